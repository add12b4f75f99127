"""What every benchmark's result looks like: a JSON file of tables and checks, of which report.py makes one page.

    {"benchmark": name, "date": ..., "machine": {...}, "versions": {...}, "command": "python benchmarks/NAME.py ...",
     "tables": [{"title": ..., "columns": [...], "rows": [[...], ...]}],
     "checks": [{"name": ..., "value": ..., "limit": ..., "ok": true}]}

A script calls `add_arguments(parser)`, prints progress with `say`, and returns `finish(name, tables, checks,
arguments)` as its exit code: 1 where a check is missed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("trainfw", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")

Table = dict[str, Any]
Check = dict[str, Any]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}


def at_most(name: str, value: float, limit: float) -> Check:
    return {"name": name, "value": value, "limit": f"at most {show(limit)}", "ok": bool(value <= limit)}


def at_least(name: str, value: float, limit: float) -> Check:
    return {"name": name, "value": value, "limit": f"at least {show(limit)}", "ok": bool(value >= limit)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the result to this file")
    parser.add_argument("--save", action="store_true", help=f"write the result to benchmarks/{RESULTS.name}")


def writable(text: str) -> Path:
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a directory; expected a file")
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: the directory does not exist")
    return Path(text)


def readable(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return Path(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number")
    return int(text)


def say(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def finish(
    name: str,
    tables: Sequence[Table],
    checks: Sequence[Check],
    arguments: argparse.Namespace,
    packages: Sequence[str] = (),
    *,
    page: bool = False,
) -> int:
    """Print the result, write it where it was asked for; the exit code.

    Args:
        packages: what else has a version.
        page: `--save` writes the result as a page of its own, not as data for report.py.
    """
    result = {
        "benchmark": name,
        "date": str(datetime.date.today()),
        "machine": machine(),
        "versions": versions([*PACKAGES, *packages]),
        "command": command(name, sys.argv[1:]),
        "tables": list(tables),
        "checks": list(checks),
    }
    print(rendered := render(result))
    data = json.dumps(result, indent=1) + "\n"
    files = [(arguments.json, data)] if arguments.json else []
    if arguments.save:
        files.append((RESULTS / f"{name}.md", rendered) if page else (RESULTS / f"{name}.json", data))
    for file, text in files:
        file.write_text(text)
        say(f"wrote {file}")
    return int(not all(check["ok"] for check in checks))


def command(name: str, given: Sequence[str]) -> str:
    """How to measure it again; where the result went is left out."""
    kept: list[str] = []
    words = iter(given)
    for word in words:
        if word == "--json":
            next(words, None)
        elif word != "--save" and not word.startswith("--json="):
            kept.append(word)
    return shlex.join(["python", f"benchmarks/{name}.py", *kept])


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def versions(packages: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def render(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    lines = [f"## {result['benchmark']}", "", f"`{result['command']}`", ""]
    where = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines += [f"{result['date']}; {where}; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}", ""]
    for one in result["tables"]:
        lines += [f"**{one['title']}**", "", *_grid(one["columns"], one["rows"]), ""]
    if result["checks"]:
        rows = [[c["name"], c["value"], c["limit"], "yes" if c["ok"] else "**missed**"] for c in result["checks"]]
        lines += _grid(["check", "value", "limit", "holds"], rows)
    return "\n".join(lines).rstrip() + "\n"


def _grid(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [list(columns), *([show(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    right = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    drawn = [
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return [drawn[0], rule, *drawn[1:]]


def show(value: Any) -> str:
    """A figure with as many digits as it is good for."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}" if size >= 1 or not size else f"{value:.3g}"
