from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import jax
import numpy as np

from trainfw.backends import exchange
from trainfw.errors import RunError


def compare_replicas(params: Any, name: str) -> None:
    """Check that devices which hold the same part of a parameter hold the same bits.

    Each process hashes what its devices keep (copied to the host, array by array). `name` is this comparison's own.
    Raises RunError, in every process, naming the array and the devices that differ from the most.
    """
    mine: dict[str, dict[str, str]] = {}
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        if all(shard.replica_id == 0 for shard in array.global_shards):
            continue
        key = ".".join(str(part.key) for part in path)
        for shard in array.addressable_shards:
            digest = hashlib.blake2b(np.asarray(shard.data).tobytes(), digest_size=8).hexdigest()
            slices = ", ".join(f"{part.start or 0}:{part.stop or ''}" for part in shard.index)
            whole = all(part.start is None and part.stop is None for part in shard.index)
            mine.setdefault(key if whole else f"{key}[{slices}]", {})[str(shard.device)] = digest
    found: dict[str, dict[str, str]] = {}
    for part in exchange(name, mine):
        for key, digests in part.items():
            found.setdefault(key, {}).update(digests)
    for key, digests in found.items():
        ((most, _),) = Counter(digests.values()).most_common(1)
        if odd := [device for device, digest in digests.items() if digest != most]:
            raise RunError(
                f"replicas differ: {key} on {', '.join(odd)} is not what {len(digests) - len(odd)} other devices have; "
                "a device computes or remembers wrongly, and what was saved since the last comparison may be wrong"
            )
