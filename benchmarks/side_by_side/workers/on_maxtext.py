"""MaxText: its own `train_loop` on its own synthetic data; between two steps it waits for its turn."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from turns import Turns, read_work

TURNS, WORK = Turns(), read_work()


def main() -> None:
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # MaxText's switch: nothing of Google Cloud

    import jax
    import maxtext
    from maxtext.trainers.pre_train import train

    TURNS.say("imported", versions={name: version(name) for name in ("maxtext", "jax", "flax")})
    model, settings = WORK["model"], WORK["optimizer"]
    options: dict[str, Any] = {
        "run_name": "peers",
        "base_output_directory": WORK["directory"],
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "jax_cache_dir": "",  # compiled afresh, as the others are
        "dataset_type": "synthetic",
        "packing": False,  # whole rows
        "per_device_batch_size": WORK["rows"],
        "max_target_length": WORK["length"],
        "steps": 1_000_000,
        "enable_dropout": False,
        "sharding_tolerance": 1.0,
        # The model.
        "decoder_block": "llama2",
        "vocab_size": model["vocab_size"],
        "base_emb_dim": model["hidden_size"],
        "base_mlp_dim": model["intermediate_size"],
        "base_num_decoder_layers": model["num_layers"],
        "base_num_query_heads": model["num_heads"],
        "base_num_kv_heads": model["num_kv_heads"],
        "head_dim": model["head_dim"],
        "normalization_layer_epsilon": model["norm_eps"],
        "rope_max_timescale": int(model["rope_theta"]),
        "logits_via_embedding": False,
        "dtype": WORK["dtype"],
        "weight_dtype": "float32",
        # The optimizer, at a constant rate.
        "opt_type": "adamw",
        "learning_rate": settings["learning_rate"],
        "learning_rate_final_fraction": 1.0,
        "warmup_steps_fraction": 0.0,
        "adam_b1": settings["b1"],
        "adam_b2": settings["b2"],
        "adam_eps": settings["epsilon"],
        "adam_weight_decay": settings["weight_decay"],
        "gradient_clipping_threshold": settings["clip_norm"],
        **WORK["options"],
    }
    iterate, told = train.training_loop_iteration, False

    def iterate_and_wait(device_state: dict[str, Any], *arguments: Any) -> Any:
        nonlocal told
        if not told:
            from flax import nnx

            params = nnx.state(device_state["state"].model, nnx.Param)
            TURNS.say("built", parameters=sum(leaf.size for leaf in jax.tree.leaves(params)))
            told = True
        metrics = iterate(device_state, *arguments)
        jax.block_until_ready(device_state["state"])
        TURNS.done(float(metrics["scalar"]["learning/loss"]))
        return metrics

    train.training_loop_iteration = iterate_and_wait
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    train.main([sys.argv[0], str(base), *(f"{key}={value}" for key, value in options.items())])


main()
