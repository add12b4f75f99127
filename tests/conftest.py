"""Eight simulated CPU devices, before anything imports jax; caches under a temporary directory."""

import gc
import os
import signal
import tempfile
import time

# jaxlib reads it once, when it is imported: XLA's warnings of what its partitioner cannot split are to be seen here
# (tests/program/test_collectives.py), also by workers, which inherit what is set below.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers import COMPILED_QUICKLY
from trainfw import backends
from trainfw.backends import select

# Tests compile far more than they compute. `prepare` keeps flags that are set.
os.environ["XLA_FLAGS"] = COMPILED_QUICKLY
select.CPU.init_options["xla_backend_optimization_level"] = "0"  # it comes before the flag; tests/program/test_build.py
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share what one of them has compiled
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="trainfw-cache-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.03"
backends.prepare(8)
import jax

# Started here, whichever test comes first: commands run in this process may ask for another number.
assert jax.device_count() == 8
# A busy machine is no fault of a test.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # as commands set it; this process has read the other


def pytest_addoption(parser):
    parser.addoption("--begin-within", type=float, metavar="SECONDS", help="skip tests that would begin later")
    parser.addoption("--begin-at", type=int, default=0, metavar="N", help="begin with the Nth test, wrapping round")


def pytest_configure(config):
    config.began = time.monotonic()


def pytest_collection_modifyitems(config, items):
    if items:
        first = config.option.begin_at % len(items)
        items[:] = items[first:] + items[:first]


def pytest_collection_finish():
    gc.freeze()  # modules stay: there are millions of their objects to look through


def pytest_runtest_setup(item):
    within = item.config.option.begin_within
    if within is not None and time.monotonic() - item.config.began > within:
        pytest.skip("no time is left for it")


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
