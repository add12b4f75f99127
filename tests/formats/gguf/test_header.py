import resource
import struct

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gguf_files import string, write_gguf
from trainfw.errors import UserError
from trainfw.formats import huggingface_tokenizer, read_header
from trainfw.interop import GGUFTensors, gguf_config

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<eos>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}
SHAPES = {
    "token_embd.weight": (4, 32),
    "output_norm.weight": (32,),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (64, 32),
    "blk.0.ffn_up.weight": (64, 32),
    "blk.0.ffn_down.weight": (32, 64),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    random = np.random.default_rng(0)
    tensors = {name: ("F32", random.standard_normal(shape).astype(np.float32)) for name, shape in SHAPES.items()}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "good.gguf", METADATA, tensors).read_bytes()


def read_all(file):
    """Everything that a file is read for."""
    header = read_header(file)
    gguf_config(file)
    tensors = GGUFTensors(file)
    huggingface_tokenizer(header)
    return {name: tensors.read(name) for name in tensors.infos}


def test_the_header_is_what_the_gguf_library_reads(good, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(good)
    header, reader = read_header(file), GGUFReader(file)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == theirs
    assert {tensor.name: tensor.data_offset for tensor in reader.tensors} == {
        name: tensor.offset for name, tensor in header.tensors.items()
    }
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == SHAPES
    assert len(read_all(file)) == len(SHAPES)


def _changed(good: bytes, at: int, *values: int, code: str = "Q") -> bytes:
    new = struct.pack(f"<{len(values)}{code}", *values)
    return good[:at] + new + good[at + len(new) :]


def _info(good: bytes, name: str) -> int:
    """Where the rank of a tensor is, after its name."""
    return good.index(string(name.encode())) + 8 + len(name)


HOSTILE = {
    "empty": (lambda good: b"", "cut short"),
    "a pickle": (lambda good: b"\x80\x02}q\x00X" + good[6:], "not a GGUF file"),
    "version 1": (lambda good: _changed(good, 4, 1, code="I"), "version 1 is not supported"),
    "version 999": (lambda good: _changed(good, 4, 999, code="I"), "version 999"),
    "big-endian": (lambda good: good[:4] + good[7:3:-1] + good[8:], "big-endian"),
    "2**63 tensors": (lambda good: _changed(good, 8, 1 << 63), "do not fit into the file"),
    "2**63 keys": (lambda good: _changed(good, 16, 1 << 63), "do not fit into the file"),
    "more keys than there are": (lambda good: _changed(good, 16, len(METADATA) + 3), "gguf:"),
    "a key of 2**62 bytes": (lambda good: _changed(good, 24, 1 << 62), "expected .* at most"),
    "a key of 1 MB": (lambda good: _changed(good, 24, 1 << 20), "cut short"),
    "a list of 2**61": (
        lambda good: _changed(good, good.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8, 1 << 61),
        "a list of",
    ),
    "a list of lists": (
        lambda good: _changed(
            good, good.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 4, 9, code="I"
        ),
        "list of metadata of type 9",
    ),
    "an unknown type of metadata": (
        lambda good: _changed(good, good.index(b"llama.block_count") + len("llama.block_count"), 77, code="I"),
        "unknown type 77",
    ),
    "text that is not UTF-8": (lambda good: good.replace(b"general.a", b"general.\xff"), "UTF-8"),
    "a tensor of 0 dims": (lambda good: _changed(good, _info(good, "token_embd.weight"), 0, code="I"), "0 dims"),
    "a tensor of 2**31 dims": (
        lambda good: _changed(good, _info(good, "token_embd.weight"), 1 << 31, code="I"),
        "expected 1 to 4",
    ),
    "dims whose product overflows": (
        lambda good: _changed(good, _info(good, "token_embd.weight") + 4, 1 << 32, 1 << 32),
        "cut short, or its header is wrong",
    ),
    "a dim of 0": (lambda good: _changed(good, _info(good, "token_embd.weight") + 4, 0, 4), "has shape"),
    "an unknown quantisation": (
        lambda good: _changed(good, _info(good, "token_embd.weight") + 20, 200, code="I"),
        "unknown type 200",
    ),
    "blocks that do not fit a row": (
        lambda good: _changed(good, _info(good, "token_embd.weight") + 20, 12, code="I"),
        "of type Q4_K has shape",
    ),
    "an offset outside the file": (
        lambda good: _changed(good, _info(good, "token_embd.weight") + 24, 1 << 40),
        "cut short, or its header is wrong",
    ),
    "an offset that overflows": (
        lambda good: _changed(good, _info(good, "token_embd.weight") + 24, (1 << 64) - 32),
        "cut short, or its header is wrong",
    ),
    "an offset inside another tensor": (
        lambda good: _changed(good, _info(good, "blk.0.attn_q.weight") + 24, 32),
        "overlap",
    ),
    "a tensor twice": (lambda good: good.replace(b"blk.0.attn_v.weight", b"blk.0.attn_k.weight"), "comes twice"),
    "a key twice": (lambda good: good.replace(b"llama.context_length", b"llama.embedding_leng"), "gguf:"),
    "data cut short": (lambda good: good[:-64], "cut short"),
    "a header cut short": (lambda good: good[:300], "cut short|do not fit"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, good, tmp_path):
    damage, message = HOSTILE[name]
    file = tmp_path / "bad.gguf"
    file.write_bytes(damage(good))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message):
        read_all(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # KB


MISSING = [key for key in METADATA if key not in ("tokenizer.ggml.pre", "llama.rope.freq_base")]
WRONG = {
    "general.architecture": ("mamba", "'mamba' is not supported; one of: llama, qwen2"),
    "llama.block_count": (0, "expected 1 or more"),
    "llama.embedding_length": (1.5, "expected a whole number"),
    "llama.attention.head_count": (5, "does not divide by 5"),
    "llama.attention.head_count_kv": ([2, 2], "expected a whole number"),
    "llama.attention.layer_norm_rms_epsilon": (float("nan"), "expected a number"),
    "llama.rope.scaling.type": ("yarn", "'yarn' is not supported"),
    "llama.rope.dimension_count": (4, "is not supported"),
    "tokenizer.ggml.model": ("bert", "'bert' is not supported"),
    "tokenizer.ggml.pre": ("Llama_BPE", "did you mean 'llama-bpe'"),
    "tokenizer.ggml.eos_token_id": (4, "has 4 tokens"),
    "tokenizer.ggml.token_type": ([1], "has 1 elements"),
    "tokenizer.ggml.tokens": (["a", "a", "ab", "<eos>"], "'a' twice"),
    "tokenizer.ggml.merges": (["b b"], "expected two tokens that make one"),
    "general.alignment": (48, "power of two"),
}


def _rewritten(tmp_path, metadata, changes=None):
    shapes = SHAPES | (changes or {})
    tensors = {name: ("F32", np.ones(shape, np.float32)) for name, shape in shapes.items()}
    return write_gguf(tmp_path / "model.gguf", metadata, tensors)


@pytest.mark.parametrize("key", WRONG)
def test_metadata_that_makes_no_sense_is_refused_by_its_key(key, tmp_path):
    value, message = WRONG[key]
    with pytest.raises(UserError, match=message):
        read_all(_rewritten(tmp_path, METADATA | {key: value}))


@pytest.mark.parametrize(
    "key",
    [
        key
        for key in MISSING[1:]
        if key not in ("llama.attention.head_count_kv", "tokenizer.ggml.token_type", "tokenizer.ggml.eos_token_id")
    ],
)
def test_missing_metadata_is_named(key, tmp_path):
    metadata = {name: value for name, value in METADATA.items() if name != key}
    with pytest.raises(UserError, match=f"no metadata key {key}"):
        read_all(_rewritten(tmp_path, metadata))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.1.attn_q.weight", (32, 32), "has no tensor"),
        ("blk.0.attn_w.weight", (32, 32), "has no tensor 'blk.0.attn_w.weight'$"),
        ("blk.0.attn_q.weight", (36, 32), "expected 4 heads"),
        ("blk.0.ffn_gate_exps.weight", (2, 8, 32), "for as many experts"),
        ("blk.0.ffn_up.weight", (2, 32, 32), "expected 2 dims or 1"),
        ("rope_freqs.weight", (4,), None),
        ("rope_freqs.weight", (5,), "llama3"),
    ],
)
def test_tensors_that_have_no_place_are_refused(name, shape, message, tmp_path):
    file = _rewritten(tmp_path, METADATA, {name: shape})
    if message is None:
        assert len(read_all(file)) == len(SHAPES)
        return
    with pytest.raises(UserError, match=message):
        read_all(file)


@pytest.fixture
def parts(good, tmp_path):
    """Of the same model: as llama.cpp's gguf-split names them, and what each holds of the tensors."""
    (tmp_path / "good.gguf").write_bytes(good)
    reader = GGUFReader(tmp_path / "good.gguf")
    writer = GGUFWriter(tmp_path / "part.gguf", "llama", split_max_tensors=4)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            array = len(field.types) > 1
            writer.add_array(key, field.contents()) if array else writer.add_key_value(
                key, field.contents(), field.types[0]
            )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.glob("part-*.gguf"))
    assert len(files) == 3
    return files


def test_a_file_in_parts_is_read_by_the_name_of_any(parts, tmp_path):
    whole = read_all(tmp_path / "good.gguf")
    for file in parts:
        found = read_all(file)
        assert set(found) == set(whole)
        for name, value in found.items():
            np.testing.assert_array_equal(value, whole[name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda parts: parts[2].unlink(), "part-00002-of-00003.gguf: is one of 3 parts; not beside it: part-00003-of-"),
        (lambda parts: parts[0].rename(parts[0].with_name("first.gguf")), "not beside it: part-00001-of-00003.gguf"),
        (lambda parts: parts[2].write_bytes(parts[1].read_bytes()), r"split.count = \(1, 3\): expected \(2, 3\)"),
        (lambda parts: parts[2].write_bytes(b"GGUF"), "part-00003-of-00003.gguf: the header is cut short"),
    ],
)
def test_parts_that_are_missing_or_another_are_named(parts, damage, message):
    damage(parts)
    with pytest.raises(UserError, match=message):
        read_all(parts[1])


def test_a_part_by_another_name_is_refused(parts, tmp_path):
    parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"model.gguf: is one of 3 parts, .* expected NAME-00001-of-00003.gguf"):
        read_header(tmp_path / "model.gguf")


def test_keys_about_the_model_that_are_not_read_are_said(tmp_path):
    file = _rewritten(tmp_path, METADATA | {"llama.attention.scale": 0.5, "general.anything": 1})
    with pytest.warns(UserWarning, match=r"model.gguf: not read: llama.attention.scale$"):
        gguf_config(file)


@pytest.mark.parametrize(
    ("key", "off", "on"),
    [("attention.causal", True, False), ("rope.scaling.attn_factor", 1.0, 2.0), ("expert_shared_count", 0, 1)],
)
def test_keys_that_llama_cpp_may_compute_by_are_refused_where_they_are_set(tmp_path, key, off, on):
    gguf_config(_rewritten(tmp_path, METADATA | {f"llama.{key}": off}))
    file = _rewritten(tmp_path, METADATA | {f"llama.{key}": on})
    with pytest.raises(UserError, match=f"llama.{key} = {on} is not supported"):
        gguf_config(file)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_read_and_nothing_else(good, tmp_path, data):
    start = good.index(b"blk.0.ffn_down.weight") + 60
    if data.draw(st.booleans(), "cut"):
        damaged = good[: data.draw(st.integers(0, len(good) - 1), "length")]
    else:
        damaged = bytearray(good)
        for at, value in data.draw(st.lists(st.tuples(st.integers(0, start), st.integers(0, 255)), min_size=1)):
            damaged[at] = value
    file = tmp_path / "damaged.gguf"
    file.write_bytes(damaged)
    try:
        tensors = read_all(file)
    except UserError:
        return
    for name, tensor in tensors.items():
        assert tensor.size <= len(good), name
