"""What XLA makes of a program: the partitioned module as data, its collectives, and the places in user code."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
