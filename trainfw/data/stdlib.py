"""Tasks made of Python's own library, which is on every machine: prompts, and the completions to learn."""

from __future__ import annotations

import ast
import re
import textwrap
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainfw.data.compressed import File

Pair = tuple[int, str, str]
"""(line, prompt, completion)"""

_Defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_WORDS = range(3, 31)
"""Numbers of words of a line worth learning: shorter lines say nothing, longer ones are lists or tables."""
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()\-]*[.?!]")
"""A sentence in which only case and punctuation could be missing: no code, markup or paths."""


def summaries(text: str) -> Iterator[Pair]:
    """Yield the source of each function, method and class without docstrings -> the first line of its docstring.

    Left out are docstrings whose first line breaks off (PEP 257 asks for a line of its own), and definitions that
    hold nothing but their docstring. Docstrings inside go too: one pair's prompt never holds another's completion.
    """
    lines = text.splitlines()
    for node in _documented(text, _Defined):
        doc = ast.get_docstring(node)
        assert doc is not None and not isinstance(node, ast.Module)  # noqa: PT018
        first, _, rest = doc.partition("\n")
        breaks_off, empty = rest.partition("\n")[0].strip(), all(map(_says_nothing, node.body[1:]))
        if len(first.split()) not in _WORDS or breaks_off or empty:
            continue
        if (source := _without_docstrings(lines, node)) is not None:
            yield node.lineno, source, first.strip()


def rewrites(text: str) -> Iterator[Pair]:
    """Yield each sentence of a docstring in lower case and without punctuation -> the sentence as it was written."""
    for node in _documented(text, (ast.Module, *_Defined)):
        doc = ast.get_docstring(node)
        assert doc is not None
        for paragraph in re.split(r"\n\s*\n", doc):
            for sentence in re.split(r"(?<=[.?!])\s+", " ".join(paragraph.split())):
                if len(sentence.split()) in _WORDS and _PROSE.fullmatch(sentence):
                    # A hyphen and an apostrophe belong to the word.
                    bare = re.sub(r"[^a-z0-9' \-]", "", sentence.lower())
                    yield getattr(node, "lineno", 1), " ".join(bare.split()), sentence


def preferences(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield each pair of `summaries` with the completion of the next in the file (of the last, the first) as the one
    that is rejected; none where both are the same, as in a file with one alone."""
    pairs = list(summaries(text))
    for (line, prompt, chosen), (_, _, rejected) in zip(pairs, [*pairs[1:], *pairs[:1]]):
        if chosen != rejected:
            yield line, prompt, chosen, rejected


TASKS: dict[str, tuple[Callable[[str], Iterator[tuple[Any, ...]]], tuple[str, ...]]] = {
    "python-stdlib-summaries": (summaries, ("prompt", "completion")),
    "python-stdlib-rewrites": (rewrites, ("prompt", "completion")),
    "python-stdlib-preferences": (preferences, ("prompt", "chosen", "rejected")),
}
"""Function that yields (line, one text for each key) of a file's text, and the keys, by the name of the task."""


def read_task(path: File, task: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows made of a Python file; none of one that does not decode or parse."""
    assert isinstance(path, Path)  # of this Python's own library
    rows, keys = TASKS[task]
    try:
        with tokenize.open(path) as file:
            text = file.read()
        for line, *texts in rows(text):
            yield f":{line}", dict(zip(keys, texts, strict=True))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return


def read_topics(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the topics of Python's reference in pydoc's file of them, a dict of texts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield f":{name}", text


def _documented(text: str, kinds: tuple[type[ast.AST], ...]) -> Iterator[ast.FunctionDef | ast.ClassDef | ast.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about strings in these files, such as "\d"
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and _docstring(node) is not None:
            yield node  # type: ignore[misc]


def _docstring(node: ast.AST) -> ast.Constant | None:
    body = getattr(node, "body", None)
    if isinstance(node, (ast.Module, *_Defined)) and body and isinstance(body[0], ast.Expr):
        value = body[0].value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value
    return None


def _says_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _without_docstrings(lines: list[str], node: ast.FunctionDef | ast.ClassDef) -> str | None:
    """Return the source of `node` without docstrings; None where one shares a line with other code."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    assert node.end_lineno is not None
    dropped: set[int] = set()
    for inner in ast.walk(node):
        if (doc := _docstring(inner)) is not None:
            assert doc.end_lineno is not None
            before = lines[doc.lineno - 1].encode()[: doc.col_offset]
            after = lines[doc.end_lineno - 1].encode()[doc.end_col_offset :].strip()
            if before.strip() or (after and not after.startswith(b"#")):
                return None
            end = doc.end_lineno
            while end < node.end_lineno and not lines[end].strip():  # blank lines after it
                end += 1
            dropped.update(range(doc.lineno, end + 1))
    remaining = [lines[i - 1] for i in range(first, node.end_lineno + 1) if i not in dropped]
    return textwrap.dedent("\n".join(remaining)).strip()
