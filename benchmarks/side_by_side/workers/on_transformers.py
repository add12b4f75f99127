"""Hugging Face Transformers on PyTorch: SDPA, fused AdamW; eager, or through torch.compile."""

from __future__ import annotations

import itertools
from importlib.metadata import version

from turns import Turns, read_work

TURNS, WORK = Turns(), read_work()


def main() -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    TURNS.say("imported", versions={name: version(name) for name in ("transformers", "torch")})
    model = AutoModelForCausalLM.from_pretrained(WORK["weights"], dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    model.train()
    settings = WORK["optimizer"]
    # trainfw's `weight_decay_exclude` is the norms' scales (and biases, of which there are none).
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": scales, "weight_decay": 0.0}],
        lr=settings["learning_rate"],
        betas=(settings["b1"], settings["b2"]),
        eps=settings["epsilon"],
        fused=True,
    )
    TURNS.say("built", parameters=sum(p.numel() for p in model.parameters()))
    forward = torch.compile(model) if WORK["compile"] else model
    rows = torch.from_numpy(np.load(WORK["batches"])["rows"]).long()
    mixed = WORK["dtype"] == "bfloat16"
    for batch in itertools.cycle(rows):
        tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        # float32 parameters, as trainfw's; products in bfloat16.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = forward(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        TURNS.done(loss.item())


main()
