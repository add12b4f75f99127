"""Files of rows, whatever a crash or a stranger left in them."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import Heard, tiny_recipe
from trainfw import UserError
from trainfw.recipe import FaultsConfig
from trainfw.training import RunDirectory, loggers
from trainfw.training.faults import FaultLog, Growth
from trainfw.training.loggers import MetricsLog
from trainfw.training.records import EvaluationRow, FaultRow, MetricsRow, SessionRow, append_rows, stream_rows
from trainfw.training.sessions import Sessions

SECONDS = {"start": 4.0, "compile": 6.0, "step": 80.0, "validation": 5.0, "save": 5.0, "lost": 0.0}
ROWS = {
    MetricsRow: {"step": 3, "loss": 2.5, "mfu": None, "validation_bits_per_byte": 1.5, "goodput": 1},
    EvaluationRow: {
        "step": 0,
        "example": 1,
        "prompt": "a",
        "reference": "b",
        "output": "c",
        "max_tokens": 4,
        "chrf": 0.5,
    },
    FaultRow: {"step": 6, "kind": "spike", "policy": "rollback", "row": 40, "rows": 8, "loss": "nan"},
    SessionRow: {"session": 0, "from": 0, "step": 8, "started": 1e9, "time": 1e9 + 100, "boot": "a", "uptime": 5.0}
    | {f"{name}_seconds": value for name, value in SECONDS.items()},
}
ODD = st.sampled_from([None, True, -1, 0, 1, 2**63, 10**400, 1e300, -1e300, 0.5, "", "x", [], [[]], {}, {"step": 1}])


@st.composite
def edited(draw, row):
    """Lines of a file of such rows, some of them edited, cut short or run together."""
    lines = []
    for _ in range(draw(st.integers(1, 4))):
        one = dict(row)
        for _ in range(draw(st.integers(0, 2))):
            key = draw(st.sampled_from([*row, "other"]))
            if draw(st.booleans()):
                one.pop(key, None)
            else:
                one[key] = draw(ODD)
        line = json.dumps(one).encode() + b"\n"
        lines.append(line[: draw(st.integers(0, len(line)))] if draw(st.integers(0, 3)) == 0 else line)
    lines.append(draw(st.sampled_from([b"", b"\0" * 9, b"NaN\n", b"[" * 3000 + b"\n", b'{"step": NaN}\n', b"\xff\n"])))
    return b"".join(draw(st.permutations(lines)))


@pytest.mark.parametrize("kind", ROWS)
def test_edits_are_left_out_and_what_is_added_is_read(kind, tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "file.jsonl"

    @settings(max_examples=300, deadline=None)
    @given(edited(ROWS[kind]))
    def look(data):
        file.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = list(stream_rows(file, kind))
            append_rows(file, [ROWS[kind]])
            assert list(stream_rows(file, kind)) == [*before, ROWS[kind]]
            for row in before:
                use(kind, row, file)

    look()


def use(kind, row, file):
    """As whoever reads it does."""
    if kind is MetricsRow and row.get("loss") is not None:
        Growth(row["loss"]).seen(1.0)
        f"{row.get('validation_bits_per_byte') or 0:.3f} {row['step']}"
    elif kind is EvaluationRow:
        assert {(row["example"], row["prompt"]): row["output"].strip()}
    elif kind is FaultRow:
        run = RunDirectory(file.parent)
        run.faults_file = file
        try:
            assert len(FaultLog(run, FaultsConfig(), 0, writes=False).rows) <= 2**22
        except UserError as error:
            assert "put it right, or delete the line" in str(error)  # noqa: PT017
    elif kind is SessionRow:
        found = Sessions(file, 4).goodput(9, SECONDS)
        assert 0 <= found.fraction <= 1
        assert str(found)


def test_a_row_that_is_none_is_named(tmp_path):
    file = tmp_path / "faults.jsonl"
    append_rows(file, [ROWS[FaultRow]])
    file.open("a").write('{"step": 7, "ki')  # a crash
    assert list(stream_rows(file, FaultRow, all_count=True)) == [ROWS[FaultRow]]
    append_rows(file, [ROWS[FaultRow], ROWS[FaultRow] | {"row": None}])
    with pytest.raises(UserError, match=r"faults\.jsonl, line 4: row = null: expected a valid integer; put it right"):
        list(stream_rows(file, FaultRow, all_count=True))
    with pytest.warns(UserWarning, match=r"faults\.jsonl: left out: line 4: row = null: expected"):
        assert len(list(stream_rows(file, FaultRow))) == 2


def test_rows_that_are_left_out_are_bounded_together(tmp_path):
    run, row = RunDirectory(tmp_path), ROWS[FaultRow] | {"rows": 2**20}
    append_rows(run.faults_file, [row | {"row": 10**9 + i * 2**20} for i in range(4)])
    assert len(run.faults()) == 4
    append_rows(run.faults_file, [row])
    with pytest.raises(UserError, match=r"rollbacks leave out 5,242,880 rows of data; expected 4,194,304 at most"):
        run.faults()


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_full_disk_took_half_of_is_taken_back(tmp_path, monkeypatch):
    file = tmp_path / "file.jsonl"
    append_rows(file, [{"step": 1}])
    write = os.write
    taken = iter([True])
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]) if next(taken, False) else no_space())
    with pytest.raises(OSError, match="No space left"):
        append_rows(file, [{"step": 2}])
    assert file.read_text() == '{"step": 1}\n'


def test_metrics_that_the_disk_does_not_take_come_later(tmp_path, monkeypatch):
    run, heard = RunDirectory(tmp_path), Heard()
    log = MetricsLog(run, None, heard)
    log.write({"step": 1, "loss": 1.0})
    with monkeypatch.context() as full:
        full.setattr(loggers, "append_rows", no_space)
        full.setattr(RunDirectory, "drop_after", no_space)
        log.write({"step": 2, "loss": 1.0})
        log.write({"step": 3, "loss": 1.0})
        log.rewind(1)
        log.write({"step": 2, "loss": 0.5})
        assert [row["step"] for row in log.rows()] == [1, 2]
    log.write({"step": 3, "loss": 0.25})
    log.close()
    assert [(row["step"], row["loss"]) for row in run.metrics()] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    where = f"{tmp_path}: metrics"
    assert heard.notes == [
        f"warning: {where} cannot be written: No space left on device; they are kept for later",
        f"{where} are written again",
    ]


def test_validations_are_read_from_the_file_once(tmp_path, monkeypatch):
    def bits(step: int) -> dict[str, float]:
        return {"step": step, "validation_loss": 8.0 - step}

    run = RunDirectory(tmp_path)
    append_rows(run.metrics_file, [{"step": 0, "loss": 1.0}, bits(0), bits(2), {"step": 3, "loss": 1.0}])
    log = MetricsLog(run, 3, Heard())
    assert log.validations() == [bits(0), bits(2)]
    with monkeypatch.context() as unread:
        unread.setattr(RunDirectory, "metrics", None)
        log.write(bits(4))
        assert log.validations() == [bits(0), bits(4)]
    log.rewind(2)
    assert log.validations() == [bits(0), bits(2)]


def test_a_directory_called_like_a_store_is_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s3:x").mkdir()
    log = MetricsLog(RunDirectory("s3:x"), None, Heard())
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert list(Path("s3:x/tensorboard").iterdir())


def test_faults_that_the_disk_does_not_take_come_later(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    growth = Growth(1.0)
    growth.now = 20.0
    log = FaultLog(run, FaultsConfig(), 0, writes=True)

    def steps():
        return [row["step"] for row in run.faults()]

    log.grown(3, 16, growth)
    for step, happens, then in ((2, log.rewind, []), (4, lambda step: log.grown(step, 24, growth), [4])):
        before = steps()
        with monkeypatch.context() as full:
            full.setattr("trainfw.training.faults.append_rows", no_space)
            full.setattr("trainfw.training.faults.rewrite_rows", no_space)
            happens(step)
        assert steps() == before
        log.catch_up()
        assert steps() == then


@pytest.mark.parametrize("name", ["metrics", "evaluation", "faults", "sessions"])
def test_what_is_no_file_is_said_before_anything_is_written(name, tmp_path):
    file = tmp_path / "run" / f"{name}.jsonl"
    file.parent.mkdir()
    os.mkfifo(file)
    with pytest.raises(UserError, match=rf"{name}\.jsonl: is not a regular file"):
        RunDirectory(file.parent).check(tiny_recipe(tmp_path), "auto", [])
    assert os.listdir(file.parent) == [file.name]


FILES = ["run.json", "recipe.yaml", "metrics.jsonl", "evaluation.jsonl", "faults.jsonl", "sessions.jsonl"]


@pytest.mark.parametrize("name", [*FILES, "tokenizer/tokenizer.json"])
def test_a_link_out_of_the_run_directory_is_refused(name, tmp_path):
    (precious := tmp_path / "precious").write_text("")
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.symlink_to(precious)
    with pytest.raises(UserError, match=rf"{name}: leads to .*precious, outside of the run directory"):
        RunDirectory(tmp_path / "run").check(tiny_recipe(tmp_path), "auto", [])
    assert precious.read_text() == ""


def test_a_run_directory_may_be_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    assert RunDirectory(tmp_path / "run").check(tiny_recipe(tmp_path), "auto", []) is None
