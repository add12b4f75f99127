"""Modules that XLA itself wrote, numbered anew and read by XLA again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from trainfw.hlo import export
from trainfw.hlo.renumbering import MOST, instruction_ids, module_of, renumbered

hlo = pytest.importorskip("jaxlib._hlo", reason="this jaxlib does not read modules")


@pytest.fixture(scope="module")
def dumps(tmp_path_factory) -> dict[str, bytes]:
    """Modules of one program at several stages: with loops, tuples, calls, and in the end a schedule."""

    def f(x: Any, w: Any) -> Any:
        y = jnp.sort(x @ w, axis=-1)
        return jax.lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ w), y).sum()

    directory = tmp_path_factory.mktemp("dump")
    arguments = jax.ShapeDtypeStruct((16, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
    options = {"xla_dump_to": str(directory), "xla_dump_hlo_pass_re": "call-inliner", "xla_dump_hlo_as_proto": True}
    jax.jit(f).lower(*arguments).compile(compiler_options=options)
    return {path.name: module_of(path.read_bytes()) for path in Path(directory).glob("*.hlo.pb")}


def printed(module: bytes) -> str:
    return hlo.HloModule.from_serialized_hlo_module_proto(module).to_string()


def test_the_module_is_the_same_but_for_numbers(dumps):
    assert any("is_scheduled=true" in printed(module) for module in dumps.values())
    assert any(max(instruction_ids(module)) > MOST for module in dumps.values())
    for module in dumps.values():
        new = renumbered(module)
        assert sorted(instruction_ids(new)) == list(range(1, len(instruction_ids(module)) + 1))
        assert printed(new) == printed(module)
        assert renumbered(new) == new


def test_what_fits_stays_as_it_is():
    # A computation 5 of instructions 7 and 9, its operand and root by number; unknown fields are copied.
    body = bytes.fromhex("2805 3009 1203980207 1206980209a00207".replace(" ", ""))
    fits = b"\x1a" + bytes([len(body)]) + body
    assert instruction_ids(fits) == [7, 9]
    assert renumbered(fits) == fits


def test_exported_modules_fit(dumps):
    exported = export(jax.jit(lambda x: jnp.sort(x) + 1).lower(jax.ShapeDtypeStruct((8,), jnp.float32)))
    assert max(instruction_ids(exported.proto)) <= MOST
    assert exported.module.entry.split(".")[0] in exported.text
    assert "sort(" in printed(exported.proto)
