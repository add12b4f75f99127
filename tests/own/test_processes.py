"""Two processes with callbacks of their own."""

from __future__ import annotations

import pytest

from tests.helpers import in_two_processes, losses, write_recipe

WORKER = """
import sys
from trainfw import backends, load_recipe
recipe, run = sys.argv[1:]
loaded = load_recipe(recipe, ["train.steps=20"])
wiring = backends.prepare(1, hardware=loaded.hardware, layout={"data": 2})
backends.connect(wiring, 120)
import jax, trainfw

class Asks(trainfw.Callback):
    def step(self, step, metrics):
        if step == 3 and jax.process_index() == 1:
            FAILS
            return "enough"

try:
    result = trainfw.train(loaded, run_dir=run, callbacks=[Asks()])
    print("ended", result.step, result.stopped, flush=True)
except trainfw.RunError as error:
    print("failed:", error, flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("fails", [False, True])
def test_all_stop_at_the_step_at_which_one_asks(tmp_path, fails):
    recipe = write_recipe(tmp_path, parallel={"data": 2})
    code = WORKER.replace("FAILS", 'raise KeyError("x")' if fails else "pass")
    both = in_two_processes(code, recipe, tmp_path / "run", XDG_CACHE_HOME=str(tmp_path / "cache"))
    said = [[line for line in one.stdout.splitlines() if line.startswith(("ended", "failed"))] for one in both]
    assert said[0] == said[1] != [], both
    last = max(losses(tmp_path / "run"))
    if fails:
        assert "failed: callback Asks at step 3: step: KeyError: 'x'; what was saved is kept" in said[0]
    else:
        assert said[0] == [f"ended {last} Asks at step 3: enough"]
    assert 3 <= last < 20
    assert (tmp_path / "run" / "checkpoints" / str(last)).is_dir()
