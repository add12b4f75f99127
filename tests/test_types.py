"""What a type checker sees of the package."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import trainfw

PACKAGE = Path(trainfw.__file__).parent
MOST_WITHOUT_TYPES = 330
"""Signatures that hold `Any`, of 2,410 functions; 615 of 2,517 once. Lower it where fewer do."""


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
