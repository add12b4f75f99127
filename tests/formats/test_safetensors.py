"""What is read of a file is what NumPy would slice of the whole."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from trainfw.formats import SafetensorsTensors
from trainfw.formats import safetensors as safetensors_reader
from trainfw.formats.tensors import row_blocks

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def bounds(length: int) -> st.SearchStrategy[slice]:
    return st.slices(length).map(lambda part: slice(part.start, part.stop))


@pytest.mark.parametrize("separate", [1, 2**20], ids=["run by run", "whole rows"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_part_equals_numpys_slice(separate, data, tmp_path_factory):
    shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
    arrays = {}
    for name in ("a", "b"):
        shape, dtype = data.draw(shapes), data.draw(st.sampled_from(DTYPES))
        arrays[name] = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    directory = tmp_path_factory.mktemp("model")
    save_file(arrays, directory / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_reader, "_SEPARATE", separate)
        patch.setattr(safetensors_reader, "CHUNK", data.draw(st.sampled_from([1, 20, 2**23])))
        tensors = SafetensorsTensors(directory)
        for name, array in arrays.items():
            assert (tensors.infos[name].shape, tensors.infos[name].dtype) == (array.shape, array.dtype)
            dims = data.draw(st.integers(0, array.ndim))
            index = tuple(data.draw(bounds(length)) for length in array.shape[:dims])
            part = tensors.read(name, index)
            assert part.dtype == array.dtype
            np.testing.assert_array_equal(part, array[index])
            assert part.flags.owndata or part.base is None
            assert part.flags.writeable


def test_steps_are_refused(tmp_path):
    save_file({"a": np.zeros((4, 4), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(IndexError, match="only steps of 1"):
        SafetensorsTensors(tmp_path).read("a", (slice(0, 4, 2),))


@given(st.lists(st.integers(0, 6), max_size=4), st.integers(1, 60))
def test_blocks_cut_an_array_in_order(shape, limit):
    array = np.arange(math.prod(shape)).reshape(shape)
    blocks = [array[index] for index in row_blocks(array.shape, 2, limit)]
    assert all(block.size * 2 <= max(limit, 2) for block in blocks)
    np.testing.assert_array_equal(np.concatenate([np.ravel(block) for block in blocks] or [np.zeros(0)]), array.ravel())


def test_a_link_out_of_the_directory_is_followed(tmp_path):
    """Hugging Face's cache has nothing else."""
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "5c07"
    snapshot.mkdir(parents=True)
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "blobs" / "0f3e")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0f3e")
    np.testing.assert_array_equal(SafetensorsTensors(snapshot).read("a"), np.ones(3))


def test_the_fingerprint_is_of_values_and_not_of_files(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((40, 90)).astype(np.float32) for name in ("a", "b")}
    for kind in ("one", "two", "other", "cast"):
        (tmp_path / kind).mkdir()
    save_file(arrays, tmp_path / "one" / "model.safetensors")
    for name in arrays:
        save_file({name: arrays[name]}, tmp_path / "two" / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in arrays}}
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(arrays | {"b": arrays["b"] + np.float32(1e-6)}, tmp_path / "other" / "model.safetensors")
    save_file({n: a.astype(np.float64) for n, a in arrays.items()}, tmp_path / "cast" / "model.safetensors")
    one, two, other, cast = (
        SafetensorsTensors(tmp_path / kind).fingerprint() for kind in ("one", "two", "other", "cast")
    )
    assert one == two
    assert len({one, other, cast}) == 3
