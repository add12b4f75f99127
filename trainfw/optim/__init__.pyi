from .config import OptimizerConfig as OptimizerConfig
from .optimizer import make_optimizer as make_optimizer
from .optimizer import optimizer_shardings as optimizer_shardings
from .schedule import make_schedule as make_schedule
