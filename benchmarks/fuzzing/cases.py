"""One case: a copy of a kind's directory in which something is changed, the same for the same seed and number."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

from benchmarks.fuzzing.mutations import FORMS
from benchmarks.fuzzing.readers import READERS


def make(corpus: Path, kind: str, seed: int, number: int, target: Path) -> str:
    """Write the case, and say in words what was changed."""
    rng = random.Random(f"{seed}/{kind}/{number}")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(corpus / kind, target)
    if kind == "checkpoint" and rng.random() < 0.1:
        return _moved(target / "checkpoints", rng)
    file, form = rng.choice(list(READERS[kind].places(target)))
    path = target / file
    if rng.random() < 0.03 and form != "overrides":  # which are no file to trainfw
        return f"{file}: {_other_thing(path, rng)}"
    data = path.read_bytes()
    path.write_bytes(FORMS[form](data, rng))
    if kind == "checkpoint" and path.name != "manifest.json" and file.parts[0] == "checkpoints" and rng.random() < 0.7:
        _in_manifest(target / Path(*file.parts[:2]), path)
        return f"{file}: {form}, and the manifest says so"
    return f"{file}: {form}"


def _other_thing(path: Path, rng: random.Random) -> str:
    """Something else in a file's place."""
    data = path.read_bytes()
    path.unlink()
    match what := rng.choice(["a pipe", "a directory", "a dangling link", "a link to /dev/zero", "empty", "missing"]):
        case "a pipe":
            os.mkfifo(path)
        case "a directory":
            path.mkdir()
        case "a dangling link":
            path.symlink_to("nowhere")
        case "a link to /dev/zero":
            path.symlink_to("/dev/zero")
        case "empty":
            path.write_bytes(data[:0])
    return what


def _moved(checkpoints: Path, rng: random.Random) -> str:
    """Accidents of whole checkpoints."""
    first, last = sorted(checkpoints.glob("[0-9]*"), key=lambda path: int(path.name))
    what = rng.choice(["renamed", "copied", "swapped", "an empty one", "a file", "a strange name", "a pipe in it"])
    match what:
        case "renamed":
            last.rename(checkpoints / rng.choice(["3", "9", "0", "004"]))
        case "copied":
            shutil.copytree(first, checkpoints / rng.choice(["3", "99"]))
        case "swapped":
            last.rename(checkpoints / "x")
            first.rename(last)
            (checkpoints / "x").rename(first)
        case "an empty one":
            (checkpoints / rng.choice(["1", "5", "99999999999999999999"])).mkdir()
        case "a file":
            (checkpoints / rng.choice(["7", "x"])).write_text("")
        case "a strange name":
            (checkpoints / rng.choice(["\u00b2", "\u0663", "-1", "4.orbax-checkpoint-tmp-1", "[4]", "4 "])).mkdir()
        case _:
            os.mkfifo(last / "params" / "pipe")
            _in_manifest(last, last / "params" / "pipe")
    return f"checkpoints: {what}"


def _in_manifest(checkpoint: Path, file: Path) -> None:
    """Let the manifest describe a file as it is now, as whoever changes one by hand might."""
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    data = file.read_bytes() if file.is_file() else b""
    manifest["sha256"][file.relative_to(checkpoint).as_posix()] = [len(data), hashlib.sha256(data).hexdigest()]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
