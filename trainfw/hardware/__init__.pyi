from .config import HardwareConfig as HardwareConfig
from .figures import duration as duration
from .topology import Dimension as Dimension
from .topology import Link as Link
from .topology import Topology as Topology
from .topology import load_topology as load_topology
from .topology import peak_flops as peak_flops
from .topology import topology_names as topology_names
