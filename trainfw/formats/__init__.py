"""GGUF and safetensors files: headers, tensors and tokenizers as they are stored."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
