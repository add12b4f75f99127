from __future__ import annotations

import json

import pytest

from trainfw.data import byte_tokenizer
from trainfw.models import ModelConfig
from trainfw.weights.open import check_tokenizer


def test_a_tokenizer_that_cannot_be_used_is_warned_of(tmp_path):
    check_tokenizer(tmp_path, ModelConfig(preset="tiny"))  # weights alone
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"x": 3}}))
    with pytest.warns(UserWarning, match=r"expected an object of tokens by their ids; the weights come without"):
        check_tokenizer(tmp_path, ModelConfig(preset="tiny"))
