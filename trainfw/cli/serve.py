from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from trainfw import backends, serving
from trainfw.cli.console import make_reporter
from trainfw.cli.options import AnyModel, Devices, adapters_by_name, check_choice
from trainfw.cli.terminal import say
from trainfw.errors import UserError, pip_install

if TYPE_CHECKING:
    from typing import Literal

    import jax

    from trainfw.serving import HttpServer, Service

    _Kept = Literal["float32", "bfloat16", "int8", "nf4"]
    _Computed = Literal["float32", "bfloat16"]
    _Cached = Literal["float32", "bfloat16", "int8"]
else:  # any text: `check_choice` says what is wrong with it
    _Kept = _Computed = _Cached = str


def serve(
    model: AnyModel,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="An adapter of the model, asked for by its name.")
    ] = None,
    adapter_dir: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="Adapters below it may be loaded over HTTP.")
    ] = None,
    max_adapters: Annotated[
        int | None, typer.Option(help="Places for adapters (default: as many as given; 8 with --adapter-dir).", min=0)
    ] = None,
    max_rank: Annotated[int, typer.Option(help="The largest rank of an adapter.", min=1)] = 16,
    slots: Annotated[int, typer.Option(help="Requests that are answered at once.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens of prompt and answer that a slot holds.", min=2)] = 4096,
    queue: Annotated[int, typer.Option(help="Most requests that wait; others get 429.", min=1)] = 256,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any that is free.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name (default: the last part of its path).")] = None,
    weights: Annotated[
        _Kept | None, typer.Option(metavar="DTYPE", help="float32, bfloat16, int8 or nf4 (default: as --dtype).")
    ] = None,
    dtype: Annotated[_Computed, typer.Option(metavar="DTYPE", help="Compute in float32 or bfloat16.")] = "float32",
    cache: Annotated[
        _Cached | None,
        typer.Option(metavar="DTYPE", help="float32 (a CPU's default), bfloat16 (--dtype's) or int8."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(metavar="AXIS=N,...", help="Split it over devices: sizes of tensor, expert, fsdp and data."),
    ] = None,
    devices: Devices = None,
    drain: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time that requests have to end after SIGTERM.", min=0)
    ] = 30.0,
) -> None:
    """Serve a model and its adapters over HTTP, to OpenAI's clients.

    TRAINFW_API_KEY in the environment is the key that requests need. A first SIGTERM or SIGINT takes no more requests,
    and leaves once all have ended; a second one leaves at once.
    """
    check_choice("--weights", weights, "float32", "bfloat16", "int8", "nf4")
    check_choice("--dtype", dtype, "float32", "bfloat16")
    check_choice("--cache", cache, "float32", "bfloat16", "int8")
    adapters = adapters_by_name(adapter or [])
    if max_adapters is None:
        max_adapters = max(len(adapters), 8 if adapter_dir else 0)
    if max_adapters < len(adapters):
        raise UserError(f"--max-adapters {max_adapters}: {len(adapters)} are given with --adapter")
    try:
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: {pip_install('serve')}") from None
    sizes = {} if layout is None else serving.read_layout(layout)
    if devices is not None and not sizes:
        raise UserError(f"--devices {devices}: goes with --layout, such as --layout tensor={devices}")
    backends.prepare(devices)
    reporter = make_reporter()

    def ready(server: HttpServer, service: Service) -> None:
        reporter.close()
        at = f"[{host}]" if ":" in host else host
        say(f"serving {', '.join([service.name, *service.engine.adapters])} at http://{at}:{server.port}")
        say(f"  {slots} slots of {length:,} tokens; Ctrl-C ends it")
        if server.is_open:
            say(f"warning: anybody who reaches {at} may use it: {serving.KEY} is not set", err=True)

    stopped_by = serving.serve(
        model, adapters=adapters, adapter_dirs=adapter_dir or (), name=name, host=host, port=port, drain_seconds=drain,
        ready=ready, slots=slots, length=length, queue=queue, places=max_adapters, rank=max_rank, weights=weights,
        compute_dtype=dtype, cache=cache, progress=reporter.progress, layout=sizes or None,
        devices=_first(layout, sizes),
    )  # fmt: skip
    if stopped_by is not None:
        raise typer.Exit(128 + stopped_by)


def _first(layout: str | None, sizes: Mapping[str, int]) -> Sequence[jax.Device] | None:
    """Return as many devices as a layout takes, None for no layout. Raises UserError where there are fewer."""
    import jax

    needed, found = math.prod(sizes.values()), jax.devices()
    if needed > len(found):
        there = f"there {'is' if len(found) == 1 else 'are'} {len(found)}"
        how = f"--devices {needed} simulates them on the CPU"
        raise UserError(f"--layout {layout}: takes {needed} devices, and {there}; {how}")
    return found[:needed] if sizes else None
