"""Inputs of the adapters in every layer: which row takes which adapter, and the key that dropout draws from.

Handed on by a context variable, so that the layers in between need not know of it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdapterInputs:
    """Inputs of adapters, the same in every layer but for `layer`."""

    rows_B: jax.Array | None = None
    """Number of the adapter that each row takes from a bank, i32."""
    key: jax.Array | None = None
    """State of the `rbg` generator for dropout, u32[4], its last number 0; None where nothing is dropped."""
    ids_B: jax.Array | None = None
    """Rows' numbers in the global batch, i32: no two microbatches, of one device or of two, draw the same."""
    layer: jax.Array | None = None
    """Place of the layer among those that draw, i32[]."""

    def draws(self, salt: int, part: jax.Array) -> jax.Array | None:
        """A generator's key for one module, of which this is part number `part` (over `tensor`), or None.

        Key and counter of the generator are set by hand, since folding numbers into a key would take Threefry, which
        Neuron's compiler refuses. Streams differ in the upper half of the counter or in the key, so that none meets
        another before 2**34 numbers.
        """
        if self.key is None or self.ids_B is None:
            return None
        layer = jnp.int32(0) if self.layer is None else self.layer
        number = self.ids_B[0].astype(jnp.uint32) * jnp.uint32(16384) + layer.astype(jnp.uint32)
        salted = jnp.uint32(salt) + part.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
        k = self.key
        return jax.random.wrap_key_data(jnp.stack([k[0], k[1] ^ salted, k[2], k[3] + number]), impl="rbg")


_active: contextvars.ContextVar[AdapterInputs | None] = contextvars.ContextVar("trainfw_adapter_inputs", default=None)


@contextlib.contextmanager
def use_inputs(inputs: AdapterInputs | None, layer: jax.Array | None = None) -> Iterator[None]:
    """While tracing inside, adapters read `inputs`."""
    token = _active.set(inputs if inputs is None or layer is None else replace(inputs, layer=layer))
    try:
        yield
    finally:
        _active.reset(token)


def active_inputs() -> AdapterInputs:
    return _active.get() or AdapterInputs()
