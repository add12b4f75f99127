from .config import ModelConfig as ModelConfig
from .config import RopeScaling as RopeScaling
from .config import preset_names as preset_names
from .flops import flops_per_token as flops_per_token
from .transformer import KVCache as KVCache
from .transformer import Transformer as Transformer
from .transformer import abstract_model as abstract_model
from .transformer import count_parameters as count_parameters
