"""Clients that mean harm, are slow, or go away; and a server that is told to stop."""

import contextlib
import gc
import json
import signal
import subprocess
import sys
import threading
import time

import openai
import pytest

from tests.serving.hostile import ASKED, HOSTILE, LOAD, request
from tests.serving.servers import connect, exchange, response, serving
from trainfw.errors import UserError
from trainfw.serving import http, service
from trainfw.serving.bodies import TextAsked


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for name in ("secret", "open/good"):
        (root / name).mkdir(parents=True)
        (root / name / "adapter_config.json").write_text("{}")
    (root / "open/link").symlink_to(root / "secret")
    return [root / "open"]


@pytest.fixture(scope="module")
def server(directories):
    with serving(adapter_dirs=directories) as server:
        yield server


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_requests_are_refused(server, case):
    data, status = HOSTILE[case]
    got, head, body = exchange(server, data)
    assert got == status
    if "application/json" in head:
        assert json.loads(body)["error"]["message"]


def test_texts_that_no_slot_holds_are_refused_before_they_are_encoded(server, monkeypatch):
    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(service, "text_prompts", fail)
    monkeypatch.setattr(service.Chat, "prompt", fail)
    for case in ("a long prompt", "a long message"):
        assert b"context_length_exceeded" in exchange(server, HOSTILE[case][0])[2]


def test_nobody_elses_stream_is_harmed(server):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any", max_retries=0)
    with client.completions.create(model="model", prompt="forever", max_tokens=500, stream=True) as chunks:
        texts = [next(iter(chunks)).choices[0].text]
        threads = [threading.Thread(target=exchange, args=(server, data)) for data, _ in HOSTILE.values()]
        for thread in threads:
            thread.start()
        silent = [connect(server) for _ in range(50)]
        for sock in silent:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")  # and no more
        texts += [chunk.choices[0].text for chunk in chunks]
        for thread in threads:
            thread.join()
        for sock in silent:
            sock.close()
    assert "".join(texts) == ("la " * 167)[:500]


def test_a_flood_is_answered_by_429(server):
    statuses = []

    def ask():
        statuses.append(exchange(server, request({**ASKED, "prompt": "forever", "max_tokens": 400}))[0])

    threads = [threading.Thread(target=ask) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    assert exchange(server, request(ASKED))[0] == 200


def until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_request_that_was_refused_is_not_held(server):
    gc.collect()
    gc.disable()  # which would find it in time, but not before many others
    try:
        exchange(server, HOSTILE["a long prompt"][0])
        until(lambda: not any(type(each) is TextAsked for each in gc.get_objects()))
    finally:
        gc.enable()


@pytest.mark.parametrize("stream", [True, False])
def test_the_slots_of_vanished_clients_are_freed(server, stream):
    used = lambda: server.engine.counts().slots_used  # noqa: E731
    until(lambda: used() == 0)
    with connect(server) as sock:
        sock.sendall(request({**ASKED, "prompt": "forever", "max_tokens": 500, "n": 3, "stream": stream}))
        until(lambda: used() == 3)
        given = list(server.engine._active)
    until(lambda: used() == 0)
    assert all(answer.finish_reason == "cancelled" for answer in given)


def test_a_client_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(http, "WRITE_SECONDS", 0.2)
    with serving(length=1 << 22, slots=16, queue=16) as server, connect(server) as sock:
        long = {"prompt": "forever", "max_tokens": 4_000_000, "n": 16, "logprobs": 8, "stream": True}
        sock.sendall(request({**ASKED, **long}))
        until(lambda: server.engine.counts().slots_used == 16)
        until(lambda: server.engine.counts().slots_used == 0)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HT", request(ASKED)[:-5]])
def test_a_client_that_sends_half_is_told_so(monkeypatch, sent):
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(http, "BODY_SECONDS", 0.2)
    with serving() as server, connect(server) as sock:
        sock.sendall(sent)
        assert response(sock)[0] == 408


def test_adapters_come_and_go(server):
    good = {"lora_name": "poet", "lora_path": "good"}
    assert exchange(server, request(good, LOAD))[::2] == (200, b"Success: LoRA adapter 'poet' added successfully.")
    assert exchange(server, request(good, LOAD))[0] == 400
    assert b"poet <hi>" in exchange(server, request({**ASKED, "model": "poet", "prompt": "hi"}))[2]
    assert exchange(server, request({"lora_name": "poet"}, "/v1/unload_lora_adapter"))[0] == 200
    assert exchange(server, request({**ASKED, "model": "poet"}))[0] == 404


def test_an_adapter_that_goes_away_as_it_is_asked_for_is_not_found(server, monkeypatch):
    def submit(prompt, sampling):
        server.engine.remove_adapter("poet")
        raise UserError("adapter: no 'poet'")

    assert exchange(server, request({"lora_name": "poet", "lora_path": "good"}, LOAD))[0] == 200
    monkeypatch.setattr(server.engine, "submit", submit)
    assert exchange(server, request({**ASKED, "model": "poet"}))[0] == 404


def test_without_directories_no_adapter_is_loaded():
    with serving() as server:
        assert exchange(server, request({"lora_name": "a", "lora_path": "good"}, LOAD))[0] == 403


def test_an_engine_that_failed_is_said():
    with serving() as server:
        server.engine.failed = "the engine has failed: no memory"
        assert exchange(server, request(ASKED))[0] == 503
        assert exchange(server, request(path="/health", method="GET"))[0] == 503


def started(drain):
    code = """
import sys
from tests.serving.servers import *
service = Service(ScriptedEngine(script, length=1 << 20), TOKENIZER, "model", {})
server = HttpServer(service, bind("127.0.0.1", 0), drain_seconds=float(sys.argv[1]))
print(server.port, flush=True)
server.run_until_stopped()
sys.exit(server.stopped_by)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(drain)], stdout=subprocess.PIPE, text=True)
    process.port = int(process.stdout.readline())
    return process


def asked_of(process, **options):
    def ask():
        with contextlib.suppress(ConnectionRefusedError):
            return connect(process)

    while (sock := ask()) is None:
        time.sleep(0.01)
    sock.sendall(request({**ASKED, "prompt": "forever", "stream": True, **options}))
    assert b"200 OK" in sock.recv(4096)
    return sock


def test_sigterm_lets_answers_end():
    process = started(20)
    with asked_of(process, max_tokens=2000) as sock:
        process.send_signal(signal.SIGTERM)
        rest = b""
        while part := sock.recv(65536):
            rest += part
    assert b'"finish_reason": "length"' in rest
    assert rest.rstrip(b"\r\n0").endswith(b"data: [DONE]")
    assert process.wait(10) == signal.SIGTERM


def test_sigterm_ends_what_takes_too_long():
    process = started(0.3)
    with asked_of(process, max_tokens=1_000_000) as sock:
        process.send_signal(signal.SIGTERM)
        rest = b""
        while part := sock.recv(65536):
            rest += part
    assert b"the server is stopping" in rest
    assert process.wait(10) == signal.SIGTERM


def test_a_second_signal_ends_it_at_once():
    process = started(60)
    with asked_of(process, max_tokens=1_000_000):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # a signal that comes before the first was seen counts as the same
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
