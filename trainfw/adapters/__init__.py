"""LoRA-family adapters on a frozen base, which may be quantised."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
