from .config import AXES as AXES
from .config import ParallelConfig as ParallelConfig
from .layout import Layout as Layout
from .rules import Rules as Rules
from .rules import constrain as constrain
from .rules import gather_weight as gather_weight
from .rules import make_mesh as make_mesh
from .rules import use_rules as use_rules
