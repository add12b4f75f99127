"""Remedy for the memory that Orbax takes at every save and does not free."""

from __future__ import annotations

import functools
import json
from typing import Any


@functools.cache
def spare_memory() -> None:
    """Have Orbax ask TensorStore less often for JSON, of which TensorStore 0.1.86 leaks some: 40 KB a save.

    Orbax asks twice for counters, only to log them, and at every array for the spec of its directory.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils as utils

    if not hasattr(utils, "get_tensorstore_raw_bytes") or not hasattr(utils, "ts"):
        return  # another version, which may not need it
    utils.get_tensorstore_raw_bytes = lambda direction=None: 0
    utils.ts = _TensorStore(utils.ts)


class _TensorStore:
    """TensorStore's module, which remembers the specs of directories."""

    def __init__(self, module: Any):
        self._module, self.KvStore = module, _KvStore(module.KvStore)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


class _KvStore:
    def __init__(self, real: Any):
        self._real = real
        resolved = functools.lru_cache(maxsize=64)(lambda text: real.Spec(json.loads(text)).to_json())

        class Spec:
            def __init__(self, spec: dict[str, object]):
                self.spec = spec

            def to_json(self) -> dict[str, object]:
                spec = self.spec
                # TensorStore returns a file's path as it was given, and each step has other paths.
                request = spec | {"path": "/"} if spec.get("driver") == "file" else spec
                answer = dict(resolved(json.dumps(request)))
                return answer | {"path": spec["path"]} if answer.get("path") == "/" else answer

        self.Spec = Spec

    def open(self, spec: Any, **options: Any) -> Any:
        return self._real.open(spec.spec if isinstance(spec, self.Spec) else spec, **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)
