from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainfw.config import INT32, Config, Dim, PositiveInt, invalid


class EvaluationConfig(Config):
    """Evaluation of the model's answers to held-out prompts, or of its pictures, before the first step and after the
    last.

    Answers need `data.format: chat` (the last turn that is learnt is the reference), `prompt_completion`, or
    `preferences` (what was chosen is the reference).
    """

    metric: Literal["rouge_l", "chrf", "exact_match", "class_accuracy", "retrieval"] = "rouge_l"
    """`rouge_l`: F1 of the longest common subsequence of words, without case and punctuation (Lin, "ROUGE", 2004).
    `chrf`: F2 of character n-grams up to 6 (Popović, "chrF", 2015). `exact_match`: whether every character is right.
    Of pictures, `class_accuracy`: whether a classifier that learnt from held-out ones takes it for its class;
    `retrieval`: whether the held-out picture of its caption is among the ten nearest to it. Each from 0 to 1, averaged
    over the examples."""
    examples: PositiveInt = 64
    """Number of held-out examples, spread over all of them, or of pictures."""
    max_tokens: Dim = 48
    """Tokens the model may write; it takes the likeliest each time."""
    batch_size: Dim = 16
    """Prompts continued at once."""
    samples: int = Field(default=3, ge=0)
    """Examples that are shown when the run ends; evaluation.jsonl in the run directory holds all answers. A picture is
    shown beside the training picture that is nearest to it."""


class TrainConfig(Config):
    """The training run: how long, on how much at a time, computed how, and what is reported."""

    steps: int = Field(default=1000, ge=1, le=INT32)
    """Optimizer updates."""
    global_batch_size: Dim = 8
    """Rows (of data.sequence_length tokens) in one update, over all devices."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Microbatches that one update is split into: less activation memory, the same update."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products and activations. Parameters, gradients and optimizer state are float32."""
    matmul_dtype: Literal["fp8"] | None = None
    """fp8: the layers' linear maps multiply in 8 bits, E4M3 forward and E5M2 for gradients, each array scaled by its
    largest number. Experts, the output head and attention's own products stay in compute_dtype. For GPUs from Hopper
    on; a CPU is slower with it, and on Neuron it has not run."""
    remat: Literal["none", "dots", "full", "stage"] = "none"
    """Recomputation in the backward pass: nothing; all but matrix products; all of each layer; and, where layers are in
    stages of a pipeline, all of each stage once and of each of its layers once more, for the least memory."""
    scan_layers: bool = True
    """Compile one layer and scan over the stack; false unrolls the layers: slower to compile, the same numbers."""
    loss_chunk: int = Field(default=2048, ge=1)
    """Tokens on a device whose logits exist at a time."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of log(Z)^2, which keeps the logits' normaliser near 1 (PaLM, arXiv 2204.02311, section 5)."""
    seed: int = Field(default=0, ge=0, le=INT32)
    """Seed of the initial parameters."""
    log_every: int = Field(default=10, ge=1)
    """Steps between rows of metrics.jsonl."""
    validate_every: int = Field(default=0, ge=0)
    """Steps between validations; 0: only before the first step and after the last."""
    validation_batches: int | None = Field(default=None, ge=0)
    """Validate on this many batches at most; 0: never; null: the whole held-out split."""
    sample_prompt: str | None = None
    """Prompt after which the model writes a sample when the run ends."""
    sample_tokens: int = Field(default=64, ge=1, le=2**20)
    """Tokens of that sample."""
    sample_images: int = Field(default=16, ge=0, le=4096)
    """Pictures that a model of images draws at every validation, as one in samples/ of the run and in TensorBoard."""

    @model_validator(mode="after")
    def _combinations(self) -> TrainConfig:
        steps, rows = self.accumulation_steps, self.global_batch_size
        if rows % steps:
            problem = f"accumulation_steps = {steps} does not divide train.global_batch_size = {rows}"
            invalid("accumulation_steps", problem)
        return self


class FaultsConfig(Config):
    """Policies for steps that go wrong.

    Policies: `stop` ends the run; `skip` leaves parameters and optimizer as they were (decided on the devices) and
    goes on; `rollback` goes back to the last checkpoint and leaves out the rows of that step. Each is written to
    faults.jsonl in the run directory.
    """

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """Policy when the loss or a norm of the gradient is infinite or not a number."""
    spike: Literal["stop", "skip", "rollback"] = "skip"
    """Policy when the loss or the gradient's norm is `spike_sigma` above what it has been."""
    spike_sigma: float | None = Field(default=None, gt=0)
    """Standard deviations above the running mean (over some 50 steps) that make a spike; null: nothing does."""
    most: int = Field(default=10, ge=0)
    """Bad steps in a row, and rollbacks in all, after which the run ends whatever the policy."""
    replicas_every: int = Field(default=0, ge=0)
    """Compare the parameters of all replicas, bit for bit, every this many steps; 0: never."""


class WatchdogConfig(Config):
    """Seconds without progress after which a process prints where it hangs and exits with code 75; 0: never.

    The other processes, which wait for it in a collective, do the same: the job ends, and starts again.
    """

    start_seconds: float = Field(default=3600, ge=0)
    """Reading data, weights and checkpoints; each piece read is progress."""
    compile_seconds: float = Field(default=10800, ge=0)
    """Compiling the training step: hours, for a large model on Neuron (others measured 20 to 36 minutes)."""
    step_seconds: float = Field(default=1800, ge=0)
    """A step, a batch of validation, or an example of an evaluation."""
    save_seconds: float = Field(default=3600, ge=0)
    """Waiting for a checkpoint."""
