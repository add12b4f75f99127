"""The house: imports point down, and the front door is fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trainfw

PACKAGE = Path(trainfw.__file__).parent
# Top to bottom. Packages of one row do not import each other, except where a row says so.
ROWS = [
    ["cli"],
    ["sweeping"],
    ["planning", "launch"],
    ["checking"],
    ["report"],
    ["training"],
    ["serving"],
    ["program"],
    ["weights"],
    ["recipe"],
    ["data", "optim", "checkpoint", "interop", "sampling"],
    ["adapters", "objectives"],
    ["models"],
    ["hlo"],
    ["parallel"],
    ["quantization"],
    ["backends"],
    ["hardware"],
    ["config", "formats", "yaml_text"],
    ["json_text"],
    ["confined", "names", "paths", "pieces", "scopes", "signals", "streams", "tables", "unfinished", "utf8", "version"],
    ["errors"],
]
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}


def imports(file: Path) -> set[tuple[str, str]]:
    """(module, name) of every trainfw import in a file, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trainfw":
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file):
    mine = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if mine.startswith("__"):
        return
    for module, name in imports(file):
        parts = module.split(".")
        theirs = parts[1] if len(parts) > 1 else name
        if theirs == mine:
            continue
        assert LEVEL[theirs] > LEVEL[mine], f"{file.name} of {mine} imports {theirs}.{name}"
        assert len(parts) <= 2, f"{file.name} reaches past the face of {theirs}: {module}"


def device_questions(code: str) -> list[str]:
    """The comparisons of a file that ask which device this is: what differs by device is said by `Backend`."""
    asked = []
    for node in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Compare)):
        sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
        device = any(repr(name) in side for side in sides for name in ("cpu", "gpu", "neuron"))
        if device or any(side.split(".")[-1] == "platform" and side != "sys.platform" for side in sides):
            asked.append(ast.unparse(node))
    return asked


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_backends_asks_which_device_it_is(file):
    # A topology, which lies below, says of itself which it is.
    if file.relative_to(PACKAGE).parts[0] not in ("backends", "hardware"):
        assert device_questions(file.read_text()) == []


def test_questions_for_a_device_are_seen():
    for code in ("backend.platform == 'cpu'", "topology.rules != 'neuron'", "name in ('cpu', 'gpu')", "platform == x"):
        assert device_questions(code)
    assert not device_questions("sys.platform == 'linux'")


def test_decoders_are_named_only_where_decoders_are_meant():
    # Of a model, all else asks its family or a TokenModel.
    names = {"Transformer", "ModelConfig", "DecoderLayer"}
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.relative_to(PACKAGE).parts[0] not in ("models", "interop", "sampling"):
            assert not names & {name for _, name in imports(file)}, file


@pytest.mark.parametrize("code", ["import trainfw", "import trainfw.cli", "import trainfw.recipe"])
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    heavy = ["jax", "flax", "numpy", "grain", "orbax", "tokenizers", "torch"]
    subprocess.run([sys.executable, "-c", f"{code}, sys; assert not set({heavy}) & set(sys.modules)"], check=True)


def test_loading_a_recipe_needs_no_jax():
    code = "import trainfw, sys; trainfw.load_recipe('quickstart'); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("face", sorted(PACKAGE.rglob("__init__.pyi")), ids=lambda f: f.parent.name)
def test_no_module_has_the_name_of_what_its_package_exports(face):
    # Once imported, the module would stand in the place of the function.
    exported = {alias.asname for node in ast.parse(face.read_text()).body for alias in getattr(node, "names", ())}
    assert exported
    assert not {name for name in exported if (face.parent / f"{name}.py").exists()}


def definitions(file: Path) -> list[ast.stmt]:
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.stmt)]


def test_functions_fit_a_screen_and_files_stay_short():
    long_functions, long_files = set(), []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if len(file.read_text().splitlines()) > 600:
            long_files.append(name)
        for node in definitions(file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 80:
                long_functions.add(f"{name}: {node.name}")
    assert not long_functions
    assert not long_files


RIDDLES = {
    *("What", "Of", "Whether", "Where", "That", "Those", "And", "Its", "By", "How", "Which", "Who", "When", "As", "In"),
    *("Ours", "Theirs", "Such", "Said", "Also", "But"),
}


def docstrings(file: Path) -> list[tuple[int, str]]:
    """(line, text) of every docstring in a file, those below attributes too."""
    return [
        (node.lineno, node.value.value)
        for node in definitions(file)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_docstring_is_a_riddle(file):
    assert not [f"line {line}: {text[:60]}" for line, text in docstrings(file) if _first(text) in RIDDLES]


def _first(text: str) -> str:
    return text.split(maxsplit=1)[0].strip(".,:;")
