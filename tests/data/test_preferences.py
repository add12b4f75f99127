"""Rows of preferences: what is learnt of each side, which pairs are refused, and what is kept of them."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.data import (
    DataConfig,
    PairRows,
    Tokenizer,
    byte_tokenizer,
    open_rows,
    prepare,
    train_iterator,
    validation_batches,
)
from trainfw.data.cache import _fingerprint
from trainfw.data.examples import Example
from trainfw.data.preferences import PairEncoder
from trainfw.data.sources import Row, Source
from trainfw.errors import UserError

from .test_chat import SMOLLM2, TEMPLATES, make_tokenizer
from .test_examples import chat, shown
from .test_turns import THINKING


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t", SMOLLM2)


def turns(*said: str) -> list[dict]:
    """Messages, with their roles by the first letter: "u:hi"."""
    return chat(*said)["messages"]


def pair(prompt: object, chosen: object, rejected: object, **extra: object) -> dict:
    """A row; without a prompt where that is None."""
    return {**({} if prompt is None else {"prompt": prompt}), "chosen": chosen, "rejected": rejected, **extra}


def encode(rows: list, tokenizer: Tokenizer, **options: object) -> tuple[list[Example], list[str]]:
    encoder = PairEncoder(DataConfig(format="preferences", **{"sequence_length": 512} | options), tokenizer)
    examples = list(encoder.encode([Row(f"a.jsonl:{i}", row) for i, row in enumerate(rows, start=1)]))
    return examples, [str(one) for one in encoder.refusals.summary()]


def refusal(row: object, tokenizer: Tokenizer, **options: object) -> str:
    """Why the row is refused; other rows of the batch are not."""
    good = pair("x", "y", "z")
    examples, refused = encode([good, row, good], tokenizer, **options)
    assert [one.ids for one in examples[:2]] == [one.ids for one in examples[2:]]
    assert len(examples) == 4
    (said,) = refused
    assert said.startswith("1 row: ")
    assert said.endswith(" (the first: a.jsonl:2)")
    return said.removeprefix("1 row: ").removesuffix(" (the first: a.jsonl:2)")


PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
FORMS = {
    "texts": pair("hi", "hello", "go away"),
    "messages": pair(turns("s:Be brief.", "u:hi"), turns("a:hello"), turns("a:go away")),
    "conversations": pair(None, turns("s:Be brief.", "u:hi", "a:hello"), turns("s:Be brief.", "u:hi", "a:go away")),
    "system beside": pair(turns("u:hi"), turns("a:hello"), turns("a:go away"), system="Be brief."),
}
FORMS["null"] = {**FORMS["conversations"], "prompt": None}  # as Parquet fills what others have


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(smollm2, form):
    options = {"system_prompt": "Be brief."} if form == "texts" else {}
    (chosen, rejected), refused = encode([FORMS[form]], smollm2, **options)
    assert shown(chosen, smollm2) == (PROMPT + "hello<|im_end|>", "hello<|im_end|>")
    assert shown(rejected, smollm2) == (PROMPT + "go away<|im_end|>", "go away<|im_end|>")
    assert chosen.key == rejected.key == "hi"
    assert not refused


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_learns_the_answers(name, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", TEMPLATES[name])
    long = pair(None, *(turns("u:1 + 1", "a:2", "u:+ 1", f"a:{n}") for n in (3, 4)))
    sides, refused = encode([pair("1 + 2", "3", "4"), long], tokenizer)
    end = {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}.get(name, "<|im_end|>")
    assert [shown(one, tokenizer)[1].strip() for one in sides] == [f"3{end}", f"4{end}"] * 2
    assert not refused


def test_of_an_answer_in_several_messages_the_assistants_are_learnt(smollm2):
    row = pair(turns("u:hi", "a:hello", "u:1 + 1?"), turns("a:ask it", "t:2", "a:2"), turns("a:3"))
    (chosen, rejected), _ = encode([row], smollm2)
    assert shown(chosen, smollm2)[1] == "ask it<|im_end|>2<|im_end|>"
    assert shown(rejected, smollm2)[1] == "3<|im_end|>"
    row["chosen"][0]["weight"] = 0
    assert shown(encode([row], smollm2)[0][0], smollm2)[1] == "2<|im_end|>"


def test_texts_as_they_are(smollm2):
    (chosen, rejected), _ = encode([pair("1 + 1 = <|im_end|>", "2", "3")], smollm2, chat_template=False)
    assert shown(chosen, smollm2) == ("<s>1 + 1 = <|im_end|>2</s>", "2</s>")
    assert shown(rejected, smollm2) == ("<s>1 + 1 = <|im_end|>3</s>", "3</s>")
    said = refusal(pair("x", "y", "z", system="Be brief."), smollm2, chat_template=False)
    assert said == "'system' beside the texts, which is for a chat template to write"
    said = refusal(FORMS["messages"], smollm2, chat_template=False)
    assert said == "'chosen' is a list of messages, which `chat_template: false` does not write"


def test_tools_are_handed_to_the_template(smollm2):
    sources = {"default": SMOLLM2, "tool_use": "{{ tools | tojson }}" + SMOLLM2}
    settings = {**smollm2.settings, "chat_template": [{"name": n, "template": s} for n, s in sources.items()]}
    rows = [pair("a", "b", "c"), pair("a", "b", "c", tools=[{"name": "f"}])]
    examples, _ = encode(rows, replace(smollm2, settings=settings))
    begun = [shown(one, smollm2)[0].startswith('[{"name": "f"}]<|im_start|>') for one in examples]
    assert begun == [False, False, True, True]


UNUSABLE = {
    "not an object": [1],
    "the row says weight: 0": pair("x", "y", "z", weight=0),
    "no 'chosen'": {"prompt": "x", "rejected": "y"},
    "no 'rejected'": {"prompt": "x", "chosen": "y"},
    "no 'prompt'": pair(None, "x", "y"),
    "'chosen' is neither text nor a list of messages": pair("x", 3, "y"),
    "'rejected' is neither text nor a list of messages": pair("x", "y", {"role": "assistant"}),
    "of 'chosen' and 'rejected', one is text and the other a list": pair("x", "y", turns("a:z")),
    "'prompt' is not text, as 'chosen' is": pair(turns("u:x"), "y", "z"),
    "'prompt' is not a list of messages, as 'chosen' is; where these are whole conversations, name another "
    "prompt_field": pair("x", turns("u:x", "a:y"), turns("u:x", "a:z")),
    "'prompt' is not a list of messages, as 'chosen' is": pair([], turns("a:y"), turns("a:z")),
    "'chosen' is empty": pair("x", " \n", "y"),
    "'rejected' is empty": pair("x", "y", ""),
    "'prompt' has a lone surrogate": pair("\ud800", "y", "z"),
    "'rejected' has a lone surrogate": pair("x", "y", "\ud800"),
    "'chosen' and 'rejected' are equal": pair("x", "y", "y"),
    "no 'prompt', and 'chosen' and 'rejected' begin with no message in common": pair(
        None, turns("u:x", "a:y"), turns("u:other", "a:z")
    ),
    "'chosen' holds no message after the prompt": pair(None, turns("u:x", "a:y"), turns("u:x", "a:y", "a:z")),
    "'rejected' holds no message after the prompt": pair(turns("u:x"), turns("a:y"), []),
    "'rejected', after the prompt, ends with a message of user, not of assistant": pair(
        turns("u:x"), turns("a:y"), turns("a:z", "u:thanks")
    ),
    "'chosen', after the prompt, begins with a message of user, not of assistant": pair(
        turns("u:x"), turns("u:x", "a:y"), turns("u:x", "a:z")
    ),
    "a message to learn is empty": pair(turns("u:x"), turns("a:y"), turns("a: ")),
    "no message of assistant to learn": pair(turns("u:x"), turns("a:y"), [{**turns("a:z")[0], "weight": 0}]),
    "a message has no role": pair(turns("u:x"), turns("a:y"), [{"content": "z"}]),
    "unknown role 'usr'; did you mean 'user'?": pair([{"role": "usr", "content": "x"}], turns("a:y"), turns("a:z")),
    "a message holds '<|im_end|>', which is a special token of the tokenizer": pair("x", "y", "z<|im_end|>"),
    "'tools' is not a list": pair("x", "y", "z", tools=3),
    "'functions' beside the messages is not read, and may change what the template writes": pair(
        "x", "y", "z", functions=[3]
    ),
    "longer than sequence_length = 512": pair("x", "y", "z" * 600),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_pairs_that_cannot_be_used(smollm2, reason):
    assert refusal(UNUSABLE[reason], smollm2) == reason


def test_equal_conversations_are_refused(smollm2):
    for sides in (turns("u:x", "a:y"), [{**message, "name": None} for message in turns("u:x", "a:y")]):
        assert refusal(pair(None, turns("u:x", "a:y"), sides), smollm2) == "'chosen' and 'rejected' are equal"


def test_sides_that_the_template_makes_equal_are_refused(tmp_path):
    """It strips the spaces by which they differ."""
    tokenizer = make_tokenizer(tmp_path / "t", TEMPLATES["llama3"])
    assert refusal(pair("x", "y", "y "), tokenizer) == "both sides are the same as tokens"


def test_a_template_that_refuses_a_side(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", TEMPLATES["mistral"])
    row = pair(turns("u:x"), turns("a:y"), turns("a:y", "a:z"))
    assert refusal(row, tokenizer).startswith("the chat template refuses it: Conversation roles must alternate")


def test_a_template_that_rewrites_earlier_turns(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", THINKING)
    row = pair(turns("u:x"), turns("a:<think>hm</think>y", "u:and?", "a:<think>ah</think>z"), turns("a:y"))
    assert refusal(row, tokenizer) == (
        "several examples of one side, since the chat template writes a turn differently once others follow"
    )
    encoder = PairEncoder(DataConfig(format="preferences", sequence_length=512), tokenizer)
    assert not list(encoder.encode([Row("a", row)]))
    assert not [said for said in encoder.remarks() if said.startswith("several examples")]


def test_what_is_too_long_may_be_cut(smollm2):
    rows = [pair("x", "y", "z" * 600), pair("x", "y" * 600, "y" * 700), pair("x" * 600, "y", "z")]
    options = {"too_long": "truncate", "sequence_length": 200}
    (chosen, rejected), refused = encode(rows, smollm2, **options)
    assert shown(chosen, smollm2)[1] == "y<|im_end|>"
    assert len(rejected.ids) == 201  # the last is a target only
    assert set(shown(rejected, smollm2)[1]) == {"z"}
    assert refused == [
        "1 row: both sides are the same as tokens (the first: a.jsonl:2)",
        "1 row: longer than sequence_length = 200 (the first: a.jsonl:3)",
    ]
    encoder = PairEncoder(DataConfig(format="preferences", **options), smollm2)
    list(encoder.encode([Row("a", row) for row in rows]))
    assert "1 example cut at sequence_length = 200, before the end of a turn" in encoder.remarks()


texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)


@given(st.lists(st.tuples(texts, texts, texts), max_size=6))
@settings(deadline=None, max_examples=40)
def test_a_row_is_two_examples_or_is_refused(smollm2, rows):
    """Of any texts; the sides stay together and in order."""
    examples, refused = encode([pair(*row) for row in rows], smollm2)
    good = [row for row in rows if row[1].strip() and row[2].strip() and row[1] != row[2]]
    learnt = [shown(one, smollm2)[1] for one in examples]
    assert learnt == [f"{text}<|im_end|>" for _, *sides in good for text in sides]
    assert sum(int(one.split()[0]) for one in refused) == len(rows) - len(good)


# --- Prepared -----------------------------------------------------------------------------------------------------


def config_of(path: Path, **options: object) -> DataConfig:
    options = {"validation_fraction": 0.3, "cache_dir": str(path.parent / "cache"), "sequence_length": 64} | options
    return DataConfig(source=str(path), format="preferences", chat_template=False, **options)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [pair(f"question {i % 20} ", f"right {i}", f"wrong, {'ab' * (i % 7)} {i}") for i in range(60)]


def test_prepared_pairs_and_the_cache_opened_again(tmp_path, smollm2):
    config = config_of(write(tmp_path / "a.jsonl", [*ROWS, pair("x", "y", "y")]))
    first, again = (prepare(config, tokenizer=smollm2) for _ in range(2))
    assert first.notes() == again.notes()
    for data in (first, again):
        assert data.train.group == data.validation.group == 2
        assert data.train.num_documents + data.validation.num_documents == 120
        trained, held_out = data.train.num_documents // 2, data.validation.num_documents // 2
        assert data.notes()[:2] == [
            f"{trained} pairs to train on, {held_out} held out; 1 row refused:",
            "  1 row: 'chosen' and 'rejected' are equal (the first: a.jsonl:61)",
        ]
        assert isinstance(open_rows(data.train, config), PairRows)
    questions = []
    for store in (again.train, again.validation):
        sides = [smollm2.decode(store.tokens[a:b].tolist()) for a, b in itertools.pairwise(store.offsets[:])]
        for chosen, rejected in zip(sides[::2], sides[1::2], strict=True):
            question, _, number = chosen.partition("right ")
            assert rejected.startswith(f"{question}wrong, ")
            assert rejected.endswith(f" {number}")
        questions.append({side.partition("right ")[0] for side in sides[::2]})
    assert not questions[0] & questions[1], "a prompt is on one side of the split"


def test_parquet_and_jsonl_are_the_same_pairs(tmp_path, smollm2):
    rows = [pair(None, turns(f"u:{i}", f"a:{i}"), turns(f"u:{i}", f"a:not {i}")) for i in range(30)]
    rows[3]["chosen"][0]["name"] = "somebody"  # a column of nulls for the others
    rows[3]["rejected"][0]["name"] = "somebody"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", rows)
    parquet, lines = (
        prepare(
            config_of(tmp_path / name).model_copy(update={"chat_template": True, "sequence_length": 256}),
            tokenizer=smollm2,
        )
        for name in ("a.parquet", "a.jsonl")
    )
    assert parquet.train.digest == lines.train.digest


def test_names_of_the_columns(tmp_path, smollm2):
    rows = [{"question": f"{i}", "good": "yes", "bad": "no"} for i in range(30)]
    names = {"prompt_field": "question", "chosen_field": "good", "rejected_field": "bad"}
    config = config_of(write(tmp_path / "a.jsonl", rows), **names)
    swapped = config.model_copy(update={"chosen_field": "bad", "rejected_field": "good"})
    learnt = []
    for one in (config, swapped):
        store = prepare(one, tokenizer=smollm2).train
        start, end = store.offsets[:2]
        learnt.append(smollm2.decode(store.tokens[start:end][store.learnt[start:end]].tolist()))
    assert learnt == ["yes", "no"], "and not from the other's cache"
    with pytest.raises(
        UserError, match=r"30 rows: no 'chosen' \(see .*, chosen_field\); keys found: 'bad', 'good', 'q"
    ):
        prepare(config_of(tmp_path / "a.jsonl"), tokenizer=smollm2)


def test_other_formats_keep_their_caches():
    """As they were before there were preferences: a fingerprint that changes makes everybody tokenise anew."""
    source, fingerprints = Source((), ("x",), "here"), {}
    for format in ("text", "chat", "prompt_completion", "preferences"):
        config = DataConfig(format=format, sequence_length=64)
        fingerprints[format] = _fingerprint(config, source, byte_tokenizer())
    preferences = fingerprints.pop("preferences")
    assert preferences not in fingerprints.values()
    assert fingerprints == {
        "text": "d9069328373519444a4374216fb15359",
        "chat": "bf5e38b1a2c341ecaacff010d5e1e1c5",
        "prompt_completion": "738d40e450853c67db80dfee441da8da",
    }


def test_batches_of_pairs(tmp_path, smollm2):
    """Of any number of processes; a state goes on exactly, and is of one number of pairs a row."""
    config = config_of(write(tmp_path / "a.jsonl", ROWS), pairs_per_row=2)
    store = prepare(config, tokenizer=smollm2).train
    whole = train_iterator(store, config, global_batch_size=4)
    expected = [next(whole) for _ in range(6)]
    assert all(values.shape == (4, 2, 64) for batch in expected for values in batch.values())
    assert max(int(batch["segment_ids"].max()) for batch in expected) == 2
    for count in (1, 2, 4):
        shares = [
            train_iterator(store, config, global_batch_size=4, process_index=p, process_count=count)
            for p in range(count)
        ]
        for batch in expected[:2]:
            parts = [next(share) for share in shares]
            for name, values in batch.items():
                np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))
        state = json.loads(json.dumps(shares[0].get_state()))
        resumed = train_iterator(store, config, global_batch_size=4)
        resumed.set_state(state)
        np.testing.assert_array_equal(next(resumed)["tokens"], expected[2]["tokens"])
    other = train_iterator(store, config.model_copy(update={"pairs_per_row": 1}), global_batch_size=4)
    with pytest.raises(UserError, match="the data has changed since this state was saved"):
        other.set_state(state)


@pytest.mark.parametrize("count", [1, 2])
def test_validation_is_every_pair_once(tmp_path, smollm2, count):
    config = config_of(write(tmp_path / "a.jsonl", ROWS), pairs_per_row=3)
    store = prepare(config, tokenizer=smollm2).validation
    shares = [
        list(validation_batches(store, config, global_batch_size=4, process_index=p, process_count=count))
        for p in range(count)
    ]
    batches = [np.concatenate([part["segment_ids"] for part in step]) for step in zip(*shares, strict=True)]
    assert all(batch.shape == (4, 2, 64) for batch in batches)
    pairs = [row.max(axis=-1).tolist() for batch in batches for row in batch]
    assert all(chosen == rejected <= 3 for chosen, rejected in pairs)
    assert sum(chosen for chosen, _ in pairs) == store.num_documents // 2
    learnt = sum(int(part["loss_mask"].sum()) for share in shares for part in share)
    assert learnt == store.num_targets
