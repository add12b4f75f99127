from __future__ import annotations

from collections.abc import Callable, Sequence

from trainfw.errors import UserError
from trainfw.launch import SlurmArray, SlurmJob
from trainfw.sweeping.grid import SweepRun, check_runs
from trainfw.sweeping.result import read_result


def array_of(
    runs: Sequence[SweepRun],
    make_job: Callable[..., SlurmJob] = SlurmJob,
    *,
    at_once: int | None = None,
    write: bool = True,
) -> SlurmArray:
    """Make the runs that are not done the tasks of a Slurm array, and write their recipes where it reads them.

    Args:
        make_job: `SlurmJob`, perhaps with some of its options (`functools.partial`).
        write: false leaves out the recipes.

    Raises UserError where a run cannot start, or none is left.
    """
    check_runs(runs)
    left, directory = [run for run in runs if not read_result(run).finished], runs[0].path.parent
    if not left:
        raise UserError(f"{directory}: all {len(runs)} runs are done; the same command without --slurm lists them")
    jobs = [make_job(run.recipe, str(run.recipe_file), (), run.path) for run in left]
    for run in left if write else ():
        run.write_recipe()
    return SlurmArray(jobs, directory, at_once)
