"""Train LLMs and their adapters in JAX on Trainium-style meshes: run, plan, check and measure one program."""

from trainfw.signals import end_without_traceback, is_command

if is_command():  # before anything else is imported, which takes a moment
    end_without_traceback()

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
