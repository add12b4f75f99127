"""What other trainers call our keys."""

from __future__ import annotations

from typing import get_args

from trainfw.names import FIRST, KEYS, SECTIONS, VALUES
from trainfw.optim import OPTIMIZERS
from trainfw.recipe import keys


def test_every_name_leads_to_a_key_that_exists():
    wrong = {theirs: ours for theirs, ours in (KEYS | SECTIONS).items() if ours.partition(" ")[0] not in keys()}
    assert not wrong
    assert all(any(f"{section}.{key}" in valid for valid in keys()) for section, key in FIRST.items())
    assert not set(KEYS) & set(keys()) - {"seed"}, "ours need no translation"


def test_every_value_is_one_that_some_key_takes():
    taken = {choice for kind in keys().values() for part in (kind, *get_args(kind)) for choice in get_args(part)}
    assert set(VALUES.values()) <= taken | set(OPTIMIZERS)
