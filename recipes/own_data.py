"""Data, a logger and a callback of your own in trainfw's loop.

python recipes/own_data.py [RECIPE] [KEY=VALUE]...
"""

import csv
import sys

from trainfw import backends

backends.prepare()  # the backend's environment comes before anything imports jax

import trainfw

# Rows that are all there: a list, an array of token ids, or a `datasets.Dataset`. They are tokenised, held out, packed
# and shuffled as files are, and a run that goes on finds its place among them.
PEOPLE = ["Ada", "Grace", "Alan", "Edsger", "Barbara"]
ROWS = [{"text": f"{PEOPLE[n % 5]} has {n} books and lends {n // 2} of them."} for n in range(2000)]


class Table(trainfw.Logger):
    """losses.csv: the rows of the run come as dicts, in order."""

    def __init__(self, path):
        self.path = path

    def write(self, rows):
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerows([row["step"], row["loss"]] for row in rows if "loss" in row)


class Patience(trainfw.Callback):
    """Stops the run when the held-out loss falls no more."""

    def __init__(self, least):
        self.least, self.best = least, None

    def validation(self, step, validation, state):
        if self.best is not None and validation.loss > self.best - self.least:
            return f"the held-out loss is {validation.loss:.3f}, and was {self.best:.3f}"
        self.best = validation.loss

    def end(self, step, state):
        print(f"ended at step {step}, having seen {self.best:.3f}")


if __name__ == "__main__":
    path, *overrides = sys.argv[1:] or ["quickstart", "name=own-data", "train.validate_every=20"]
    recipe = trainfw.load_recipe(path, overrides)
    result = trainfw.train(recipe, data=ROWS, loggers=[Table("losses.csv")], callbacks=[Patience(least=0.01)])
    print(f"stopped by {result.stopped}" if result.stopped else "trained to the last step")
