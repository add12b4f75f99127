from .gguf_configs import gguf_config as gguf_config
from .gguf_reader import GGUFTensors as GGUFTensors
from .gguf_writer import save_gguf as save_gguf
from .huggingface import config_from_huggingface as config_from_huggingface
from .huggingface import params_from_huggingface as params_from_huggingface
from .tensors import TensorInfo as TensorInfo
from .tensors import Tensors as Tensors
