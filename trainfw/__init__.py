"""Train LLMs and their adapters in JAX on Trainium-style meshes: run, plan, check and measure one program."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
