from __future__ import annotations

from dataclasses import dataclass

from trainfw.data import Tokenizer, chat_prompt, stop_ids
from trainfw.errors import UserError
from trainfw.paths import resolve_path
from trainfw.recipe import load_recipe
from trainfw.weights.open import is_run


@dataclass(frozen=True)
class PromptForm:
    """How a prompt is put to a model, unless it is said otherwise: as the model was trained."""

    chat: bool = False
    system_prompt: str | None = None
    starts: bool = False
    """A text starts with bos, as the documents of a run do; else with what the tokenizer puts there."""

    def encode(
        self, tokenizer: Tokenizer, text: str, *, chat: bool | None = None, system_prompt: str | None = None
    ) -> list[int]:
        """Its tokens: a turn of the user by the chat template, or the text after what begins one.

        Raises UserError for a system prompt without the template, and for a template that is not there.
        """
        if self.chat if chat is None else chat:
            return chat_prompt(tokenizer, text, system_prompt or self.system_prompt)
        if system_prompt is not None:
            raise UserError("system_prompt (--system): goes with chat (--chat)")
        begin = [tokenizer.bos_id] if self.starts or not text else tokenizer.prefix_ids
        return [*begin, *tokenizer.encode(text)]

    def echo(self, text: str, chat: bool | None) -> str:
        """What of the prompt the text goes on from."""
        return "" if (self.chat if chat is None else chat) else text


def prompt_form(path: str) -> PromptForm:
    """That of the data that a run was trained on; plain text for anything else."""
    if not is_run(path):
        return PromptForm()
    data = load_recipe(resolve_path(path) / "recipe.yaml").data
    return PromptForm(data.writes_turns, data.system_prompt, starts=True)


def end_tokens(tokenizer: Tokenizer) -> set[int]:
    """What ends a text: the end of a document, and of a turn in a chat."""
    return set(stop_ids(tokenizer))
