from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest

from trainfw import UserError, backends


def test_simulated_devices_are_there():
    assert backends.current().name == "cpu"
    assert jax.device_count() == 8


def test_another_number_after_jax_has_started_is_refused():
    before = dict(os.environ)
    with pytest.raises(UserError, match="already running with 8"):
        backends.prepare(4)
    assert dict(os.environ) == before


def test_the_users_own_flags_are_kept():
    code = (
        "import os; os.environ['XLA_FLAGS'] = '--xla_cpu_enable_fast_math=false';"
        "from trainfw import backends; backends.prepare(3); import jax; assert jax.device_count() == 3;"
        "assert '--xla_cpu_enable_fast_math=false' in os.environ['XLA_FLAGS']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
