from .build import Metrics as Metrics
from .build import Program as Program
from .build import build_program as build_program
from .metrics import Mean as Mean
from .state import TrainState as TrainState
