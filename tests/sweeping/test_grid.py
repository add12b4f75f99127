"""Values on a command line, and the runs that they make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfw import UserError
from trainfw.sweeping import make_runs, read_grid
from trainfw.sweeping.grid import split_values

scalars = st.one_of(
    st.integers(-9, 9), st.booleans(), st.none(), st.text(st.characters(codec="ascii", exclude_categories=["C"]))
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text("ab"), inner), max_leaves=4)


@given(st.lists(values.map(json.dumps), min_size=1))
def test_values_are_split_at_their_own_commas_alone(texts):
    assert [text.strip() for text in split_values(",".join(texts))] == texts


def test_keys_of_one_value_are_fixed():
    fixed, swept = read_grid(["train.steps=50", "optimizer.learning_rate=1e-3,1e-2", "data.source=[a, b]"])
    assert fixed == ["train.steps=50", "data.source=[a, b]"]
    assert swept == {"optimizer.learning_rate": [1e-3, 1e-2]}
    assert read_grid(["data.source=[a, b],[c]"])[1] == {"data.source": [["a", "b"], ["c"]]}


def test_every_combination_is_a_run_named_by_its_values():
    runs = make_runs("quickstart", {"model.num_heads": [4, 8], "optimizer.learning_rate": [1e-3, 0.01]})
    assert [run.name for run in runs] == [
        *("learning_rate=0.001,num_heads=4", "learning_rate=0.01,num_heads=4"),
        *("learning_rate=0.001,num_heads=8", "learning_rate=0.01,num_heads=8"),
    ]
    assert runs[1].path == Path("runs/quickstart-sweep/learning_rate=0.01,num_heads=4")
    assert (runs[3].recipe.model.num_heads, runs[3].recipe.optimizer.learning_rate) == (8, 0.01)


def test_the_order_of_keys_and_letters_of_values_do_not_mix_runs_up():
    keys = {"model.num_heads": [4, 8], "train.seed": [1, 2]}
    names = {run.name for run in make_runs("quickstart", keys)}
    assert names == {run.name for run in make_runs("quickstart", dict(reversed(keys.items())))}
    paths = make_runs("quickstart", {"data.source": ["a/b", "a-b", "A-B"]})
    assert len({run.name.lower() for run in paths}) == 3


def test_what_follows_from_a_value_follows():
    model = {"vocab_size": 300, "num_heads": 4, "num_kv_heads": 4, "intermediate_size": 8, "num_layers": 1}
    small = {"model": model, "data": {"source": "python-stdlib", "sequence_length": 8}}
    runs = make_runs(small, {"model.hidden_size": [32, 64]})
    assert [run.recipe.model.head_dim for run in runs] == [8, 16]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.seed=1"], "no key has several values"),
        (["train.seed=1,1"], r"train\.seed: 1 is given twice"),
        (["train.seed=1,,2"], "a value between commas is empty"),
        (["train.seed=1,2", "train.seed=3"], r"train\.seed: is given twice"),
        (["train.sed=1,2"], r"train\.sed = 1: unknown key; did you mean 'train\.seed'"),
        (["train.steps=1,two"], r"train\.steps = 'two': expected a valid integer"),
        (["optimizer.learning_rate=1,1.0"], "is given twice"),
        ([f"train.seed={','.join(map(str, range(1001)))}"], "1,001 runs; expected 1,000 at most"),
        (["data.shuffle=true,false", "model.preset=tiny,null"], "model.vocab_size: is required"),
        (["train.seed", "train.steps=1,2"], "expected key=value"),
    ],
)
def test_refused_before_anything_starts(overrides, said):
    with pytest.raises(UserError, match=said):
        runs_of(overrides)


def runs_of(overrides):
    fixed, swept = read_grid(overrides)
    return make_runs("quickstart", swept, overrides=fixed)


@pytest.mark.parametrize("given", [[], "12", 3])
def test_values_in_python_are_lists(given):
    with pytest.raises(UserError, match=r"train\.seed = .*: expected a list of values"):
        make_runs("quickstart", {"train.seed": given})
