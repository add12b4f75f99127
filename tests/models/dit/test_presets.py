"""Published models: as many parameters as their authors, and diffusers, count."""

from __future__ import annotations

import math

import jax
import pytest
from flax import nnx

from tests.models.dit.references import reference, torch
from trainfw.models import DiTConfig, abstract_model
from trainfw.models.family import load_presets

# DiT's own log says 675,129,632, of which 256 x 1152 are positions that do not learn; the paper says 33 and
# 130 million of the smaller ones. PixArt's: transformer/diffusion_pytorch_model.safetensors of PixArt-XL-2. SD3's: that
# of stable-diffusion-3-medium-diffusers has 2,084,951,104, of which 192**2 x 1536 are positions.
PUBLISHED = {
    "dit-s/2": 33e6,
    "dit-b/2": 130e6,
    "dit-xl/2": 675_129_632 - 256 * 1152,
    "pixart-xl/2": 610_856_096,
    "sd3-medium": 2_084_951_104 - 192**2 * 1536,
}


def test_every_preset_has_a_published_count():
    assert PUBLISHED.keys() == load_presets("trainfw.models.dit").keys() - {"tiny"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_a_preset_are_as_published(name):
    config = DiTConfig(preset=name)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract_model(config), nnx.Param)))
    published = PUBLISHED[name]
    assert count == published if isinstance(published, int) else abs(count - published) < 5e5
    with torch.device("meta"):
        other = reference(config)
    assert count == sum(parameter.numel() for parameter in other.parameters())
