"""An S3 server (moto's) in a process of its own, which can stop answering, and go on with its objects."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False)
server.start()
print("started", flush=True)
for command in sys.stdin:
    getattr(server, command.strip())()
    print("done", flush=True)
"""
BUCKET = "corpus"


class Server:
    """A server that `start` runs; its objects stay while it is stopped."""

    def __init__(self) -> None:
        import socket

        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-c", _SERVE, str(self.port)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._heard()

    def tell(self, command: str) -> None:
        """Stop or start it, and wait until that is done."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        self._heard()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    @property
    def client(self) -> Any:
        import boto3

        return boto3.client("s3", endpoint_url=self.endpoint)

    def _heard(self) -> None:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("the S3 server has ended")


@contextmanager
def serving() -> Iterator[Server]:
    """A server with an empty bucket, and the environment that leads to it."""
    import s3fs

    server = Server()
    settings = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_MAX_ATTEMPTS": "1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()  # which would go on with another server's address
    try:
        server.client.create_bucket(Bucket=BUCKET)
        yield server
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.close()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
