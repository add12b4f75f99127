"""Published drawing with PixArt on Inferentia2, predicted: python benchmarks/diffusion_plan.py [--plans]

The four rows are of aws-neuron-sdk (Inf2.xlarge, SDK 2.20). Its own script measured them:
src/benchmark/pytorch/pixart_alpha_benchmark.py and pixart_sigma_benchmark.py at 72825d50. It calls diffusers' pipeline
with a prompt and nothing else, so 20 steps, guided, one image at a time. The time is of the whole call: T5-XXL for the
prompt and for the empty one, the transformer 20 times, the autoencoder's decoder; by the notebook that compiles these
(aws-neuron-samples 4ed5764f torch-neuronx/inference/hf_pretrained_pixart_alpha_inference_on_inf2.ipynb) the transformer
computes the two rows of guidance on a core each, all else runs on one core, and weights are bfloat16.

Here each of them is planned as one core's function, with the figures that trainfw/hardware/chips/inferentia2.yaml has
for every plan: nothing is fitted to these rows. The host's work between calls is in no plan.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import trainfw
from trainfw.models import AutoencoderConfig, Condition, DiTConfig, abstract_model
from trainfw.planning import FunctionPlan

CHIP = "inf2.xlarge"
STEPS = 20
"""diffusers' default for both pipelines (PixArtAlphaPipeline, PixArtSigmaPipeline)."""
BF16 = jnp.bfloat16


@dataclass(frozen=True)
class Published:
    model: str
    side: int
    tokens: int
    """Tokens of a caption."""
    images_per_second: float
    latency: float
    """Median seconds."""


# aws-neuron-sdk 907af9f8 general/benchmarks/inf2/latency_data_vision_dit.csv
ROWS = (
    Published("PixArt-Alpha", 256, 120, 1.975, 0.502587),
    Published("PixArt-Alpha", 512, 120, 0.565, 1.769756),
    Published("PixArt-Sigma", 256, 300, 1.86, 0.540832),
    Published("PixArt-Sigma", 512, 300, 0.543, 1.841882),
)


@dataclass(frozen=True)
class Predicted:
    transformer: FunctionPlan
    encoder: FunctionPlan
    decoder: FunctionPlan

    def seconds(self, end: str = "seconds") -> float:
        """One image: `seconds`, `low` or `high`."""
        transformer, encoder, decoder = (getattr(plan.time, end) for plan in vars(self).values())
        return STEPS * transformer + 2 * encoder + decoder


def predicted(row: Published) -> Predicted:
    return Predicted(transformer(row.side, row.tokens), text_encoder(row.tokens), decoder(row.side))


def transformer(side: int, tokens: int, dtype: Any = BF16) -> FunctionPlan:
    """One row, without or with its caption; `dtype` is that of the weights."""
    scale = {256: 0.5, 512: 1.0}[side]
    config = DiTConfig(preset="pixart-xl/2", image_size=side // 8, caption_length=tokens, position_scale=scale)
    graphdef, weights = nnx.split(abstract_model(config, compute_dtype="bfloat16"))

    def denoise(weights: Any, image: jax.Array, time: jax.Array, caption: jax.Array, mask: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, weights)
        return model.unpatched(model.forward(image, time, Condition(caption_BTF=caption, caption_mask_BT=mask)))

    arrays = shapes(image=(1, side // 8, side // 8, 4), time=(1,), caption=(1, tokens, 4096), mask=(1, tokens))
    return trainfw.plan(denoise, cast(weights, dtype), *arrays, hardware=CHIP)


def decoder(side: int) -> FunctionPlan:
    """Latents of one image to pixels."""
    config = AutoencoderConfig(family="autoencoder", preset="sd-vae", image_size=side)
    graphdef, weights = nnx.split(abstract_model(config, compute_dtype="bfloat16"))

    def decode(weights: Any, latent: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, weights).decode(latent)

    return trainfw.plan(decode, cast(weights, BF16), *shapes(latent=(1, side // 8, side // 8, 4)), hardware=CHIP)


def text_encoder(tokens: int) -> FunctionPlan:
    """T5 v1.1 XXL's encoder (huggingface.co/google/t5-v1_1-xxl config.json) of one text, its embedding left out."""
    D, heads, size, F, layers = 4096, 64, 64, 10240, 24
    maps = dict.fromkeys(("query", "key", "value"), (D, heads * size))
    maps |= {"output": (heads * size, D), "gate": (D, F), "up": (D, F), "down": (F, D)}
    weights = {name: jax.ShapeDtypeStruct((layers, *shape), BF16) for name, shape in maps.items()}

    def normed(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(BF16)

    def layer(x: jax.Array, w: dict[str, jax.Array], bias: jax.Array) -> jax.Array:
        h = normed(x)
        q, k, v = ((h @ w[name]).reshape(tokens, heads, size) for name in ("query", "key", "value"))
        with jax.named_scope(trainfw.scopes.ATTENTION):
            scores = jnp.einsum("shd,thd->hst", q, k, preferred_element_type=jnp.float32) + bias
            o = jnp.einsum("hst,thd->shd", jax.nn.softmax(scores).astype(BF16), v)
        x = x + o.reshape(tokens, -1) @ w["output"]
        h = normed(x)
        return x + (jax.nn.gelu(h @ w["gate"], approximate=True) * (h @ w["up"])) @ w["down"]

    def encode(weights: dict[str, jax.Array], x: jax.Array, bias: jax.Array) -> jax.Array:
        return normed(jax.lax.scan(lambda x, w: (layer(x, w, bias), None), x, weights)[0])

    x, bias = jax.ShapeDtypeStruct((tokens, D), BF16), jax.ShapeDtypeStruct((heads, tokens, tokens), jnp.float32)
    return trainfw.plan(encode, weights, x, bias, hardware=CHIP)


def shapes(**sizes: tuple[int, ...]) -> Iterator[jax.ShapeDtypeStruct]:
    return (jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes.values())


def cast(weights: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), weights)


HEAD = (
    *("model", "px", "published, images/s", "predicted", "range", "error"),
    *("a step, ms", "20 steps", "T5, 2 texts", "decoder", "left over, ms"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", action="store_true", help="print the plans of the first row, too")
    chosen = parser.parse_args()
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for row in ROWS:
        made = predicted(row)
        seconds, rate = made.seconds(), 1 / made.seconds()
        step, encoder, decoding = (plan.time.seconds * 1e3 for plan in vars(made).values())
        cells = (
            *(row.model, row.side, row.images_per_second, f"{rate:.3g}"),
            f"{1 / made.seconds('high'):.3g} to {1 / made.seconds('low'):.3g}",
            f"{rate / row.images_per_second - 1:+.0%}",
            *(f"{step:.2f}", f"{STEPS * step:.0f}", f"{2 * encoder:.0f}", f"{decoding:.0f}"),
            f"{(row.latency - seconds) * 1e3:.0f}",
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        if chosen.plans and row is ROWS[0]:
            for plan in vars(made).values():
                print(f"\n{plan}\n")


if __name__ == "__main__":
    main()
