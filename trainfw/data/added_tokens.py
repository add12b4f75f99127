"""Tokens that a tokenizer's other files add to its tokenizer.json: tokenizer_config.json, special_tokens_map.json and
added_tokens.json, each as Transformers 5 reads it (`PreTrainedTokenizerFast`, tokenization_utils_{base,tokenizers}.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken

from trainfw.errors import UserError

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """What stands beside a tokenizer.json, as JSON objects; empty where a file is missing."""

    config: Mapping[str, Any]
    """tokenizer_config.json."""
    special_tokens_map: Mapping[str, Any]
    added_tokens: Mapping[str, Any]
    where: str
    """The directory, for errors."""

    def roles(self) -> dict[str, Any]:
        """`bos_token`, `eos_token` and the like. special_tokens_map.json counts where tokenizer_config.json lists no
        added tokens, and then comes first."""
        return dict(self.config) if self._listed is not None else {**self.config, **self.special_tokens_map}

    def add_to(self, backend: tokenizers.Tokenizer) -> None:
        """Give `backend` the tokens that it lacks, and the flags that are said otherwise here.

        Raises UserError where a token is described in a way that is not understood, or would get another id than the
        one that the files name, and so another row of the embedding.
        """
        named = self._named()
        extra = self._extra()
        before = backend.get_added_tokens_decoder()
        by_id = self._by_id(before, {token.content for token in (*named, *extra)})
        same = {repr(token) for token in before.values()}
        added = [by_id[id_] for id_ in sorted(by_id) if repr(by_id[id_]) not in same]
        known = {token.content for token in (*before.values(), *added)}
        for token in (*named, *extra):
            if token.content not in known:
                known.add(token.content)
                added.append(token)
        roles = {token.content for token in named}
        for token in added:
            token.special = token.special or token.content in roles
        backend.add_tokens(added)
        for id_, token in by_id.items():
            if (found := backend.token_to_id(token.content)) != id_:
                raise UserError(f"{self.where}: {token.content!r} is to have the id {id_}, but its place is {found}")

    def _named(self) -> list[AddedToken]:
        """Tokens of roles: the usual ones in the order of `_ROLES`, then a model's own."""
        roles = self.roles()
        keys = [*(key for key in _ROLES if key in roles), *(key for key in roles if key not in _ROLES)]
        return [_token(roles[key], f"{self.where}: {key}") for key in keys if _is_role(key, roles[key])]

    @property
    def _listed(self) -> Any:
        return self.config.get("added_tokens_decoder")

    def _extra(self) -> list[AddedToken]:
        """Special tokens without a role. The older key counts where the newer one has no list."""
        newer, older = "extra_special_tokens", "additional_special_tokens"
        files = [self.config, *([self.special_tokens_map] if self._listed is None else [])]
        chosen = [(file, newer) for file in files]
        if not any(isinstance(file.get(newer), list) and file[newer] for file in files):
            chosen += [(file, older) for file in files if file.get(older)][:1]
        found: dict[str, AddedToken] = {}
        for file, key in chosen:
            value = file.get(key) or []
            tokens = list(value.values()) if isinstance(value, Mapping) else value
            if not isinstance(tokens, list):
                raise UserError(f"{self.where}: {key} = {str(value)[:40]!r}: expected a list of tokens")
            for one in tokens:
                token = _token(one, f"{self.where}: {key}")
                found.setdefault(token.content, token)
        return list(found.values())

    def _by_id(self, before: Mapping[int, AddedToken], special: set[str]) -> dict[int, AddedToken]:
        """Tokens that the files name with their ids."""
        if self._listed is not None:
            where = f"{self.where}: added_tokens_decoder"
            if not isinstance(self._listed, Mapping) or not all(str(id_).isdecimal() for id_ in self._listed):
                raise UserError(f"{where}: expected an object of tokens by their ids")
            return {int(id_): _token(token, where, special=False) for id_, token in self._listed.items()}
        for name, id_ in self.added_tokens.items():
            if not isinstance(id_, int) or id_ < 0:
                raise UserError(f"{self.where}: added_tokens.json: {name!r} = {str(id_)[:40]!r}: expected its id")
        return {
            id_: AddedToken(name, normalized=name not in special, special=name in special)
            for name, id_ in self.added_tokens.items()
            if id_ not in before
        }


def _is_role(key: str, value: Any) -> bool:
    """Any key that ends in `_token` and holds one is a role; models have their own (`image_token`)."""
    return value is not None and (key in _ROLES or (key.endswith("_token") and isinstance(value, (str, Mapping))))


def _token(value: Any, where: str, *, special: bool = True) -> AddedToken:
    """A token written as its text, or as an object with flags."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    if isinstance(value, Mapping):
        flags = {key: flag for key, flag in value.items() if key not in ("__type", "content", "id")}
        right = isinstance(value.get("content"), str) and all(
            key in _FLAGS and isinstance(flag, bool) for key, flag in flags.items()
        )
        if right:
            return AddedToken(value["content"], **{"special": special, **flags})
    raise UserError(f"{where}: {str(value)[:60]!r}: expected a token's text, or an object with `content`")
