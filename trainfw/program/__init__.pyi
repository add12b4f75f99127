from .build import Metrics as Metrics
from .build import Program as Program
from .build import build_program as build_program
from .loss import loss_chunks as loss_chunks
from .metrics import Mean as Mean
from .state import TrainState as TrainState
