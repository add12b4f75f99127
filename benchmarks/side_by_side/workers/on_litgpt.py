"""LitGPT: its own `pretrain.setup` (Fabric, torch.compile); its data loader is where it waits for its turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from turns import Turns, read_work

TURNS, WORK = Turns(), read_work()


def main() -> None:
    import numpy as np
    import torch
    from litgpt import pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import DataModule
    from torch.utils.data import DataLoader, IterableDataset

    TURNS.say("imported", versions={name: version(name) for name in ("litgpt", "torch", "lightning")})
    model, settings = WORK["model"], WORK["optimizer"]
    rows = torch.from_numpy(np.load(WORK["batches"])["rows"])
    losses: list[float] = []
    entropy, parameters = pretrain.chunked_cross_entropy, pretrain.num_parameters

    def kept(logits: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = entropy(logits, *arguments, **options)
        if loss.requires_grad and not loss.is_meta:  # LitGPT counts the FLOPs of one on the meta device
            losses.append(loss.item())
        return loss

    def told(module: Any) -> int:
        count = int(parameters(module))
        TURNS.say("built", parameters=count)
        return count

    pretrain.chunked_cross_entropy, pretrain.num_parameters = kept, told

    class Batches(IterableDataset):
        """The loader asks for a batch when the step before is finished."""

        def __iter__(self) -> Iterator[torch.Tensor]:
            for batch in itertools.cycle(rows):
                yield batch
                TURNS.done(losses.pop())

    class Data(DataModule):
        def __init__(self) -> None:
            super().__init__()

        def connect(self, *arguments: Any, **options: Any) -> None:
            pass

        def train_dataloader(self) -> DataLoader:
            return DataLoader(Batches(), batch_size=None)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(rows[:1], batch_size=None)  # type: ignore[arg-type]

    config = Config(
        name="peers",
        block_size=WORK["length"],
        n_layer=model["num_layers"],
        n_embd=model["hidden_size"],
        n_head=model["num_heads"],
        n_query_groups=model["num_kv_heads"],
        head_size=model["head_dim"],
        vocab_size=model["vocab_size"],
        padded_vocab_size=model["vocab_size"],
        intermediate_size=model["intermediate_size"],
        rotary_percentage=1.0,
        rope_base=int(model["rope_theta"]),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=model["norm_eps"],
        mlp_class_name="LLaMAMLP",
    )
    pretrain.setup(
        model_name="peers",
        model_config=config,
        out_dir=Path(WORK["directory"]),
        precision="bf16-mixed" if WORK["dtype"] == "bfloat16" else "32-true",
        data=Data(),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=WORK["rows"],
            micro_batch_size=WORK["rows"],
            max_tokens=10**12,
            max_norm=settings["clip_norm"],
            min_lr=settings["learning_rate"],  # a constant rate
            lr_warmup_steps=0,
            max_seq_length=WORK["length"],
            tie_embeddings=False,
        ),
        eval=EvalArgs(interval=10**9, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {
                "lr": settings["learning_rate"],
                "betas": (settings["b1"], settings["b2"]),
                "eps": settings["epsilon"],
                "weight_decay": settings["weight_decay"],
            },
        },
        devices=1,
        logger_name="csv",
    )


main()
