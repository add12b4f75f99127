"""One page of every result in benchmarks/results: python benchmarks/report.py [--check]

Reads the JSON that benchmarks write with `--save` (reporting.py says its form) and writes results/report.md. With
`--check`, writes nothing, and exits 1 where the page is not the one that the results make.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import RESULTS, render

KEYS = {"benchmark", "date", "machine", "versions", "command", "tables", "checks"}


def page(directory: Path) -> str:
    """Raises ValueError for a file that is not a result."""
    results = []
    for file in sorted(directory.glob("*.json")):
        try:
            result = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}") from error
        if not isinstance(result, dict) or not result.keys() >= KEYS:
            raise ValueError(f"{file}: is no result of a benchmark; it needs {', '.join(sorted(KEYS))}")
        results.append(result)
    if not results:
        raise ValueError(f"{directory}: has no results")
    checks = [check for result in results for check in result["checks"]]
    missed = [f"{r['benchmark']}: {c['name']}" for r in results for c in r["checks"] if not c["ok"]]
    holds = f"{len(checks) - len(missed)} of {len(checks)} checks hold"
    head = (
        "# What the benchmarks measured\n\n"
        "Made of `benchmarks/results/*.json` by `python benchmarks/report.py`. Each section says the machine, the\n"
        "versions and the command that measures it again.\n\n"
        f"{holds}{'; missed: ' if missed else ''}{', '.join(missed)}.\n"
    )
    return "\n".join([head, *map(render, results)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the directory (default: benchmarks/results)")
    arguments = parser.parse_args()
    if not arguments.results.is_dir():
        parser.error(f"--results {arguments.results}: is not a directory")
    file = arguments.results / "report.md"
    try:
        text = page(arguments.results)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        same = file.is_file() and file.read_text() == text
        print(f"{file.name}: {'as the results are' if same else 'is not what the results make; run report.py'}")
        return int(not same)
    file.write_text(text)
    print(f"wrote {file.name}: {text.count(chr(10) + '## ')} benchmarks")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
