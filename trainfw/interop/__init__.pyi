from .huggingface import config_from_huggingface as config_from_huggingface
from .huggingface import params_from_huggingface as params_from_huggingface
from .tensors import TensorInfo as TensorInfo
from .tensors import Tensors as Tensors
