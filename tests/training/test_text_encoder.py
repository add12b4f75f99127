"""Features of captions: hidden states of a decoder, compared with Transformers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gguf_files import byte_level
from tests.interop.references import reference
from trainfw import UserError
from trainfw.data import load_tokenizer
from trainfw.training.text_encoder import HashedWords, TextEncoder

TEXTS = ["red heart", "", "a man who walks a very long way to the house of his old friends"]
LENGTH = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Llama of 3 layers with a tokenizer."""
    directory = byte_level(tmp_path_factory.mktemp("model"), size=300)
    model = reference("Llama", {"num_hidden_layers": 3, "vocab_size": 300})
    model.save_pretrained(directory)
    return directory, model


def states(model, tokens, layers):
    """Transformers' hidden states after so many layers and the last norm."""
    with torch.inference_mode():
        inside = model(torch.as_tensor(tokens, dtype=torch.long), output_hidden_states=True).hidden_states[layers]
        return (inside if layers == 3 else model.model.norm(inside)).numpy()  # the last of them is normed already


@pytest.mark.parametrize("layers", [None, 2])
def test_features_are_standardised_states_of_a_layer(place, layers):
    directory, model = place
    encoder = TextEncoder(str(directory), LENGTH, 48, layers)
    features, mask = encoder(TEXTS)
    tokenizer = load_tokenizer(directory)
    ids = [[*(tokenizer.prefix_ids or [tokenizer.bos_id]), *tokenizer.encode(text)] for text in TEXTS]
    assert encoder.cut == sum(len(row) > LENGTH for row in ids) == 1
    random = np.random.Generator(np.random.Philox(0)).integers(0, 300, (32, 1 + LENGTH), np.int32)
    random[:, 0] = ids[0][0]
    seen = states(model, random, layers or 3)[:, 1:].reshape(-1, 48)
    for row, own in enumerate(ids):
        own = own[:LENGTH]
        expected = (states(model, [own], layers or 3)[0] - seen.mean(0)) / seen.std(0)
        np.testing.assert_allclose(features[row, : len(own)], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(features[row, len(own) :], 0)
        np.testing.assert_array_equal(mask[row], np.arange(LENGTH) < len(own))


def test_an_encoder_is_told_by_what_changes_its_features(place):
    directory, _ = place
    encoders = [TextEncoder(str(directory), length, 48, layers) for length, layers in ((8, None), (8, 2), (9, None))]
    assert len({encoder.identity for encoder in encoders}) == 3
    assert TextEncoder(str(directory), 8, 48, 3).identity == encoders[0].identity  # all there are
    with pytest.raises(UserError, match=r"has 3 layers; set model\.text_encoder_layers"):
        TextEncoder(str(directory), 8, 48, 4)
    with pytest.raises(UserError, match=r"gives 48 features .*set model\.caption_size=48, not 47"):
        TextEncoder(str(directory), 8, 47)


def test_hashed_words_are_vectors_of_words_in_their_order():
    encoder = HashedWords(3, 16)
    (a, b), mask = encoder(["red heart", "Heart, RED!"])
    np.testing.assert_array_equal(a[:2], b[1::-1])
    np.testing.assert_array_equal(mask, [[1, 1, 0]] * 2)
    assert abs(a[:2].std() - 1) < 0.5
