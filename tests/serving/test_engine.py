"""What an engine writes, whatever shares its batch; and requests that come, go and fail."""

import threading
import time

import numpy as np
import pytest

from tests.helpers import quicker
from tests.serving.engines import VOCABULARY, drawn, engine_of, prompts
from trainfw.errors import UserError
from trainfw.serving import Full, Sampling, generate

TOKENS = 12


def written(engine, prompt, **sampling):
    return [each.token for each in engine.submit(prompt, Sampling(**{"max_tokens": TOKENS, **sampling}))]


def greedy(model, prompt, tokens=TOKENS):
    return list(generate(model, prompt, max_tokens=tokens, temperature=0))


CASES = {
    "gemma, int8 cache": ("gemma", {"cache": "int8"}),
    "scanned, tensor": ("gemma", {"layout": {"tensor": 2}, "scan_layers": True}),
    "data x tensor": ("dense", {"layout": {"data": 2, "tensor": 2}}),
    "heads shared": ("dense", {"layout": {"tensor": 8}}),
    "experts": ("moe", {"layout": {"expert": 2, "tensor": 2}, "scan_layers": True}),
    "fsdp, int8": ("dense", {"layout": {"fsdp": 2}, "weights": "int8"}),
    "nf4": ("dense", {"weights": "nf4"}),
    "places": ("dense", {"layout": {"tensor": 2}, "adapters": 2, "rank": 4}),
}


@pytest.mark.parametrize("case", quicker(CASES, ["gemma, int8 cache", "data x tensor", "experts", "nf4"]))
def test_every_answer_is_that_of_its_prompt_alone(case):
    kind, options = CASES[case]
    engine, model = engine_of(drawn(kind), **options)
    try:
        asked = prompts(9)  # more than there are slots, of all lengths
        answers = [engine.submit(prompt, Sampling(max_tokens=3 + i)) for i, prompt in enumerate(asked)]
        for i, (prompt, answer) in enumerate(zip(asked, answers)):
            got = [each.token for each in answer]
            want = greedy(model, prompt, 3 + i)
            if options.get("cache") == "int8":  # keys and values are rounded
                got, want = got[:2], want[:2]
            assert got == want, prompt
            assert answer.finish_reason == "length"
    finally:
        engine.close()


@pytest.fixture(scope="module")
def served():
    engine, model = engine_of(drawn("dense"), queue=8)
    yield engine, model
    engine.close()


def test_a_seed_draws_the_same_in_any_company(served):
    engine, _ = served
    sampling = {"temperature": 1.5, "seed": 7}
    alone = written(engine, [1, 2, 3], **sampling)
    others = [engine.submit([5, i], Sampling(max_tokens=30, temperature=2.0, top_k=5)) for i in range(3)]
    assert written(engine, [1, 2, 3], **sampling) == alone  # by the function that filters
    assert written(engine, [1, 2, 3], **sampling | {"seed": 8}) != alone
    for other in others:
        other.cancel()


def test_truncated_draws_and_log_probabilities(served):
    engine, model = served
    prompt, logits = [3, 1, 4, 1, 5], None
    logits = np.asarray(model(np.array([prompt])))[0, -1].astype(np.float64)
    logs = logits - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()
    best = np.argsort(-logs)
    first = [
        next(iter(engine.submit(prompt, Sampling(max_tokens=1, temperature=3.0, top_k=3, seed=seed, logprobs=4))))
        for seed in range(40)
    ]
    assert {each.token for each in first} == set(best[:3].tolist())
    for each in first[:3]:
        assert each.logprob == pytest.approx(logs[each.token], abs=1e-4)
        assert [token for token, _ in each.likeliest] == best[:4].tolist()
        assert [log for _, log in each.likeliest] == pytest.approx(logs[best[:4]].tolist(), abs=1e-4)


class Alternating:
    """Even and odd tokens in turn, five of them."""

    def __init__(self):
        self.taken = []

    def allowed(self):
        bits = 0x55555555 if len(self.taken) % 2 == 0 else 0xAAAAAAAA
        return np.full(-(-VOCABULARY // 32), bits, np.uint32)

    def accept(self, token):
        self.taken.append(token)

    @property
    def ended(self):
        return len(self.taken) == 5


def test_a_constraint_is_kept_step_by_step(served):
    engine, _ = served
    other = engine.submit([9], Sampling(max_tokens=40))
    constrained = engine.submit([1, 2], Sampling(max_tokens=TOKENS, constraint=Alternating()))
    assert [each.token % 2 for each in constrained] == [0, 1, 0, 1, 0]
    assert constrained.finish_reason == "stop"
    assert len(list(other)) == 40


def test_stop_tokens_end_an_answer_without_them(served):
    engine, model = served
    want = greedy(model, [1, 2, 3])
    stop = want[4]
    answer = engine.submit([1, 2, 3], Sampling(max_tokens=TOKENS, stop_ids=frozenset([stop])))
    assert [each.token for each in answer] == want[: want.index(stop)]
    assert answer.finish_reason == "stop"


def test_a_full_queue_refuses_and_cancelled_requests_leave(served):
    engine, model = served
    long = [engine.submit([i], Sampling(max_tokens=60)) for i in range(4)]
    for answer in long:
        answer.next()  # each has a slot
    waiting = [engine.submit([1], Sampling(max_tokens=60)) for _ in range(8)]
    with pytest.raises(Full):
        engine.submit([1], Sampling(max_tokens=60))
    for answer in (*long, *waiting):
        answer.cancel()
    for answer in (*long, *waiting):
        assert len(list(answer)) < 60
        assert answer.finish_reason == "cancelled"
    assert written(engine, [1, 2, 3]) == greedy(model, [1, 2, 3])
    assert engine.counts().queue == engine.counts().slots_used == 0


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], {}, "at least one token"),
        ([VOCABULARY], {}, "not in the vocabulary"),
        ([1] * 60, {"max_tokens": 5}, "room for 4"),
        ([1], {"max_tokens": 0}, "max_tokens = 0"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_k": 0}, "top_k"),
        ([1], {"logprobs": 9}, "0 to 8"),
        ([1], {"stop_ids": 5}, "stop_ids = 5: expected a set of tokens"),
        ([1], {"max_tokens": 2.5}, "max_tokens = 2.5: expected a whole number"),
        ([1], {"adapter": "blue"}, "no 'blue'"),
    ],
)
def test_requests_that_make_no_sense(served, prompt, sampling, message):
    with pytest.raises(UserError, match=message):
        served[0].submit(prompt, Sampling(**{"max_tokens": 4, **sampling}))


def test_closing_lets_answers_end_or_cuts_them_off():
    engine, model = engine_of(drawn("dense"))
    answer = engine.submit([1, 2, 3], Sampling(max_tokens=TOKENS))
    engine.close(drain_seconds=60)
    assert [each.token for each in answer] == greedy(model, [1, 2, 3])
    with pytest.raises(UserError, match="closing"):
        engine.submit([1], Sampling(max_tokens=1))


def test_a_failure_ends_every_answer(monkeypatch):
    engine, _ = engine_of(drawn("dense"))
    monkeypatch.setitem(engine.server._compiled, "decode", lambda *_: 1 / 0)
    answer = engine.submit([1], Sampling(max_tokens=3))
    assert len(list(answer)) <= 1
    assert answer.finish_reason == "error"
    assert "division by zero" in answer.error
    with pytest.raises(UserError, match="has failed"):
        engine.submit([1], Sampling(max_tokens=1))


def test_callbacks_are_told_of_every_token(served):
    engine, _ = served
    told, ended = [], threading.Event()
    answer = engine.submit([1], Sampling(max_tokens=5))
    answer.on_change(lambda: (told.append(time.monotonic()), answer.finish_reason and ended.set()))
    assert ended.wait(60)
    assert 1 <= len(told) <= 6
