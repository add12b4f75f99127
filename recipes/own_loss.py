"""A loss of your own in trainfw's loop: the next token, and the distribution of a frozen teacher.

    python recipes/own_loss.py [RECIPE] [KEY=VALUE]...

Accumulation, meshes, checkpoints, validation and the guard against bad steps are those of every run.
"""

import sys
from dataclasses import dataclass

from trainfw import backends

backends.prepare()  # the backend's environment comes before anything imports jax

import jax
import jax.numpy as jnp

import trainfw
from trainfw.objectives import Mean, token_rows
from trainfw.parallel import all_gather, axis_size


@dataclass(frozen=True)
class Distillation:
    """Cross-entropy with the next token, and the divergence from a teacher."""

    weight: float = 0.5
    unit = "token"  # what the loss counts
    roles = ("teacher",)  # frozen models that it needs, which hold what the run starts from (`model.from`)

    def schema(self, batch, sequence):
        return token_rows(batch, sequence)  # packed rows of tokens, as data/ makes them

    def loss(self, models, batch, draw):
        """This device's part of the summed loss, and what is logged."""

        def log_p_BSV(model):
            logits_BSV = model(batch["tokens"], segment_ids_BS=batch["segment_ids"], positions_BS=batch["positions"])
            return jax.nn.log_softmax(all_gather(logits_BSV, "tensor", 2))  # along `tensor` each has a part of them

        learner_BSV, teacher_BSV = log_p_BSV(models["learner"]), log_p_BSV(models["teacher"])
        nats_BS = -jnp.take_along_axis(learner_BSV, batch["targets"][..., None], axis=-1)[..., 0]
        divergence_BS = jnp.sum(jnp.exp(teacher_BSV) * (teacher_BSV - learner_BSV), axis=-1)

        def mean(x_BS):  # a total and a count, which are added up over microbatches and devices
            share = 1 / axis_size("tensor")  # those along `tensor` have computed the same
            return Mean(jnp.sum(x_BS * batch["loss_mask"]) * share, jnp.sum(batch["loss_mask"]) * share)

        sums = {"loss": mean(nats_BS), "divergence": mean(divergence_BS)}  # the gradient is divided by loss's count
        return sums["loss"].total + self.weight * sums["divergence"].total, sums


if __name__ == "__main__":
    path, *overrides = sys.argv[1:] or ["quickstart"]
    trainfw.train(trainfw.load_recipe(path, overrides), objective=Distillation(weight=0.1))
