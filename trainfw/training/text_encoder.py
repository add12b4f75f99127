"""A frozen text encoder: the hidden states of a language model, by which models of images are conditioned."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainfw.data import Progress, Tokenizer
from trainfw.errors import UserError
from trainfw.models import LanguageModel, abstract_model, family_of, vocabulary_of
from trainfw.training.loading import load_model
from trainfw.weights import open_base

HASHED_WORDS = "hashed-words"
"""Name of the encoder that needs no model: `HashedWords`."""
_ROWS = 32
_STANDARD = "standardised 1"
"""Form of the features, in an encoder's identity."""


class HashedWords:
    """A fixed vector for each word, drawn from a normal distribution by the word's hash, in the order of the words.

    Words are lower-case runs of letters and digits; it knows nothing of their meaning.
    """

    def __init__(self, length: int, size: int):
        self._length, self._size = length, size
        self.identity = f"{HASHED_WORDS} 1 {length} {size}"
        self.cut = 0

    def __call__(self, texts: Sequence[str], progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return what a `TextEncoder` does; of a text without words, one vector."""
        features = np.zeros((len(texts), self._length, self._size), np.float32)
        mask = np.zeros((len(texts), self._length), np.float32)
        for row, text in enumerate(texts):
            words = re.findall(r"[^\W_]+", text.lower()) or [""]
            self.cut += len(words) > self._length
            for place, word in enumerate(words[: self._length]):
                key = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=16).digest())
                features[row, place] = np.random.Generator(np.random.Philox(key=key)).standard_normal(self._size)
                mask[row, place] = 1
        return features, mask


class TextEncoder:
    """Hidden states of a decoder after its last norm, in float32, of the first `length` tokens of each text.

    Each feature is moved and scaled to mean 0 and deviation 1 over random tokens of its vocabulary: as they are, states
    of all texts are much the same vector, and a model of images takes long to see what differs. The decoder is read
    once it is needed. Tokens are those of `generate`'s plain prompts: a text's own, after what the tokenizer begins
    with.
    """

    def __init__(self, path: str, length: int, size: int, layers: int | None = None):
        """Open a decoder, of which the first `layers` are run (None: all).

        `size` is the number of features that the model of images takes. Raises UserError where it gives others, or has
        fewer layers.
        """
        base = open_base(path)
        if not family_of(base.config).decodes:
            raise UserError(
                f"{path}: is a model of family {base.config.family!r}; expected a decoder, which reads text"
            )
        if base.config.hidden_size != size:
            raise UserError(
                f"{path}: gives {base.config.hidden_size} features a token, its hidden_size; set "
                f"model.caption_size={base.config.hidden_size}, not {size}"
            )
        if layers is not None and layers > base.config.num_layers:
            raise UserError(f"{path}: has {base.config.num_layers} layers; set model.text_encoder_layers to as many")
        self._path, self._length, self._size, self._layers = path, length, size, layers
        self.identity = f"{base.fingerprint()} {length} {layers or base.config.num_layers} {_STANDARD}"
        """Changes when the features do."""
        self.cut = 0
        """Texts of which tokens after the first `length` were left out."""

    @cached_property
    def _loaded(self) -> tuple[Callable[[np.ndarray], np.ndarray], Tokenizer]:
        model, tokenizer = load_model(self._path)
        if self._layers is not None:
            model = _first_layers(model, self._layers)
        states = jax.jit(lambda model, tokens_BT: model.forward(tokens_BT)[0].astype(jnp.float32))
        random = np.random.Generator(np.random.Philox(0))
        tokens = random.integers(0, vocabulary_of(model.config), (_ROWS, 1 + self._length), dtype=np.int32)
        tokens[:, 0] = self._begin(tokenizer)[0]
        seen = np.asarray(states(model, tokens))[:, 1:].reshape(-1, self._size)
        mean, deviation = seen.mean(0), np.maximum(seen.std(0), 1e-6)
        return lambda tokens_BT: (np.asarray(states(model, tokens_BT)) - mean) / deviation, tokenizer

    @staticmethod
    def _begin(tokenizer: Tokenizer) -> list[int]:
        return [*(tokenizer.prefix_ids or [tokenizer.bos_id])]

    def __call__(self, texts: Sequence[str], progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return (features, f32[N, T, F], and mask, f32[N, T], 1 where there is a token)."""
        states, tokenizer = self._loaded
        features = np.zeros((len(texts), self._length, self._size), np.float32)
        mask = np.zeros((len(texts), self._length), np.float32)
        for start in range(0, len(texts), _ROWS):
            part = texts[start : start + _ROWS]
            tokens = np.zeros((_ROWS, self._length), np.int32)  # padding comes last, and nothing before it sees it
            for row, text in enumerate(part):
                ids = [*self._begin(tokenizer), *tokenizer.encode(text)]
                self.cut += len(ids) > self._length
                ids = ids[: self._length]
                tokens[row, : len(ids)] = ids
                mask[start + row, : len(ids)] = 1
            features[start : start + len(part)] = states(tokens)[: len(part)]
            if progress is not None:
                progress(f"encoding captions with {self._path}", start + len(part), len(texts))
        return features * mask[..., None], mask


def _first_layers(model: LanguageModel, layers: int) -> LanguageModel:
    """Return a model of the first layers of another."""
    weights = dict(nnx.to_flat_state(nnx.state(model)))
    graphdef, state = nnx.split(abstract_model(model.config.model_copy(update={"num_layers": layers})))
    values = []
    for path, variable in nnx.to_flat_state(state):
        value = weights[path].get_value()
        values.append((path, value if value.shape == variable.shape else value[:layers]))
    first: LanguageModel = nnx.merge(graphdef, nnx.from_flat_state(values))
    return first
