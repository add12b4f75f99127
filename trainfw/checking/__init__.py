"""Every rule that Neuron is known to enforce, read from what a program lowers and partitions to, without Neuron."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
