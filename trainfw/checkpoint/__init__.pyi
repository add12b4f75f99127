from .config import CheckpointConfig as CheckpointConfig
from .manager import Checkpoints as Checkpoints
from .saved import SavedParameters as SavedParameters
from .stores import Directory as Directory
from .stores import locate as locate
from .stores import steps_in as steps_in
