"""Number formats of 8 and 4 bits: frozen weights and matrix products."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
