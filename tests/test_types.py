"""What a type checker sees of the package."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainfw

PACKAGE = Path(trainfw.__file__).parent
MOST_WITHOUT_TYPES = 351
"""Signatures that hold `Any`, of 2,689 functions; 615 of 2,517 before. Lower it where fewer do."""

USER = """
import jax, jax.numpy as jnp
import trainfw

reveal_type(trainfw.plan("quickstart", hardware="trn2.3xlarge"))
reveal_type(trainfw.plan({"extends": "quickstart"}).time.seconds)
reveal_type(trainfw.plan(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32)))
reveal_type(trainfw.check("quickstart"))
reveal_type(trainfw.load_recipe("quickstart", {"train.steps": 5}).train.steps)
reveal_type(trainfw.load_model("runs/quickstart")[0].save("model"))
reveal_type(trainfw.__version__)
trainfw.plan("quickstart", mesh=None)
"""
SEEN = [
    "trainfw.planning.predict.plan.Plan",
    "float",
    "trainfw.planning.predict.function_plan.FunctionPlan",
    "trainfw.checking.report.Report",
    "int",
    "str",
    "str",
]


def untyped(file: Path) -> Iterator[str]:
    """The functions of a file whose arguments or result are annotated with Any, or with what holds it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            annotations = [node.returns, *(argument.annotation for argument in arguments if argument is not None)]
            texts = [ast.unparse(annotation) for annotation in annotations if annotation is not None]
            if any(re.search(r"\bAny\b", text) for text in texts):
                yield f"{file.relative_to(PACKAGE)}:{node.lineno} {node.name}"


def test_signatures_with_any_do_not_grow_in_number():
    found = [name for file in sorted(PACKAGE.rglob("*.py")) for name in untyped(file)]
    assert len(found) <= MOST_WITHOUT_TYPES, "\n".join(found)


def test_the_package_says_that_it_has_types_and_which_version_it_is():
    assert (PACKAGE / "py.typed").is_file()
    assert trainfw.__version__ == importlib.metadata.version("trainfw")
    code = "import trainfw, sys; assert 'importlib.metadata' not in sys.modules; trainfw.__version__"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_user_of_the_package_has_its_types(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "user.py"]
    seen = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert re.findall(r'Revealed type is "(?:builtins\.)?([^"]*)"', seen) == SEEN
    assert seen.count(": error:") == 1
    assert 'No overload variant of "plan"' in seen
