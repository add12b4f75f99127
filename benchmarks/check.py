"""How long `trainfw check` takes and how much memory: python benchmarks/check.py [--sdk 2.32 ...] [RECIPE ...]

Default: every bundled recipe for Neuron, with the newest SDK. One process each, so that peaks are of one check.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time

from trainfw.backends import sdk_versions
from trainfw.errors import UserError
from trainfw.recipe import bundled_recipes, load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--sdk", action="append", choices=sdk_versions(), help="may be given more than once")
    given = parser.parse_args()
    named = given.recipes
    try:
        known = [name for name, path in bundled_recipes().items() if "topology" in path.read_text()]
        recipes = {name: load_recipe(name) for name in named or known}
    except UserError as error:
        parser.error(str(error))
    names = named or [name for name, recipe in recipes.items() if recipe.hardware.topology]
    print(f"{os.cpu_count()} CPUs\n{'recipe':29} {'cores':>6} {'seconds':>8} {'peak GB':>8}  verdict")
    failed = 0
    for name, sdk in itertools.product(names, given.sdk or [None]):
        topology = recipes[name].hardware.load()
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "trainfw", "check", name, *([f"hardware.sdk={sdk}"] if sdk else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        seconds, peak = time.monotonic() - start, usage.ru_maxrss * 1024 / 1e9
        failed |= status
        cores = topology.cores if topology else 0
        print(
            f"{name:29} {cores:6,} {seconds:8.1f} {peak:8.2f}  {lines[-1] if lines else 'nothing printed'}", flush=True
        )
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
