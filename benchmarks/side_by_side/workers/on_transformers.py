"""Hugging Face Transformers on PyTorch: SDPA, fused AdamW; eager, or through torch.compile.

From the work's weights, or with random ones of the shape that `config` gives to LlamaConfig; on `device`, which is the
CPU where nothing is said, and in microbatches of `microbatch` rows.
"""

from __future__ import annotations

import itertools

from turns import Turns, read_work, versions

TURNS, WORK = Turns(), read_work()


def main() -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    TURNS.say("imported", versions=versions("transformers", "torch"))
    device = WORK.get("device", "cpu")
    if "config" in WORK:
        with torch.device(device):
            config = LlamaConfig(**WORK["config"])
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    else:
        model = AutoModelForCausalLM.from_pretrained(WORK["weights"], dtype=torch.float32, attn_implementation="sdpa")
    if WORK.get("checkpointing"):
        model.gradient_checkpointing_enable()
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
    size = WORK.get("microbatch", WORK["rows"])
    for batch in itertools.cycle(rows):
        total = torch.zeros((), device=device)
        parts = batch.to(device).split(size)
        for part in parts:
            tokens, targets = part[:, :-1].contiguous(), part[:, 1:].contiguous()
            # float32 parameters, as trainfw's; products in bfloat16.
            with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
                loss = forward(input_ids=tokens, labels=targets, shift_labels=targets).loss / len(parts)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        loss = total.item()
        told = {}
        if device != "cpu":
            told = {"device": torch.cuda.get_device_name(), "device_memory": torch.cuda.max_memory_allocated()}
        TURNS.done(loss, more=told)


main()
