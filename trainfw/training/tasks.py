"""Evaluation of what a model writes after held-out prompts, by a metric."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainfw.data import Progress, Tokenizer, TokenStore, stop_ids
from trainfw.models import LanguageModel
from trainfw.recipe import EvaluationConfig
from trainfw.serving import generate_batch


def rouge_l(output: str, reference: str) -> float:
    """F1 of the longest common subsequence of words: Lin, "ROUGE", 2004, section 3; without stemming."""
    ours, theirs = (re.findall(r"\w+", text.lower()) for text in (output, reference))
    common = [0] * (len(theirs) + 1)  # by how many words of `theirs` are looked at
    for x in ours:
        row = [0]
        for j, y in enumerate(theirs):
            row.append(common[j] + 1 if x == y else max(common[j + 1], row[j]))
        common = row
    return 2 * common[-1] / (len(ours) + len(theirs)) if common[-1] else 0.0


def chrf(output: str, reference: str, order: int = 6, beta: float = 2.0) -> float:
    """F2 of character n-grams without whitespace, precision and recall averaged over n: Popović, "chrF", 2015.

    Sizes that neither text is long enough for are left out of the average.
    """
    ours, theirs = ("".join(text.split()) for text in (output, reference))
    precision, recall, orders = 0.0, 0.0, 0
    for n in range(1, order + 1):
        mine, true = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (ours, theirs))
        if not mine and not true:
            break
        orders += 1
        common = (mine & true).total()
        precision += common / max(mine.total(), 1)
        recall += common / max(true.total(), 1)
    if not precision or not recall:
        return 0.0
    precision, recall = precision / orders, recall / orders
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def exact_match(output: str, reference: str) -> float:
    """1 where both are the same, but for spaces around them."""
    return float(output.strip() == reference.strip())


METRICS: dict[str, Callable[[str, str], float]] = {"rouge_l": rouge_l, "chrf": chrf, "exact_match": exact_match}
"""`metric(output, reference)`, from 0 to 1, by the name used in recipes."""


@dataclass(frozen=True)
class TaskExample:
    """A held-out prompt, and what should follow it."""

    prompt: list[int]
    reference: list[int]


def held_out_tasks(store: TokenStore, count: int) -> list[TaskExample]:
    """Up to `count` examples of the store (of pairs, the chosen), spread evenly over it; of each, its last run of
    learnt tokens."""
    assert store.learnt is not None
    total = store.num_documents // store.group
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))
    tasks = []
    for i in chosen * store.group:
        start, end = store.offsets[i : i + 2]
        ids, learnt = store.tokens[start:end].tolist(), np.asarray(store.learnt[start:end])
        last = int(np.flatnonzero(learnt)[-1])
        begin = int(np.flatnonzero(~learnt[:last])[-1]) + 1
        tasks.append(TaskExample(ids[:begin], ids[begin : last + 1]))
    return tasks


def evaluate_task(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[TaskExample],
    config: EvaluationConfig,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Return each example's prompt, reference and output as text, and the metric under its name."""
    ends = stop_ids(tokenizer)
    said = None if progress is None else lambda _, done, total: progress("evaluating, examples", done, total)
    written = generate_batch(
        model,
        [task.prompt for task in tasks],
        max_tokens=config.max_tokens,
        eos_ids=ends,
        slots=min(config.batch_size, len(tasks)),
        progress=said,
    )
    outputs = [tokenizer.decode(ids).strip() for ids in written]
    metric = METRICS[config.metric]
    rows = []
    for i, task in enumerate(tasks):
        prompt, reference = tokenizer.decode(task.prompt), tokenizer.decode(task.reference).strip()
        texts = {"example": i, "prompt": prompt, "reference": reference, "output": outputs[i]}
        rows.append({**texts, "max_tokens": config.max_tokens, config.metric: metric(outputs[i], reference)})
    return rows


@dataclass(frozen=True)
class Comparison:
    """The same held-out examples before training and after it."""

    metric: str
    before: list[dict[str, Any]]
    """Rows of `evaluate_task`; empty where nothing was evaluated before the first step."""
    after: list[dict[str, Any]]

    @property
    def score_before(self) -> float | None:
        return mean_score(self.before, self.metric) if self.before else None

    @property
    def score(self) -> float:
        return mean_score(self.after, self.metric)

    def __str__(self) -> str:
        head = f"{self.metric} on {len(self.after)} held-out examples"
        if self.score_before is None:
            return f"{head}: {self.score:.3f}"
        gains = [b[self.metric] - a[self.metric] for a, b in zip(self.before, self.after)]
        mean = sum(gains) / len(gains)
        error = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / max(len(gains) - 1, 1) / len(gains))
        return (
            f"{head}: {self.score_before:.3f} before training, {self.score:.3f} after "
            f"({mean:+.3f}, standard error {error:.3f}; better on {sum(g > 0 for g in gains)}, "
            f"worse on {sum(g < 0 for g in gains)})"
        )

    def samples(self, count: int) -> list[str]:
        """`count` examples as text, spread over all: the end of the prompt, the reference, both outputs."""
        chosen = np.unique(np.linspace(0, len(self.after) - 1, min(count, len(self.after))).round().astype(int))
        texts = []
        for i in map(int, chosen):
            row = self.after[i]
            prompt = row["prompt"]
            shown = prompt if len(prompt) <= _SHOWN else f"...{prompt[-_SHOWN:]}"
            before = {"before": self.before[i]["output"]} if self.before else {}
            lines = {"prompt": shown, "reference": row["reference"], **before, "after": row["output"]}
            text = f"sample {i + 1} of {len(self.after)}"
            for name, said in lines.items():
                text += f"\n  {name + ':':<11}" + said.strip().replace("\n", "\n" + " " * 13)
            texts.append(text)
        return texts


_SHOWN = 400
"""Characters of a sample's prompt."""


def mean_score(rows: Sequence[dict[str, Any]], metric: str) -> float:
    return sum(row[metric] for row in rows) / len(rows)
