from .config import CheckpointConfig as CheckpointConfig
from .manager import Checkpoints as Checkpoints
from .saved import SavedParameters as SavedParameters
