"""diffusers' DiT or PixArt on PyTorch: steps of training, or pictures drawn by its Euler scheduler of flows.

Eager, or through torch.compile. What embeds times and classes is one module, of which its DiT has a copy in each layer.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

from turns import Turns, read_work, versions

TURNS, WORK = Turns(), read_work()
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: WORK["threads"]])


def main() -> None:
    import numpy as np
    import torch
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    torch.set_num_threads(WORK["threads"])
    TURNS.say("imported", versions=versions("diffusers", "torch"))
    of_classes = WORK["model"]["conditioning"] == "class"
    model: Any = (DiTTransformer2DModel if of_classes else PixArtTransformer2DModel).from_pretrained(WORK["weights"])
    if of_classes:
        embed = model.transformer_blocks[0].norm1.emb
        embed.class_embedder.dropout_prob = 0.0  # labels to leave out are handed in
        for block in model.transformer_blocks:
            block.norm1.emb = embed
    arrays = np.load(WORK["batches"])
    batches = [{name: torch.from_numpy(arrays[name][i]) for name in arrays.files} for i in range(len(arrays["time"]))]
    for batch in batches:
        for name in ("image", "noise"):
            batch[name] = batch[name].permute(0, 3, 1, 2).contiguous()
    (train if WORK["task"] == "train" else draw)(model, batches)


def conditions(batch: Any, keep: Any) -> dict[str, Any]:
    """The condition of each row, or none where it is not kept: another class, or zeros, all of them seen."""
    import torch

    if "label" in batch:
        return {"class_labels": torch.where(keep > 0.5, batch["label"].long(), WORK["model"]["num_classes"])}
    keep = keep[:, None]
    mask = torch.where(keep > 0.5, batch["caption_mask"], 1.0)
    return {"encoder_hidden_states": batch["caption"] * keep[..., None], "encoder_attention_mask": mask}


def autocast() -> Any:
    """A context in which products are in the work's dtype."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=WORK["dtype"] == "bfloat16")


def train(model: Any, batches: list[Any]) -> None:
    import torch

    model.train()
    settings = WORK["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["learning_rate"],
        betas=(settings["b1"], settings["b2"]),
        eps=settings["epsilon"],
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    TURNS.say("built", parameters=sum(p.numel() for p in model.parameters()))
    forward: Callable[..., Any] = torch.compile(model) if WORK["compile"] else model
    for batch in itertools.cycle(batches):
        image, noise, time_B = batch["image"], batch["noise"], batch["time"]
        noisy = image + (time_B / 1000)[:, None, None, None] * (noise - image)
        with autocast():
            prediction = forward(noisy, timestep=time_B, **conditions(batch, batch["keep"]), return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), noise - image)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        TURNS.done(loss.item(), more=time.process_time())


def draw(model: Any, batches: list[Any]) -> None:
    import numpy as np
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    model.eval().requires_grad_(False)
    batch = batches[0]
    noise, rows = batch["noise"], len(batch["noise"])
    both = {name: torch.cat([array, array]) for name, array in batch.items()}
    condition = conditions(both, (torch.arange(2 * rows) < rows).float())
    TURNS.say("built", parameters=sum(p.numel() for p in model.parameters()))
    forward: Callable[..., Any] = torch.compile(model) if WORK["compile"] else model
    scheduler = FlowMatchEulerDiscreteScheduler()
    for number in itertools.count():
        x = noise
        scheduler.set_timesteps(WORK["denoising_steps"])
        with torch.inference_mode():
            for t in scheduler.timesteps:
                doubled = torch.cat([x, x])
                with autocast():
                    prediction = forward(doubled, timestep=t.expand(2 * rows), **condition, return_dict=False)[0]
                kept, left_out = prediction.float().chunk(2)
                prediction = left_out + WORK["guidance"] * (kept - left_out)
                x = scheduler.step(prediction, t, x, return_dict=False)[0]
        if not number:
            np.save(WORK["pictures"], x.permute(0, 2, 3, 1).numpy())
        TURNS.done(None, more=time.process_time())


main()
