"""Tokenizers that hang, abort or fill the memory: each ends in a line, and soon; none in this process."""

import json

import pytest

from trainfw import confined
from trainfw.confined import Helper
from trainfw.data import load_tokenizer
from trainfw.data.tokenizer import byte_tokenizer
from trainfw.errors import UserError

FORM = json.loads(byte_tokenizer().backend.to_str())


def replaced(pattern: str, content: str, kind: str = "Regex") -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def several(*parts: dict) -> dict:
    return {"type": "Sequence", "normalizers": list(parts)}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


RETRIES = "the tokenizer fails at '.*' and so on: Onig: .*retry-limit"
ABORTS = "the tokenizer fails, or needs more than"
VAST = FORM["model"] | {"vocab": FORM["model"]["vocab"] | {"zz": 2**32 - 1}}
HOSTILE = {
    "an expression that tries all": ({"pre_tokenizer": split("(a+)+$")}, RETRIES),
    "of a class": ({"pre_tokenizer": split(r"(?:\p{L}|\p{L}\p{L})+\d")}, RETRIES),
    "of its own letters": ({"pre_tokenizer": split("(q|qq)*y")}, RETRIES),
    "that repeats repeats": ({"pre_tokenizer": split("(z{1,1000}){1,1000}y")}, RETRIES),
    "in a normaliser": ({"normalizer": replaced("(a+)+$", "b")}, RETRIES),
    "growth": ({"normalizer": several(*[replaced("a", "a" * 50, "String")] * 8)}, ABORTS),
    "growth of its own letters": ({"normalizer": several(*[replaced("q", "q" * 50, "String")] * 8)}, ABORTS),
    "growth of a class": ({"normalizer": several(*[replaced(r"\p{L}", "é" * 50)] * 8)}, ABORTS),
    "much": ({"normalizer": replaced("a", "a" * 99, "String")}, "the tokenizer makes 39,600 tokens of 400 characters"),
    "a character map": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}}, ABORTS),
    "an empty one": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
        "index out of bounds",
    ),
    "an unknown token around a text": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "q", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
        "no entry found for key",
    ),
    "a vast id": (
        {"model": VAST},
        "the id 4,294,967,295",
    ),
}


@pytest.fixture(scope="module")
def helper():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confined, "MEMORY", 2**29)
        patch.setattr("trainfw.data.tokenizer.helper", helper := Helper())
        yield helper
        helper.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tokenizer_that_does_harm(name, helper, tmp_path, capfd):
    parts, words = HOSTILE[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(FORM | parts))
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(caught.value)
    assert not any(capfd.readouterr()), "a panic's own words"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", "[" * 10**5, "nested too deeply"),
        ("special_tokens_map.json", '{"a": ' * 10**5, "nested too deeply"),
        ("tokenizer.json", "[" * 10**5, "not a tokenizer.json that can be read"),
        ("tokenizer_config.json", json.dumps({"bos_token": "é" * 10**6}), "a token has 1000 letters at most"),
        (
            "tokenizer_config.json",
            json.dumps({"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}),
            "expected an object of tokens by their ids",
        ),
    ],
)
def test_files_that_are_nested_too_deeply_or_have_huge_tokens_and_ids(name, content, words, helper, tmp_path):
    byte_tokenizer().save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path)


def test_a_text_that_makes_it_fail_is_a_users_error(helper, tmp_path):
    """What no trial found: the library's panic in this process is an error like others."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(FORM | {"pre_tokenizer": split("(?:[λμ]|λμ)+ν")}))
    tokenizer = load_tokenizer(tmp_path)
    for fails in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(UserError, match="the tokenizer fails: Onig"):
            fails("λμ" * 40 + "!ν")


def test_what_stands_around_a_text_takes_its_place(helper, tmp_path):
    around = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "a", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"a": {"id": "a", "ids": [1], "tokens": ["a"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(FORM | {"post_processor": around}))
    with pytest.raises(UserError, match="takes the text's place"):
        _ = load_tokenizer(tmp_path).prefix_ids


def test_two_tokens_of_one_id(helper, tmp_path):
    """The library takes them, and writes one."""
    form = json.loads(byte_tokenizer().backend.to_str())
    form["model"]["vocab"] |= {"another": 65}
    (tmp_path / "tokenizer.json").write_text(json.dumps(form))
    with pytest.raises(UserError, match=r"the tokens '(A|another)' and '(A|another)' have one id, 65"):
        load_tokenizer(tmp_path)
