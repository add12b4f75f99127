"""What leaves is what came: bit for bit, and Transformers reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.torch import save_file

from tests.helpers import quicker
from tests.interop.references import greedy, load, logits_of, save, tensors_in
from tests.interop.test_source import FAMILIES
from tests.interop.test_source import load as load_ours
from trainfw.errors import UserError
from trainfw.interop import copy_model, new_directory, open_model, save_model
from trainfw.models import ModelConfig, Transformer
from trainfw.serving import generate

PROMPT = [5, 17, 3, 60, 8]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def param(params: nnx.State, path: str):
    for key in path.split("."):
        params = params[key]
    return params.get_value()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_import_and_export_are_bitwise(name, dtype, tmp_path):
    """Through the import's stream, and through our own parameters with a config.json of our own."""
    save(tmp_path / "theirs", name, dtype)
    source = open_model(tmp_path / "theirs")
    copied = copy_model(source, tmp_path / "copied", max_shard_size=50_000)
    ours = nnx.state(load_ours(source), nnx.Param)
    saved = save_model(tmp_path / "saved", source.config, lambda path: param(ours, path), dtype=source.dtype)
    tensors = tensors_in(tmp_path / "theirs")
    assert len(list((tmp_path / "copied").glob("*.safetensors"))) > 1
    for directory, told in {"copied": copied, "saved": saved}.items():
        assert same(tensors_in(tmp_path / directory), tensors)
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        assert told.startswith(f"{tmp_path / directory}: ")
        assert told.endswith(f" parameters, {str(dtype).removeprefix('torch.')}, {size:.1f} MB")
        assert open_model(tmp_path / directory).fingerprint() == source.fingerprint()
    assert (tmp_path / "copied" / "generation_config.json").read_bytes() == (
        tmp_path / "theirs" / "generation_config.json"
    ).read_bytes()
    written, original = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("copied", "theirs"))
    assert original.items() <= written.items()
    logits = [logits_of(load(tmp_path / each), np.array([PROMPT])) for each in ("theirs", "copied", "saved")]
    np.testing.assert_array_equal(logits[1:], [logits[0], logits[0]])


@pytest.mark.parametrize("name", quicker(FAMILIES, ["gemma3", "qwen3_moe"]))
def test_transformers_writes_on_as_we_do(name, tmp_path):
    theirs = save(tmp_path / "theirs", name)
    source = open_model(tmp_path / "theirs")
    model = load_ours(source)
    ours = nnx.state(model, nnx.Param)
    save_model(tmp_path / "ours", source.config, lambda path: param(ours, path))
    expected = greedy(theirs, PROMPT, 24)
    assert greedy(load(tmp_path / "ours"), PROMPT, 24) == expected
    # Given what was written, every next token of ours is the one that was.
    logits = nnx.jit(lambda model, tokens_BS: model(tokens_BS))(model, jnp.asarray([PROMPT + expected[:-1]]))
    assert np.argmax(logits[0, len(PROMPT) - 1 :], axis=-1).tolist() == expected
    if name.startswith("llama"):
        assert list(generate(model, PROMPT, max_tokens=24, temperature=0)) == expected


def test_another_dtype_is_a_cast(tmp_path):
    save(tmp_path / "model", "llama")
    saved = copy_model(open_model(tmp_path / "model"), tmp_path / "half", dtype="bfloat16")
    tensors = tensors_in(tmp_path / "model")
    assert same(tensors_in(tmp_path / "half"), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert " parameters, bfloat16, " in saved


def test_a_cast_that_would_overflow_is_refused(tmp_path):
    model = save(tmp_path / "model", "llama")
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"tensor model.norm.weight holds 100000, which float16 cannot"):
        copy_model(open_model(tmp_path / "model"), tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tensors_keep_their_own_dtype_and_lie_aligned(tmp_path):
    """Some checkpoints have norms in f32 among weights in bf16."""
    model = save(tmp_path / "model", "gemma2", torch.bfloat16, vocab_size=95)
    model.model.norm.float()
    for layer in model.model.layers:
        layer.input_layernorm.float()
    model.save_pretrained(tmp_path / "model")
    source = open_model(tmp_path / "model")
    assert source.dtype == "bfloat16"
    copy_model(source, tmp_path / "copied")
    assert same(tensors_in(tmp_path / "copied"), tensors_in(tmp_path / "model"))
    data = (tmp_path / "copied" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert all(e["data_offsets"][0] % (4 if e["dtype"] == "F32" else 2) == 0 for n, e in header.items() if n[0] != "_")


def test_shards_are_as_their_index_says(tmp_path):
    save(tmp_path / "model", "llama")
    copy_model(open_model(tmp_path / "model"), tmp_path / "sharded", max_shard_size=40_000)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert {name for name, where in index["weight_map"].items() if where == file.name} == set(shard.keys())
            assert len(list(shard.keys())) == 1 or file.stat().st_size < 45_000
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(tmp_path / "model").values())


def test_a_fresh_model_of_ours_leaves(tmp_path):
    """One that no one has made a config.json for."""
    config = ModelConfig(preset="tiny", num_layers=3)
    model = Transformer(config, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    save_model(tmp_path / "out", config, lambda path: np.asarray(param(params, path)), extra={"eos_token_id": 1})
    tokens = np.array([PROMPT])
    expected = np.asarray(model(jnp.asarray(tokens)))
    theirs = load(tmp_path / "out")
    assert theirs.config.eos_token_id == 1
    assert np.abs(logits_of(theirs, tokens) - expected).max() < 1e-4 * np.abs(expected).max()


def test_what_belongs_to_a_model_comes_along(tmp_path):
    save(tmp_path / "model", "llama")
    large = json.dumps({"model": {}}) + " " * 2**24  # as Gemma 3 has
    files = {"tokenizer.json": large, "chat_template.jinja": "{{ messages }}", "merges.txt": "a b", "README.md": "no"}
    for name, text in files.items():
        (tmp_path / "model" / name).write_text(text)
    copy_model(open_model(tmp_path / "model"), tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", *files} - {"README.md"}
    assert all((tmp_path / "out" / name).read_text() == files[name] for name in names & set(files))


def test_what_is_read_is_let_go_before_the_next(tmp_path):
    config = ModelConfig(preset="tiny")
    params = nnx.state(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param)
    asked: list[str] = []

    def read(path: str) -> np.ndarray:
        asked.append(path)
        return np.asarray(param(params, path))

    save_model(tmp_path / "out", config, read)
    assert len(asked) == len(set(asked)) == len(nnx.to_flat_state(params))


def fail(_path: Path) -> None:
    raise OSError("the disk is gone")


def test_after_an_error_nothing_has_changed(tmp_path):
    save(tmp_path / "model", "llama")
    with pytest.raises(OSError, match="the disk is gone"):
        copy_model(open_model(tmp_path / "model"), tmp_path / "a" / "b" / "out", companions=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("empty")
    for name, message in {"full": "is not empty", "file": "is no directory", "link": "is no directory"}.items():
        with pytest.raises(UserError, match=message), new_directory(tmp_path / name):
            pass
    with new_directory(tmp_path / "empty") as directory:
        (directory / "new").touch()
    with pytest.raises(UserError, match=r"needs 1,000,000,000,000 MB"), new_directory(tmp_path / "big", 10**18):
        pass
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=200_000))
    with pytest.raises(UserError, match=r"needs 1 MB, and 0 MB are"), new_directory(tmp_path / "small", 300_000):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file", "full", "kept", "link", "new"]


def test_values_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path):
    save(tmp_path / "theirs", "llama")
    tensors = tensors_in(tmp_path / "theirs")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor model.norm.weight has values that are not finite"):
        copy_model(open_model(tmp_path / "theirs"), tmp_path / "copied")
    assert not (tmp_path / "copied").exists()
