"""Data: sources of documents, tokenizers, a cache of tokens, packed rows, and the iterators over them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
