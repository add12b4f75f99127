"""Rows of examples: what is learnt of them, and what is refused."""

import datetime
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.data import DataConfig, PreparedData, Tokenizer, prepare
from trainfw.data.cache import is_held_out
from trainfw.data.examples import Encoder
from trainfw.data.sources import Row
from trainfw.errors import UserError

from .test_chat import SMOLLM2, TEMPLATES, make_tokenizer
from .test_turns import THINKING

PAIR = "prompt_completion"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t", SMOLLM2)


def chat(*turns: str, **extra: object) -> dict:
    """Roles by their first letter: "u:hi"."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"messages": [{"role": roles[t[0]], "content": t[2:]} for t in turns], **extra}


def config(format: str = "chat", **options: object) -> DataConfig:
    return DataConfig(format=format, **{"sequence_length": 512} | options)  # type: ignore[arg-type]


def encode(rows: list, tokenizer: Tokenizer, **options: object):
    encoder = Encoder(config(**options), tokenizer)  # type: ignore[arg-type]
    examples = list(encoder.encode([Row(f"a.jsonl:{i}", row) for i, row in enumerate(rows, start=1)]))
    return examples, [str(one) for one in encoder.refusals.summary()]


def shown(example, tokenizer: Tokenizer) -> tuple[str, str]:
    """(all of it, what of it is learnt), special tokens as text."""
    learnt = [id_ for id_, is_learnt in zip(example.ids, example.learnt) if is_learnt]
    return tuple(tokenizer.backend.decode(ids, skip_special_tokens=False) for ids in (example.ids, learnt))  # type: ignore[return-value]


def test_a_chat_learns_what_the_assistant_writes(smollm2):
    [one], refused = encode([chat("s:Be brief.", "u:hi", "a:hello", "u:bye", "a:so long", "u:ok")], smollm2)
    text, learnt = shown(one, smollm2)
    assert learnt == "hello<|im_end|>so long<|im_end|>"
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "hello<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nso long<|im_end|>"
    )
    assert one.key == "hi"
    assert not refused


def test_other_roles_may_be_learnt(smollm2):
    [one], _ = encode([chat("u:user", "a:hello", "t:42")], smollm2, loss_on=["user", "tool"])
    assert shown(one, smollm2)[1] == "user<|im_end|>42<|im_end|>"


def test_a_system_prompt_is_added_where_there_is_none(smollm2):
    rows = [chat("u:hi", "a:hello"), chat("s:own", "u:hi", "a:hello")]
    texts = [shown(one, smollm2)[0] for one in encode(rows, smollm2, system_prompt="Be kind.")[0]]
    assert [text.split("<|im_end|>")[0] for text in texts] == [
        "<|im_start|>system\nBe kind.",
        "<|im_start|>system\nown",
    ]


def test_a_system_prompt_may_stand_beside_the_messages(tmp_path, smollm2):
    rows = [chat(f"u:{i}", "a:x", system="Be kind.", id=i) for i in range(30)]
    for path in (write(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"):
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        tokens = prepared(path, smollm2).train.tokens[:80].tolist()
        assert smollm2.decode(tokens).startswith("system\nBe kind.\nuser")


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_completion_are_turns_of_the_template(name, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", TEMPLATES[name])
    [one], _ = encode([{"prompt": "1 + 1", "completion": "2"}], tokenizer, format="prompt_completion")
    _, learnt = shown(one, tokenizer)
    end = {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}.get(name, "<|im_end|>")
    assert learnt.strip() == f"2{end}"


def test_prompt_and_completion_as_they_are(smollm2):
    options = {"format": "prompt_completion", "chat_template": False}
    [one], _ = encode([{"prompt": "1 + 1 = <|im_end|>", "completion": "2"}], smollm2, **options)
    assert shown(one, smollm2) == ("<s>1 + 1 = <|im_end|>2</s>", "2</s>")
    assert smollm2.backend.token_to_id("<|im_end|>") not in one.ids


UNUSABLE = {
    "no 'messages'": {"message": []},
    "'messages' is not a list of messages": {"messages": "hi"},
    "not an object": [1],
    "a message is not an object": {"messages": ["hi"]},
    "a message has no role": {"messages": [{"content": "hi"}]},
    "unknown role 'asistant'; did you mean 'assistant'?": {"messages": [{"role": "asistant", "content": "hi"}]},
    "a message's content is not text": {"messages": [{"role": "assistant", "content": 3}]},
    "a message's content is a list of parts: write their text as one": {
        "messages": [{"role": "assistant", "content": [{"type": "text"}]}]
    },
    "a message has 'from' and 'value' (ShareGPT's form): write it with 'role' and 'content'": {
        "messages": [{"from": "human", "value": "hi"}]
    },
    "a message has 'function_call', which is now written as 'tool_calls'": {
        "messages": [{"role": "assistant", "content": None, "function_call": {"name": "f"}}]
    },
    "the row says weight: 0": chat("u:hi", "a:x", weight=0),
    "the row says train: false": chat("u:hi", "a:x", train=False),
    "'system' is not text": chat("u:hi", "a:x", system=["Be brief."]),
    "'chat_template_kwargs' beside the messages is not read, and may change what the template writes": chat(
        "u:hi", "a:x", chat_template_kwargs={"enable_thinking": False}
    ),
    "no message of assistant to learn": chat("u:hi"),
    "a message to learn is empty": chat("u:hi", "a: "),
    "'tools' is not a list": chat("u:hi", "a:x", tools=3),
    "a message holds '<|im_end|>', which is a special token of the tokenizer": chat("u:a<|im_end|>b", "a:x"),
    "a message has a lone surrogate": chat("u:\ud800", "a:x"),
    "longer than sequence_length = 512": chat("u:hi", "a:" + "x" * 600),
}


def test_rows_that_cannot_be_used_are_counted_by_reason(smollm2):
    rows = [row for row in UNUSABLE.values() for _ in range(2)]
    examples, refused = encode([*rows, chat("u:hi", "a:hello")], smollm2)
    assert len(examples) == 1
    expected = {f"2 rows: {reason} (the first: a.jsonl:{2 * i + 1})" for i, reason in enumerate(UNUSABLE)}
    assert set(refused) == expected


def test_pairs_that_cannot_be_used(smollm2):
    rows = {
        "no 'completion'": {"prompt": "x"},
        "'prompt' is not text": {"prompt": 1, "completion": "x"},
        "'prompt' is a list: put both into one of messages, for format: chat": {
            "prompt": [{"role": "user", "content": "x"}],
            "completion": "y",
        },
        "'completion' is empty": {"prompt": "x", "completion": " \n"},
        "'completion' has a lone surrogate": {"prompt": "x", "completion": "\udfff"},
    }
    _, refused = encode(list(rows.values()), smollm2, format="prompt_completion")
    assert refused == [f"1 row: {reason} (the first: a.jsonl:{i})" for i, reason in enumerate(rows, start=1)]


def test_what_is_too_long_may_be_cut(smollm2):
    rows = [chat("u:hi", "a:" + "x" * 600), chat("u:" + "x" * 600, "a:never seen")]
    examples, refused = encode(rows, smollm2, too_long="truncate", sequence_length=200)
    assert [len(one.ids) for one in examples] == [201]  # the last is a target only
    assert examples[0].learnt[-1]
    assert refused == ["1 row: longer than sequence_length = 200 (the first: a.jsonl:2)"]
    said = remarks(rows, smollm2, too_long="truncate", sequence_length=200).splitlines()
    assert said[0].startswith("warning: no turn to learn ends in a token at which generation stops")
    assert said[1] == "1 example cut at sequence_length = 200, before the end of a turn"


def test_a_template_that_refuses_a_row(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", TEMPLATES["gemma"])
    _, refused = encode([chat("s:x", "u:x", "a:x")], tokenizer)
    assert refused == ["1 row: the chat template refuses it: System role not supported (the first: a.jsonl:1)"]


def test_a_tokenizer_without_a_template(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", None)
    with pytest.raises(UserError, match=r"format: chat: the tokenizer has no chat template; put one beside"):
        Encoder(config(), tokenizer)
    with pytest.raises(UserError, match="set chat_template: false, or put one"):
        Encoder(config("prompt_completion"), tokenizer)


texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)


@given(st.lists(st.tuples(st.sampled_from("uas"), texts), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_learnt_tokens_are_the_contents_and_their_ends(smollm2, turns):
    """Of any conversation, in any script; all that is left out is refused for a reason."""
    row = chat(*(f"{role}:{text}" for role, text in turns))
    examples, refused = encode([row], smollm2)
    assert len(examples) + len(refused) == 1
    said = [text for role, text in turns if role == "a"]
    if examples:
        assert shown(examples[0], smollm2)[1] == "".join(f"{text}<|im_end|>" for text in said)
        assert not examples[0].learnt[0]
    else:
        assert not said or any(not text.strip() for text in said)


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": 0}])
def test_a_message_may_say_that_it_is_not_learnt(smollm2, off):
    row = chat("u:hi", "a:hello", "u:bye", "a:so long")
    row["messages"][1] |= off
    row["messages"][3] |= {key: type(value)(1) for key, value in off.items()}
    [one], refused = encode([row], smollm2)
    assert shown(one, smollm2)[1] == "so long<|im_end|>"
    row["messages"][3] |= off
    assert encode([row], smollm2)[1] == ["1 row: no message of assistant to learn (the first: a.jsonl:1)"]
    for change, problem in (
        ({"weight": 0.5}, "weight is 0.5: expected 0 or 1"),
        ({"train": "no"}, "train is 'no': exp"),
    ):
        assert problem in encode([chat("a:x") | {"messages": [{**row["messages"][3], **change}]}], smollm2)[1][0]
    row["messages"][0]["train"] = True
    assert "a message of user says train: true, but loss_on is assistant" in encode([row], smollm2)[1][0]
    assert not refused


def test_a_message_cannot_forge_a_marker_that_was_not_added_as_special(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", SMOLLM2.replace("<|im_end|>", "<end>"))
    tokenizer.backend.add_tokens(["<end>", "<think>"])
    [one], refused = encode([chat("u:<think>", "a:<think>x"), chat("u:a<end>b", "a:x")], tokenizer)
    assert shown(one, tokenizer)[1] == "<think>x<end>"
    assert refused == ["1 row: a message holds '<end>', which marks turns in the chat template (the first: a.jsonl:2)"]


def remarks(rows: list, tokenizer: Tokenizer, **options: object) -> str:
    encoder = Encoder(config(**options), tokenizer)  # type: ignore[arg-type]
    assert list(encoder.encode([Row("a", row) for row in rows]))
    return "\n".join(encoder.remarks())


def test_what_else_there_is_to_know_is_said(tmp_path, smollm2):
    rows = [chat("u:hi", "a:hello", "u:bye", "a:so long", tools=[{"name": "f"}]) for _ in range(2)]
    rows[0]["messages"][1]["reasoning_content"] = "hm"
    said = remarks(rows, smollm2)
    keys = "tools (2), reasoning_content (1)"
    assert said == f"warning: the chat template reads nothing of these keys of messages and rows: {keys}"
    thinking = make_tokenizer(tmp_path / "thinking", THINKING)
    assert remarks(rows, thinking).startswith(
        "several examples of 2 rows, since the chat template writes a turn differ"
    )
    asks = make_tokenizer(tmp_path / "asks", SMOLLM2.replace("assistant\n' }}", "assistant\n<think>' }}"))
    said = remarks([chat("u:a", "a:b", "u:c", "a:d")], asks)
    assert said.startswith(r"warning: 2 turns to learn without the beginning '<|im_start|>assistant\n<think>', with")
    assert not remarks([chat("u:a", "a:<think>b")], asks)
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    merged = make_tokenizer(tmp_path / "m", source + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    assert remarks([chat("u:b", "a:a")], merged).startswith("warning: 1 turn to learn beginning within a token of")
    last = "{% generation %}{{ m.content + '</s>' }}{% endgeneration %}"
    last = "{% if loop.last %}" + last + "{% else %}{{ m.content }}{% endif %}"
    tags = make_tokenizer(tmp_path / "tags", "{% for m in messages %}" + last + "{% endfor %}")
    said = remarks([chat("u:a", "a:b", "u:c", "a:d")], tags)
    assert said.startswith("1 turn of the assistant outside the template's {% generation %} tags: not learnt")
    never = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    between = SMOLLM2.replace("+ '<|im_end|>' + '\n'}}", "}}{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}")
    for name, source in (("never", never), ("between", between)):
        tokenizer = make_tokenizer(tmp_path / name, source)
        for row, options in ((chat("u:a", "a:b"), {}), ({"prompt": "a", "completion": "b"}, {"format": PAIR})):
            said = remarks([row], tokenizer, **options)
            assert said.startswith("warning: no turn to learn ends in a token at which generation stops ('</s>')")
    assert not remarks([{"prompt": "a", "completion": "b"}], tokenizer, format=PAIR, chat_template=False)


# --- Prepared -------------------------------------------------------------------------------------


def prepared(path: Path, tokenizer: Tokenizer, **options: object) -> PreparedData:
    options = {"source": str(path), "validation_fraction": 0.3, "cache_dir": str(path.parent / "cache")} | options
    return prepare(config(**options), tokenizer=tokenizer)  # type: ignore[arg-type]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prepared_examples(tmp_path, smollm2):
    rows = [chat(f"u:question {i % 20}", f"a:answer {i}") for i in range(60)]
    path = write(tmp_path / "a.jsonl", [*rows, {"messages": 3}])
    twice = '{"messages": 1, "messages": []}'
    path.write_text(path.read_text() + f"not json\n\n{twice}\n" + json.dumps(chat("u:q", "a:a")) + "\n")
    for _ in range(2):  # the second from the cache
        data = prepared(path, smollm2)
        assert data.train.num_documents + data.validation.num_documents == 61
        assert [str(one) for one in data.refused] == [
            "1 row: 'messages' is not a list of messages (the first: a.jsonl:61)",
            "1 row: not JSON (the first: a.jsonl:62)",
            "1 row: key 'messages' is written twice (the first: a.jsonl:64)",
        ]
        assert data.notes()[0].endswith("; 3 rows refused:")
        sides = {"train": set(), "validation": set()}
        for split, questions in sides.items():
            store = getattr(data, split)
            assert store.learnt[:].dtype == bool
            for start, end in zip(store.offsets[:-1], store.offsets[1:]):
                text = smollm2.decode(store.tokens[start:end].tolist())
                questions.add(text.split("user\n")[1].split("\nassistant")[0])
                answer = smollm2.decode(store.tokens[start:end][store.learnt[start:end]].tolist())
                assert text.endswith(answer)
        assert not sides["train"] & sides["validation"]
        assert all(is_held_out(question, 0.3) for question in sides["validation"])
        assert data.validation.num_bytes == sum(
            len(f"answer {i}") for i in range(60) if f"question {i % 20}" in sides["validation"]
        ) + ("q" in sides["validation"])


@pytest.mark.parametrize(
    "change",
    [{"loss_on": ["user"]}, {"system_prompt": "x"}, {"sequence_length": 99}, {"too_long": "truncate"}],
    ids=lambda change: next(iter(change)),
)
def test_options_that_shape_examples(tmp_path, smollm2, change):
    path = write(tmp_path / "a.jsonl", [chat(f"u:{i}", f"a:{i}") for i in range(30)])
    first = prepared(path, smollm2)
    assert prepared(path, smollm2, **change).fingerprint != first.fingerprint
    assert prepared(path, smollm2, **change).fingerprint == prepared(path, smollm2, **change).fingerprint


def test_remarks_come_from_the_cache_too(tmp_path, smollm2):
    path = write(tmp_path / "a.jsonl", [chat(f"u:{i}", f"a:{i}", tools=[{}]) for i in range(30)])
    notes = prepared(path, smollm2).notes()
    assert notes == prepared(path, smollm2).notes()
    assert notes[-1].endswith("rows: tools (30)")


def test_conversations_with_tools_have_the_template_for_them(smollm2):
    """As in Transformers, where a tokenizer has several."""
    sources = {"default": SMOLLM2, "tool_use": "{{ tools | tojson }}" + SMOLLM2}
    settings = {**smollm2.settings, "chat_template": [{"name": n, "template": s} for n, s in sources.items()]}
    rows = [chat("u:a", "a:b", tools=[{"name": "f"}]), chat("u:a", "a:b")]
    with_tools, without = encode(rows, replace(smollm2, settings=settings))[0]
    assert shown(with_tools, smollm2)[0].startswith('[{"name": "f"}]<|im_start|>')
    assert shown(without, smollm2)[0].startswith("<|im_start|>")


def test_the_day_that_a_template_is_told(tmp_path, smollm2):
    """Part of the data exactly where the template asks; today, unless it is said."""
    path = write(tmp_path / "a.jsonl", [chat(f"u:{i}", f"a:{i}") for i in range(30)])
    assert prepared(path, smollm2).fingerprint == prepared(path, smollm2, date="2020-02-29").fingerprint
    clock = make_tokenizer(tmp_path / "t", "{{ strftime_now('%d %b %Y %H:%M') }}" + SMOLLM2)
    data = prepared(path, clock, date="2020-02-29")
    assert clock.decode(data.train.tokens[:40].tolist()).startswith("29 Feb 2020 00:00")
    today = prepared(path, clock, date=datetime.date.today().isoformat()).fingerprint
    assert prepared(path, clock).fingerprint == today != data.fingerprint
    with pytest.raises(ValueError, match=r"'2021-02-29' is no day"):
        DataConfig(sequence_length=8, format="chat", date="2021-02-29")


def test_another_template_is_other_data(tmp_path, smollm2):
    path = write(tmp_path / "a.jsonl", [chat(f"u:{i}", f"a:{i}") for i in range(30)])
    other = make_tokenizer(tmp_path / "t", TEMPLATES["llama3"])
    assert prepared(path, smollm2).fingerprint != prepared(path, other).fingerprint


def test_parquet(tmp_path, smollm2):
    rows = [chat(f"u:{i}", f"a:{i}") for i in range(30)]
    rows[3]["messages"][0]["name"] = "somebody"  # a column of nulls for the others
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    digest = prepared(path, smollm2).train.digest
    assert digest == prepared(write(tmp_path / "a.jsonl", rows), smollm2).train.digest


def test_nothing_to_use_is_an_error(tmp_path, smollm2):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(UserError, match=r"used:\n  3 rows: no 'messages' \(see mess.*\); keys found: 'text' \("):
        prepared(path, smollm2)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (chat("u:x", "a:y"), "chat"),
        ({"prompt": "x", "completion": "y"}, "prompt_completion"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "preferences"),
    ],
)
def test_text_that_looks_like_examples(tmp_path, smollm2, row, format):
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=f"no key 'text', but .*: did you mean data.format: {format}\\?"):
        prepared(path, smollm2, format="text")


def test_files_of_text_are_no_examples(tmp_path, smollm2):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"cannot read a \.txt file as rows of examples; one of: \.jsonl, \.parquet"):
        prepared(tmp_path / "a.txt", smollm2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_on": ["user"]}, "loss_on is for `format: chat`"),
        ({"system_prompt": "x"}, "system_prompt is written by a chat template"),
        ({"chat_template": False}, "is for `format: prompt_completion` and `preferences`, but format is 'text'"),
        ({"too_long": "truncate"}, "`format: chat`, `prompt_completion` and `preferences`: text is cut into rows"),
        ({"chosen_field": "a"}, "chosen_field is for `format: preferences`, but format is 'text'"),
        (
            {"rejected_field": "a", "format": "chat"},
            "rejected_field is for `format: preferences`, but format is 'chat'",
        ),
        ({"pairs_per_row": 2, "format": "prompt_completion"}, "pairs_per_row is for `format: preferences`, but for"),
        ({"pairs_per_row": 0, "format": "preferences"}, "pairs_per_row\n.*greater than 0"),
        ({"format": "preferences", "chosen_field": "rejected"}, "'rejected' is chosen_field too: expected another"),
        ({"format": "preferences", "prompt_field": "chosen"}, "'chosen' is of an answer too: expected another key"),
        ({"format": "preferences", "loss_on": ["user"]}, "loss_on is for `format: chat`, but format is 'preferences'"),
        ({"format": "preferences", "tokenizer": {"name": "bpe", "vocab_size": 300}}, "`name: bpe` trains on text"),
        (
            {"format": "preferences", "chat_template": False, "system_prompt": "x"},
            "system_prompt is written by a chat template; this recipe uses none",
        ),
        ({"source": "python-stdlib-preferences"}, "is of preferences: set `format: preferences`"),
        ({"source": "python-stdlib-rewrites", "format": "preferences"}, "completions: set `format: prompt_completion`"),
        (
            {"source": "python-stdlib-preferences", "format": "preferences", "chosen_field": "a"},
            "chosen_field does not change source: python-stdlib-preferences",
        ),
        ({"max_characters": 3}, "max_characters is for a built-in task"),
        ({"source": "python-stdlib-rewrites"}, "set `format: prompt_completion`"),
        ({"source": ["python-stdlib-rewrites", "x"]}, "cannot be mixed"),
        ({"format": "chat", "tokenizer": {"name": "bpe", "vocab_size": 300}}, "`name: bpe` trains on text"),
    ],
)
def test_options_of_other_formats(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(sequence_length=8, **options)
