"""Recipe + devices -> program: the one place where everything meets, and the only model of what runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
