"""Servers over scripted engines, and raw requests to them."""

from __future__ import annotations

import contextlib
import itertools
import socket
from dataclasses import replace

from tests.serving.scripted import ScriptedEngine
from trainfw.data import byte_tokenizer
from trainfw.serving import HttpServer, Service, bind

TEMPLATE = (
    "{% if tools %}# Tools, as <tool_call>{{ tools | tojson }}{{ '\n' }}{% endif %}{% for m in messages %}"
    "{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}"
    "<|eos|>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TOKENIZER = replace(byte_tokenizer(), settings={"chat_template": TEMPLATE})
REPLIES = {
    "count": "1 2 3 4 5 6 7 8 9",
    "smile": "é 😀 ü",
    "weather": 'Well. <tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>',
    "malformed": "<tool_call>{nonsense}</tool_call>",
    "torn": b"a\xf0\x9f",
}


def script(prompt, sampling):
    """Replies by a word of the prompt's last line, or its adapter and the prompt itself."""
    text = TOKENIZER.decode(prompt)
    asked = text.removesuffix("assistant:").strip().splitlines()[-1] if text.strip() else ""
    if "falter" in asked:  # and says no more, until it is cancelled
        return itertools.chain(b"la la", itertools.repeat(None))
    if "forever" in asked:
        return itertools.cycle(b"la ")
    for word, reply in REPLIES.items():
        if word in asked:
            return reply.encode() if isinstance(reply, str) else reply
    return f"{sampling.adapter or 'base'} <{text}>".encode()


@contextlib.contextmanager
def serving(*, forms=None, adapter_dirs=(), api_key=None, drain_seconds=5.0, tokenizer=TOKENIZER, **options):
    engine = ScriptedEngine(script, **options)
    service = Service(engine, tokenizer, "model", forms or {}, adapter_dirs)
    server = HttpServer(service, bind("127.0.0.1", 0), api_key=api_key, drain_seconds=drain_seconds)
    server.start()
    try:
        yield server
    finally:
        server.close()


def connect(server):
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def exchange(server, data):
    """Send bytes; return the status, the head and the body of the answer."""
    with connect(server) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        return response(sock)


def response(sock):
    got = b""
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(65536):
            got += part
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode(), body
