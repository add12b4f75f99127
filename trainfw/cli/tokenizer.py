from __future__ import annotations

from typing import Annotated

import typer

from trainfw import data
from trainfw.cli.console import cleaning_up

app = typer.Typer(help="Make tokenizers.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `train` a subcommand while it is the only one."""


@app.command()
def train(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="As data.source: files, a glob, a dataset.")],
    out: Annotated[str, typer.Option(help="The directory to write tokenizer.json to.")],
    vocab_size: Annotated[int, typer.Option(help="Entries of the vocabulary.")] = 4096,
    text_field: Annotated[str, typer.Option(help="The column of text in JSONL, Parquet and datasets.")] = "text",
) -> None:
    """Train a byte-level BPE. Use it with data.tokenizer.name=file data.tokenizer.path=OUT (a directory)."""
    with cleaning_up() as reporter:
        opened = data.open_source(data.DataConfig(source=source, text_field=text_field, sequence_length=1))
        if opened.skipped:
            reporter.note(f"data: {opened.skipped}")
        tokenizer = data.train_bpe((d.text for d in opened.documents()), vocab_size, progress=reporter.progress)
        tokenizer.save(out)
    typer.echo(f"{out}: {tokenizer.vocab_size:,} entries")
