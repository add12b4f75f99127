"""Rows that Python code gives: they are tokens like those of a file, or a stream with a place to go back to."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from tests.own.pieces import OTHERS
from trainfw import UserError
from trainfw.data import (
    DataConfig,
    Rows,
    StreamIterator,
    byte_tokenizer,
    data_name,
    held_tokens,
    memory_source,
    open_source,
    prepare,
    prepare_tokens,
)
from trainfw.data.python_rows import source_of
from trainfw.errors import RunError


def texts(corpus):
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


def test_rows_in_memory_are_the_tokens_of_a_file_with_them(corpus, config):
    from datasets import Dataset

    file = prepare(config)
    whole = texts(corpus)
    for given in (whole, tuple(whole), [{"text": text, "n": 1} for text in whole], Dataset.from_dict({"text": whole})):
        held = prepare(config, source=memory_source(given, config))
        assert (held.train.digest, held.validation.digest) == (file.train.digest, file.validation.digest)


def test_rows_in_memory_are_cached_until_one_changes(corpus, config, monkeypatch):
    whole = texts(corpus)
    first = prepare(config, source=memory_source(whole, config))
    with monkeypatch.context() as once:
        once.setattr("trainfw.data.cache._Cache._build", None)
        assert prepare(config, source=memory_source(list(whole), config)).fingerprint == first.fingerprint
    whole[7] += "!"
    assert prepare(config, source=memory_source(whole, config)).train.digest != first.train.digest


def test_a_function_is_a_source_by_its_name(tmp_path):
    config = DataConfig(source="tests.own.pieces:rows", sequence_length=32, cache_dir=str(tmp_path))
    data = prepare(config)
    assert data.train.num_documents + data.validation.num_documents == 300
    few = prepare(config.model_copy(update={"max_documents": 100}))
    assert few.train.num_documents + few.validation.num_documents == 100
    pairs = config.model_copy(update={"format": "prompt_completion", "prompt_field": "text", "chat_template": False})
    pairs = pairs.model_copy(update={"completion_field": "gone"})
    with pytest.raises(UserError, match=r"no row of the source can be used:[\s\S]*tests.own.pieces:rows#0"):
        prepare(pairs)
    for name, said in {
        "tests.own.pieces:TOY": "is a Backend; expected a function that returns rows",
        "tests.own.pieces:gone": "has no attribute 'gone'",
        "in-memory:list": "a script handed it over",
    }.items():
        with pytest.raises(UserError, match=said):
            source_of(config.model_copy(update={"source": name}))
    assert open_source(DataConfig(sequence_length=8)).inputs


def test_rows_of_tokens_are_taken_as_they_are():
    config = DataConfig(sequence_length=8, validation_fraction=0.3)
    rows = [[256, n, n + 1, 257] for n in range(40)]
    data = prepare_tokens(config, rows)
    tokens = [*data.train.tokens.tolist(), *data.validation.tokens.tolist()]
    assert sorted(tokens) == sorted(itertools.chain(*rows))
    assert data.train.num_bytes == 2 * data.train.num_documents
    arrays = prepare_tokens(config, [{"input_ids": np.array(row)} for row in rows])
    assert (arrays.train.digest, arrays.validation.digest) == (data.train.digest, data.validation.digest)
    for row, said in {
        "[1.5, 2.5]": "expected text, or token ids",
        '{"input_ids": [1], "labels": [1]}': "'labels', which is not read",
        '"text"': "after rows of tokens; expected token ids",
    }.items():
        with pytest.raises(UserError, match=said):
            prepare_tokens(config, [rows[0], json.loads(row)])


def test_what_is_no_data_is_said():
    for given, said in {
        "a/path.jsonl": "a path goes into the recipe",
        3: "expected rows, an iterator of them, or a function",
    }.items():
        with pytest.raises(UserError, match=said):
            data_name(given)
    with pytest.raises(UserError, match=r"has splits 'train', 'test'; expected rows, such as data\['train'\]"):
        data_name({"train": [], "test": []})
    assert (data_name([]), data_name(iter([]))) == ("in-memory:list", "in-memory:list_iterator")
    assert data_name(row for row in "ab") == "in-memory:generator"


NO_SOURCES = {
    "nothing": "gives None; expected rows",
    "number": "gives 3; expected rows",
    "letters": "gives 'letters'; expected rows",
    "fails": "ZeroDivisionError",
    "fails_late": "LookupError: no more",
    "leaves": "SystemExit: 0",
    "broken": "has a lone surrogate at character 3",
}


@pytest.mark.parametrize("name", NO_SOURCES)
def test_a_function_that_gives_no_rows_is_refused_by_name(name, tmp_path):
    config = DataConfig(source=f"tests.own.pieces:{name}", sequence_length=8, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=rf"tests.own.pieces:{name}.*{NO_SOURCES[name]}"):
        prepare(config)
    with pytest.raises(UserError, match=NO_SOURCES[name]):
        next(stream(OTHERS[name]))


def test_a_type_is_no_rows():
    with pytest.raises(
        UserError, match=r"source = builtins:list: is a class; expected rows, which list\(...\) may hold"
    ):
        data_name(list)


def test_empty_documents_are_left_out_of_a_stream_as_of_rows():
    same(taken(stream(["", *DOCUMENTS[:5], "", *DOCUMENTS[5:]]), 3), taken(stream(DOCUMENTS), 3))


DOCUMENTS = [f"document {n} " * (1 + n % 4) for n in range(60)]


def stream(given, index=0, count=1, length=16, said=None):
    config = DataConfig(sequence_length=length)
    return StreamIterator(
        given,
        config,
        byte_tokenizer(),
        global_batch_size=4,
        process_index=index,
        process_count=count,
        vocab_size=258,
        report=[].append if said is None else said.append,
    )


def taken(batches, count):
    return [next(batches) for _ in range(count)]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_a_stream_is_packed_as_a_file_is_and_shared_out():
    tokenizer = byte_tokenizer()
    ids = [np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) for text in DOCUMENTS]
    rows = Rows(held_tokens(ids, len), 16)
    batches = taken(stream(DOCUMENTS), 6)
    for number, batch in enumerate(batches):
        same([{name: x[i] for name, x in batch.items()} for i in range(4)], [rows[4 * number + i] for i in range(4)])
    halves = [taken(stream(lambda: iter(DOCUMENTS), index, 2), 6) for index in range(2)]
    same([{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves)], batches)
    same(taken(stream(ids), 6), batches)


class Placed:
    """An iterator that can be moved."""

    def __init__(self):
        self.at, self.moved = 0, False

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return DOCUMENTS[self.at - 1]

    def get_state(self):
        return self.at

    def set_state(self, at):
        self.at, self.moved = at, True


@pytest.mark.parametrize("make", [lambda: DOCUMENTS.__iter__, lambda: iter(DOCUMENTS), Placed])
def test_a_stream_goes_on_where_a_state_says(make):
    first, said = stream(make()), []
    taken(first, 3)
    state = json.loads(json.dumps(first.get_state()))
    given = make()
    again = stream(given, said=said)
    again.set_state(state)
    same(taken(again, 4), taken(first, 4))
    assert again.get_state() == first.get_state()
    if isinstance(given, Placed):
        assert (given.moved, said) == (True, [])
    else:
        assert said == [f"data: reading the stream's first {state['documents']} documents again, to go on after them"]


def test_what_a_stream_cannot_go_on_from_is_refused():
    first = stream(DOCUMENTS)
    taken(first, 3)
    state = first.get_state()
    with pytest.raises(UserError, match=r"first \d+ documents are others than they were"):
        stream(["x", *DOCUMENTS]).set_state(state)
    with pytest.raises(UserError, match="in rows of another length"):
        stream(DOCUMENTS, length=8).set_state(state)
    once = stream(iter(DOCUMENTS))
    taken(once, 1)
    with pytest.raises(RunError, match="cannot go back to its beginning; hand over a function"):
        once.restart()
    first.restart()
    same(taken(first, 1), taken(stream(DOCUMENTS), 1))
    with pytest.raises(RunError, match=r"the data has ended after 60 documents, \d+ rows of 16 tokens; give more"):
        taken(first, 1000)
    with pytest.raises(UserError, match="a row is '3'; expected text, or token ids"):
        next(stream([3]))


def test_a_stream_leaves_out_the_batches_of_rows_that_are_skipped():
    whole = taken(stream(DOCUMENTS), 4)
    skipping = stream(DOCUMENTS)
    skipping.skip([5])
    same(taken(skipping, 3), [whole[0], *whole[2:]])
