"""How much of the host's memory a checkpoint takes on its way in: python benchmarks/import_memory.py [--gigabytes 3]

Writes a synthetic sharded checkpoint (a Llama in bfloat16), then, in a process of its own each,

- loads it onto 8 simulated devices, laid out as a recipe's program lays its parameters out (FSDP over all 8), and
- streams it into another directory, as `trainfw import` does.

Printed: peak resident memory (VmHWM, the kernel's own), what was resident before (libraries, the traced program), what
the devices hold (simulated devices' memory is the host's), and what is left of the peak: the host's own staging. Exit 1
where that is over 1.3 times the largest tensor group, which is one stacked parameter.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DEVICES, BOUND = 8, 1.3
RECIPE = """
name: import-memory
model: {model}
data: {{sequence_length: 128, source: python-stdlib}}
parallel: {{fsdp: 8}}
train: {{global_batch_size: 8, compute_dtype: bfloat16}}
"""


def shape(gigabytes: float) -> dict[str, Any]:
    """A Llama of about that size in bfloat16; the widths go with the cube root, so that it looks alike at any size."""
    width = max(round(2048 * (gigabytes / 3) ** (1 / 3) / 64) * 64, 64)
    fields = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_heads": width // 64,
        "num_kv_heads": width // 64,
    }
    fields |= {"vocab_size": 32_000 if gigabytes >= 1 else 4_000, "max_position": 4096}
    layer = 4 * width**2 + 12 * width**2
    return fields | {"num_layers": max(round((gigabytes * 1e9 / 2 - 2 * fields["vocab_size"] * width) / layer), 1)}


def write_checkpoint(directory: Path, gigabytes: float) -> None:
    import ml_dtypes
    import numpy as np

    from trainfw.interop import save_model
    from trainfw.models import ModelConfig, abstract_model

    config = ModelConfig(**shape(gigabytes))
    abstract = abstract_model(config)
    rng = np.random.default_rng(0)

    def read(path: str) -> np.ndarray:
        node: Any = abstract
        for name in path.split("."):
            node = getattr(node, name)
        # Sixteen bits whose exponent is that of 0.01 or so.
        return rng.integers(0x3C00, 0x3C80, node.shape, np.uint16).view(ml_dtypes.bfloat16)

    saved = save_model(directory, config, read, dtype="bfloat16", max_shard_size=int(gigabytes * 1e9 / 6))
    print(f"{saved} in {len(list(directory.glob('*.safetensors')))} files", flush=True)


def memory() -> dict[str, int]:
    """Bytes, of /proc/self/status: VmRSS now, VmHWM at most since `reset`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}


def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def load(source: Path, dtype: str) -> dict[str, int]:
    from trainfw import backends

    backends.prepare(DEVICES)

    import jax

    from trainfw import load_recipe
    from trainfw.interop import open_model
    from trainfw.program import build_program

    model = open_model(source)
    fields = model.config.model_dump(exclude_none=True, exclude={"preset"}, mode="json")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(RECIPE.format(model=json.dumps(fields)))
        file.flush()
        params = build_program(load_recipe(file.name)).abstract_state.params
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), params)
    jax.block_until_ready([jax.device_put(0.0, device) for device in jax.devices()])
    reset()
    before = memory()["VmRSS"]
    leaves = jax.tree_util.tree_leaves_with_path(wanted)
    arrays = [model.read(".".join(str(key.key) for key in keys), leaf) for keys, leaf in leaves]
    peak = memory()["VmHWM"]
    held = sum(part.data.nbytes for array in arrays for part in array.addressable_shards)
    largest = max(array.nbytes for array in arrays)
    return {"peak": peak, "before": before, "devices": held, "largest": largest}


def copy(source: Path, out: Path) -> dict[str, int]:
    from trainfw import backends

    backends.prepare()

    from trainfw.interop import copy_model, open_model

    model = open_model(source)
    itemsize = next(iter(model.tensors.infos.values())).dtype.itemsize
    largest = max(math.prod(parameter.shape) for parameter in model.parameters.values()) * itemsize
    reset()
    before = memory()["VmRSS"]
    copy_model(model, out)
    return {"peak": memory()["VmHWM"], "before": before, "devices": 0, "largest": largest}


def measured(what: str, *arguments: str) -> bool:
    """Run one of the above in a process of its own and print what it found; whether it is within the bound."""
    start = time.monotonic()
    command = [sys.executable, __file__, "--child", what, *arguments]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    staging = found["peak"] - found["before"] - found["devices"]
    share = staging / found["largest"]
    figures = "".join(f"{found[key] / 1e6:>10,.0f}" for key in ("peak", "before", "devices"))
    seconds = time.monotonic() - start
    verdict = "within" if share <= BOUND else "OVER"
    print(
        f"{' '.join([what, *arguments[2:]]):15}{figures}{staging / 1e6:>10,.0f}{found['largest'] / 1e6:>10,.0f}"
        f"{share:>8.2f}  {verdict} {BOUND}, {seconds:.0f} s",
        flush=True,
    )
    return share <= BOUND


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of the checkpoint")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the parameters on the devices"
    )
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if not 0 < chosen.gigabytes < math.inf:
        parser.error(f"--gigabytes {chosen.gigabytes}: expected a positive number")
    if chosen.child:
        what, source, argument = chosen.child
        found = load(Path(source), argument) if what == "load" else copy(Path(source), Path(argument))
        print(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "model"
        write_checkpoint(source, chosen.gigabytes)
        print(f"{'MB':15}{'peak':>10}{'before':>10}{'devices':>10}{'staging':>10}{'largest':>10}{'ratio':>8}")
        fits = measured("load", str(source), chosen.dtype)
        fits &= measured("import", str(source), str(Path(directory) / "out"))
    return int(not fits)


if __name__ == "__main__":
    raise SystemExit(main())
