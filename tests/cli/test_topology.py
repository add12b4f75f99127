from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

import pytest

from trainfw.cli import main
from trainfw.hardware import topology_names


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["trainfw", "topology", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    output = capsys.readouterr()
    return int(exit_.value.code or 0), output.out, output.err


def test_alone_it_lists_every_topology(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys)
    assert code == 0
    for name in topology_names():
        assert f"\n{name} " in f"\n{out}"
    assert "64 chips  256 cores      6 TiB  42.69 PFLOP/s bf16" in out
    assert "4 trn2u.48xlarge, 64 Trainium2 chips in a 4x4x4 torus" in out


def test_one_topology(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "trn2-ultraserver")
    assert code == 0
    assert "64 chips x 4 cores = 256 cores, 4 instances (LNC 2: 2 of 8 physical cores each)" in out
    assert "166.75 TFLOP/s a core, 42.69 PFLOP/s in all" in out
    assert "24 GiB a core, 6 TiB in all" in out
    assert "links.neuronlink-z.bandwidth = 128 GB/s" in out
    assert "\x1b" not in out  # Plain in a pipe.


def test_a_price_is_shown_with_its_day(monkeypatch, capsys):
    assert "$2.32 an hour (on demand, Linux, us-east-1, 2026-09-24)" in run(monkeypatch, capsys, "c7g.16xlarge")[1]
    assert "an hour" not in run(monkeypatch, capsys, "c8g.24xlarge")[1]


def test_layout_and_picture(monkeypatch, capsys, tmp_path):
    file = tmp_path / "topology.svg"
    arguments = ("trn2-ultraserver", "--count", "2", "--layout", "tensor=4,fsdp=-1,data=2", "--svg", str(file))
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "layout data(2) * fsdp(64) * tensor(4)" in out
    assert "512 cores, 8 instances" in out
    assert f"wrote {file}" in out
    root = ET.parse(file).getroot()
    assert sum(element.get("class") == "link" for element in root.iter()) == 192


def test_lnc_1(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "trn2.48xlarge", "--lnc", "1", "--layout", "tensor=8")
    assert code == 0
    assert "layout fsdp(16) * tensor(8)" in out
    assert "cores 120-127" in out


def test_colour_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    code, out, _ = run(monkeypatch, capsys, "trn2.48xlarge", "--layout", "tensor=4")
    assert code == 0
    assert "\x1b[38;2;59;130;224m" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trn2.48xlarg",), "topology 'trn2.48xlarg': unknown; did you mean 'trn2.48xlarge'?"),
        (("inf2.48xlarge", "--count", "2"), "no network joins them"),
        (("trn2.48xlarge", "--count", "0"), "count = 0: expected 1 to 1,048,576"),
        (("trn1.32xlarge", "--lnc", "2"), "lnc = 2: trn1.32xlarge has LNC 1 only"),
        (("--layout", "tensor=4"), "need the name of a topology"),
        (("trn2.48xlarge", "--layout", "tensr=4"), "unknown axis 'tensr'; did you mean 'tensor'?"),
        (("trn2.48xlarge", "--layout", "tensor"), "'tensor': expected axis=size"),
        (("trn2.48xlarge", "--layout", ""), "expected axis=size"),
        (("trn2.48xlarge", "--layout", "tensor=four"), "tensor = 'four': expected an integer"),
        (("trn2.48xlarge", "--layout", "tensor=0"), "tensor = 0: expected a positive size"),
        (("trn2.48xlarge", "--layout", "tensor=4,tensor=4"), "tensor is given twice"),
        (("trn2.48xlarge", "--layout", "tensor=-1,fsdp=-1"), "only one axis may be -1"),
        (("trn2.48xlarge", "--layout", "tensor=5"), "tensor(5) = 5 does not divide the 64 cores of 1 x trn2.48xlarge"),
        (("trn2.48xlarge", "--layout", "tensor=4,fsdp=8"), "tensor(4) * fsdp(8) = 32 is not the 64 cores"),
        (("trn2.48xlarge", "--layout", "tensor=8,context=2"), "no device order gives every axis groups"),
        (("trn2.48xlarge", "--svg", "/nonexistent/x.svg"), "/nonexistent/x.svg: No such file"),
    ],
)
def test_bad_input_exits_2(monkeypatch, capsys, arguments, message):
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
