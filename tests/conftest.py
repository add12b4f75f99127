"""Eight simulated CPU devices, before anything imports jax; caches under a temporary directory."""

import os
import signal
import tempfile

import pytest
from hypothesis import HealthCheck, settings

from trainfw import backends

# Tests compile far more than they compute. `prepare` keeps flags that are set.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="trainfw-cache-")
# Warnings of XLA's are to be seen here: of what its partitioner cannot split (tests/program/test_collectives.py).
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"
backends.prepare(8)
import jax

# Started here, whichever test comes first: commands run in this process may ask for another number.
assert jax.device_count() == 8
# A busy machine is no fault of a test.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # as commands set it; this process has read the other


@pytest.fixture
def sighup_is_heard():
    """Also where these tests run under `nohup`, which trainfw's commands heed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def pytest_terminal_summary(terminalreporter):
    """Say how many programs the checks were tried on, where their tests ran."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    if any(report.nodeid.startswith("tests/checking/test_cases.py") for report in reports):
        from tests.checking.cases import counted

        terminalreporter.section("rows of tests/checking/cases")
        for line in counted():
            terminalreporter.write_line(line)
