"""How commands end."""

from __future__ import annotations

import signal

import pytest

from trainfw.cli.console import cleaning_up
from trainfw.interop import new_directory


def test_ctrl_c_leaves_nothing_half_written(tmp_path, capsys):
    def write() -> None:
        with cleaning_up(), new_directory(tmp_path / "deep" / "out") as directory:
            (directory / "half").touch()
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit_:
        write()
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is before
