"""A user's script as mypy sees it, with the types that the package gives; it is checked, and never run."""

from typing import assert_type

import jax
import jax.numpy as jnp

import trainfw
from trainfw.checking import Report
from trainfw.planning import FunctionPlan, Plan

assert_type(trainfw.plan("quickstart", hardware="trn2.3xlarge"), Plan)
assert_type(trainfw.plan({"extends": "quickstart"}).time.seconds, float)
assert_type(trainfw.plan(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32)), FunctionPlan)
assert_type(trainfw.check("quickstart"), Report)
assert_type(trainfw.load_recipe("quickstart", {"train.steps": 5}).train.steps, int)
assert_type(trainfw.load_model("runs/quickstart")[0].save("model"), str)
assert_type(trainfw.__version__, str)
trainfw.plan("quickstart", mesh=None)  # type: ignore[call-overload]  # a mesh is for functions
