from __future__ import annotations

from dataclasses import dataclass

from trainfw.data import Tokenizer, chat_prompt, stop_ids
from trainfw.errors import UserError
from trainfw.paths import resolve_path
from trainfw.recipe import load_recipe
from trainfw.weights.open import is_run


@dataclass(frozen=True)
class PromptForm:
    """Default form of a model's prompts, which is that of its training data."""

    chat: bool = False
    system_prompt: str | None = None
    starts: bool = False
    """Flag: a text starts with bos, as the documents of a run do; else with the tokenizer's own prefix."""

    def encode(
        self, tokenizer: Tokenizer, text: str, *, chat: bool | None = None, system_prompt: str | None = None
    ) -> list[int]:
        """Encode a prompt: as a turn of the user by the chat template, or as text after bos or the tokenizer's prefix.

        Raises UserError for a system prompt without the template, and where there is no template.
        """
        if self.chat if chat is None else chat:
            return chat_prompt(tokenizer, text, system_prompt or self.system_prompt)
        if system_prompt is not None:
            raise UserError("system_prompt (--system): goes with chat (--chat)")
        begin = [tokenizer.bos_id] if self.starts or not text else tokenizer.prefix_ids
        return [*begin, *tokenizer.encode(text)]

    def echo(self, text: str, chat: bool | None) -> str:
        """Return the text that the model's answer continues: the prompt, or nothing for a chat."""
        return "" if (self.chat if chat is None else chat) else text


def prompt_form(path: str) -> PromptForm:
    """Return the form of the data that a run was trained on; plain text for other models."""
    if not is_run(path):
        return PromptForm()
    data = load_recipe(resolve_path(path) / "recipe.yaml").data
    return PromptForm(data.writes_turns, data.system_prompt, starts=True)


def end_tokens(tokenizer: Tokenizer) -> set[int]:
    """Return the ids that end a text: the end of a document, and of a turn in a chat."""
    return set(stop_ids(tokenizer))
