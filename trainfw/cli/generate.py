from __future__ import annotations

from typing import Annotated

import typer

from trainfw.cli.options import RunPath, Step


def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.", show_default=False)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens that make up p.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
    step: Step = None,
) -> None:
    """Write on from a prompt with a trained run."""
    from trainfw import backends

    backends.prepare()

    from trainfw import models, training
    from trainfw.data import TextStream
    from trainfw.errors import UserError

    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"--prompt {prompt!r}: is not UTF-8 text") from None
    model, tokenizer = training.load_model(run, step=step)
    tokens = models.generate(
        model,
        [tokenizer.bos_id, *tokenizer.encode(prompt)],
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=tokenizer.eos_id,
        seed=seed,
    )
    typer.echo(prompt, nl=False)
    text = TextStream(tokenizer)
    for token in tokens:
        typer.echo(text.push(token), nl=False)
    typer.echo(text.flush())
