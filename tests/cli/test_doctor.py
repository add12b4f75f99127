"""The verdict of `trainfw doctor` on Neuron hosts that are directories: tests/backends/neuron/hosts.yaml has them."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainfw import backends
from trainfw.backends import ranges, read_host
from trainfw.cli import main
from trainfw.errors import UserError

HOSTS = yaml.safe_load((Path(__file__).parents[1] / "backends/neuron/hosts.yaml").read_text())
BASE = HOSTS[0]
BIN, SITE = os.path.dirname(sys.executable), sysconfig.get_path("purelib")
WRONG = "WRONG PACKAGE. Please install the package from Neuron Repository - pip.repos.neuron.amazonaws.com\n"
MAPPINGS = ("python_packages", "files")


def complete(host: dict[str, Any]) -> dict[str, Any]:
    """A host with what it has of the first one."""
    whole = {**BASE, "open": {}, "placeholders": {}, "rpm": {}, "shows": [], **host}
    for key in (*MAPPINGS, "dpkg"):
        if whole[key] is not None:
            whole[key] = {k: v for k, v in ({**BASE[key], **host.get(key, {})}).items() if v is not None}
    return whole


def write(root: Path, path: str, text: str, mode: int = 0o644) -> None:
    file = root / path.replace("{bin}", BIN).replace("{site}", SITE).lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(mode)


def build(root: Path, host: dict[str, Any]) -> None:
    """Write the files of a host below `root`."""
    for key in ("python_packages", "placeholders"):
        for name, version in host[key].items():
            about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n{WRONG * (key == 'placeholders')}"
            write(root, f"{SITE}/{name.replace('-', '_')}-{version}.dist-info/METADATA", about)
    for path, text in host["files"].items():
        write(root, path, text)
    for command in host["commands"]:
        write(root, command, "#!/bin/sh\n", 0o755)
    for number in range(host["devices"]):
        write(root, f"/dev/neuron{number}", "")
    if host["dpkg"] is not None:
        removed = "Package: aws-neuronx-oci-hook\nStatus: deinstall ok config-files\nVersion: 2.1\n"
        entries = [f"Package: {n}\nStatus: install ok installed\nVersion: {v}\n" for n, v in host["dpkg"].items()]
        write(root, "/var/lib/dpkg/status", "\n".join([removed, *entries]))
    if host["rpm"]:
        lines = " ".join(shlex.quote(f"{name} {version}") for name, version in host["rpm"].items())
        write(root, "/usr/bin/rpm", f"#!/bin/sh\nprintf '%s\\n' {lines}\n", 0o755)
    for process, devices in host["open"].items():
        pid, _, command = process.partition(" ")
        write(root, f"/proc/{pid}/cmdline", command.replace(" ", "\0"))
        write(root, f"/proc/{pid}/comm", f"{command.split()[0]}\n")
        write(root, f"/proc/{pid}/fd/.keep", "")
        for number, device in enumerate(devices):
            (root / f"proc/{pid}/fd/{number + 3}").symlink_to(f"/dev/{device}")


@pytest.fixture
def doctor(monkeypatch, capsys, tmp_path):
    """Run the command on a host; its exit code and its lines."""

    def run(host: dict[str, Any]) -> tuple[int, list[str]]:
        build(tmp_path, host)
        for name in list(os.environ):
            if name.startswith(("NEURON", "JAX", "TRAINFW")):
                monkeypatch.delenv(name)
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # put back afterwards, whatever the command does
        monkeypatch.delenv("JAX_PLATFORMS")
        for name, value in host["environ"].items():
            monkeypatch.setenv(name, value.replace("{bin}", BIN))
        monkeypatch.setenv("TRAINFW_SYSROOT", str(tmp_path))
        monkeypatch.setattr(platform, "python_version", lambda: host["python"])
        monkeypatch.setattr(sys, "argv", ["trainfw", "doctor"])
        with pytest.raises(SystemExit) as stopped:
            main()
        output = capsys.readouterr()
        assert not output.err
        return stopped.value.code or 0, output.out.splitlines()

    return run


@pytest.mark.parametrize("host", [complete(host) for host in HOSTS], ids=lambda host: host["name"])
def test_the_verdict_on_a_host(host, doctor):
    code, lines = doctor(host)
    verdicts = [line for line in lines if line.startswith(("will fail: ", "note: "))]
    assert len(verdicts) == len(host["says"]), verdicts
    for line, expected in zip(verdicts, host["says"], strict=True):
        assert expected.replace("{bin}", BIN) in line
    assert code == host["exit"]
    assert (code == 1) == any(line.startswith("will fail: ") for line in lines)
    for part in host["shows"]:
        assert any(part.replace("{bin}", BIN) in line for line in lines), part


def test_open_files_of_others_are_said_to_be_hidden(tmp_path, monkeypatch):
    build(tmp_path, complete(BASE))
    write(tmp_path, "/proc/1/cmdline", "init")
    write(tmp_path, "/proc/1/fd/.keep", "")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("/proc/1/fd"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    host = read_host({"TRAINFW_SYSROOT": str(tmp_path), "PATH": BIN})
    assert (host.holders, host.unseen) == ((), 1)


def test_devices_that_do_not_start_are_a_finding(monkeypatch):
    from trainfw.cli import doctor as command

    def current():
        raise RuntimeError("nrt_init failed")

    monkeypatch.setattr(backends, "current", current, raising=False)
    (finding,) = command._started()
    assert finding.fails
    assert "jax does not start on Neuron: nrt_init failed" in str(finding)


def test_ranges():
    assert ranges([]) == ""
    assert ranges(["neuron3"]) == "neuron3"
    assert ranges([f"neuron{n}" for n in (0, 1, 2, 5, 7, 8)]) == "neuron0 to neuron2, neuron5, neuron7 to neuron8"


def test_a_root_that_is_not_there_is_not_an_empty_machine(tmp_path):
    with pytest.raises(UserError, match=r"TRAINFW_SYSROOT = .*/nowhere: expected a directory"):
        read_host({"TRAINFW_SYSROOT": str(tmp_path / "nowhere")})
