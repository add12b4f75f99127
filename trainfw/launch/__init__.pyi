from .kubernetes import KubernetesJob as KubernetesJob
from .local import launch_local as launch_local
from .nodes import accepting as accepting
from .nodes import as_argument as as_argument
from .slurm import SlurmArray as SlurmArray
from .slurm import SlurmJob as SlurmJob
from .slurm import submit as submit
