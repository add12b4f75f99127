"""Many processes of one run: on this machine, under Slurm and on Kubernetes, which place and restart them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
