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


def test_every_field_is_described() -> None:
    schema = DataConfig.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert all(field.get("description") for field in section["properties"].values())


def test_importing_the_config_is_light() -> None:
    heavy = {"jax", "grain", "numpy", "tokenizers", "filelock"}
    code = f"import sys; from trainfw.data import DataConfig; print({heavy} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
