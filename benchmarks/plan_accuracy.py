"""Published training runs, predicted: python benchmarks/plan_accuracy.py [--fit] [NAME ...]

Prints prediction, published figure and error of every run in RUNS. A chip has one free parameter, the share of its
peak that matrix products reach (`matmul_efficiency` in trainfw/hardware/chips/). `--fit` finds it anew on the runs
that are `fit`; all others are held out. Where trainfw cannot express a run, the nearest that it can is planned, and
`nearest` says what differs; what remat computes again is set as the run's source has it (`as_published`), and of the
hardware what the source says (`parameters`). Nothing else is adjusted by run.

Which runs are `fit` follows from a rule that names no error, and that was written down before any row that came with
it was predicted: of every table and family of models, the runs of the smallest model on the fewest chips. All others,
so all pipelines, all larger models and all longer clusters, are held out. A table of cards whose peak is not known
(torchtitan's) is held out whole. Where several releases or logs publish a run, it is one row, and its error counts
against the geometric middle of the lowest and the highest figure; the error against the nearer end is printed too.

A run is `unseen` if nobody had predicted it before it was written here: what the parameters of then said of it is in
results/plan_accuracy.md ("First look"). Once printed it is seen, and a change made later may have had it in view.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import yaml

from trainfw import Recipe, backends, load_recipe
from trainfw.hardware import Topology, load_topology
from trainfw.models import flops_per_token
from trainfw.parallel import Layout, place
from trainfw.planning import Analysis, Assumptions, StepTime, analyse, simulated_recipe, step_time

DEVICES = 64
"""Simulated by this process."""
MOST = 16
"""To which `data` and `fsdp` are shortened: what a core does stays as it is (tests/planning/test_time.py)."""

AXLEARN = "AXLearn (arXiv:2507.05411), wizwand.com/paper/68fa79ed1e209131cea80024"
FUJI = "layout: apple/axlearn axlearn/experiments/text/gpt/fuji.py"
NEURON = (
    "aws-neuron-sdk about-neuron/benchmarks/trn1/training_data_decoder.csv (SDK 2.24); settings: neuronx-distributed "
    "examples/training/llama/tp_zero1_llama_hf_pretrain/tp_zero1_llama3_8B_hf_pretrain.sh"
)
TORCHTITAN = "pytorch/torchtitan 31a17bfd benchmarks/llama3_h100_202412_torchtitan.md"
MAXTEXT = "AI-Hypercomputer/maxtext (2024) README, MaxText/configs/a3/llama_2_7b (README.md, 1vm.sh to 16vm.sh)"


@dataclass(frozen=True, eq=False)
class Run:
    name: str
    chip: str
    settings: dict[str, object]
    """Of a recipe."""
    published: float
    unit: str
    """`s/step`, `seq/s`, `tok/s/chip` or `TFLOP/s/chip` (as MaxText counted then: attention in full)."""
    source: str
    nearest: str = ""
    """What the published run does otherwise."""
    fit: bool = False
    parameters: dict[str, str] = field(default_factory=dict)
    """Of its hardware, where its source says that they differ."""
    keeps_attention: bool = False
    """Remat saves what attention returns, too."""
    computes_again: tuple[tuple[int, int], ...] = ()
    """Products of a layer that remat does not save: (k, n) of each on one core."""
    wide_gradients: bool = False
    """Gradients are reduced in float32."""

    def recipe(self, efficiency: float | None = None) -> Recipe:
        """The run as a recipe, perhaps with another efficiency of matrix products than the chip's."""
        tree: dict[str, dict[str, object]] = {
            "data": {"source": "corpus.jsonl"},
            "train": {"compute_dtype": "bfloat16", "scan_layers": False},
            "hardware": {"parameters": dict(self.parameters)},
        }
        if efficiency is not None:
            tree["hardware"]["parameters"] |= {"chip.matmul_efficiency": f"{efficiency:.4f}"}  # type: ignore[operator]
        for key, value in self.settings.items():
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = value
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(tree, file)
            file.flush()
            return load_recipe(file.name)


def _settings(topology: str, count: int, preset: str, **settings: object) -> dict[str, object]:
    """A recipe's settings by dotted key; `a__b` is `a.b`."""
    return {"hardware.topology": topology, "hardware.count": count, "model.preset": preset} | {
        key.replace("__", "."): value for key, value in settings.items()
    }


def _maxtext(nodes: int, published: float) -> Run:
    return Run(
        name=f"MaxText Llama 2 7B, {nodes} x A3",
        chip="h100",
        settings=_settings(
            "h100-8",
            nodes,
            "llama2-7b",
            data__sequence_length=4096,
            train__global_batch_size=32 * nodes,
            train__remat="dots",
            parallel__data=nodes,
            parallel__fsdp=8,
        ),
        published=published,
        unit="TFLOP/s/chip",
        source=MAXTEXT,
        fit=nodes == 1,
        keeps_attention=True,  # remat minimal_flash: what `dots` saves, and the result of attention
        # Its device type, h100-80gb-8, is A3 High (4vm.sh), which has 1,000 Gbit/s by five cards of 200, of which four
        # are the 8 GPUs' (cloud.google.com/compute/docs/gpus/gpu-network-bandwidth). Of these, "the expected bandwidth
        # per NIC is approximately 150 Gbps" (cloud.google.com/kubernetes-engine/docs/how-to/
        # gpu-bandwidth-gpudirect-tcpx-autopilot).
        parameters={"network.bandwidth": "100 Gbit/s", "network.efficiency": "0.75"} if nodes > 1 else {},
    )


def _torchtitan(nodes: int, published: float) -> Run:
    return Run(
        name=f"torchtitan Llama 3.1 8B, {nodes * 8} GPUs",
        chip="h100",
        settings=_settings(
            "h100-8",
            nodes,
            "llama3.1-8b",
            data__sequence_length=8192,
            train__global_batch_size=16 * nodes,
            train__remat="dots",
            parallel__fsdp=8 * nodes,
        ),
        published=published,
        unit="tok/s/chip",
        source=TORCHTITAN,
        nearest='its cards are limited to 500 W, their peak not known: "between SXM and NVL", here the middle of both',
        keeps_attention=True,
        # Every second product of a layer (torchtitan/parallelisms/parallelize_llama.py, selective_ac_option op): of
        # queries, keys, values, output, gate, up and down those of keys, output and up.
        computes_again=((4096, 1024), (4096, 4096), (4096, 14336)),
        wide_gradients=True,  # torchtitan/config_manager.py: mixed_precision_reduce is float32
        # torchtitan/utils.py get_peak_flops: 989 TFLOP/s (SXM) and 835 (NVL).
        parameters={"chip.hbm_bandwidth": "2.4 TB/s", "chip.peak_flops.bfloat16": "912 TFLOP/s"},
    )


RUNS = [
    Run(
        name="AXLearn Llama 2 7B, 1,024 Trainium2",
        chip="trainium2",
        settings=_settings(
            "trn2.48xlarge",
            64,
            "llama2-7b",
            data__sequence_length=4096,
            train__global_batch_size=1024,
            train__remat="dots",
            parallel__fsdp=1024,
            parallel__tensor=4,
        ),
        published=1.2,
        unit="s/step",
        source=f"{AXLEARN}; {FUJI}",
        nearest="batch (1,024 x 4,096 tokens) and remat are not published with it: those of its 70B configuration",
        fit=True,
        computes_again=((1024, 4096),),  # what projects attention's result; saved are queries, keys, values, gate, up
    ),
    Run(
        name="AXLearn Llama 2 70B, 1,024 Trainium2",
        chip="trainium2",
        settings=_settings(
            "trn2.48xlarge",
            64,
            "llama2-70b",
            data__sequence_length=4096,
            train__global_batch_size=1024,
            train__remat="dots",
            parallel__fsdp=1024,
            parallel__tensor=4,
        ),
        published=11.2,
        unit="s/step",
        source=f"{AXLEARN}; {FUJI}",
        nearest="batch not published with it",
        computes_again=((2048, 8192),),
    ),
    Run(
        name="NxDT Llama 3.1 8B, 512 Trainium1",
        chip="trainium1",
        settings=_settings(
            "trn1.32xlarge",
            32,
            "llama3.1-8b",
            model__num_kv_heads=32,
            data__sequence_length=8192,
            train__global_batch_size=1024,
            train__remat="dots",
            parallel__data=32,
            parallel__fsdp=1,
            parallel__tensor=32,
        ),
        published=47.95,
        unit="seq/s",
        source=NEURON,
        nearest="kv heads repeated to 32, as there; no ZeRO-1: the whole update on every replica; one microbatch, "
        "which would not fit, so that a step has as few gathers and sums as there",
        fit=True,
    ),
    *(_maxtext(nodes, published) for nodes, published in ((1, 492), (2, 422), (4, 407), (8, 409), (16, 375))),
    *(_torchtitan(nodes, published) for nodes, published in ((1, 6667), (16, 6514))),
]

ASSUMED = Assumptions(attention="fused", mixed="narrow")
"""Of all runs: each has an attention kernel, and products in bfloat16 throughout."""


def in_unit(run: Run, recipe: Recipe, topology: Topology, seconds: float) -> float:
    """A step's time as the figure that was published."""
    rows, length = recipe.train.global_batch_size, recipe.data.sequence_length
    match run.unit:
        case "s/step":
            return seconds
        case "seq/s":
            return rows / seconds
        case "tok/s/chip":
            return rows * length / seconds / topology.chips
        case "TFLOP/s/chip":
            model = recipe.model
            upper_half = 6.0 * model.num_layers * model.num_heads * model.head_dim * length
            flops = flops_per_token(model, length) + upper_half
            return rows * length * flops / seconds / topology.chips / 1e12
    raise ValueError(run.unit)


def as_published(run: Run, analysis: Analysis) -> Analysis:
    """With the products that the run's remat computes again, where `dots` saves others, and its gradients' width."""
    layers = run.recipe().model.num_layers
    forward = {(matmul.k, matmul.n) for matmul in analysis.matmuls if not matmul.backward and not matmul.attention}
    assert forward.issuperset(run.computes_again), run.name
    matmuls = []
    for matmul in analysis.matmuls:
        times = matmul.times
        if matmul.attention and not matmul.backward and run.keeps_attention:
            times //= 2  # of which one is in the backward pass
        elif not matmul.attention and not matmul.backward:
            times += layers * run.computes_again.count((matmul.k, matmul.n))
        matmuls.append(replace(matmul, times=times))
    transfers = [
        replace(transfer, dtype="f32", bytes=2 * transfer.bytes)
        if run.wide_gradients and (transfer.kind, transfer.dtype) == ("reduce-scatter", "bf16")
        else transfer
        for transfer in analysis.transfers
    ]
    return replace(analysis, matmuls=tuple(matmuls), transfers=tuple(transfers))


def predict(run: Run, analysis: Analysis, efficiency: float | None = None) -> tuple[StepTime, float]:
    """The step, and the ratio of its predicted time to what was published."""
    recipe = run.recipe(efficiency)
    topology = recipe.hardware.load()
    assert topology is not None
    step = step_time(analysis, place(topology, analysis.layout), recipe, ASSUMED)
    predicted = in_unit(run, recipe, topology, step.seconds)
    return step, predicted / run.published if run.unit == "s/step" else run.published / predicted


def fitted(runs: dict[Run, Analysis]) -> float:
    """The efficiency at which the times of these runs are right, in the geometric mean."""
    low, high = 0.01, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        errors = [math.log(predict(run, analysis, middle)[1]) for run, analysis in runs.items()]
        low, high = (middle, high) if sum(errors) > 0 else (low, middle)
    return (low + high) / 2


def _efficiency(topology: str) -> float:
    return load_topology(topology).figures["chip.matmul_efficiency"].number


def analysed(runs: list[Run]) -> dict[Run, Analysis]:
    """What each run's program is, compiled once for those that differ in the length of `data` alone."""
    known: dict[str, Analysis] = {}
    found = {}
    for run in runs:
        recipe = run.recipe()
        topology = recipe.hardware.load()
        assert topology is not None
        layout = Layout.resolve(recipe.parallel, topology.cores)
        key = f"{simulated_recipe(recipe, layout, MOST)[0].to_yaml()} fsdp {layout.fsdp}"
        if key not in known:
            started = time.monotonic()
            known[key] = analyse(recipe, most=MOST)[0]
            print(f"{time.monotonic() - started:5.1f} s to compile {run.name}", file=sys.stderr, flush=True)
        found[run] = as_published(run, replace(known[key], layout=layout))
    return found


def show(run: Run, analysis: Analysis, efficiency: float | None) -> float:
    """Print a run; the error of its predicted time."""
    step, ratio = predict(run, analysis, efficiency)
    recipe = run.recipe()
    topology = recipe.hardware.load()
    assert topology is not None
    middle, *ends = (in_unit(run, recipe, topology, s) for s in (step.seconds, step.low, step.high))
    print(f"\n{run.name} ({'fitted' if run.fit else 'held out'})")
    print(f"  source     {run.source}")
    print(f"  published  {run.published:10,.2f} {run.unit}")
    print(f"  predicted  {middle:10,.2f} {run.unit}   ({min(ends):,.2f} to {max(ends):,.2f})")
    print(f"  step time  {step.seconds:10.3f} s, {ratio - 1:+.1%} of the published")
    print(f"  MFU        {step.mfu:10.1%}, bound by {step.bound_by}")
    parts = [f"{name} {seconds:.3f}" for name, seconds in step.parts.items() if seconds >= 0.0005]
    hidden = [f"{name} {seconds:.3f}" for name, seconds in step.hidden.items() if seconds >= 0.0005]
    print(f"  seconds    {', '.join(parts)}{'; hidden: ' + ', '.join(hidden) if hidden else ''}")
    if run.nearest:
        print(f"  differs    {run.nearest}")
    return ratio - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="runs whose names contain this (default: all)")
    parser.add_argument("--fit", action="store_true", help="find the chips' efficiency anew")
    arguments = parser.parse_args()
    for name in arguments.names:
        if not any(name in run.name for run in RUNS):
            parser.error(f"{name}: no run's name contains this; the runs are {'; '.join(run.name for run in RUNS)}")
    chosen = [run for run in RUNS if not arguments.names or any(name in run.name for name in arguments.names)]
    backends.prepare(DEVICES)
    analyses = analysed(chosen)
    chips = dict.fromkeys(run.chip for run in chosen)
    efficiency = {}
    for chip in chips:
        mine = {run: analysis for run, analysis in analyses.items() if run.chip == chip and run.fit}
        if arguments.fit and mine:
            efficiency[chip] = fitted(mine)
            print(f"{chip}: matmul_efficiency {efficiency[chip]:.3f}, fitted on {', '.join(r.name for r in mine)}")
    errors = {run: show(run, analysis, efficiency.get(run.chip)) for run, analysis in analyses.items()}
    held_out = [abs(error) for run, error in errors.items() if not run.fit]
    if held_out:
        within = sum(error <= 0.10 for error in held_out)
        mean = sum(held_out) / len(held_out)
        runs = f"{len(held_out)} run{'s' * (len(held_out) > 1)}"
        print(f"\nheld out: {runs}, {within} within 10%, mean error {mean:.1%}, worst {max(held_out):.1%}")
    borrowed = efficiency.get("trainium2") or _efficiency("trn2.48xlarge")
    for run, analysis in analyses.items():
        if run.chip == "trainium1":
            error = predict(run, analysis, borrowed)[1] - 1
            print(f"{run.name}, the only run of its chip, with Trainium2's efficiency: {error:+.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
