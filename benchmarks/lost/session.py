"""A session of a run that says what it has saved: python -m benchmarks.lost.session RECIPE RUN STATES [KEY=VALUE ...]

Once a save counts as done (`Checkpoints.wait` has returned, or the next `save`), `saved-STEP` is marked in the journal.
Digests of the arrays of each step that was saved are written to STATES.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def digests(*trees: Any) -> list[str]:
    import jax
    import numpy as np

    return [hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for leaf in jax.tree.leaves(trees)]


def mark(name: str) -> None:
    with contextlib.suppress(OSError):
        os.open(f"/lost-mark/{name}", os.O_RDONLY)


def main(recipe: str, run: str, out: str, *overrides: str) -> None:
    from trainfw import backends

    backends.prepare(1)
    from trainfw import load_recipe
    from trainfw.checkpoint import Checkpoints
    from trainfw.training import Reporter, train

    states: dict[int, list[str]] = {}
    pending: list[int] = []
    save, wait = Checkpoints.save, Checkpoints.wait

    def done() -> None:
        while pending:
            mark(f"saved-{pending.pop()}")

    def marking_save(self: Checkpoints, step: int, params: Any, rest: Any, *others: Any, **named: Any) -> bool:
        states[step] = digests(params, rest)
        started = save(self, step, params, rest, *others, **named)
        done()
        pending.append(step)
        return started

    def marking_wait(self: Checkpoints, **named: Any) -> None:
        wait(self, **named)
        done()

    Checkpoints.save, Checkpoints.wait = marking_save, marking_wait  # type: ignore[method-assign]
    train(load_recipe(recipe, overrides), run_dir=run, reporter=Reporter())
    done()
    Path(out).write_text(json.dumps(states))


if __name__ == "__main__":
    main(*sys.argv[1:])
