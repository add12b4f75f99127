"""Damaged and hostile models through the command: exit 2, a message that says what is wrong, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.interop.references import save
from trainfw.cli import main
from trainfw.data import byte_tokenizer
from trainfw.errors import UserError
from trainfw.formats import SafetensorsTensors
from trainfw.interop import config_from_huggingface, open_model, read_huggingface
from trainfw.interop.source import COMPANIONS
from trainfw.models import ModelConfig
from trainfw.weights import check_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`one` file and three `sharded`, of a tiny Llama."""
    directory = tmp_path_factory.mktemp("models")
    model = save(directory / "one", "llama", num_hidden_layers=2)
    model.save_pretrained(directory / "sharded", max_shard_size="100KB")
    assert len(list((directory / "sharded").glob("*.safetensors"))) > 1
    return directory


def header_of(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file: Path, header: str, values: bytes, length: int | None = None) -> None:
    text = header.encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + values)


def edit(change: Callable[[dict], object], name: str = WEIGHTS) -> Callable[[Path], None]:
    """Change a header and leave the values."""

    def damage(model: Path) -> None:
        header, values = header_of(model / name)
        change(header)
        write(model / name, json.dumps(header), values)

    return damage


def entry(**fields: object) -> Callable[[Path], None]:
    return edit(lambda header: header[UP].update(fields))


def moved(by: int) -> Callable[[Path], None]:
    return edit(lambda header: header[UP].update(data_offsets=[at + by for at in header[UP]["data_offsets"]]))


def config(**fields: object) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return damage


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda model: (
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        found = json.loads((model / INDEX).read_text())
        change(found["weight_map"])
        (model / INDEX).write_text(json.dumps(found))

    return damage


def cut(model: Path) -> None:
    with open(model / WEIGHTS, "r+b") as file:
        file.truncate(20_000)


def cut_shard(model: Path) -> None:
    file = max(model.glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def length(value: int) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        data = (model / WEIGHTS).read_bytes()
        (model / WEIGHTS).write_bytes(struct.pack("<Q", value) + data[8:])

    return damage


def twice(model: Path) -> None:
    header, values = header_of(model / WEIGHTS)
    name = json.dumps(UP)
    body = json.dumps(header)
    write(model / WEIGHTS, body[:-1] + f", {name}: {json.dumps(header[UP])}}}", values)


def to_pickle(suffix: str) -> Callable[[Path], None]:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(suffix),)

    def damage(model: Path) -> None:
        (model / WEIGHTS).unlink()
        with open(model / f"pytorch_model{suffix}", "wb") as file:
            pickle.dump(Bomb(), file)

    return damage


def shard(model: Path, number: int = 0) -> str:
    return sorted(file.name for file in model.glob("model-*.safetensors"))[number]


def drop_shard(model: Path) -> None:
    (model / shard(model)).unlink()


def in_two_shards(model: Path) -> None:
    header, values = header_of(model / shard(model))
    name = next(name for name in header if name[0] != "_")
    other, others = header_of(model / shard(model, 1))
    start = len(others)
    begin, end = header[name]["data_offsets"]
    other[name] = header[name] | {"data_offsets": [start, start + end - begin]}
    write(model / shard(model, 1), json.dumps(other), others + values[begin:end])


def not_in_its_shard(model: Path) -> None:
    found = json.loads((model / INDEX).read_text())
    name, where = UP, found["weight_map"][UP]
    found["weight_map"][name] = next(each for each in found["weight_map"].values() if each != where)
    (model / INDEX).write_text(json.dumps(found))


def shard_named(name: str) -> Callable[[Path], None]:
    return index(lambda shards: shards.update({"lm_head.weight": name}))


def into_pipe(model: Path) -> None:
    (model / WEIGHTS).unlink()
    os.mkfifo(model / WEIGHTS)


def run(name: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        shutil.rmtree(model)
        model.mkdir()
        (model / name).write_text("{}")

    return damage


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 9\n"


def link(name: str) -> Callable[[Path], None]:
    """To nowhere, as in a cache whose files are gone."""

    def damage(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to("../blobs/0a")

    return damage


def link_out(name: str) -> Callable[[Path], None]:
    """To a file of the machine that is not the model's."""

    def damage(model: Path) -> None:
        (model.parent / "secret").write_bytes((model / name).read_bytes() if (model / name).exists() else b"{}")
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to("../secret")

    return damage


# (which model, what is done to it, what the message must say)
DAMAGES: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "cut short": ("one", cut, [WEIGHTS, "of the 17,872 that the file has: cut short?"]),
    "cut to nothing": ("one", text(WEIGHTS, b""), [WEIGHTS, "is 0 bytes"]),
    "a shard cut by a byte": ("sharded", cut_shard, ["model-0000", "cut short?"]),
    "header longer than the file": ("one", length(10**6 * 9), ["header has 9,000,000 bytes, but the file has"]),
    "header longer than memory": ("one", length(2**63), ["9,223,372,036,854,775,808 bytes; expected 16,777,216"]),
    "header of nothing": ("one", length(0), ["header: not valid JSON"]),
    "header that is no JSON": ("one", lambda model: write(model / WEIGHTS, "{'a': 1}", b""), ["not valid JSON"]),
    "header that is a list": ("one", lambda model: write(model / WEIGHTS, "[]", b""), ["expected a JSON object"]),
    "header nested too deeply": (
        "one",
        lambda model: write(model / WEIGHTS, '{"a":' + "[" * 200_000, b""),
        ["header: not valid JSON"],
    ),
    "header with a tensor twice": ("one", twice, [f"key '{UP}' is written twice"]),
    "header with a number for a tensor": ("one", edit(lambda h: h.update(a=5)), ["tensor a: expected dtype, shape"]),
    "metadata that is no text": ("one", edit(lambda h: h.update(__metadata__={"a": [1]})), ["__metadata__: expected"]),
    "dtype that is none": (
        "one",
        entry(dtype="F33"),
        [UP, "dtype 'F33' is not supported; one of: F64, F32, BF16, F16"],
    ),
    "dtype of integers": ("one", entry(dtype="I32"), [UP, "dtype 'I32' is not supported"]),
    "dtype of another size": ("one", entry(dtype="BF16"), [UP, "15,360 bytes, but BF16 of shape (80, 48) takes 7,680"]),
    "shape of another size": (
        "one",
        entry(shape=[80, 49]),
        [UP, "15,360 bytes, but F32 of shape (80, 49) takes 15,680"],
    ),
    "shape of less than nothing": ("one", entry(shape=[-80, -48]), [UP, "shape [-80, -48]: expected"]),
    "shape beyond all memory": ("one", entry(shape=[2**62, 2**62]), [UP, "takes 85,070,591,730,234,615,865,843"]),
    "shape of words": ("one", entry(shape="80x48"), [UP, "shape '80x48': expected"]),
    "shape of fractions": ("one", entry(shape=[80.0, 48]), [UP, "shape [80.0, 48]: expected"]),
    "offsets below nothing": ("one", entry(data_offsets=[-15360, 0]), [UP, "data_offsets [-15360, 0]: expected"]),
    "offsets beyond the file": ("one", entry(data_offsets=[10**15, 10**15 + 15360]), [UP, "1,000,000,000,000,000 to"]),
    "offsets backwards": ("one", entry(data_offsets=[15360, 0]), [UP, "lies at bytes 15,360 to 0"]),
    "offsets that overlap": ("one", moved(-4), [UP, "overlap"]),
    "a tensor that nothing belongs to": ("one", edit(lambda h: h.pop(UP)), ["15,360 bytes", "belong to no tensor"]),
    "bytes behind the last": (
        "one",
        lambda model: (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes() + b"MZ"),
        ["2 bytes at the end belong to no tensor"],
    ),
    "another shape": ("one", entry(shape=[48, 80]), [UP, "has shape (48, 80), but the model needs (80, 48)"]),
    "a tensor of another name": (
        "one",
        edit(lambda h: h.update({"up": h.pop(UP)})),
        [f"no tensor {UP}"],
    ),
    "a layer too many": ("one", config(num_hidden_layers=3), ["no tensor model.layers.2.", "and 6 more"]),
    "a layer too few": ("one", config(num_hidden_layers=1), ["no place for tensor model.layers.1.", "and 6 more"]),
    "a shard by its path": (
        "sharded",
        shard_named("/etc/passwd"),
        ["lm_head.weight", "'/etc/passwd'; expected the name"],
    ),
    "a shard above": ("sharded", shard_named("../one/model.safetensors"), ["'../one/model.safetensors'; expected"]),
    "a shard of Windows": ("sharded", shard_named("..\\a.safetensors"), ["expected the name of a .safetensors file"]),
    "a shard of no type": ("sharded", shard_named("pytorch_model.bin"), ["'pytorch_model.bin'; expected the name"]),
    "a shard that is a number": ("sharded", index(lambda m: m.update({"lm_head.weight": 5})), ["in 5; expected the"]),
    "a shard that is not there": ("sharded", drop_shard, ["names shard 'model-00001-of-", "download is not complete"]),
    "a tensor in two shards": ("sharded", in_two_shards, ["model-00002-of-", "is in model-00001-of-", "too"]),
    "a tensor in another shard": ("sharded", not_in_its_shard, [INDEX, "is in model-0000", ", not in model-0000"]),
    "a tensor in no shard": (
        "sharded",
        index(lambda m: m.update(a=m["lm_head.weight"])),
        ["tensor a is not in model-0"],
    ),
    "a tensor that the index lacks": ("sharded", index(lambda m: m.pop(UP)), ["does not name"]),
    "an index of nothing": ("sharded", text(INDEX, "{}"), [INDEX, "expected weight_map"]),
    "an index that is no JSON": ("sharded", text(INDEX, "weights"), [INDEX, "not valid JSON"]),
    "pickle": ("one", to_pickle(".bin"), ["pytorch_model.bin: is a pickle", "safe_serialization=True"]),
    "checkpoint of PyTorch": ("one", to_pickle(".pth"), ["pytorch_model.pth: is a pickle", "from_pretrained"]),
    "no weights": ("one", lambda model: (model / WEIGHTS).unlink(), ["has no weights: expected model.safetensors"]),
    "a pipe": ("one", into_pipe, [WEIGHTS, "is not a regular file"]),
    "no config": ("one", lambda model: (model / "config.json").unlink(), ["is no model: it has no config.json"]),
    "a config of bytes": ("one", text("config.json", b"\xff\xfe{}"), ["config.json: not valid JSON"]),
    "a config that is a list": ("one", text("config.json", "[1]"), ["config.json: expected a JSON object, found list"]),
    "a config with NaN": ("one", text("config.json", '{"rms_norm_eps": NaN}'), ["config.json", "NaN is not a number"]),
    "a width that is a word": ("one", config(hidden_size="big"), ["hidden_size = 'big': expected a whole number"]),
    "a width below nothing": ("one", config(hidden_size=-48), ["hidden_size = -48: expected a whole number"]),
    "a vocabulary of another size": ("one", config(vocab_size=97), ["(96, 48), but the model needs (97, 48)"]),
    "a family that is none": ("one", config(model_type="mamba"), ["'mamba' is not supported; one of: llama, mistral"]),
    "weights in Git LFS": ("one", text(WEIGHTS, POINTER), [f"{WEIGHTS}: is a pointer of Git LFS", "`git lfs pull`"]),
    "a shard in Git LFS": ("sharded", lambda model: (model / shard(model)).write_text(POINTER), ["pointer of Git LFS"]),
    "a config in Git LFS": ("one", text("config.json", POINTER), ["config.json: is a pointer of Git LFS"]),
    "a tokenizer in Git LFS": ("one", text("tokenizer.json", POINTER), ["tokenizer.json: is a pointer of Git LFS"]),
    "weights that are a link": ("one", link(WEIGHTS), [f"{WEIGHTS}: is a link to ../blobs/0a, where nothing is"]),
    "a shard that is a link": ("sharded", lambda model: link(shard(model))(model), ["is a link to ../blobs/0a"]),
    "a config that is a link": ("one", link("config.json"), ["config.json: is a link to ../blobs/0a"]),
    "a tokenizer that is a link": ("one", link("tokenizer.json"), ["tokenizer.json: is a link to ../blobs/0a"]),
    **{
        f"{name} that is a link out of the model": (
            "one",
            link_out(name),
            [f"{name}: is a link to ", "secret, outside"],
        )
        for name in (WEIGHTS, "config.json", *COMPANIONS)
    },
    "a shard that is a link out of the model": (
        "sharded",
        lambda model: link_out(shard(model))(model),
        ["secret, outside of the model's directory"],
    ),
    "an index that is a link out of the model": ("sharded", link_out(INDEX), [f"{INDEX}: is a link to "]),
    "a tokenizer that is none": (
        "one",
        text("tokenizer.json", "{}"),
        ["not a tokenizer.json that can be read: Model"],
    ),
    "merges that are no text": ("one", text("merges.txt", b"\xff\xfe\xfd"), ["merges.txt"]),
    "a SentencePiece that is none": ("one", text("tokenizer.model", "root:x:0"), ["expected a model of SentencePiece"]),
    "an adapter": ("one", run("adapter_config.json"), ["is a PEFT adapter, not a model"]),
    "a run": ("one", run("recipe.yaml"), ["is a run; trainfw export"]),
}


COMMANDS = ("import", "export", "generate")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_token_past_the_embedding_is_named(command, models, tmp_path, monkeypatch, capsys):
    shutil.copytree(models / "one", tmp_path / "model")
    byte_tokenizer().save(tmp_path / "model")
    more = ["--prompt", "a"] if command == "generate" else ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["trainfw", command, str(tmp_path / "model"), *more])
    with pytest.raises(SystemExit) as exit_:
        main()
    message = "its tokenizer has ids to 257, but its embedding has 96 rows: none for '`' (96). Make them, with Transf"
    check(capsys, int(exit_.value.code or 0), [f"error: {tmp_path / 'model'}: {message}"])
    assert not (tmp_path / "out").exists()


def test_special_tokens_past_the_embedding_are_no_texts():
    """As Gemma 3's `<image_soft_token>` is; the two of this tokenizer are special."""
    config = ModelConfig(vocab_size=256, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1)
    with pytest.warns(UserWarning, match=r"special tokens to '<\|eos\|>' \(257\), past the 256 rows"):
        check_tokenizer("here", config, byte_tokenizer())
    template = {"chat_template": "{% for m in messages %}{{ m.content + '<|eos|>' }}{% endfor %}"}
    with pytest.raises(UserError, match=r"none for '<\|eos\|>' \(257\)"):
        check_tokenizer("here", config, replace(byte_tokenizer(), settings=template))
    with pytest.raises(UserError, match=r"here: its tokenizer has ids to 257, but its embedding has 255 rows"):
        check_tokenizer("here", config.model_copy(update={"vocab_size": 255}), byte_tokenizer())


def import_(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["trainfw", "import", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def check(capsys, code: int, messages: list[str]) -> None:
    out, error = capsys.readouterr()
    assert code == 2, error
    assert not out
    assert "Traceback" not in error
    assert len(error) < 1500
    for message in messages:
        assert message in error, error


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_and_hostile_models(name, models, tmp_path, monkeypatch, capsys):
    which, damage, messages = DAMAGES[name]
    model = tmp_path / "model"
    shutil.copytree(models / which, model)
    monkeypatch.chdir(tmp_path)
    damage(model)
    before = sorted(tmp_path.rglob("*"))
    check(capsys, import_(monkeypatch, model, "--out", tmp_path / "deep" / "out"), messages)
    assert sorted(tmp_path.rglob("*")) == before


ARGUMENTS = {
    "nowhere": (["nowhere", "--out", "out"], ["nowhere: no such file or directory; models are not downloaded"]),
    "one file of it": (["model/config.json", "--out", "out"], ["is one file of a model; give its directory"]),
    "over itself": (["model", "--out", "model"], ["model: exists and is not empty; nothing is overwritten"]),
    "over a file": (["model", "--out", "model/config.json"], ["exists and is no directory"]),
    "under a file": (["model", "--out", "model/config.json/out"], ["Not a directory"]),
    "to nowhere": (["model", "--out", ""], ["expected the path of a new directory"]),
    "unknown dtype": (["model", "--out", "out", "--dtype", "float8"], ["dtype 'float8': expected one of", "float32"]),
    "NUL": (["mo\0del", "--out", "out"], ["holds a NUL"]),
    "a package that is none": (["package:llm_none", "--out", "out"], ["pip install llm-none"]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments(name, models, tmp_path, monkeypatch, capsys):
    arguments, messages = ARGUMENTS[name]
    shutil.copytree(models / "one", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    check(capsys, import_(monkeypatch, *arguments), messages)
    assert sorted(tmp_path.rglob("*")) == before


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_bytes_change_it_is_read_or_refused(data, models, tmp_path):
    """Headers, index and config with bytes changed, cut off or put in: a UserError, or a model that can be read."""
    model = tmp_path / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(models / "sharded", model)
    file = model / data.draw(st.sampled_from([shard(model), INDEX, "config.json"]))
    content = bytearray(file.read_bytes())
    end = len(content) if file.suffix == ".json" else 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        size = data.draw(st.integers(0, 4))
        content[at : at + size] = data.draw(st.binary(max_size=4) | st.sampled_from([b'"', b"0", b"-", b"9e9", b"[{"]))
    file.write_bytes(content)
    try:
        config_from_huggingface(read_huggingface(model))
        tensors = SafetensorsTensors(model)
    except UserError:
        return
    for name, info in tensors.infos.items():
        assert tensors.read(name).shape == info.shape


def test_a_model_that_is_whole(models, tmp_path, monkeypatch, capsys):
    """What the damages above are done to is taken, one file or many."""
    for which in ("one", "sharded"):
        monkeypatch.setattr(sys, "argv", ["trainfw", "import", str(models / which), "--out", str(tmp_path / which)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert not exit_.value.code
        assert "llama, 50,928 parameters, float32, 0.2 MB" in capsys.readouterr().out
        assert sorted(file.name for file in (tmp_path / which).iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]


def test_links_within_a_model_and_its_cache(models, tmp_path):
    """The layout of Hugging Face's cache, and links that stay in a directory; not a store that is a link itself."""
    for layout in ("snapshots/abc", "snapshots/abc/text", "plain"):
        model, store = tmp_path / layout, tmp_path / "blobs" if layout != "plain" else tmp_path / "plain" / "blobs"
        store.mkdir(parents=True, exist_ok=True)
        model.mkdir(parents=True, exist_ok=True)
        for file in (models / "one").iterdir():
            shutil.copyfile(file, store / f"{len(layout)}-{file.name}")
            (model / file.name).symlink_to(os.path.relpath(store / f"{len(layout)}-{file.name}", model))
        assert open_model(model).config.vocab_size == 96
    shutil.move(tmp_path / "blobs", tmp_path / "elsewhere")
    (tmp_path / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"config.json: is a link to .*elsewhere"):
        open_model(tmp_path / "snapshots" / "abc")


def test_an_export_of_a_model_is_an_import(models, tmp_path, monkeypatch, capsys):
    arguments = ["export", str(models / "one"), "--format", "hf", "--dtype", "bfloat16", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["trainfw", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    assert "llama, 50,928 parameters, bfloat16, 0.1 MB" in capsys.readouterr().out


def test_a_format_that_is_none(models, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainfw", "export", str(models / "one"), "--format", "ggml", "--out", "out"])
    with pytest.raises(SystemExit) as exit_:
        main()
    check(capsys, int(exit_.value.code or 0), ["--format ggml: expected one of hf, gguf, peft"])
