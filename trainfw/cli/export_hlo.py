from __future__ import annotations

import importlib.metadata
import shlex
from pathlib import Path

from trainfw import checking
from trainfw import recipe as recipes
from trainfw.cli.options import Count, Hardware, OutPath, Overrides, RecipePath
from trainfw.cli.signals import leaving_at_once
from trainfw.cli.simulated import build_for, compiler_options, load_simulated
from trainfw.cli.terminal import Clock, say
from trainfw.errors import RunError, UserError
from trainfw.unfinished import writing


def export_hlo(
    recipe: RecipePath, out: OutPath, overrides: Overrides = None, hardware: Hardware = None, count: Count = None
) -> None:
    """Write each step's HLO for neuronx-cc, and how to compile it.

    No compiler is needed to write it.
    """
    target = Path(out)
    if target.exists() or target.is_symlink():
        raise UserError(f"--out {out}: exists; nothing is overwritten")
    loaded, topology = load_simulated(recipe, overrides or (), hardware, count)
    flags = compiler_options(loaded, topology)
    with (
        Clock() as progress,
        leaving_at_once("nothing is written"),
        writing(target, directory=True) as directory,  # where that cannot be, it is said before all the work
    ):
        modules = checking.export_steps(build_for(loaded, topology, progress), progress)
        for name, module in modules.items():
            if isinstance(module, str):
                raise RunError(f"{name} cannot be exported: {module}")
            (directory / f"{name}.pb").write_bytes(module.proto)
            (directory / f"{name}.txt").write_text(module.text, encoding="utf-8")
        units = f"{topology.count} x {topology.name}" if topology.count > 1 else topology.name
        (directory / "README.md").write_text(_readme(loaded, units, list(modules), flags), encoding="utf-8")
    say(out)


def _readme(recipe: recipes.Recipe, units: str, names: list[str], flags: list[str]) -> str:
    commands = "\n".join(shlex.join(checking.command_of(name, flags)) for name in names)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    return f"""# {recipe.name} on {units}

Each step as one core runs it, after partitioning: a serialized HloModuleProto (.pb) and the same as text, in which
large constants are left out. Lowered for Neuron with {versions}, without kernels of
Neuron's own; partitioned by XLA for the CPU, where the plugin's own partitioner may do otherwise. Instruction numbers
fit 32 bits. Both name source files by their paths on the machine that wrote them.

In this directory, with neuronx-cc on PATH (any x86-64 Linux machine; no Neuron hardware is needed):

```sh
{commands}
```

A compile may take more than 14 GiB of memory and half an hour. These commands have not been tried with the real
compiler.
"""
