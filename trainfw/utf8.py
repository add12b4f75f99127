"""UTF-8 text of others: the byte-order mark that some editors put before it is not part of it, and control characters
are not for a terminal."""

from __future__ import annotations

import codecs
from pathlib import Path

from trainfw.errors import UserError

_OTHERS = {  # the longer first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


# C0 without tab and line feed, DEL, C1, and what turns the direction of text around.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
_CONTROLS |= {
    code: f"\\u{code:04x}" for code in (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
}


def printable(text: str) -> str:
    """Write control characters, which a terminal would obey, as `\\x1b`; tabs and line feeds stay."""
    return text.translate(_CONTROLS)


def without_mark(data: bytes) -> bytes:
    """Drop a UTF-8 byte-order mark, if there is one. Raises ValueError for the mark of another encoding."""
    for mark, name in _OTHERS.items():
        if data.startswith(mark):
            raise ValueError(f"is {name}, as its byte-order mark says; expected UTF-8: iconv -f {name} -t UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def decode_utf8(data: bytes, where: object, line: int = 1) -> str:
    """Decode `data`, which begins at a line of the file that `where` writes, without a byte-order mark.

    Raises UserError, with the line, for what is not UTF-8.
    """
    try:
        return without_mark(data).decode()
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise UserError(
            f"{where}, line {line}: expected UTF-8, found byte 0x{error.object[error.start]:02x}"
        ) from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def read_utf8(file: Path) -> str:
    """Read the text of a file without a byte-order mark, with the line ends of text mode.

    Raises UserError for what is not UTF-8, and OSError as reading does.
    """
    return decode_utf8(file.read_bytes(), file).replace("\r\n", "\n").replace("\r", "\n")
