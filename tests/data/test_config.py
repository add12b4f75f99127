import subprocess
import sys

import pytest
from pydantic import ValidationError

from trainfw.data import DataConfig, TokenizerConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "bpe"}, "`name: bpe` needs vocab_size"),
        ({"name": "file"}, "`name: file` needs path"),
        ({"name": "bytes", "vocab_size": 512}, "vocab_size is for `name: bpe`, but name is 'bytes'"),
        ({"name": "bpe", "vocab_size": 512, "path": "x"}, "path is for `name: file`, but name is 'bpe'"),
        ({"name": "bpe", "vocab_size": 257}, "greater than or equal to 258"),
    ],
)
def test_tokenizer_combinations(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokenizerConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "digits", "format": "images", "sequence_length": 8}, "sequence_length is for the formats of text"),
        ({"source": "digits", "format": "images", "text_field": "x"}, "text_field is for the formats of text"),
        ({"source": "digits", "format": "images", "system_prompt": "x"}, "system_prompt is for the formats of text"),
        ({"source": "digits", "format": "images", "loss_on": ["user"]}, "loss_on is for `format: chat`"),
        ({"source": "digits", "format": "images", "pairs_per_row": 2}, "pairs_per_row is for `format: preferences`"),
        ({"source": "digits", "format": "images", "label_field": "x"}, "label_field does not change source: digits"),
        ({"source": ["digits", "x"], "format": "images"}, "source: digits cannot be mixed with other sources"),
        ({"format": "images"}, "source: python-stdlib is text; `format: images` has digits and emoji, or name files"),
        ({"source": "emoji", "sequence_length": 8}, "source: emoji is of pictures: set `format: images`"),
        ({"sequence_length": 8, "flip": True}, "flip is for `format: images`, but format is 'text'"),
        ({"format": "chat", "sequence_length": 8, "caption_field": "x"}, "caption_field is for `format: images`"),
        ({"format": "images", "source": "digits", "packing": "best_fit"}, "packing is for the formats of text"),
        ({"format": "chat", "sequence_length": 8, "packing": "best_fit"}, "packing is for `format: text`"),
        ({"sequence_length": 8, "split": "never"}, "`never` needs `packing: best_fit`, but packing is 'concatenate'"),
        ({"sequence_length": 8, "split": "train"}, "expected long or never.*held out is chosen by data.validation_fr"),
        ({}, "is required"),
    ],
)
def test_keys_of_text_and_of_pictures(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**values)
    config = DataConfig(source="digits", format="images", flip=True)
    assert DataConfig(**config.model_dump()) == config


def test_every_field_is_described() -> None:
    schema = DataConfig.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert all(field.get("description") for field in section["properties"].values())


def test_importing_the_config_is_light() -> None:
    heavy = {"jax", "grain", "numpy", "tokenizers", "filelock"}
    code = f"import sys; from trainfw.data import DataConfig; print({heavy} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
