"""An engine that writes what a test tells it to, a token a step for every slot."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np

from trainfw.errors import UserError
from trainfw.serving import Counts, Drawn, Full, Unavailable


class ScriptedAnswer:
    def __init__(self, tokens, sampling, seed):
        self.sampling, self.random = sampling, random.Random(seed)
        self.script = iter(tokens)
        self.finish_reason = self.error = None
        self.cancelled, self.count = False, 0
        self._drawn, self._changed, self._callbacks = deque(), threading.Condition(), []

    def next(self, timeout=None):
        with self._changed:
            if not self._changed.wait_for(lambda: self._drawn or self.finish_reason, timeout):
                raise TimeoutError
            return self._drawn.popleft() if self._drawn else None

    def __iter__(self):
        while (drawn := self.next()) is not None:
            yield drawn

    def on_change(self, callback):
        self._callbacks.append(callback)
        callback()

    def cancel(self):
        self.cancelled = True

    def put(self, drawn, finish=None):
        with self._changed:
            if drawn is not None:
                self._drawn.append(drawn)
                self.count += 1
            self.finish_reason = finish
            self._changed.notify_all()
        for callback in list(self._callbacks):
            callback()


class ScriptedEngine:
    """Writes `script(prompt, sampling)`; of a constraint, tokens that it allows, by the request's seed."""

    def __init__(self, script, *, vocabulary=258, length=512, slots=4, queue=8, adapters=()):
        self.vocabulary, self.length, self.failed = vocabulary, length, None
        self._script, self._slots, self._room = script, slots, queue
        self._adapters = list(adapters)
        self._active, self._queue = [], deque()
        self._lock, self._deadline = threading.Condition(), None
        self._totals = [0, 0, 0]
        self.asked = []
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def adapters(self):
        return tuple(self._adapters)

    def submit(self, prompt, sampling):
        if not 0 < len(prompt) <= self.length - sampling.max_tokens:
            raise UserError("prompt: does not fit")
        if any(not 0 <= token < self.vocabulary for token in prompt):
            raise UserError("prompt: holds what is no token")
        with self._lock:
            if self.failed or self._deadline is not None:
                raise Unavailable(self.failed or "the engine is closing")
            if len(self._queue) >= self._room:
                raise Full
            self._totals[0] += 1
            answer = ScriptedAnswer(self._script(list(prompt), sampling), sampling, sampling.seed)
            self._queue.append(answer)
            self.asked.append((list(prompt), sampling))
            self._lock.notify_all()
            return answer

    def add_adapter(self, name, path):
        if not (Path(path) / "adapter_config.json").exists():
            raise UserError(f"{path}: holds no adapter")
        self._adapters.append(name)

    def remove_adapter(self, name):
        self._adapters.remove(name)

    def counts(self):
        with self._lock:
            return Counts(self._slots, len(self._active), len(self._queue), *self._totals)

    def close(self, drain_seconds):
        with self._lock:
            self._deadline = time.monotonic() + drain_seconds
            self._lock.notify_all()

    def _run(self):
        while True:
            with self._lock:
                self._active = [one for one in self._active if one.finish_reason is None]
                while self._queue and len(self._active) < self._slots:
                    self._active.append(self._queue.popleft())
                if self._deadline is not None and (not self._active or time.monotonic() > self._deadline):
                    break
                if not self._active:
                    self._lock.wait()
                    continue
                active = list(self._active)
            for answer in active:
                self._step(answer)
            time.sleep(0.0005)
        for answer in [*self._active, *self._queue]:
            answer.put(None, "cancelled")

    def _step(self, answer):
        sampling = answer.sampling
        if answer.cancelled:
            return answer.put(None, "cancelled")
        if sampling.constraint is None:
            token = next(answer.script, 257)
        else:
            bits = np.unpackbits(sampling.constraint.allowed().view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits[: self.vocabulary]).tolist()
            token = 257 if 257 in allowed else answer.random.choice(allowed)
        if token is None:
            return None
        if token in sampling.stop_ids:
            return answer.put(None, "stop")
        finish = "length" if answer.count + 1 == sampling.max_tokens else None
        if sampling.constraint is not None:
            sampling.constraint.accept(token)
            finish = "stop" if sampling.constraint.ended else finish
        self._totals[2] += 1
        if sampling.logprobs is None:
            return answer.put(Drawn(token), finish)
        likeliest = tuple((token + i, -0.5 - i) for i in range(sampling.logprobs))
        return answer.put(Drawn(token, -0.5, likeliest), finish)
