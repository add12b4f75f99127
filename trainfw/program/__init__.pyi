from .build import build_program as build_program
from .build import denoise_by_rows as denoise_by_rows
from .build import name_pieces as name_pieces
from .build import objective_of as objective_of
from .init_state import check_sources as check_sources
from .program import Function as Function
from .program import Program as Program
from .state import TrainState as TrainState
