"""`trainfw data`, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import write_recipe
from trainfw.cli import main


def trainfw(*arguments: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([sys.executable, "-m", "trainfw", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    file = tmp_path / "corpus.jsonl"
    rows = [{"text": f"Document {n}: {' '.join(str(n * k) for k in range(30))}"} for n in range(50)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return str(file)


def test_report_of_a_source_and_of_a_recipe(corpus: str, tmp_path: Path) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text(f"model: {{preset: tiny}}\ndata: {{source: {corpus}, sequence_length: 64}}\n")
    made = trainfw("data", "report", str(recipe), "data.sequence_length=128", "--json")
    report = json.loads(made.stdout)
    assert report["data"]["sequence_length"] == 128
    assert (report["total"]["documents"], report["total"]["copies"]) == (51, 1)
    assert "Reading documents" in made.stderr
    said = trainfw("data", "report", corpus, "--against", corpus).stdout
    assert "rows of 2,048 tokens" in said
    assert "documents hold 13 words in a row of 51 of its 51 examples (100.0%)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "error: missing.yaml: no such recipe"),
        (["missing"], "error: recipe: data.source 'missing' does not exist"),
        (["python-stdlib", "--against-words", "5"], "error: --against-field and --against-words go with --against"),
        (["python-stdlib", "--against", "missing"], "error: --against missing: source 'missing' does not exist"),
        (["python-stdlib", "data.formt=chat"], "unknown key; did you mean 'data.format'?"),
        (["python-stdlib", "--near", "0.1"], "'--near'"),
    ],
)
def test_errors(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["trainfw", "data", "report", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def prepared(*arguments: str, cwd: Path, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "trainfw", *arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_prepare_and_a_run_finds_it(tmp_path):
    recipe = str(write_recipe(tmp_path))
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    first = prepared("data", "prepare", recipe, cache, cwd=tmp_path)
    lines = first.splitlines()
    assert lines[-4].split() == ["documents", "tokens", "MB"]
    assert [line.split()[0] for line in lines[-3:]] == ["to", "held", "prepared"]
    [place] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert lines[-1].endswith(str(place))
    assert all(len(line.removesuffix(str(place))) <= 80 for line in lines)
    second = prepared("data", "prepare", recipe, cache, cwd=tmp_path)
    assert second.splitlines()[:-1] == lines[:-1]
    assert second.splitlines()[-1].startswith("all is there already: 0.")
    before = (place / "meta.json").stat().st_mtime_ns
    prepared("train", recipe, cache, "train.steps=1", cwd=tmp_path)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [place]
    assert (place / "meta.json").stat().st_mtime_ns == before


def test_a_source_that_is_not_there(tmp_path):
    recipe = str(write_recipe(tmp_path))
    problem = prepared("data", "prepare", recipe, "data.source=nothing.jsonl", cwd=tmp_path, code=2)
    assert problem.startswith("error: ")
    assert "data.source" in problem
    assert "Traceback" not in problem
