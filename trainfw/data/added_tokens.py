"""Tokens added to a tokenizer.json by tokenizer_config.json, special_tokens_map.json and added_tokens.json.

Each is read as Transformers 5 does (`PreTrainedTokenizerFast`, tokenization_utils_{base,tokenizers}.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken

from trainfw.errors import UserError

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")
"""Keys of special tokens without a role: the newer, and the older."""
_LONGEST = 1000
"""Most letters of an added token, as in a GGUF file: a template writes it again and again."""
_ID = re.compile(r"[0-9]{1,20}", re.ASCII).fullmatch
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """The files beside a tokenizer.json, as JSON objects; empty where a file is missing."""

    config: Mapping[str, Any]
    """tokenizer_config.json."""
    special_tokens_map: Mapping[str, Any]
    added_tokens: Mapping[str, Any]
    where: str
    """Their directory, for errors."""

    def roles(self) -> dict[str, Any]:
        """Return `bos_token`, `eos_token` and the like.

        Where tokenizer_config.json lists no added tokens, special_tokens_map.json counts too, and takes precedence.
        """
        return dict(self.config) if self._listed is not None else {**self.config, **self.special_tokens_map}

    def add_to(self, backend: tokenizers.Tokenizer) -> None:
        """Give `backend` the tokens that it lacks, and the flags that differ here.

        Raises UserError where a token's description is not understood, or where it would get another id (and so another
        row of the embedding) than the files name.
        """
        own, extra = self._extra()
        roles = {**self.roles(), **own}
        order = sorted(roles, key=lambda key: _ROLES.index(key) if key in _ROLES else len(_ROLES))
        named = [_token(roles[key], f"{self.where}: {key}") for key in order if _is_role(key, roles[key])]
        before = backend.get_added_tokens_decoder()
        by_id = self._by_id(before)
        same = {repr(token) for token in before.values()}
        added = [by_id[id_] for id_ in sorted(by_id) if repr(by_id[id_]) not in same]
        present = {token.content for token in (*before.values(), *added)}
        # A token with two roles is added twice: the flags of the second count.
        added += [token for token in (*named, *extra) if token.content not in present]
        for token in added:
            token.special = token.special or token.content in {one.content for one in named}
        for text in (token.content for token in (*before.values(), *added)):
            if len(text) > _LONGEST:
                shown = f"{text[:20]!r} and so on"
                raise UserError(f"{self.where}: {shown}: a token has {_LONGEST} letters at most, not {len(text):,}")
        backend.add_tokens(added)
        for id_, token in by_id.items():
            if (actual := backend.token_to_id(token.content)) != id_:
                raise UserError(f"{self.where}: {token.content!r} is to have the id {id_}, but its place is {actual}")

    @property
    def _listed(self) -> object:
        return self.config.get("added_tokens_decoder")

    def _extra(self) -> tuple[dict[str, object], list[AddedToken]]:
        """Return the model's own roles, and the special tokens without a role, from the newer key or the older."""
        newer, older = _LISTS
        value, other = self.config.get(newer), self.config.get(older)
        if other and not value:
            value, other = other, None
        own: dict[str, Any] = {}
        if isinstance(value, Mapping):
            own, value = dict(value), None
        if self._listed is None:
            other = self.special_tokens_map.get(older, other)
            more = self.special_tokens_map.get(newer)
            if isinstance(more, Mapping):
                own, value = {**own, **more}, None
            elif more is not None:
                value = [*self._list(value, newer), *self._list(more, newer)]
        tokens = self._list(other if value is None else value, newer if value else older)
        return own, [_token(one, f"{self.where}: {newer if value else older}") for one in tokens]

    def _list(self, value: object, key: str) -> list[object]:
        if value is not None and not isinstance(value, list):
            raise UserError(f"{self.where}: {key} = {str(value)[:40]!r}: expected a list of tokens")
        return value or []

    def settings(self) -> dict[str, Any]:
        """Return the tokenizer_config.json that belongs beside a tokenizer.json with all tokens."""
        own, _ = self._extra()
        return {
            key: value["content"] if _is_role(key, value) and isinstance(value, Mapping) else value
            for key, value in {**self.roles(), **own}.items()
            if key not in (*_LISTS, "added_tokens_decoder")  # tokenizer.json holds these, once all tokens are added
        }

    def _by_id(self, before: Mapping[int, AddedToken]) -> dict[int, AddedToken]:
        """Return the tokens for which the files name an id."""
        if self._listed is not None:
            where = f"{self.where}: added_tokens_decoder"
            if not isinstance(self._listed, Mapping) or not all(map(_ID, self._listed)):
                raise UserError(f"{where}: expected an object of tokens by their ids")
            return {int(id_): _token(token, where, special=False) for id_, token in self._listed.items()}
        for name, id_ in self.added_tokens.items():
            if not isinstance(id_, int) or id_ < 0:
                raise UserError(f"{self.where}: added_tokens.json: {name!r} = {str(id_)[:40]!r}: expected its id")
        # Special are roles that are plain text, or in the map.
        roles, listed = self.roles(), self.config.get(_LISTS[0]) or self.config.get(_LISTS[1])
        plain = [roles.get(key) for key in _ROLES] + (listed if isinstance(listed, list) else [])
        special = {one for one in plain if isinstance(one, str)} | {
            one["content"]
            for key, value in self.special_tokens_map.items()
            for one in (value if key == _LISTS[0] else [value] if key in _ROLES else [])
            if isinstance(one, Mapping) and "content" in one
        }
        return {
            id_: AddedToken(name, normalized=name not in special, special=name in special)
            for name, id_ in self.added_tokens.items()
            if id_ not in before
        }


def _is_role(key: str, value: object) -> bool:
    """Tell whether a key is a role: any that ends in `_token` and holds one, as `image_token` of some models."""
    return value is not None and (key in _ROLES or (key.endswith("_token") and isinstance(value, (str, Mapping))))


def _token(value: object, where: str, *, special: bool = True) -> AddedToken:
    """Return a token that is written as its text, or as an object with flags. Raises UserError for another form."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    if isinstance(value, Mapping):
        flags = {key: flag for key, flag in value.items() if key not in ("__type", "content", "id")}
        right = all(key in _FLAGS and isinstance(flag, bool) for key, flag in flags.items())
        if right and isinstance(value.get("content"), str):
            return AddedToken(value["content"], **{"special": special, **flags})
    raise UserError(f"{where}: {str(value)[:60]!r}: expected a token's text, or an object with `content`")
