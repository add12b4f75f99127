"""Commands whose stdout or stderr is closed, full or gone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers import write_recipe

NEWS = """
import trainfw.cli as cli
from trainfw.cli.terminal import say
from trainfw.streams import go_on_without_output
from trainfw.training import Reporter
def main():
    {mode}
    for _ in range(5000):
        print("a library's line")
        say("ours")
        Reporter().note("a run's")
        say("ours", err=True)
    raise SystemExit({code})
cli.main = main
cli.command()
"""
LOST = {
    ">/dev/full": "failed: stdout: No space left on device\n",
    ">&-": "failed: stdout: Bad file descriptor\n",
    "| exec true": "",
}


def run_it(mode, code, redirect):
    script = NEWS.format(mode=mode, code=code)
    command = f'set -o pipefail; "$0" -c "$1" {redirect}'
    return subprocess.run(["bash", "-c", command, sys.executable, script], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("redirect", [*LOST, "2>&-", "2>/dev/full", ">&- 2>&- <&-", ">/dev/full 2>&1"])
@pytest.mark.parametrize("code", [0, 75])
def test_news_that_nobody_takes_changes_nothing(redirect, code):
    assert run_it("go_on_without_output()", code, redirect).returncode == code


@pytest.mark.parametrize("redirect", LOST)
def test_a_result_that_is_lost_is_a_failure(redirect):
    command = f'set -o pipefail; "$0" -m trainfw recipe show quickstart {redirect}'
    result = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (1, LOST[redirect])


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_without_its_log(tmp_path, processes):
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    for rank in range(processes):  # every write to it fails, as on a full disk
        (run / "logs" / f"rank-{rank}.log").symlink_to("/dev/full")
    recipe = [str(write_recipe(tmp_path)), "--run-dir", str(run), f"parallel.data={processes}"]
    launch = ["launch", "local", *recipe] if processes > 1 else ["train", *recipe]
    command = f'exec "$0" -m trainfw "$@" {">/dev/full 2>&1" if processes > 1 else ">&- 2>&-"}'
    subprocess.run(["bash", "-c", command, sys.executable, *launch], check=True, timeout=300)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 8
    assert (run / "checkpoints" / "8").is_dir()
