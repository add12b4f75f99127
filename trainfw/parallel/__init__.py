"""Layout, mesh and rules: from the sizes in a recipe to the sharding of every array."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
