from __future__ import annotations

from typing import Annotated, Any

import typer

from trainfw import backends, data, serving, training, weights
from trainfw.cli.options import AnyModel, Step, Which, adapters_by_name
from trainfw.cli.pictures import draw
from trainfw.cli.terminal import show
from trainfw.errors import UserError
from trainfw.paths import resolve_path


def generate(
    model: AnyModel,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="The text to go on from, or a picture's caption or class; several at once."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Text: stop after this many tokens (default: 256).")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Text: 0 always takes the likeliest token (default: 0.8).")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Text: sample from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Text: sample from the likeliest tokens that make up p.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same.")] = 0,
    step: Step = None,
    which: Which = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain", help="Text: as a user's turn by the chat template, or as text (default: as trained)."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="With --chat: the system prompt (default: as trained).")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="An adapter of the model; a prompt NAME=TEXT takes it."),
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Pictures: the PNG file to write.")] = None,
    count: Annotated[int | None, typer.Option(help="Pictures: how many for each prompt (default: 1).")] = None,
    steps: Annotated[int | None, typer.Option(help="Pictures: steps of the sampler (default: 20).")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Pictures: 1 as the model is; more, closer to the prompt (default: 4).")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Pictures: euler, heun, ddim or dpm++.")] = None,
    scale: Annotated[int | None, typer.Option(help="Pictures: enlarge each pixel to this many (default: 1).")] = None,
) -> None:
    """Write on from prompts, or draw pictures. With a run, a model, or a model and several adapters."""
    of_text: dict[str, object] = {
        "--max-tokens": max_tokens,
        "--temperature": temperature,
        "--top-k": top_k,
        "--top-p": top_p,
    }
    of_text |= {"--chat": chat, "--system": system}
    of_pictures: dict[str, object] = {
        "--out": out,
        "--count": count,
        "--steps": steps,
        "--guidance": guidance,
        "--sampler": sampler,
        "--scale": scale,
    }
    draws = weights.is_run(model) and weights.run_recipe(model).reads_images
    if not draws and not model.startswith("package:") and not resolve_path(model).exists():
        raise UserError(f"{model}: no such file or directory; expected a run or a model")
    for option, value in (of_text if draws else of_pictures).items():
        if value is not None:
            kind = "draws pictures" if draws else "writes text"
            raise UserError(f"{option} {value}: does not apply to {model}, which {kind}")
    adapters = adapters_by_name(adapter or [])
    if draws:
        draw(
            model, [_chosen(text, adapters) for text in prompt or []], out=out, count=count, scale=scale, step=step,
            which=which, adapters=adapters, seed=seed, steps=steps, guidance=guidance, sampler=sampler,
        )  # fmt: skip
        return
    if not prompt:
        raise UserError("--prompt: expected a text to go on from")
    max_tokens, temperature = 256 if max_tokens is None else max_tokens, 0.8 if temperature is None else temperature
    sampled = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    read = {"step": step, "adapters": adapters or None, "weights": which}
    _write(model, prompt, read, {"chat": chat, "system_prompt": system}, sampled)


def _write(model: str, prompt: list[str], read: dict[str, Any], asked: dict[str, Any], sampled: dict[str, Any]) -> None:
    for text in prompt:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"--prompt {text!r}: is not UTF-8 text") from None

    backends.prepare()
    loaded, tokenizer = training.load_model(model, **read)
    adapters = read["adapters"] or {}
    chosen = [_chosen(text, adapters) for text in prompt]
    form = {name: weights.prompt_form(path) for name, path in [(None, model), *adapters.items()]}
    tokens = [form[name].encode(tokenizer, text, **asked) for name, text in chosen]
    ends = data.stop_ids(tokenizer)
    longest, most = max(map(len, tokens)) + sampled["max_tokens"], loaded.config.longest_context
    if most is not None and longest > most:
        what = f"{longest} tokens are more than the {most} positions that the model was made for"
        typer.echo(f"warning: {what}", err=True)
    if len(prompt) == 1 and not adapters:
        stream = data.TextStream(tokenizer)
        drawn = serving.generate(loaded, tokens[0], eos_ids=ends, **sampled)  # before the prompt: it may be refused
        show(form[None].echo(prompt[0], asked["chat"]))
        for token in drawn:
            show(stream.push(token))
        show(stream.flush() + "\n")
        return
    names = [name for name, _ in chosen] if adapters else None
    written = serving.generate_batch(loaded, tokens, eos_ids=ends, adapters=names, **sampled)
    for (name, text), ids in zip(chosen, written, strict=True):
        show(f"--- {name + ': ' if name else ''}{text.splitlines()[0] if text else ''}\n")
        show(tokenizer.decode(ids) + "\n")


def _chosen(prompt: str, adapters: dict[str, str]) -> tuple[str | None, str]:
    """Split a prompt into its adapter, or None for the model without one, and its text."""
    if not adapters:
        return None, prompt
    name, equals, text = prompt.partition("=")
    if equals and name in adapters:
        return name, text
    if equals and name == "base":
        return None, text
    if len(adapters) == 1:
        return next(iter(adapters)), prompt
    raise UserError(f"--prompt {prompt[:40]!r}: expected NAME=TEXT with NAME one of {', '.join(adapters)} or base")
