from .local import launch_local as launch_local
