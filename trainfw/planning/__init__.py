"""A training run at full scale before anything is rented: memory, traffic and time of the very program that trains."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
