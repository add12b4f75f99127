"""Remedy for the memory that Orbax takes at every save and does not free."""

from __future__ import annotations

import functools
import json
from typing import Any


@functools.cache
def spare_memory() -> None:
    """Have Orbax ask TensorStore less often for JSON, of which TensorStore 0.1.86 never frees all: 40 KB a save.

    It asks twice for counters that go into a log which nobody reads, and at every array what its directory's spec is.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils as utils

    if not hasattr(utils, "get_tensorstore_raw_bytes") or not hasattr(utils, "ts"):
        return  # of another version, which may do without
    utils.get_tensorstore_raw_bytes = lambda direction=None: 0
    utils.ts = _TensorStore(utils.ts)


class _TensorStore:
    """The module, but for one answer that it remembers."""

    def __init__(self, module: Any):
        self._module, self.KvStore = module, _KvStore(module.KvStore)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


class _KvStore:
    def __init__(self, real: Any):
        self._real = real
        resolved = functools.lru_cache(maxsize=64)(lambda text: real.Spec(json.loads(text)).to_json())

        class Spec:
            def __init__(self, held: dict[str, object]):
                self.held = held

            def to_json(self) -> dict[str, object]:
                held = self.held
                # A file's path is in the answer as it is in the question, and each step has paths of its own.
                asked = held | {"path": "/"} if held.get("driver") == "file" else held
                answer = dict(resolved(json.dumps(asked)))
                return answer | {"path": held["path"]} if answer.get("path") == "/" else answer

        self.Spec = Spec

    def open(self, spec: Any, **options: Any) -> Any:
        return self._real.open(getattr(spec, "held", spec), **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)
