"""Models of diffusers' directories, whatever they hold."""

from __future__ import annotations

from pathlib import Path

from trainfw.interop.diffusers.autoencoder import DiffusersAutoencoder, open_autoencoder
from trainfw.interop.diffusers.transformer import DiffusersTransformer, open_transformer
from trainfw.interop.paths import AUTOENCODER, CONFIG
from trainfw.json_text import read_json


def open_diffusers(directory: Path) -> DiffusersTransformer | DiffusersAutoencoder:
    """Open the model of a diffusers directory by the class that its config.json names.

    Raises UserError where it is damaged, or none of those that are read.
    """
    autoencoder = read_json(directory / CONFIG).get("_class_name") == AUTOENCODER
    return open_autoencoder(directory) if autoencoder else open_transformer(directory)
