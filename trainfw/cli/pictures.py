"""Pictures from the command line: `trainfw generate` of a run of a model of images."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainfw import backends, training
from trainfw.cli.console import make_reporter
from trainfw.cli.options import check_page
from trainfw.cli.terminal import say
from trainfw.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from trainfw.weights import Which


def draw(
    run: str,
    prompts: Sequence[tuple[str | None, str]],
    *,
    out: str | None,
    count: int | None,
    scale: int | None,
    step: int | None,
    which: Which | None,
    seed: int,
    adapters: Mapping[str, str],
    **settings: object,
) -> None:
    """Draw `count` pictures for each prompt, or in all for a model without prompts, and write them as one PNG file.

    Args:
        prompts: (the name of its adapter, or None; text)
    """
    if out is None:
        raise UserError("--out: expected a file for the pictures, such as --out pictures.png")
    file = Path(out)
    if file.suffix.lower() != ".png":
        raise UserError(f"--out {out}: pictures are written as PNG; expected a name that ends with .png")
    check_page("--out", file)
    if file.exists():
        raise UserError(f"--out {out}: exists already; name another file")
    if count is not None and not 1 <= count <= 4096:
        raise UserError(f"--count {count}: expected 1 to 4096")
    if scale is not None and not 1 <= scale <= 64:
        raise UserError(f"--scale {scale}: expected 1 to 64")
    each = count or 1
    asked: list[str | None] = [prompt for _, prompt in prompts for _ in range(each)]
    asked = asked or [None] * each
    chosen = [name for name, _ in prompts for _ in range(each)] or None
    backends.prepare()
    with contextlib.closing(make_reporter()) as reporter:
        drawer = training.load_drawer(run, count=len(asked), step=step, weights=which, adapters=adapters)
        given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        pictures = drawer.draw(asked, seed=seed, adapters=chosen, progress=reporter.progress, **given)
    # A row for each prompt, where there are several.
    columns = each if len(prompts) > 1 and each > 1 else None
    whole = training.grid(pictures, columns, scale or 1)
    file.write_bytes(training.encode_png(whole))
    _preview(training.grid(pictures, columns))
    say(f"{len(asked)} picture{'s' * (len(asked) > 1)} in {out} ({whole.shape[1]} x {whole.shape[0]})")


def _preview(picture: np.ndarray) -> None:
    """Show a picture in a terminal that has the colours and the room: two pixels in each character's place."""
    import numpy as np

    if not sys.stdout.isatty() or os.environ.get("COLORTERM") not in ("truecolor", "24bit"):
        return
    height, width, _ = picture.shape
    if width > shutil.get_terminal_size().columns:
        return
    rgb = np.broadcast_to(picture, (height, width, 3))
    rgb = np.concatenate([rgb, np.full((height % 2, width, 3), 255, np.uint8)])
    for upper, lower in zip(rgb[::2], rgb[1::2]):
        cells = (f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m▀" for a, b in zip(upper, lower))
        say("".join(cells) + "\x1b[0m")
