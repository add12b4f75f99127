"""Sweeps: many runs of one recipe with other values, compared by their validation loss."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
