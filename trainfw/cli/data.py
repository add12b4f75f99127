from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from trainfw import backends, data, training
from trainfw import recipe as recipes
from trainfw.cli.console import make_reporter
from trainfw.cli.options import Overrides, RecipeCommand, RecipePath, load
from trainfw.cli.signals import leaving_at_once
from trainfw.cli.terminal import Clock, say
from trainfw.errors import UserError
from trainfw.streams import go_on_without_output
from trainfw.tables import table

app = typer.Typer(help="Look at data, and prepare it, before training on it.", no_args_is_help=True)

_EVERY_SECONDS = 5.0


@app.command(cls=RecipeCommand)
def prepare(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Tokenise a recipe's text, or decode its pictures, ahead of a run. Stopped, the same command goes on."""
    go_on_without_output()
    loaded = load(recipe, overrides)
    training.check_inputs(loaded)
    if loaded.data.stream is not None:
        raise loaded.error("data.stream", "is read while training, and prepares nothing: set it to null")
    if loaded.reads_images:  # whose encoders compute
        backends.prepare()
    started, made = time.monotonic(), False
    with contextlib.closing(make_reporter()) as reporter, leaving_at_once():

        def progress(description: str, completed: int, total: int | None) -> None:
            nonlocal made
            made = True
            reporter.progress(description, completed, total)

        prepared = training.read_data(loaded, None, reporter, progress)
        if loaded.stages or loaded.data.mixture is not None:
            training.mixed_stages(loaded, prepared, reporter.note)
    seconds = time.monotonic() - started
    root = data.cache_root(loaded.data)
    if rows := [row for name, part in prepared.parts.items() for row in _splits(name, part)]:
        for line in table([["", "documents", "tokens", "MB"], *rows], "<>>>"):
            say(line)
    if any(_shows_the_day(loaded.data.part(name), part) for name, part in prepared.parts.items()):
        say("note: the chat template shows the day: a run of another day tokenises again, or name it in data.date")
    places = [root / part.fingerprint for part in prepared.parts.values()]
    size = sum(file.stat().st_size for place in places for file in place.rglob("*") if file.is_file())
    where = places[0] if len(places) == 1 else f"{len(places)} directories of {root}"
    say(f"{f'prepared in {seconds:,.1f} s' if made else 'all is there already'}: {size / 1e6:,.1f} MB in {where}")


def _splits(name: str, prepared: data.PreparedData | data.PreparedImages) -> Iterator[list[str]]:
    """Yield a row for each split: documents, or examples, their tokens, and their text, or what is learnt of it."""
    if isinstance(prepared, data.PreparedImages):
        return
    of = f"{name}, " * bool(name)
    for split, store in (("to train on", prepared.train), ("held out", prepared.validation)):
        yield [f"{of}{split}", f"{store.num_documents:,}", f"{store.num_tokens:,}", f"{store.num_bytes / 1e6:,.1f}"]


def _shows_the_day(config: data.DataConfig, prepared: data.PreparedData | data.PreparedImages) -> bool:
    if config.date is not None or not config.writes_turns or isinstance(prepared, data.PreparedImages):
        return False
    template = data.ChatTemplate.of(prepared.tokenizer)
    return template is not None and "strftime_now" in template.source


@app.command()
def report(
    source: Annotated[str, typer.Argument(metavar="RECIPE_OR_SOURCE", help="A recipe, or files as data.source.")],
    overrides: Overrides = None,
    against: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="An evaluation set: count the documents that overlap it.")
    ] = None,
    against_field: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A column of it (default: the data's). Give it for each.")
    ] = None,
    against_words: Annotated[
        int, typer.Option(min=1, help="Words in a row that make an overlap, as for GPT-3 (arXiv:2005.14165, C).")
    ] = 13,
    near: Annotated[float, typer.Option(min=0.5, max=1.0, help="Least Jaccard similarity of near copies.")] = 0.8,
    language_field: Annotated[
        str | None, typer.Option(metavar="NAME", help="A column that names each document's language.")
    ] = None,
    sample: Annotated[
        int, typer.Option(min=100, help="Most documents that are tokenised and compared with each other.")
    ] = 100_000,
    show: Annotated[int, typer.Option(min=0, max=100, help="Documents of each source to show.")] = 2,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Count documents, tokens, copies and overlaps. Lengths, near copies and rows too; reads all of it once.

    Memory stays below about 1 GB, whatever the size of the data.
    """
    if against is None and (against_field or against_words != 13):
        raise UserError("--against-field and --against-words go with --against")
    recipe = _recipe_of(source, overrides or ())
    options = data.ReportOptions(
        against=against,
        against_fields=tuple(against_field or ()),
        against_words=against_words,
        near=near,
        language_field=language_field,
        sample=sample,
        shown=show,
    )
    with recipe.blamed("data"), Clock() as clock:
        made = [data.describe_data(one, options, _Told(clock)) for one in data.by_format(recipe.data)]
    if json_:
        documents = [one.to_json() for one in made]
        typer.echo(json.dumps(documents if len(documents) > 1 else documents[0], indent=2, ensure_ascii=False))
    else:
        say("\n\n".join(data.report_text(one) for one in made))


def _recipe_of(name: str, overrides: Sequence[str]) -> recipes.Recipe:
    """Return a recipe, or that of a source, with the defaults of `data`."""
    given = Path(name)
    is_recipe = given.suffix in (".yaml", ".yml") or (given / "recipe.yaml").is_file()
    if is_recipe or (not given.exists() and name in recipes.bundled_recipes()):
        return load(name, overrides)
    keys = dict(override.partition("=")[::2] for override in overrides)
    if keys.get("data.format") == "images":
        return load("digits", [f"data.source={json.dumps(name)}", *overrides])
    tree: dict[str, object] = {"model": {"preset": "tiny"}, "data": {"source": name, "sequence_length": 2048}}
    if keys.get("data.format") == "preferences":
        tree["objective"] = {"name": "dpo"}
    return recipes.load_recipe(tree, overrides, written=recipes.COMMAND_LINE)


class _Told:
    """Progress of a report, in words on stderr: stdout is the report's."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._at, self._said = clock, "", 0.0

    def __call__(self, description: str, completed: int, total: int | None) -> None:
        now = time.monotonic()
        if description == self._at and now - self._said < _EVERY_SECONDS:
            return
        of = f" of {total:,}" if total else ""
        self._clock(f"{description}: {completed:,}{of}" if description == self._at else description)
        self._at, self._said = description, now
