from .build import build_program as build_program
from .build import objective_of as objective_of
from .functions import Function as Function
from .init_state import check_sources as check_sources
from .own_pieces import name_pieces as name_pieces
from .program import Program as Program
from .state import TrainState as TrainState
