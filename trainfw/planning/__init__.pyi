from .analysis import Analysis as Analysis
from .analysis import Matmul as Matmul
from .analysis import Transfer as Transfer
from .analysis import analyse as analyse
