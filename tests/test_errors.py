from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from trainfw.errors import pip_install

REPOSITORY = Path(__file__).parent.parent


def test_what_an_extra_needs_is_named_package_by_package():
    assert pip_install("datasets") == 'pip install "datasets>=3.2" "pyarrow>=18"'
    extras = importlib.metadata.metadata("trainfw").get_all("Provides-Extra") or []
    for extra in extras:
        assert re.fullmatch(r'pip install( "[^"; ]+")+', pip_install(extra)), extra
        assert "trainfw" not in pip_install(extra)


def test_a_clone_that_was_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert pip_install("datasets") == f"pip install '{REPOSITORY}[datasets]'"


@pytest.mark.parametrize("place", ["trainfw", "recipes", "docs", "benchmarks", "README.md"])
def test_nobody_is_sent_to_a_registry_for_trainfw(place):
    root = REPOSITORY / place
    files = [root] if root.is_file() else [f for f in root.rglob("*") if f.suffix in (".py", ".md", ".yaml", ".sh")]
    assert files
    assert [str(f) for f in files if re.search(r"pip install [^\n`]*trainfw\[", f.read_text(encoding="utf-8"))] == []
