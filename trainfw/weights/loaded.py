"""Models in memory, written with the tokenizer and the files of what they were loaded from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainfw.errors import UserError
from trainfw.models import FamilyConfig, LanguageModel
from trainfw.weights.export import write_model
from trainfw.weights.open import MergedBase, Weights, check_tokenizer, is_run, merge, open_base, run_recipe


@dataclass(frozen=True)
class InMemory:
    """The weights of a model as they are now."""

    config: FamilyConfig
    arrays: Mapping[str, jax.Array]
    """Arrays by our names."""

    @property
    def dtype(self) -> str:
        return str(self.arrays["embedding.table"].dtype)

    def read(self, name: str, like: jax.ShapeDtypeStruct, layer_order: Sequence[int] | None = None) -> jax.Array:
        array = self.arrays[name] if layer_order is None else self.arrays[name][jnp.asarray(layer_order)]
        return array.astype(like.dtype)


@dataclass(frozen=True)
class LoadedFrom:
    """A path that a model was loaded from: the `origin` of a loaded model."""

    path: str
    step: int | None

    def save(self, model: LanguageModel, directory: str, dtype: str | None) -> str:
        """Write `model` as a Hugging Face directory, and say what was written (see `LanguageModel.save`)."""
        if model.adapter_names:
            raise UserError(
                f"a model with the adapters {', '.join(model.adapter_names)} beside it has no form of its own: save it "
                "without them, or merge one (`trainfw merge`)"
            )
        of_adapter = is_run(self.path) and run_recipe(self.path).adapter is not None
        opened = merge(self.path, None, self.step) if of_adapter else open_base(self.path, self.step)
        check_tokenizer(self.path, opened.config)
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        arrays = {".".join(map(str, path)): variable.get_value() for path, variable in state}
        weights: Weights = InMemory(model.config, arrays)
        if isinstance(opened, MergedBase):
            held = {name: np.asarray(array) for name, array in arrays.items() if ".adapter." in name}
            weights = replace(opened, adapter=replace(opened.adapter, arrays=held))
        return write_model(weights, self.path, directory, dtype, origin=opened)
