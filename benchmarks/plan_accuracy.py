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
from typing import Literal

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import yaml

from trainfw import Recipe, backends, load_recipe
from trainfw.hardware import Topology
from trainfw.models import flops_per_token
from trainfw.parallel import place
from trainfw.planning.predict.step_time import Assumptions, StepTime, step_time
from trainfw.planning.read_step.analysis import Analysis, compile_step, lengthened, read, simulated_program, simulation

DEVICES = 512
"""Simulated by this process: as many as 8 stages of 32 cores take, with 2 of what shares out the batch."""
MOST = 16
"""The size to which `data` and `fsdp` are shortened: what a core does stays as it is (tests/planning/test_time.py)."""

AXLEARN = "AXLearn (arXiv:2507.05411), wizwand.com/paper/68fa79ed1e209131cea80024"
FUJI = "layout: apple/axlearn axlearn/experiments/text/gpt/fuji.py"
NEURON = (
    "aws-neuron-sdk general/benchmarks/trn1/training_data_decoder.csv (1351ee12 is SDK 2.16, 82ffe529 2.17, 907af9f8 "
    "2.20, 752349fd 2.21), the page of May 2025 (2.21, 2.22), about-neuron/benchmarks/trn1 at 7c165a3e (2.24)"
)
SCRIPTS = "neuronx-distributed examples/training/llama at 0598cd8b"
TORCHTITAN = "pytorch/torchtitan 31a17bfd benchmarks/llama3_h100_202412_torchtitan.md"
MAXTEXT = "AI-Hypercomputer/maxtext (2024) README, MaxText/configs/a3/llama_2_7b (README.md, 1vm.sh to 16vm.sh)"
DGXC = "NVIDIA/dgxc-benchmarking maxtext/README_70b.md"


@dataclass(frozen=True, eq=False)
class Run:
    name: str
    chip: str
    settings: dict[str, object]
    """A recipe's settings, by dotted key."""
    published: tuple[float, ...]
    """Every figure of this run, by release or log."""
    unit: str
    """`s/step`, `seq/s`, `tok/s/chip` or `TFLOP/s/chip` (as MaxText counted then: attention in full)."""
    source: str
    nearest: str = ""
    """Differences of the published run."""
    fit: bool = False
    unseen: bool = False
    """Nobody had predicted it before it was written here."""
    attention: Literal["fused", "xla"] = "fused"
    kernel_guessed: bool = False
    """Its source names no attention kernel; what the plan would say without one is printed too."""
    parameters: dict[str, str] = field(default_factory=dict)
    """Figures of its hardware, where its source says that they differ."""
    keeps_attention: bool = False
    """Remat saves what attention returns, too."""
    computes_again: tuple[tuple[int, int], ...] = ()
    """Products of a layer that remat does not save, though `dots` would: (k, n) of each on one core."""
    wide_gradients: bool = False
    """Gradients are reduced in float32."""

    @property
    def middle(self) -> float:
        """The figure that a prediction is held against: the geometric middle of the lowest and the highest."""
        return math.sqrt(min(self.published) * max(self.published))

    def recipe(self, efficiency: float | None = None) -> Recipe:
        """The run as a recipe, perhaps with another efficiency of matrix products than the chip's."""
        tree: dict[str, dict[str, object]] = {
            "data": {"source": "corpus.jsonl"},
            "train": {"compute_dtype": "bfloat16"},
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
        published=(published,),
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


def _dgxc(
    gpus: int, *published: float, fsdp: int, model: str = "llama2-70b", fit: bool = False, unseen: bool = False
) -> Run:
    """MaxText on DGX H100, as NVIDIA publishes it; FSDP over all GPUs or, of many, replicas of 128."""
    third = model == "llama3.1-70b"
    # configure.sh of the same repository. Llama 2, bf16 (35a9aecc): saved are queries, keys, values, out_proj and
    # mlpwo; Llama 3 (0b71cfda): queries, keys and values. Neither saves what attention returns.
    wide = (8192, 28672)
    return Run(
        name=f"MaxText {'Llama 3' if third else 'Llama 2'} 70B, {gpus:,} GPUs",
        chip="h100",
        settings=_settings(
            "h100-8",
            gpus // 8,
            model,
            data__sequence_length=8192 if third else 4096,
            train__global_batch_size=2 * gpus,
            train__remat="dots",
            parallel__data=gpus // fsdp,
            parallel__fsdp=fsdp,
        ),
        published=published,
        unit="s/step",
        source=f"{DGXC} {'(Llama 3, 25.04)' if third else '35a9aecc (25.01)'}, configure.sh",
        nearest="with the RoPE of Llama 3.1, of the same cost" if third else "",
        computes_again=((8192, 8192), wide, wide) if third else (wide, wide),
        fit=fit,
        unseen=unseen,
    )


def _torchtitan(nodes: int, published: float, *, model: str = "8B") -> Run:
    largest = model == "405B"
    return Run(
        name=f"torchtitan Llama 3.1 {model}, {nodes * 8} GPUs",
        chip="h100",
        settings=_settings(
            "h100-8",
            nodes,
            f"llama3.1-{model.lower()}",
            data__sequence_length=8192,
            train__global_batch_size=2 * nodes if largest else 16 * nodes,
            train__remat="full" if largest else "dots",
            parallel__fsdp=nodes if largest else 8 * nodes,
            parallel__tensor=8 if largest else 1,
        ),
        published=(published,),
        unit="tok/s/chip",
        source="pytorch/torchtitan docs/performance.md (pull request #554, August 2024)" if largest else TORCHTITAN,
        nearest='its cards are limited to 500 W, their peak not known: "between SXM and NVL", here the middle of both',
        unseen=largest,
        keeps_attention=not largest,
        # Every second product of a layer (torchtitan/parallelisms/parallelize_llama.py, selective_ac_option op): of
        # queries, keys, values, output, gate, up and down those of keys, output and up.
        computes_again=() if largest else ((4096, 1024), (4096, 4096), (4096, 14336)),
        wide_gradients=True,  # torchtitan/config_manager.py: mixed_precision_reduce is float32
        # torchtitan/utils.py get_peak_flops: 989 TFLOP/s (SXM) and 835 (NVL).
        parameters={"chip.hbm_bandwidth": "2.4 TB/s", "chip.peak_flops.bfloat16": "912 TFLOP/s"},
    )


def _neuron(name: str, instances: int, model: str, layout: str, *published: float, **flags: object) -> Run:
    """A row of AWS's table: `layout` is `tensor x stages x data`; batch 1,024."""
    tensor, stages, data = map(int, layout.split("x"))
    sharded = flags.pop("zero1", True)
    third = model.startswith("llama3")
    settings = _settings(
        "trn1.32xlarge",
        instances,
        model,
        data__sequence_length=8192 if third else 4096,
        train__global_batch_size=1024,
        train__remat="dots",
        parallel__tensor=tensor,
        parallel__pipeline=stages,
        parallel__data=1 if sharded else data,
        parallel__fsdp=data if sharded else 1,
    )
    if sharded:
        settings["parallel.fsdp_shards"] = "optimizer"
    nearest = []
    if tensor == 32:  # kv_replicator 4
        settings["model.num_kv_heads"] = 32
        nearest.append("kv heads repeated to 32, as there")
    if stages == 1:
        nearest.append("one microbatch, which would not fit, so that a step has as few sums as there")
    return Run(
        name=f"NxD {name}",
        chip="trainium1",
        settings=settings,
        published=published,
        unit="seq/s",
        source=f"{NEURON}; {SCRIPTS}",
        nearest="; ".join(nearest),
        kernel_guessed=not third,  # use_flash_attention is in the scripts of Llama 3 alone
        **flags,  # type: ignore[arg-type]
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
        published=(1.2,),
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
        published=(11.2,),
        unit="s/step",
        source=f"{AXLEARN}; {FUJI}",
        nearest="batch not published with it",
        computes_again=((2048, 8192),),
    ),
    # Of Llama 2 7B 92.9, and of 13B 87.4, are of releases between these, as the project was told of them.
    _neuron("Llama 2 7B, TP8 DP64", 16, "llama2-7b", "8x1x64", 92.9, 93.3, 94.7, 101.3, 95.14, fit=True),
    _neuron("Llama 3.1 8B, TP32 DP32", 32, "llama3.1-8b", "32x1x32", 49.47, 53.51, fit=True, zero1=False),
    _neuron("Llama 3.1 8B, TP32 DP32 ZeRO-1", 32, "llama3.1-8b", "32x1x32", 41.99, 47.95, fit=True),
    _neuron("Llama 2 13B, TP8 PP4 DP32", 32, "llama2-13b", "8x4x32", 85.65, 81.8, 87.4),
    _neuron("Llama 2 13B, TP8 PP8 DP16", 32, "llama2-13b", "8x8x16", 84.0, 80.33, unseen=True),
    _neuron("Llama 2 70B, TP32 PP4 DP8", 32, "llama2-70b", "32x4x8", 15.34, 15.6, unseen=True),
    _neuron("Llama 2 70B, TP32 PP8 DP4", 32, "llama2-70b", "32x8x4", 14.2, 14.44, unseen=True),
    _neuron("Llama 3.1 70B, TP32 PP8 DP4", 32, "llama3.1-70b", "32x8x4", 7.59, 7.97, 7.51, 7.94, unseen=True),
    *(_maxtext(nodes, published) for nodes, published in ((1, 492), (2, 422), (4, 407), (8, 409), (16, 375))),
    _dgxc(64, 6.999, 7.908, fsdp=64, fit=True),
    _dgxc(128, 7.072, fsdp=128, unseen=True),
    _dgxc(512, 7.091, fsdp=128, unseen=True),
    _dgxc(2048, 7.066, fsdp=128, unseen=True),
    _dgxc(128, 15.563, 15.570, fsdp=128, model="llama3.1-70b", fit=True),
    _dgxc(512, 15.519, fsdp=128, model="llama3.1-70b", unseen=True),
    _dgxc(2048, 15.898, fsdp=128, model="llama3.1-70b", unseen=True),
    *(_torchtitan(nodes, published) for nodes, published in ((1, 6667), (16, 6514))),
    _torchtitan(16, 109, model="405B"),
]


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
    """Add the products that the run's remat computes again, where `dots` saves others, and its gradients' width."""
    layers = run.recipe().model.num_layers
    again = list(run.computes_again)
    matmuls = []
    for matmul in analysis.matmuls:
        times = matmul.times
        if matmul.attention and not matmul.backward:
            # The whole kernel once, and again where remat does not keep its result; a fused backward pass makes the
            # scores by itself.
            times = 0 if matmul.phase == "backward" else times * (1 if run.keeps_attention else 2)
        elif matmul.phase == "forward" and not matmul.backward:
            times += layers * again.count((matmul.k, matmul.n))
            again = [product for product in again if product != (matmul.k, matmul.n)]
        if times:
            matmuls.append(replace(matmul, times=times))
    assert not again, (run.name, again)
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
    assumed = Assumptions(attention=run.attention, mixed="narrow")  # products of all runs are in bfloat16 throughout
    step = step_time(analysis, place(topology, analysis.layout), recipe, assumed)
    return step, _ratio(run, in_unit(run, recipe, topology, step.seconds), run.middle)


def _ratio(run: Run, predicted: float, published: float) -> float:
    """Divide the predicted time by the published one."""
    return predicted / published if run.unit == "s/step" else published / predicted


def fitted(runs: dict[Run, Analysis]) -> float:
    """The efficiency at which the times of these runs are right, in the geometric mean."""
    low, high = 0.01, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        errors = [math.log(predict(run, analysis, middle)[1]) for run, analysis in runs.items()]
        low, high = (middle, high) if sum(errors) > 0 else (low, middle)
    return (low + high) / 2


def ends(run: Run, analysis: Analysis) -> list[float]:
    """The efficiencies at which this run by itself is right, at the lowest and the highest figure published of it."""
    figures = sorted({min(run.published), max(run.published)})
    return sorted(fitted({replace(run, published=(figure,)): analysis}) for figure in figures)


def analysed(runs: list[Run]) -> dict[Run, Analysis]:
    """Analyse each run's program, compiled once for those that differ in the length of `data` and `fsdp` alone."""
    known: dict[str, Analysis] = {}
    found = {}
    for run in runs:
        simulated = simulation(run.recipe(), MOST)
        key = simulated.recipe.to_yaml()
        if key not in known:
            started = time.monotonic()
            program = simulated_program(simulated)
            known[key] = read(compile_step(program).module, program.mesh, simulated.simulated)
            print(f"{time.monotonic() - started:5.1f} s to compile {run.name}", file=sys.stderr, flush=True)
        found[run] = as_published(run, lengthened(known[key], simulated.simulated, simulated.layout))
    return found


def kind(run: Run) -> str:
    """`fitted`, `held out` or `held out, unseen`."""
    return "fitted" if run.fit else "held out, unseen" if run.unseen else "held out"


def nearer(run: Run, predicted: float) -> float:
    """The error against the nearer end of what was published; nothing between them."""
    ratios = sorted(_ratio(run, predicted, end) - 1 for end in (min(run.published), max(run.published)))
    return 0.0 if ratios[0] <= 0 <= ratios[1] else min(ratios, key=abs)


def show(run: Run, analysis: Analysis, efficiency: float | None) -> Row:
    """Print a run, and return its row of the table."""
    step, ratio = predict(run, analysis, efficiency)
    recipe = run.recipe()
    topology = recipe.hardware.load()
    assert topology is not None
    middle, *ends = (in_unit(run, recipe, topology, s) for s in (step.seconds, step.low, step.high))
    figures = ", ".join(f"{figure:,.2f}" for figure in run.published)
    print(f"\n{run.name} ({kind(run)})")
    print(f"  source     {run.source}")
    print(f"  published  {figures} {run.unit}")
    print(f"  predicted  {middle:,.2f} {run.unit} ({min(ends):,.2f} to {max(ends):,.2f})")
    print(f"  step time  {step.seconds:.3f} s, {ratio - 1:+.1%} of the published")
    print(f"  MFU        {step.mfu:.1%}, bound by {step.bound_by}")
    parts = [f"{name} {seconds:.3f}" for name, seconds in step.parts.items() if seconds >= 0.0005]
    hidden = [f"{name} {seconds:.3f}" for name, seconds in step.hidden.items() if seconds >= 0.0005]
    print(f"  seconds    {', '.join(parts)}{'; hidden: ' + ', '.join(hidden) if hidden else ''}")
    if run.nearest:
        print(f"  differs    {run.nearest}")
    if run.kernel_guessed:
        other, away = predict(replace(run, attention="xla"), analysis, efficiency)
        plain = f"{in_unit(run, recipe, topology, other.seconds):,.2f} {run.unit}, {away - 1:+.1%}"
        print(f"  guessed    a fused attention kernel; its scores through memory: {plain}")
    inside = min(ends) <= max(run.published) and min(run.published) <= max(ends)
    return Row(run, middle, ratio - 1, nearer(run, middle), inside)


@dataclass(frozen=True)
class Row:
    """A run's row of the table."""

    run: Run
    predicted: float
    error: float
    """Error of the time, against the middle of what was published; below zero, predicted too fast."""
    nearer: float
    """Error against the nearer end."""
    inside: bool
    """True where the printed range holds a published figure."""


def print_table(rows: list[Row]) -> None:
    """Print every row, and the mean and worst error of those that were not fitted."""
    print("\n| run | | published | predicted | error | nearer end | in range |\n|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = min(row.run.published), max(row.run.published)
        published = f"{low:,g} to {high:,g}" if low < high else f"{low:,g}"
        print(
            f"| {row.run.name} | {kind(row.run)} | {published} {row.run.unit} | {row.predicted:,.4g} "
            f"| {row.error:+.1%} | {row.nearer:+.1%} | {'yes' if row.inside else '**no**'} |"
        )
    held_out = [row for row in rows if not row.run.fit]
    print()
    for what, group in (
        ("fitted", [row for row in rows if row.run.fit]),
        *((f"held out, {chip}", [r for r in held_out if r.run.chip == chip]) for chip in {r.run.chip: 0 for r in rows}),
        ("held out", held_out),
        ("held out, unseen", [row for row in held_out if row.run.unseen]),
    ):
        if group:
            errors = [abs(row.error) for row in group]
            close, inside = sum(error <= 0.10 for error in errors), sum(row.inside for row in group)
            mean = sum(errors) / len(errors)
            runs = f"{len(group)} run{'s' * (len(group) > 1)}"
            print(
                f"{what}: {runs}, {close} within 10%, mean error {mean:.1%}, worst {max(errors):.1%}, {inside} in range"
            )


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
    started = time.monotonic()
    analyses = analysed(chosen)
    efficiency = {}
    for chip in dict.fromkeys(run.chip for run in chosen):
        mine = {run: analysis for run, analysis in analyses.items() if run.chip == chip and run.fit}
        if arguments.fit and mine:
            efficiency[chip] = fitted(mine)
            print(f"{chip}: matmul_efficiency {efficiency[chip]:.3f}, fitted on {', '.join(r.name for r in mine)}")
            alone = {run: ends(run, analysis) for run, analysis in analyses.items() if run.chip == chip}
            for run, found in alone.items():
                print(f"  {' to '.join(f'{value:.3f}' for value in found):15}  {run.name} by itself ({kind(run)})")
            every = [value for found in alone.values() for value in found]
            print(f"  matmul_efficiency_range {min(every):.3f} to {max(every):.3f}")
    print_table([show(run, analysis, efficiency.get(run.chip)) for run, analysis in analyses.items()])
    print(f"\n{time.monotonic() - started:.0f} s in all", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
