from __future__ import annotations

from trainfw.config import Config


class BackendConfig(Config):
    """Use of the devices by programs, whatever the devices are."""

    donate: bool = True
    """Let the step write the new training state over the old one. Without, it takes the memory of both, and the next
    step begins when it is done; the numbers are the same. For Neuron, where one measured run had to turn it off (an
    error of must-alias donation) and another was right with it."""
