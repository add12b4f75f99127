from .drawing import draw_topology as draw_topology
from .page import plan_page as plan_page
from .svg import topology_svg as topology_svg
from .text import amount as amount
from .text import describe_placement as describe_placement
from .text import describe_topology as describe_topology
from .text import doubtful_figures as doubtful_figures
from .text import list_topologies as list_topologies
