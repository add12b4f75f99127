"""The next layer's weights are gathered while a layer computes: as the partitioned program depends and is ordered."""

from __future__ import annotations

import functools
import re

import jax
import pytest

from tests.helpers import tiny_recipe
from trainfw import backends, build_program
from trainfw.hlo import Computation, Instruction, Module, Partitioned, parse_module, partition

LAYERS, VOCABULARY = 4, 512
GATHERS = 7
"""Matrices of a layer."""
FORWARD, BACKWARD = 9, 8 + 19
"""Products of a layer: with these and in attention; all but the last again, two of each in the transpose, and
the row sums of attention's gradient (a CPU's kernel has them as one)."""


def partitioned(tmp_path, *overrides: str) -> Partitioned:
    recipe = tiny_recipe(
        tmp_path,
        f"model.num_layers={LAYERS}",
        f"model.vocab_size={VOCABULARY}",
        "parallel.fsdp=8",
        "train.remat=full",
        *overrides,
    )
    program = build_program(recipe, jax.devices())
    lowered = program.train_step.lower(program.abstract_state, program.abstract_batch)
    return partition(lowered, backends.current().compiler_options)


def needs(computation: Computation) -> dict[str, frozenset[str]]:
    """Every instruction's operands, their operands, and so on, by name."""

    @functools.cache
    def of(name: str) -> frozenset[str]:
        operands = {operand.partition("#")[0] for operand in computation.instructions[name].operands}
        return frozenset(operands).union(*map(of, operands))

    return {name: of(name) for name in computation.instructions}  # operands come before their users


def backward(instruction: Instruction) -> bool:
    return "transpose(" in instruction.op_name


def loops(module: Module) -> list[Computation]:
    """The bodies that run once a layer but one, and gather: forward, then backward."""
    bodies = [module.computations[name] for name, times in module.times.items() if times == LAYERS - 1]
    found = [body for body in bodies if any(i.opcode == "all-gather" for i in body.instructions.values())]
    return sorted(found, key=lambda body: any(map(backward, body.instructions.values())))


def test_scanned_layers_gather_for_the_next(tmp_path):
    forward, back = loops(partitioned(tmp_path).module)
    for body, products in ((forward, FORWARD), (back, BACKWARD)):
        instructions, before = body.instructions, needs(body)
        gathers = [name for name, i in instructions.items() if i.opcode == "all-gather"]
        dots = {name for name, i in instructions.items() if i.opcode == "dot"}
        assert len(gathers) == GATHERS
        assert len(dots) == products
        for gather in gathers:
            assert not before[gather] & dots  # waits for none of this layer's products
            assert all(gather not in before[dot] for dot in dots)  # and none of them for it
        # What it gathers goes to the next round.
        carried = {operand.partition("#")[0] for operand in body.root.operands}
        assert all(any(gather in before[name] | {name} for name in carried) for gather in gathers)


def test_without_it_they_gather_for_themselves(tmp_path):
    module = partitioned(tmp_path, "parallel.prefetch=false").module
    bodies = [module.computations[name] for name, times in module.times.items() if times == LAYERS]
    for body in bodies:
        before = needs(body)
        gathers = {name for name, i in body.instructions.items() if i.opcode == "all-gather"}
        assert len(gathers) == GATHERS
        assert all(any(g in before[n] for n, i in body.instructions.items() if i.opcode == "dot") for g in gathers)
    assert len(bodies) == 2


@pytest.mark.long
def test_unrolled_layers_gather_for_the_next(tmp_path):
    """One layer's products lie between what a gather waits for and what waits for it, and no more than that."""
    module = partitioned(tmp_path, "train.scan_layers=false").module
    entry = max(module.computations.values(), key=lambda c: sum(i.opcode == "dot" for i in c.instructions.values()))
    before = needs(entry)
    dots = {name for name, i in entry.instructions.items() if i.opcode == "dot"}
    of_layers = {n: i for n, i in entry.instructions.items() if i.opcode == "all-gather" and VOCABULARY not in dims(i)}
    # Backward, what the layer gives on waits for fewer of its products: not for the gradients of its weights.
    for back, products in ((False, FORWARD), (True, BACKWARD - GATHERS)):
        between = []
        for gather in (name for name, i in of_layers.items() if backward(i) == back):
            first = min((before[dot] & dots for dot in dots if gather in before[dot]), key=len)
            between.append(len(first - before[gather]))
        assert len(between) == GATHERS * LAYERS
        assert sum(products <= count < 2 * products for count in between) == GATHERS * (LAYERS - 1)
        assert sum(count < products for count in between) == GATHERS  # those of the first layer to run


@pytest.mark.parametrize(("scan", "times"), [("true", 1), pytest.param("false", LAYERS - 1, marks=pytest.mark.long)])
def test_they_are_scheduled_before_the_layers_products(scan, times, tmp_path):
    text = partitioned(tmp_path, f"train.scan_layers={scan}").compiled.as_text()
    assert "is_scheduled=true" in text
    order = "\n".join(map(events, parse_module(text).computations.values()))
    assert len(re.findall(r"\|G{7}D", order)) == times
    assert len(re.findall(r"\|g{7}d", order)) == times


def events(computation: Computation) -> str:
    """Gathers, products, loops and barriers as they are listed: G, D, W and |, in lower case those of backward."""
    found = ""
    for i in computation.instructions.values():
        kind = {"all-gather": "G", "while": "W", "opt-barrier": "|"}.get(i.opcode, "")
        kind = (
            "D" if i.op_name.endswith("dot_general") and i.opcode in ("dot", "fusion", "custom-call", "call") else kind
        )
        found += kind.lower() if backward(i) else kind
    return found


def dims(instruction: Instruction) -> tuple[int, ...]:
    return instruction.shapes[0].dims
