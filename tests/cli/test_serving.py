"""Command lines about servers that cannot be meant: each refused, and none ignored."""

import pytest

from tests.cli.test_errors import run

HARDWARE = ["--hardware", "trn2.3xlarge"]
SERVE = ["llama3.2-1b", "--serve", *HARDWARE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "quickstart", "--slots", "8"], "--slots: goes with --serve"),
        (["plan", "quickstart", "--prompt", "8"], "--prompt: goes with --serve"),
        (["check", "quickstart", "--layout", "tensor=4"], "--layout: goes with --serve"),
        (["plan", "llama3.2-1b", "--serve"], "expected --hardware"),
        (["plan", "llama3.2-1b", "--serve", "--hardware", "trn2.3xlarg"], "did you mean 'trn2.3xlarge'?"),
        (["plan", "llama3.2-1b", "--serve", "--hardware", "x"], "unknown topology; one of: c7g.16xlarge,"),
        (["plan", *SERVE, "--steps", "3"], "without options of other plans"),
        (["plan", *SERVE, "--objective", "cost"], "without options of other plans"),
        (["plan", *SERVE, "train.steps=3"], "without keys of a recipe"),
        (["plan", *SERVE, "--search", "--layout", "tensor=4"], "give it without --layout"),
        (["plan", *SERVE, "--search", "--scale", "50"], "--scale is of one layout"),
        (["plan", *SERVE, "--search", "--out", "best.yaml"], "without options of other plans"),
        (["plan", *SERVE, "--slots", "1,x"], "--slots 1,x: expected a number"),
        (["plan", *SERVE, "--scale", "many"], "--scale many: expected requests a second"),
        (["plan", *SERVE, "--layout", "tensr=4"], "did you mean 'tensor'?"),
        (["plan", *SERVE, "--layout", "tensor=0"], "expected tensor=N once, N at least 1"),
        (["plan", *SERVE, "--weights", "int7"], "--weights int7: expected float32, bfloat16, int8 or nf4"),
        (["check", *SERVE, "--slots", "1,8"], "a check is of one number"),
        (["check", *SERVE, "--compiler"], "goes without --compiler"),
    ],
)
def test_refused(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
