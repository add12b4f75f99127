"""Choice of an operation's implementation: a kernel where one fits, else the XLA form that every model has."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

from trainfw.backends.base import AttentionRequest, Backend, DecodingRequest, MatmulRequest
from trainfw.backends.cpu import blocks, decoding, products
from trainfw.backends.gpu import cudnn
from trainfw.backends.neuron import attention as nkilib
from trainfw.errors import UserError, did_you_mean

Request: TypeAlias = AttentionRequest | MatmulRequest | DecodingRequest


@dataclass(frozen=True)
class Candidate:
    """One implementation of an operation."""

    name: str
    refuses: Callable[[Any], str | None]
    """Reason why it cannot do what is asked, in words; None where it can."""
    load: Callable[[Any], Any]
    """The kernel for a request. Raises ImportError where it is not installed."""


@dataclass(frozen=True)
class Kernel:
    """Implementation that was chosen for an operation."""

    name: str
    call: Callable[..., Any] | None
    """None: the XLA form, which is the caller's own."""
    passed_over: tuple[str, ...] = ()
    """`name: why` of candidates before it."""

    def __str__(self) -> str:
        others = f" (not {'; not '.join(self.passed_over)})" if self.passed_over else ""
        return f"{self.name}{others}"


# By operation, then by JAX's platform, best first. Whatever is left takes the XLA form.
KERNELS: dict[str, dict[str, list[Candidate]]] = {
    "attention": {
        "cpu": [Candidate("blocks of queries", blocks.refuses, blocks.load)],
        "gpu": [Candidate("cuDNN flash attention", cudnn.refuses, cudnn.load)],
        "neuron": [Candidate("nkilib flash attention", nkilib.nkilib_refuses, nkilib.load_nkilib)],
    },
    "decoding": {"cpu": [Candidate("weights read once", decoding.refuses, decoding.load)]},
    "matmul": {"cpu": [Candidate("turned operands, float32 results", products.refuses, products.load)]},
}

_own: ContextVar[bool] = ContextVar("own_kernels", default=True)


@contextlib.contextmanager
def own_kernels(allowed: bool) -> Iterator[None]:
    """Allow `resolve` to choose more than the XLA form: not where a program stands for one of other hardware."""
    token = _own.set(allowed)
    try:
        yield
    finally:
        _own.reset(token)


def resolve(operation: str, request: Request, backend: Backend) -> Kernel:
    """Choose the implementation of `operation` for `request` on `backend`; each choice is logged once in a process.

    An attention kernel is called like `trainfw.models`' `attend`: (q_BSHh, k_BTKh, v_BTKh, mask_BST, *, scale,
    softcap) -> o_BSHh, with the shapes of one device: inside shard_map wherever there is more than one. The mask is
    None where every query sees every key.
    """
    if backend.simulated or not _own.get():
        return Kernel("XLA", None)
    if operation not in KERNELS:
        raise UserError(f"operation {operation!r}: has no kernels{did_you_mean(operation, KERNELS)}")
    return _resolve(operation, request, backend.platform)


@functools.cache  # which is also what logs a choice once
def _resolve(operation: str, request: Request, platform: str) -> Kernel:
    passed_over: list[str] = []
    name, call = "XLA", None
    for candidate in KERNELS[operation].get(platform, []):
        problem = candidate.refuses(request)
        if problem is None:
            try:
                name, call = candidate.name, candidate.load(request)
                break
            except ImportError as error:
                problem = f"cannot be imported: {error}"
        passed_over.append(f"{candidate.name}: {problem}")
    kernel = Kernel(name, call, tuple(passed_over))
    # The XLA form is what the CPU does well for the rest.
    level = logging.WARNING if call is None and passed_over and platform != "cpu" else logging.INFO
    logging.getLogger("trainfw").log(level, "%s: %s for %s", operation, kernel, request)
    return kernel
