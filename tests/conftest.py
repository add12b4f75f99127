"""Eight simulated CPU devices, before anything imports jax; caches under a temporary directory."""

import os
import tempfile

from trainfw import backends

backends.prepare(8)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="trainfw-cache-")
