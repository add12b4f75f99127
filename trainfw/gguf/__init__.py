"""GGUF files: what a header says, checked, and the tokenizer within it to and from the Hugging Face form."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
