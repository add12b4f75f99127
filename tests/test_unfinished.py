"""What is being written appears whole or not at all, and nothing is left of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from trainfw.unfinished import write_text, writing

# Busy outside of the interpreter in the middle of a file, and of a directory.
BUSY = """
import ctypes, sys
from pathlib import Path
from trainfw.cli.console import cleaning_up
from trainfw.unfinished import scratch_directory, writing
out = Path(sys.argv[1])
with cleaning_up(), writing(out / "deep" / "model", directory=True) as directory, writing(out / "file") as file:
    with scratch_directory() as scratch:
        (directory / "half").touch()
        file.write_text("half")
        print(scratch, flush=True)
        for _ in range(2):  # which the signal itself may end
            ctypes.CDLL(None).sleep(60)
"""


def busy(out):
    process = subprocess.Popen([sys.executable, "-c", BUSY, out], stdout=-1, stderr=-1, text=True)
    return process, process.stdout.readline().strip()


@pytest.mark.usefixtures("sighup_is_heard")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(tmp_path, signum):
    process, scratch = busy(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(signum)
    assert process.communicate(timeout=20)[1] == f"\nstopped by {signum.name}; nothing is written\n"
    assert process.returncode == 128 + signum
    assert not list(tmp_path.iterdir())
    assert subprocess.run(["test", "-e", scratch]).returncode == 1


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    process, _ = busy(tmp_path)
    (living,) = (path for path in tmp_path.iterdir() if path.is_file())
    (tmp_path / ".file.mine.partial").touch()
    write_text(tmp_path / "file", "1")
    assert living.exists()
    process.kill()
    process.communicate()
    write_text(tmp_path / "file", "2")
    with writing(tmp_path / "deep" / "model", directory=True) as directory:
        (directory / "all").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "deep", ".file.mine.partial"}
    assert (tmp_path / "file").read_text() == "2"
    assert [str(p.relative_to(tmp_path / "deep")) for p in sorted((tmp_path / "deep").rglob("*"))] == [
        "model",
        "model/all",
    ]


def test_a_full_disk_is_named_and_the_file_stays_as_it_was(tmp_path):
    write_text(tmp_path / "file", "1")
    with pytest.raises(OSError, match="No space left") as error, writing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "3")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "3"


def test_where_nothing_can_be_made_nothing_is(tmp_path):
    (tmp_path / "file").write_text("1")
    for target in (tmp_path / "file" / "below", tmp_path / "new" / ("long" * 100)):
        with pytest.raises(OSError, match=r"Not a directory|File name too long") as error, writing(target):
            pass
        assert str(tmp_path) in error.value.filename
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_pipe_is_written_to_and_not_waited_on_where_nobody_reads(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        write_text(pipe, "text")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
