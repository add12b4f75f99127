"""Time and memory of a step in closed form: what a search prunes by, compiling nothing and importing no JAX.

It writes down the matrix products and collectives of the step, as the program's shardings imply them, and times them
as a plan is timed. State is exact. Activations follow from the remat policy. What else passes through memory, and what
else is held, are multiples of those arrays that were read from compiled plans of Llama 3.1 70B on 1,024 cores (data 1
and 4, tensor 1 to 8, each remat policy), scanned, and of SmolLM2 135M on 8 GPUs, unrolled (four unrolled layers
of the former agree within 6%). It only says which candidates are worth compiling: what is ranked in the end, and
reported, are plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainfw.backends import load_sdk
from trainfw.hardware import Topology
from trainfw.models import FeedForward, ModelShapes, Weight, family_of, vocabulary_of
from trainfw.optim import state_bytes as state_bytes_of
from trainfw.parallel import Layout, Placement, Sharded, bubble
from trainfw.planning.predict.step_time import step_time
from trainfw.planning.read_step.analysis import Analysis, Matmul, Streamed, Transfer
from trainfw.recipe import Recipe

_MOVED = {"none": (26.0, 16.0), "dots": (51.0, 26.0), "full": (52.0, 24.0)}
"""Times that elementwise operations of a layer move an activation as wide as the model, and one as wide as its
feed-forward layer and heads, where nothing is stacked."""
_STACKED = 4.0
"""Times that a scan moves what layers keep for the backward pass: written by the layer and into the stack, read from
the stack and by the layer. Unrolled layers leave it where it is."""
_MOVED_SCORES = {"none": (16.0, 7.0), "dots": (14.3, 10.5), "full": (14.3, 10.5)}
"""Times that the scores pass through memory, in f32: scanned, and unrolled (by SmolLM2 135M on 8 GPUs)."""
_MOVED_WEIGHTS = 75.0
"""Times that a microbatch moves a core's share of the parameters, in f32."""
_MOVED_WHOLE = {"parameters": 0.0, "gradients": 2.7, "optimizer": 6.1}
"""Times that a microbatch moves parameters beside that, where they are whole along fsdp, by what fsdp shards. (This and
`_HELD_WHOLE` by compiled plans of Llama 3.1 8B on 64 cores.)"""
_HELD_SCORES = 3.0
"""Scores, f32, that one layer's backward pass holds at once."""
_HELD_LOGITS = 3.0
"""Logits of a chunk of the loss, f32, held at once."""
_HELD_STATE = 3.6
"""Gradients, their sums and the update's temporaries, in multiples of a core's share of the parameters."""
_HELD_WHOLE = {"parameters": 0.0, "gradients": 0.5, "optimizer": 1.5}
"""The same beside that, of parameters that are whole along fsdp."""
_HELD_TABLES = 2.9
"""Embedding tables, whole along fsdp, f32."""


@dataclass(frozen=True)
class Estimate:
    """Estimate of a candidate by the analytic pass."""

    seconds: float
    """Time of a step."""
    memory: int
    """Bytes of a core."""


def estimate(recipe: Recipe, placement: Placement) -> Estimate:
    """Time and memory of a step of `recipe` in the layout of `placement`, without compiling it."""
    seconds = step_time(closed_analysis(recipe, placement.layout), placement, recipe).seconds
    return Estimate(seconds, sum(closed_memory(recipe, placement.layout, placement.topology).values()))


class _Case:
    """A recipe in a layout, and the sizes on one core that a step is counted by."""

    def __init__(self, recipe: Recipe, layout: Layout):
        self.recipe, self.layout, self.model, self.train = recipe, layout, recipe.model, recipe.train
        self.shapes = model_shapes(recipe)
        self.tensor, self.microbatch_count = layout.tensor, self.train.accumulation_steps
        self.width, self.vocabulary = self.model.hidden_size, vocabulary_of(self.model)
        self.length = recipe.sequence_length // layout.context
        self.mine = self.train.global_batch_size // layout.batch_shards
        self.rows = self.mine // self.microbatch_count
        self.tokens = self.rows * self.length
        self.dtype, self.narrow = ("bf16", 2) if self.train.compute_dtype == "bfloat16" else ("f32", 4)
        self.among = layout.fsdp * layout.expert * layout.context
        """Cores that share what the default rules split of a weight's `embed` dim."""
        self.shards: Sharded = recipe.parallel.fsdp_shards if self.among > 1 else "parameters"  # all of one part
        # In one of P stages, a core has 1/P of the layers, P times the rows, and computes on nothing while it idles.
        self.loaded = 1.0 / (1.0 - bubble_of(recipe, layout))
        """Times that a row of a core's own passes a layer of the model on that core: once without a pipeline."""
        self.runs = round(self.model.num_layers * self.microbatch_count * self.loaded)
        self.chunk = self.model.num_layers / (layout.pipeline * recipe.parallel.interleave)
        """Layers in one of a stage's chunks."""
        # Remat runs a layer again for its gradient, and of whole stages for the layers after it.
        self.passes = 2.0 if self.train.remat in ("full", "stage") else 1.0
        if self.train.remat == "stage" and layout.pipeline > 1:
            self.passes = 3.0 - 1 / self.chunk
        self.feed_forwards = [self._of(part) for part in self.shapes.feed_forwards]
        """(matrices, rows of each, width) of the feed-forward layers that run side by side on one core."""
        self.forward = sum(matrices * m * inner for matrices, m, inner in self.feed_forwards)
        self.share = sum(4 * weight.elements / self.parts(weight) for weight in self.shapes.weights)

    def _of(self, part: FeedForward) -> tuple[int, int, int]:
        if part.experts is None:
            return 1, self.tokens, part.width // self.tensor
        rows = part.experts.slots(self.tokens) * self.layout.expert
        return part.experts.number // self.layout.expert, rows, part.width // self.tensor

    def parts(self, weight: Weight, *, replicated: bool = False) -> int:
        """Parts of a weight; `replicated`: where it is whole on all cores that could share it."""
        stages = self.layout.pipeline if weight.kind.startswith("layers") else 1
        among = 1 if replicated else self.among
        return stages * (1, self.tensor, among * self.tensor, among)[weight.split]

    def used(self, weight: Weight) -> int:
        """Elements of a core's part of a matrix where it is used, of one layer if it is stacked."""
        layers = weight.shape[0] if weight.is_matrix else 1
        experts = self.layout.expert if weight.kind == "layers.experts" else 1
        return weight.elements // layers // experts // self.tensor

    def kept(self) -> float:
        """Bytes that a layer keeps of a microbatch for the backward pass."""
        shapes, tensor, each = self.shapes, self.tensor, self.tokens * self.narrow
        stream, forward = self.width // tensor, self.forward / self.tokens
        both = (shapes.num_heads + 2 * shapes.num_kv_heads) * shapes.head_dim // tensor
        match self.train.remat:
            case "none":
                scores = self.tokens * self.length * shapes.num_heads // tensor
                return each * (10 * stream + 5 * forward + 4 * both) + scores * (4 + self.narrow)
            case "dots":
                return each * (2 * stream + 2 * forward + both)
            case "stage" if self.layout.pipeline > 1:
                return each * stream / self.chunk
            case _:
                return each * stream

    def state(self) -> dict[str, int]:
        parameters, optimizer = 0, 0
        for weight in self.shapes.weights:
            parts = self.parts(weight)
            kept = parts if self.shards == "parameters" else self.parts(weight, replicated=True)
            parameters += 4 * weight.elements // kept
            optimizer += state_bytes_of(self.recipe.optimizer, weight.kind, weight.shape, parts)
        return {"parameters": parameters, "optimizer_state": optimizer}


def closed_analysis(recipe: Recipe, layout: Layout) -> Analysis:
    """Count what one core computes and moves in a step, in closed form: `read_step.analysis` without a compiler."""
    case = _Case(recipe, layout)
    train, shapes, tensor, tokens, width = case.train, case.shapes, case.tensor, case.tokens, case.width
    # A stage runs every row of the pipeline through its layers, and rows of no consequence while it idles.
    runs, passes, parts, again = case.runs, case.passes, case.microbatch_count, train.remat != "none"
    dtype, narrow, rows, length = case.dtype, case.narrow, case.rows, case.length
    vocabulary = case.vocabulary // tensor
    heads, kv_heads = shapes.num_heads // tensor, max(shapes.num_kv_heads // tensor, 1)  # some share one
    attention_widths = [heads * shapes.head_dim, *2 * [kv_heads * shapes.head_dim]]

    def product(m: int, n: int, k: int, times: int, *, out: int = narrow, batch: int = 1) -> None:
        size = batch * (narrow * (m * k + k * n) + out * m * n)
        matmuls.append(Matmul(batch, m, n, k, dtype, times, bytes=size))

    matmuls: list[Matmul] = []
    # (matrices, rows of each, width in, width out, whether what it returns is never needed again)
    maps = [(1, tokens, width, out, False) for out in attention_widths]
    maps += [(1, tokens, heads * shapes.head_dim, width, False)]
    for matrices, m, inner in case.feed_forwards:
        maps += [*2 * [(matrices, m, width, inner, False)], (matrices, m, inner, width, True)]
    for matrices, m, into, out, last in maps:
        product(m, out, into, round(runs * (passes - (last and passes > 1))), batch=matrices)
        product(m, into, out, runs, batch=matrices)
        product(into, out, m, runs, batch=matrices)
    product(tokens, vocabulary, width, parts, out=4)
    product(tokens, width, vocabulary, parts)
    product(vocabulary, width, tokens, parts)
    # Of the keys, a device whose sequence is split leaves out most of those that are masked (see `_of_fused`).
    ring = layout.context > 1
    keys = length * (2 * layout.context + 1) // 4 if ring else length
    every, head, scores = heads // kv_heads * length, shapes.head_dim, heads * rows * length * keys
    ends = rows * (heads + kv_heads) * length * head
    for m, n, k, times, score_size, end_size, backward in (
        (keys, every, head, round(runs * max(passes, 1 + again)), 4, narrow, False),
        (head, every, keys, round(runs * max(passes, 1 + again)), narrow, narrow, False),
        (head, keys, every, runs, narrow, narrow, True),
        (every, keys, head, runs * (1 + ring), narrow, narrow, True),
        (keys, head, every, runs, narrow, narrow, True),
        (every, head, keys, runs, narrow, narrow, True),
    ):
        size, name = scores * score_size + ends * end_size, "f32" if end_size == 4 else dtype
        batch = rows * kv_heads
        matmuls.append(Matmul(batch, m, n, k, name, times, bytes=size, attention=True, backward=backward))
    once, beside = _MOVED[train.remat]
    stream = width // tensor  # of a sequence that is split over tensor
    moved = narrow * (tokens * (once * stream + beside * sum(attention_widths[:2])) + beside * case.forward)
    if train.scan_layers:
        moved += _STACKED * case.kept()
    attention = _MOVED_SCORES[train.remat][0 if train.scan_layers else 1] * scores * 4.0 * runs
    whole = _MOVED_WHOLE[case.shards] * case.state()["parameters"]
    averages = 0 if recipe.optimizer.ema is None else 2  # read and written
    return Analysis(
        layout=layout,
        matmuls=tuple(matmuls),
        transfers=tuple(_transfers(case)),
        streamed=(
            Streamed("model", moved * runs + parts * (_MOVED_WEIGHTS * case.share + whole)),
            Streamed("attention", attention),
            Streamed("update", case.share * (10.5 + averages + 4.4 * parts), "update"),
        ),
    )


def _transfers(case: _Case) -> Iterator[Transfer]:
    """The collectives of a step.

    Over the axes that share weights: these gathered in every microbatch, forward and backward, or once a step where
    they are whole; their gradients scattered in every microbatch, or once. Over data, the sums of a core's own share of
    the gradients, once. Over tensor, activations gathered and scattered. Over context, keys and values passed around,
    and over pipeline, what a stage hands to the next.
    """
    recipe, layout, model, train, shapes = case.recipe, case.layout, case.model, case.train, case.shapes
    parts, width, tensor, tokens = case.microbatch_count, case.width, case.tensor, case.tokens
    shards, dtype, narrow, runs, passes = case.shards, case.dtype, case.narrow, case.runs, case.passes
    # Weights are used for a microbatch at a time; a pipeline's has more rows than a core's own, or fewer.
    microbatches = _microbatches(recipe, layout)
    uses = round(runs * microbatches / layout.pipeline)
    among = tuple(axis for axis in ("fsdp", "expert", "context") if layout.sizes[axis] > 1)
    copies = tuple(axis for axis in ("pipeline", "data") if layout.sizes[axis] > 1)
    if among:
        for weight in (w for w in shapes.weights if w.is_matrix):
            # Experts stay where they are; the rest of the axes shares each.
            axes = tuple(axis for axis in among if axis != "expert") if weight.kind == "layers.experts" else among
            size = narrow * case.used(weight)
            if axes and shards == "parameters":
                yield Transfer("all-gather", axes, dtype, size, round(max(passes, 2) * uses))
            if axes and shards != "optimizer":
                yield Transfer("reduce-scatter", axes, dtype, size, uses)
        table = case.vocabulary * width // tensor
        for size, name in ((4, "f32"), (narrow, dtype)):  # the embedding is looked up in f32, and the head multiplied
            if shards == "parameters":
                yield Transfer("all-gather", among, name, size * table, parts)
            if shards != "optimizer":
                yield Transfer("reduce-scatter", among, name, size * table, parts)
        for weight in shapes.weights:
            if weight.split == 2 and shards != "parameters":  # updated in shares, and put together again
                stacked = model.num_layers // layout.pipeline if weight.is_matrix else 1
                whole = 4 * case.used(weight) * stacked
                yield Transfer("all-gather", among, "f32", whole, 1)
                if shards == "optimizer":
                    yield Transfer("reduce-scatter", among, "f32", whole, 1, "update")
    for weight in shapes.weights:
        axes = tuple(axis for axis in copies if axis == "data" or not weight.is_matrix)
        if axes and weight.split == 2:
            kept = 4 * weight.elements // case.parts(weight)
            yield Transfer("all-reduce", axes, "f32", kept, 1, "update")
    if shapes.experts is not None and layout.expert > 1:  # to the experts and back, forward and backward
        slots, again = shapes.experts.number * shapes.experts.slots(tokens), train.remat in ("full", "stage")
        yield Transfer("all-to-all", ("expert",), dtype, narrow * slots * width, runs * (4 + 2 * again))
    if layout.context > 1:  # around the ring, and backward again with their gradients
        each = tokens * max(shapes.num_kv_heads // tensor, 1) * shapes.head_dim
        turns = runs * (layout.context - 1)
        again = train.remat != "none"
        yield Transfer("collective-permute", ("context",), dtype, narrow * each, 2 * turns * (2 + again))
        yield Transfer("collective-permute", ("context",), "f32", 4 * each, 2 * runs * layout.context)
    if layout.pipeline > 1:  # two rings, forward and backward
        turns = parts * (microbatches * recipe.parallel.interleave + layout.pipeline - 1)
        each = tokens * layout.pipeline // microbatches
        yield Transfer("collective-permute", ("pipeline",), dtype, narrow * each * width // tensor, 4 * turns)
        yield Transfer("collective-permute", ("pipeline",), "s32", 2 * 4 * each, 2 * turns)  # positions and segments
    if tensor == 1:
        return
    # Of attention and feed-forward, their inputs and their outputs' gradients; of embedding and head.
    whole = narrow * tokens * width
    gathered = round(runs * (6 if train.remat == "dots" else 2 + 2 * passes)) + 2 * parts
    scattered = round(runs * (4 if passes == 1 else 1 + 2 * passes)) + 2 * parts
    yield Transfer("all-gather", ("tensor",), dtype, whole, gathered)
    yield Transfer("reduce-scatter", ("tensor",), dtype, whole, scattered)


def _microbatches(recipe: Recipe, layout: Layout) -> int:
    """Count the microbatches that pass through a pipeline's stages in an accumulation step; 1 of one stage."""
    if layout.pipeline == 1:
        return 1
    rows = recipe.train.global_batch_size // (layout.batch_shards * recipe.train.accumulation_steps)
    return recipe.parallel.pipeline_microbatches or layout.pipeline * rows


def bubble_of(recipe: Recipe, layout: Layout) -> float:
    """Share of a pipeline's iterations in which a stage has nothing to do; 0 of one stage."""
    return bubble(layout.pipeline, _microbatches(recipe, layout), recipe.parallel.interleave)


def closed_memory(recipe: Recipe, layout: Layout, topology: Topology) -> dict[str, int]:
    """Bytes on one core in closed form: state exactly, the rest by formula."""
    case = _Case(recipe, layout)
    train, tokens, narrow, width, tensor = case.train, case.tokens, case.narrow, case.width, case.tensor
    scores = case.rows * (case.shapes.num_heads // tensor) * case.length * case.length
    # Of a pipeline, what a stage keeps of the rows of all stages, in its share of the layers: as much as of its own.
    layers, state = case.model.num_layers * case.loaded, case.state()
    layer = _HELD_SCORES * 4 * scores + narrow * tokens * (3 * width + 1.5 * (case.forward / tokens))
    logits = _HELD_LOGITS * 4 * min(tokens, train.loss_chunk) * (case.vocabulary // tensor)
    gathers = case.among > 1 and case.shards == "parameters"
    gathered = 0.0 if not gathers else _HELD_TABLES * 4 * case.vocabulary * width / tensor
    if gathers:  # two layers at a time, where they are gathered ahead
        gathered += 2 * narrow * sum(case.used(w) for w in case.shapes.weights if w.is_matrix)
    return {
        **state,
        **({} if recipe.backend.donate else {"state_out": sum(state.values())}),
        "gradients": round(_HELD_STATE * case.share + _HELD_WHOLE[case.shards] * state["parameters"]),
        "activations": round(case.kept() * layers + max(layer, logits)),
        "collective_buffers": round(gathered),
        "data": 5 * 4 * case.mine * case.length,
        "runtime": load_sdk(recipe.hardware.sdk).core_overhead(topology),
    }


def state_bytes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Bytes of parameters and optimizer state on one core, counters left out, by the default rules of sharding."""
    return _Case(recipe, layout).state()


def model_shapes(recipe: Recipe) -> ModelShapes:
    """Return those of the recipe's model. Raises UserError for a family that gives none."""
    shapes = family_of(recipe.model).shapes(recipe.model)
    if shapes is None:
        why = "this family does not give the shapes (Family.shapes) that a step is estimated by"
        raise recipe.error("model.family", f"{why}; plan the recipe instead")
    return shapes
