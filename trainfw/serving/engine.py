"""Continuous batching: requests enter and leave the slots of a server while the others go on."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from trainfw.errors import UserError, did_you_mean
from trainfw.models import vocabulary_of
from trainfw.program import Rows, Server
from trainfw.sampling import DrawnTokens, Draws
from trainfw.serving.adapters import AdapterPlaces
from trainfw.serving.requests import Counts, Drawn, FinishReason, Full, Sampling, Unavailable, check_request
from trainfw.weights import Tree


class SlotAnswer:
    """An `Answer` of a `SlotEngine`."""

    def __init__(self, prompt: list[int], sampling: Sampling, seed: int, place: int):
        self.prompt, self.sampling, self.seed, self.place = prompt, sampling, seed, place
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.cancelled = False
        self._tokens: deque[Drawn] = deque()
        self._changed = threading.Condition()
        self._callbacks: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[Drawn]:
        while (drawn := self.next()) is not None:
            yield drawn

    def next(self, timeout: float | None = None) -> Drawn | None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._tokens or self.finish_reason is not None, timeout):
                raise TimeoutError
            return self._tokens.popleft() if self._tokens else None

    def on_change(self, callback: Callable[[], None]) -> None:
        with self._changed:
            self._callbacks.append(callback)
            told = bool(self._tokens) or self.finish_reason is not None
        if told:
            callback()

    def cancel(self) -> None:
        self.cancelled = True

    def put(self, drawn: Drawn | None, finish: FinishReason | None = None, error: str | None = None) -> None:
        """Add a token, or the end, or both. For the engine."""
        with self._changed:
            if drawn is not None:
                self._tokens.append(drawn)
            self.finish_reason, self.error = finish, error
            self._changed.notify_all()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()

    @property
    def draws(self) -> bool:
        """Tell whether a step needs more for it than the likeliest token."""
        return bool(self.sampling.temperature or self.sampling.logprobs or self.sampling.constraint)


@dataclass
class Slot:
    """A place in the batch, and the request that has it."""

    answer: SlotAnswer | None = None
    held: int = 0
    """Tokens in its caches once all that was started has run."""
    drawn: int = 0
    """Tokens of the answer that were started."""
    read: int = 0
    """Tokens of the answer that were read."""

    @property
    def prompted(self) -> bool:
        """Tell whether its prompt has been read whole."""
        return self.answer is not None and self.held >= len(self.answer.prompt)


@dataclass
class Step:
    """A step that was started, and whose tokens it draws: (row, slot, answer)."""

    drawn: DrawnTokens
    rows: list[tuple[int, Slot, SlotAnswer]] = field(default_factory=list)


class SlotEngine:
    """An `Engine` over a server's functions, which one thread of it calls.

    In turn a chunk of prompts, one for each group of devices, and a token for every slot whose prompt is done. Each
    step is started before the tokens of the one before are read, unless what may come next depends on them.
    """

    def __init__(
        self,
        server: Server,
        params: Tree,
        places: AdapterPlaces | None = None,
        *,
        names: Sequence[str] = (),
        queue: int | None = 256,
        compiles_first: bool = True,
    ):
        """Start it.

        Args:
            params: weights as `place_weights` returns them; the engine then owns those of adapters.
            places: loader of adapters by path; None: there are none but those of `names`.
            names: adapters that are in the first places from the start.
            queue: most requests that wait for a slot; None: any number.
            compiles_first: have all functions compiled before it returns, or each when a request needs it.
        """
        self.server, self.vocabulary = server, vocabulary_of(server.recipe.model)
        self.length = server.shape.length
        self._params, self._state = params, server.empty_state()
        for name in server.functions if compiles_first else ():
            server.compiled(name)
        self._places = places
        self._names = {name: place for place, name in enumerate(names)}
        self._slots = [Slot() for _ in range(server.shape.slots)]
        self._queue: deque[SlotAnswer] = deque()
        self._room, self._seeds = queue, itertools.count(int.from_bytes(os.urandom(3), "big"))
        self._tasks: deque[tuple[Callable[[], None], threading.Event, list[BaseException]]] = deque()
        self._wake, self._closing, self._ended = threading.Condition(), False, threading.Event()
        self._deadline: float | None = None
        self._totals = {"requests_total": 0, "prompt_tokens_total": 0, "drawn_tokens_total": 0}
        self.failed: str | None = None
        self._thread = threading.Thread(target=self._run, name="trainfw engine", daemon=True)
        self._thread.start()
        _open.add(self)
        atexit.unregister(_close_all)  # so that it comes before what others have there by now, JAX's backends among it
        atexit.register(_close_all)

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._names)

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> SlotAnswer:
        tokens = list(prompt)
        check_request(tokens, sampling, self.vocabulary, self.length)
        with self._wake:
            if self._closing or self.failed:
                raise Unavailable(self.failed or "the engine is closing, and takes no more requests")
            if self._room is not None and len(self._queue) >= self._room:
                raise Full
            place = self.server.shape.adapters
            if sampling.adapter is not None:
                if sampling.adapter not in self._names:
                    raise UserError(f"adapter: no {sampling.adapter!r}{did_you_mean(sampling.adapter, self._names)}")
                place = self._names[sampling.adapter]
            seed = next(self._seeds) if sampling.seed is None else sampling.seed
            answer = SlotAnswer(tokens, sampling, seed % 2**32, place)
            self._queue.append(answer)
            self._totals["requests_total"] += 1
            self._wake.notify_all()
        return answer

    def add_adapter(self, name: str, path: str) -> None:
        if self._places is None:
            raise UserError(f"adapter {name}: this server was started without places for adapters")
        loaded = self._places.read(path)  # by the thread that asks

        def put() -> None:
            used = {*self._names.values(), *(slot.answer.place for slot in self._slots if slot.answer)}
            used |= {answer.place for answer in self._queue}
            free = [place for place in range(self.server.shape.adapters) if place not in used]
            if name in self._names:
                raise UserError(f"adapter {name}: is there already; remove it first")
            if not free:
                raise UserError(f"adapter {name}: all {self.server.shape.adapters} places are taken; remove another")
            assert self._places is not None
            self._params = self._places.put(self._params, loaded, free[0])
            self._names[name] = free[0]

        self._do(put)

    def remove_adapter(self, name: str) -> None:
        def remove() -> None:
            if name not in self._names:
                raise UserError(f"adapter: no {name!r}{did_you_mean(name, self._names)}")
            del self._names[name]

        self._do(remove)

    def _do(self, task: Callable[[], None]) -> None:
        """Have the engine's thread do something between two steps; raises what it raises."""
        done, raised = threading.Event(), list[BaseException]()
        with self._wake:
            if self._closing or self.failed:
                raise Unavailable(self.failed or "the engine is closing")
            self._tasks.append((task, done, raised))
            self._wake.notify_all()
        done.wait()
        if raised:
            raise raised[0]

    def counts(self) -> Counts:
        with self._wake:
            used = sum(slot.answer is not None for slot in self._slots)
            return Counts(slots=len(self._slots), slots_used=used, queue=len(self._queue), **self._totals)

    def close(self, drain_seconds: float = 0.0) -> None:
        if self._ended.is_set():
            return
        with self._wake:
            self._closing, self._deadline = True, time.monotonic() + drain_seconds
            self._wake.notify_all()
        # Its own thread comes here where garbage is collected in it: of a generator that nobody reads any more.
        if threading.current_thread() is not self._thread:
            self._ended.wait()

    def _run(self) -> None:
        pending: list[Step] = []
        try:
            while self._admit(bool(pending)):
                needs = any(
                    slot.answer is not None and slot.answer.sampling.constraint is not None for slot in self._slots
                )
                while pending and needs:
                    self._read(pending.pop(0))
                started = [step for step in (self._prefill(), self._decode()) if step is not None]
                while pending:
                    self._read(pending.pop(0))
                pending = started
        except Exception as error:  # of a device, or a defect: nobody is to wait for ever
            self.failed = f"the engine has failed: {type(error).__name__}: {error}"
        finally:
            self._end_all("error" if self.failed else "cancelled")
            self._ended.set()

    def _admit(self, busy: bool) -> bool:
        """Do what was asked for between steps, and give free slots to those who wait. False: it is time to stop."""
        with self._wake:
            while True:
                self._do_tasks()
                self._drop_cancelled()
                free = [slot for slot in self._slots if slot.answer is None]
                while free and self._queue:
                    slot, answer = free.pop(0), self._queue.popleft()
                    slot.answer, slot.held, slot.drawn, slot.read = answer, 0, 0, 0
                    self._totals["prompt_tokens_total"] += len(answer.prompt)
                working = busy or any(slot.answer is not None for slot in self._slots)
                if self._closing and (not working or time.monotonic() >= (self._deadline or 0.0)):
                    return False
                if working:
                    return True
                self._wake.wait()

    def _do_tasks(self) -> None:
        while self._tasks:
            task, done, raised = self._tasks.popleft()
            try:
                task()
            except Exception as error:  # for the thread that asked
                raised.append(error)
            done.set()

    def _drop_cancelled(self) -> None:
        for slot in self._slots:
            if slot.answer is not None and slot.answer.cancelled:
                slot.answer.put(None, "cancelled")
                slot.answer = None
        for answer in [answer for answer in self._queue if answer.cancelled]:
            self._queue.remove(answer)
            answer.put(None, "cancelled")

    def _end_all(self, reason: FinishReason) -> None:
        with self._wake:
            self._closing = True
            waiting = [*self._queue, *(slot.answer for slot in self._slots if slot.answer is not None)]
            self._queue.clear()
            for slot in self._slots:
                slot.answer = None
            for _, done, raised in self._tasks:
                raised.append(Unavailable(self.failed or "the engine is closing"))
                done.set()
            self._tasks.clear()
        for answer in waiting:
            answer.put(None, reason, self.failed)

    def _prefill(self) -> Step | None:
        """Start a chunk of a prompt in each group of devices that has one."""
        server, groups = self.server, self.server.shards
        like, each = server.functions["prefill"].arguments[2], len(self._slots) // groups
        chunk = server.shape.chunk
        chosen: list[tuple[int, Slot] | None] = []
        for group in range(groups):
            waiting = [
                (place, slot)
                for place, slot in enumerate(self._slots[group * each : (group + 1) * each])
                if slot.answer is not None and not slot.prompted
            ]
            chosen.append(max(waiting, key=lambda one: one[1].held, default=None))  # what has begun first
        if not any(chosen):
            return None
        tokens = np.zeros((groups, chunk), np.int32)
        names = ("slots", "lengths", "counts", "last")
        numbers = {name: np.zeros(groups, np.int32) for name in names}
        answers: list[SlotAnswer | None] = [None] * groups
        ending = []
        for group, one in enumerate(chosen):
            if one is None:
                continue
            place, slot = one
            answer = answers[group] = slot.answer
            assert answer is not None
            part = answer.prompt[slot.held : slot.held + chunk]
            tokens[group, : len(part)] = part
            last = slot.held + len(part) == len(answer.prompt)
            for name, value in zip(names, (place, slot.held, len(part), last)):
                numbers[name][group] = value
            if last:
                ending.append((group, slot, answer))
            slot.held += len(part)
        rows = {"tokens": tokens, **numbers, **self._row_inputs(like, answers, numbers["lengths"], [0] * groups)}
        self._state, drawn = self.server.compiled("prefill")(self._params, self._state, _placed(rows, like))
        for _, slot, _ in ending:
            slot.drawn = 1
        return Step(drawn, ending)

    def _decode(self) -> Step | None:
        """Start a token for every slot whose prompt is read and whose answer has room."""
        rows = []
        for place, slot in enumerate(self._slots):
            answer = slot.answer
            if answer is None or not slot.prompted or not 0 < slot.drawn < answer.sampling.max_tokens:
                continue
            if answer.sampling.constraint is None or slot.read == slot.drawn:
                rows.append((place, slot, answer))
        if not rows:
            return None
        name = "decode_sampled" if any(answer.draws for _, _, answer in rows) else "decode"
        like = self.server.functions[name].arguments[2]
        lengths, active = (np.zeros(len(self._slots), np.int32) for _ in range(2))
        answers: list[SlotAnswer | None] = [None] * len(self._slots)
        counts = [0] * len(self._slots)
        for place, slot, answer in rows:
            lengths[place], active[place], answers[place], counts[place] = slot.held, 1, answer, slot.drawn
        inputs = {"active": active, "lengths": lengths, **self._row_inputs(like, answers, lengths, counts)}
        self._state, drawn = self.server.compiled(name)(self._params, self._state, _placed(inputs, like))
        for _, slot, _ in rows:
            slot.held, slot.drawn = slot.held + 1, slot.drawn + 1
        return Step(drawn, rows)

    def _row_inputs(
        self, like: Rows, answers: Sequence[SlotAnswer | None], lengths: np.ndarray, counts: Sequence[int]
    ) -> Rows:
        """Return the inputs that rows of both functions have: settings of the draw, places in the rings, adapters."""
        inputs: Rows = {"ends": {kind: lengths % room for kind, room in self.server.rooms.items()}}
        if "draws" in like:
            allowed = np.full((len(answers), -(-self.vocabulary // 32)), 2**32 - 1, np.uint32)
            for row, answer in zip(allowed, answers):
                if answer is not None and answer.sampling.constraint is not None:
                    row[:] = answer.sampling.constraint.allowed()
            most = self.vocabulary
            settings = [
                (0.0, 0, 0, 1.0)
                if a is None
                else (a.sampling.temperature, a.seed, min(a.sampling.top_k or 0, most), a.sampling.top_p or 1.0)
                for a in answers
            ]
            temperatures, seeds, top_ks, top_ps = map(np.array, zip(*settings))
            of_each = temperatures, seeds, np.array(counts), top_ks, top_ps, allowed
            inputs["draws"] = Draws(*of_each)  # type: ignore[arg-type]
        if "adapters" in like:
            inputs["adapters"] = np.array([self.server.shape.adapters if a is None else a.place for a in answers])
        return inputs

    def _read(self, step: Step) -> None:
        """Hand out the tokens of a step, and free the slots whose answers have ended."""
        if not step.rows:
            return
        drawn = jax.tree.map(np.asarray, step.drawn)
        with self._wake:
            for row, slot, answer in step.rows:
                if slot.answer is not answer:
                    continue  # it has ended, or nobody reads it
                self._totals["drawn_tokens_total"] += 1
                slot.read += 1
                if self._hand_out(drawn, row, answer, slot.read) is not None:
                    slot.answer = None

    def _hand_out(self, drawn: DrawnTokens, row: int, answer: SlotAnswer, number: int) -> FinishReason | None:
        sampling, token = answer.sampling, int(drawn.token_B[row])
        if token in sampling.stop_ids:
            answer.put(None, "stop")
            return "stop"
        logprob, likeliest = None, tuple[tuple[int, float], ...]()
        if sampling.logprobs is not None:
            logprob = float(drawn.logprob_B[row])
            if sampling.logprobs and drawn.likeliest_BN is not None and drawn.likeliest_logprob_BN is not None:
                pairs = zip(drawn.likeliest_BN[row].tolist(), drawn.likeliest_logprob_BN[row].tolist())
                likeliest = tuple(itertools.islice(pairs, sampling.logprobs))
        reason: FinishReason | None = "length" if number == sampling.max_tokens else None
        if sampling.constraint is not None:
            sampling.constraint.accept(token)
            reason = "stop" if sampling.constraint.ended else reason
        answer.put(Drawn(token, logprob, likeliest), reason)
        return reason


_open: weakref.WeakSet[SlotEngine] = weakref.WeakSet()


def _close_all() -> None:
    """End the threads of engines that are still open: a process that leaves amid a step of one aborts."""
    for engine in list(_open):
        engine.close()


def _placed(rows: Rows, like: Rows) -> Rows:
    return jax.tree.map(lambda to, value: jax.device_put(np.asarray(value, to.dtype), to.sharding), like, rows)
