"""How `benchmarks/soak.py` judges, and a soak of a few seconds."""

from __future__ import annotations

import random
import sys

import pytest

from benchmarks import soak
from benchmarks.soak import Sample, growth
from tests.helpers import COMPILED_QUICKLY


def samples(per_save: float, leaked: int) -> list[Sample]:
    """Ten minutes of 5 saves a second, with the noise that memory and files have."""
    rng = random.Random(0)
    return [
        Sample(
            s / 4,
            5 * s // 4,
            300 + per_save * 5 * s / 4 + rng.random() * 20,
            17 + leaked * s // 2400 + rng.randrange(9),
        )
        for s in range(2400)
    ]


def test_growth_is_told_from_noise():
    megabytes, files = growth(samples(0.058, 0))  # what saves once cost
    assert megabytes == pytest.approx(58, abs=3)
    assert files <= soak.MOST_FILES
    megabytes, files = growth(samples(0.0, 20))
    assert abs(megabytes) < soak.MOST_MB / 2
    assert files > soak.MOST_FILES


@pytest.mark.long
def test_a_few_seconds_of_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", COMPILED_QUICKLY)  # without these tests' own devices
    monkeypatch.setattr(soak, "MOST_MB", 1e6)  # so short a time says nothing
    monkeypatch.setattr(soak, "MOST_FILES", 100)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--minutes", "0.15"])
    monkeypatch.setattr(soak.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    assert soak.main() == 0
    assert "MB of memory per 1,000 saves" in capsys.readouterr().out
