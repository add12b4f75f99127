"""Programs as XLA partitions them, read as data: modules, their collectives, and places in user code."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
