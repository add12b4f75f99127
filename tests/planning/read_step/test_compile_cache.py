"""What was compiled before is not compiled again, and what was compiled for fewer cores tells of more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny_recipe, write_recipe
from trainfw import Recipe, UserError, backends
from trainfw.paths import cache_dir
from trainfw.planning import plan, simulated_cores, survey
from trainfw.planning.read_step.compile_cache import Compiled, compiled

# `trainfw.planning` has functions of the names of these modules.
COMPILED = sys.modules[compiled.__module__]

REPLICAS = ("hardware.topology=h100-8", "parallel.data=2", "parallel.fsdp=4", "train.compute_dtype=bfloat16")


@pytest.fixture
def plans(tmp_path, monkeypatch) -> Path:
    """The cache's own directory, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_dir() / "plans"


@pytest.fixture(scope="module")
def step(tmp_path_factory) -> Compiled:
    """What was read of the program of `REPLICAS`."""
    found = COMPILED.simulation(tiny_recipe(tmp_path_factory.mktemp("step"), *REPLICAS))
    return COMPILED._compile(found, found.recipe, lambda _: None)


@pytest.fixture
def compilations(plans, step, monkeypatch) -> list[Recipe]:
    """Grows by a recipe whenever one would be compiled, in place of which `step` is taken."""
    asked: list[Recipe] = []

    def instead(found, recipe, progress):
        asked.append(recipe)
        return step

    monkeypatch.setattr(COMPILED, "_compile", instead)
    return asked


def test_from_the_cache_comes_the_same_plan(tmp_path, compilations):
    recipe = tiny_recipe(tmp_path, *REPLICAS)
    told: list[str] = []
    first, second = plan(recipe, progress=told.append), plan(recipe, progress=told.append)
    assert compilations == [recipe]
    assert [text.startswith("compiled before") for text in told] == [True]
    assert second.to_json() == first.to_json()
    assert (second.analysis, second.memory) == (first.analysis, first.memory)
    assert str(second) == str(first)
    plan(recipe, fresh=True)
    assert len(compilations) == 2


@pytest.mark.parametrize(
    "override",
    [
        *("model.num_layers=3", "model.rope_theta=20000", "train.accumulation_steps=2", "train.remat=full"),
        *("train.compute_dtype=float32", "train.scan_layers=false", "optimizer.b2=0.9", "data.sequence_length=64"),
        *("parallel.data=1", "train.steps=9", "train.global_batch_size=16"),
    ],
)
def test_another_program_is_compiled(tmp_path, compilations, override):
    compiled(tiny_recipe(tmp_path, *REPLICAS))
    compiled(tiny_recipe(tmp_path, *REPLICAS, "parallel.tensor=-1", override))
    assert len(compilations) == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ("name=other",),
        ("hardware.parameters={chip.matmul_efficiency: 0.9}", "hardware.dollars_per_chip_hour=2"),
        ("hardware.count=2", "parallel.data=4", "train.global_batch_size=16"),
        ("hardware.count=64", "parallel.data=128", "train.global_batch_size=512"),
    ],
)
def test_other_hardware_and_more_replicas_take_the_same_program(tmp_path, compilations, overrides):
    compiled(tiny_recipe(tmp_path, *REPLICAS))
    recipe = tiny_recipe(tmp_path, *REPLICAS, *overrides)
    found = compiled(recipe)
    assert len(compilations) == 1
    assert found.analysis.layout.data == recipe.parallel.data


@pytest.mark.parametrize("name", ["XLA_FLAGS", "JAX_ENABLE_X64"])
def test_what_the_compiler_is_told_counts(tmp_path, compilations, monkeypatch, name):
    recipe = tiny_recipe(tmp_path, *REPLICAS)
    compiled(recipe)
    count = "--xla_force_host_platform_device_count"
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace(f"{count}=8", f"{count}=9"))
    compiled(recipe)
    assert len(compilations) == 1
    monkeypatch.setenv(name, f"{os.environ.get(name, '')} --xla_cpu_enable_fast_math=true")
    compiled(recipe)
    assert len(compilations) == 2


def test_another_version_of_the_code_compiles_again(tmp_path, compilations, monkeypatch):
    recipe = tiny_recipe(tmp_path, *REPLICAS)
    compiled(recipe)
    monkeypatch.setattr(COMPILED, "_code", lambda: "another")
    compiled(recipe)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    compiled(recipe)
    assert len(compilations) == 3


def test_an_objective_of_ones_own_is_compiled_every_time(tmp_path, plans, compilations):
    """Its code is not among the sources that an entry's key is made of."""
    recipe = tiny_recipe(tmp_path, *REPLICAS, "objective.name=tests.objectives.test_own:Squared")
    compiled(recipe)
    compiled(recipe)
    assert len(compilations) == 2
    assert not plans.exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "of another", "not ours"])
def test_a_damaged_entry_is_compiled_again(tmp_path, plans, compilations, damage):
    recipe = tiny_recipe(tmp_path, *REPLICAS)
    compiled(recipe)
    (entry,) = plans.iterdir()
    good = entry.read_text()
    entry.write_text(
        {
            "empty": "",
            "cut": good[: len(good) // 2],
            "of another": good.replace(entry.stem, "0" * 64),
            "not ours": json.dumps({"key": entry.stem, "step": {"analysis": 1}}),
        }[damage]
    )
    compiled(recipe)
    assert len(compilations) == 2
    assert entry.read_text() == good
    compiled(recipe)
    assert len(compilations) == 2


def test_a_cache_that_cannot_be_written_is_said_and_done_without(tmp_path, compilations, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    told: list[str] = []
    compiled(tiny_recipe(tmp_path, *REPLICAS), told.append)
    assert len(told) == 1
    assert "not kept" in told[0]


def test_the_entries_used_last_are_kept(tmp_path, plans, compilations, monkeypatch):
    monkeypatch.setattr(COMPILED, "ENTRIES", 2)
    recipes = [tiny_recipe(tmp_path, *REPLICAS, f"train.steps={steps}") for steps in (10, 11, 12)]
    for age, recipe in enumerate(recipes[:2]):
        compiled(recipe)
        (new,) = (entry for entry in plans.iterdir() if entry.stat().st_mtime > 1000)
        os.utime(new, (age, age))
    compiled(recipes[0])  # used again
    compiled(recipes[2])
    assert len(list(plans.iterdir())) == 2
    compiled(recipes[0])
    assert len(compilations) == 3
    compiled(recipes[1])
    assert len(compilations) == 4


def test_a_command_that_finds_it_in_the_cache_needs_no_jax(tmp_path, compilations):
    try:
        made = plan(tiny_recipe(tmp_path, *REPLICAS), simulate=8)
    finally:
        backends.prepare(8)
    assert len(compilations) == 1
    arguments = ["plan", str(write_recipe(tmp_path)), *REPLICAS, "--json"]
    code = f"import sys; sys.modules['jax'] = None; sys.argv[1:] = {arguments}; from trainfw.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "compiled before" in ran.stderr
    assert json.loads(ran.stdout) == made.to_json()


@pytest.mark.long
def test_two_commands_at_once(tmp_path, plans):
    hardware = ("hardware.topology=trn2.3xlarge", "train.compute_dtype=bfloat16")
    command = [sys.executable, "-m", "trainfw", "plan", str(write_recipe(tmp_path)), *hardware, "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ran = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    outputs = [process.communicate() for process in ran]
    assert [process.returncode for process in ran] == [0, 0], outputs
    third = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "compiled before" in third.stderr
    assert {output for output, _ in outputs} == {third.stdout}
    assert len(list(plans.iterdir())) == 1
    anew = subprocess.run([*command, "--no-cache"], capture_output=True, text=True, check=True)
    assert "compiling the step for 4 cores" in anew.stderr


@pytest.mark.parametrize(
    "made", [simulated_cores, survey, lambda recipe: compiled(recipe, simulate=None)], ids=["cores", "search", "plan"]
)
def test_hardware_without_rates_is_said_before_anything_is_compiled(tmp_path, plans, made):
    recipe = tiny_recipe(tmp_path, "hardware.topology=cpu", "train.compute_dtype=float32")
    problem = (
        r"hardware\.topology = 'cpu': .*chip\.peak_flops\.float32 and chip\.hbm_bandwidth; .*"
        r"python benchmarks/machine\.py --hardware mine\.yaml.*hardware\.topology=mine\.yaml"
    )
    with pytest.raises(UserError, match=problem):
        made(recipe)
    assert not plans.exists()


# --- A longer fsdp -------------------------------------------------------------------------------


ALONE = ("hardware={topology: trn2-ultraserver, count: 16}", "parallel.fsdp=4096", "train.global_batch_size=4096")


def test_fsdp_alone_goes_beyond_what_is_simulated(tmp_path):
    assert simulated_cores(tiny_recipe(tmp_path, *ALONE)) == 2048


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("optimizer.name=muon",), r"optimizer\.name = 'muon': .*fsdp\(4096\).*let data be longer"),
        (("train.global_batch_size=4100",), r"train\.global_batch_size = 4100: does not divide over .* = 4,096"),
        (
            ("train.accumulation_steps=2",),
            r"train\.global_batch_size = 4096: .*accumulation_steps\(2\) = 8,192; train\.accumulation_steps=1 makes "
            r"it divide; the nearest that do: 8,192$",
        ),
    ],
)
def test_what_a_shorter_fsdp_does_not_tell(tmp_path, overrides, problem):
    with pytest.raises(UserError, match=problem):
        simulated_cores(tiny_recipe(tmp_path, *ALONE, *overrides))


def test_state_that_does_not_divide_among_all_is_said_before_it_is_compiled(tmp_path, plans):
    recipe = tiny_recipe(
        tmp_path, "hardware.topology=h100-8", "model.hidden_size=36", "model.num_heads=4", "model.head_dim=16"
    )
    told: list[str] = []
    problem = r"parallel: embedding\.table: dim 1 \(size 36\) does not divide over mesh axes fsdp\(8\) = 8; .*: 4, 6$"
    with pytest.raises(UserError, match=problem):
        compiled(recipe, told.append, most=4)
    assert not told


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        (("parallel.fsdp=8", "train.accumulation_steps=2"), 4),
        pytest.param(
            ("parallel.fsdp=4", "parallel.tensor=2", "train.remat=full", "train.scan_layers=false"),
            4,
            marks=pytest.mark.long,
        ),
        pytest.param(
            ("parallel.fsdp=4", "parallel.data=2", "optimizer.name=adafactor", "model.tie_embeddings=false"),
            4,
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_shorter_fsdp_tells_of_the_memory_of_the_longer(tmp_path, plans, overrides, most):
    batch = ("train.global_batch_size=16", "data.sequence_length=128", "train.compute_dtype=bfloat16")
    recipe = tiny_recipe(tmp_path, "hardware.topology=h100-8", *batch, *overrides)
    whole, short = (compiled(recipe, most=devices) for devices in (8, most))
    assert short.memory.arguments == whole.memory.arguments
    for category in ("parameters", "optimizer_state", "data"):
        assert short.memory.categories[category] == whole.memory.categories[category]
    assert short.memory.total == pytest.approx(whole.memory.total, rel=0.05)
    assert short.memory.total == short.memory.arguments + short.memory.temporaries
    for read in ("matmuls", "transfers"):
        assert sorted(map(repr, getattr(short.analysis, read))) == sorted(map(repr, getattr(whole.analysis, read)))
    assert not whole.memory.note
    assert f"{8 // most} times shorter: state is exact" in str(short.memory)


_FIVE_HUNDRED = """
import sys
from trainfw import backends, load_recipe
backends.prepare(2048)
from trainfw.planning.read_step.compile_cache import compiled
recipe = load_recipe(sys.argv[1], sys.argv[2:])
whole, short = (compiled(recipe, most=most) for most in (2048, 512))
for read in ("matmuls", "transfers"):
    one, other = (sorted(map(repr, getattr(step.analysis, read))) for step in (short, whole))
    assert one == other, (one, other)
assert short.memory.arguments == whole.memory.arguments
assert abs(short.memory.total / whole.memory.total - 1) < 0.05, (short.memory.total, whole.memory.total)
assert "Compiled for fsdp(512), 4 times shorter" in short.memory.note
print("agree")
"""


@pytest.mark.long
def test_an_fsdp_of_512_tells_of_2048(tmp_path, plans):
    overrides = ["hardware={topology: trn2-ultraserver, count: 8}", "parallel.fsdp=2048", "model.hidden_size=2048"]
    overrides += ["model.num_heads=4", "model.head_dim=16", "train.global_batch_size=2048"]
    overrides += ["train.compute_dtype=bfloat16", "data.sequence_length=256"]
    command = [sys.executable, "-c", _FIVE_HUNDRED, str(write_recipe(tmp_path)), *overrides]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "agree", ran.stderr[-2000:]
