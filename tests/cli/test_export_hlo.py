"""`trainfw export-hlo`, as a user types it."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers import write_recipe
from trainfw.hlo import parse_module
from trainfw.hlo.renumbering import MOST, instruction_ids


def export_hlo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainfw", "export-hlo", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_modules_and_their_commands(tmp_path):
    out = tmp_path / "deep" / "hlo"
    result = export_hlo(str(write_recipe(tmp_path)), "--hardware", "trn2.3xlarge", "--out", str(out))
    assert (result.returncode, result.stdout) == (0, f"{out}\n"), result.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "evaluate.pb", "evaluate.txt", "train.pb", "train.txt")
    ]
    for name in ("train", "evaluate"):
        module = parse_module((out / f"{name}.txt").read_text())
        assert module.num_partitions == 4
        assert any(i.opcode == "all-gather" for i, _ in module.instructions())
        ids = instruction_ids((out / f"{name}.pb").read_bytes())
        assert len(set(ids)) == len(ids) == sum(len(c.instructions) for c in module.computations.values())
        assert max(ids) <= MOST
        flags = "--target=trn2 --lnc=2 --model-type=transformer -O1"
        command = f"neuronx-cc compile --framework=XLA {name}.pb --output={name}.neff {flags}\n"
        assert command in (out / "README.md").read_text()


def test_bad_input(tmp_path):
    recipe = str(write_recipe(tmp_path))
    for arguments, problem in (
        (["--out", str(tmp_path), "--hardware", "trn2.3xlarge"], "exists; nothing is overwritten"),
        (["--out", str(tmp_path / "x"), "--hardware", "h100-8"], "neuronx-cc compiles for Neuron hardware only"),
        (["--out", "/proc/x", "--hardware", "trn2.3xlarge"], "/proc/x: "),
        (["--out", str(tmp_path / "x")], "nothing to check for; expected one of"),
    ):
        result = export_hlo(recipe, *arguments)
        assert result.returncode == 2
        assert problem in result.stderr
        assert "partial" not in result.stderr
        assert "Traceback" not in result.stderr
