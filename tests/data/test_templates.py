"""Chat templates that cost more than they may: each ends in a line, and soon."""

import os
import signal

import pytest

from trainfw import confined
from trainfw.confined import Helper, LimitError
from trainfw.data import ChatTemplate
from trainfw.data.turns import TemplateProblem
from trainfw.errors import UserError

from .test_chat import CHAT, make_tokenizer

TIME, MEMORY, OUTPUT, DEEP = "takes more than 1 seconds", "needs more than 512 MB", "characters, and", "too deeply"
HOSTILE = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TIME),
    "power": ("{% set n = 9 %}{{ 10 ** (10 ** n) % 7 }}", TIME),
    "constant": ("{{ 10 ** (10 ** 9) % 7 }}", TIME),
    "macros": ("{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", TIME),
    "times": ("{{ 'a' * 10 ** 10 }}", MEMORY),
    "list": ("{{ ([0] * 10 ** 10) | length }}", MEMORY),
    "indent": ("{{ 'a\n' | indent(10 ** 10) }}", MEMORY),
    "tojson": ("{{ messages | tojson(indent=10 ** 10) }}", MEMORY),
    "center": ("{{ 'a' | center(10 ** 10) }}", MEMORY),
    "percent": ("{{ '%1000000000000d' % 1 }}", MEMORY),
    "format": ("{{ '{:>100000000000}'.format(1) }}", MEMORY),
    "clock": ("{{ strftime_now('%Y' * 10 ** 9) }}", MEMORY),
    "batch": ("{{ messages | batch(10 ** 10, 'x') | list }}", MEMORY),
    "replace": ("{{ ('a' * 10 ** 5) | replace('a', 'b' * 10 ** 5) }}", MEMORY),
    "doubling": (
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        MEMORY,
    ),
    "wide": ("{{ 'a' * 10 ** 7 }}", OUTPUT),
    "brackets": ("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", DEEP),
    "blocks": ("{% if 1 %}" * 300 + "{% endif %}" * 300, DEEP),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", DEEP),
}


@pytest.fixture
def helper(monkeypatch):
    monkeypatch.setattr(confined, "BURST_SECONDS", 1)
    monkeypatch.setattr(confined, "MEMORY", 2**29)
    monkeypatch.setattr("trainfw.data.chat.helper", helper := Helper())
    yield helper
    helper.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_costs_too_much(name, helper, tmp_path):
    source, words = HOSTILE[name]
    tokenizer = make_tokenizer(tmp_path / "t", source)
    with pytest.raises((UserError, TemplateProblem), match=words) as caught:
        ChatTemplate.of(tokenizer).render(CHAT)
    assert "\n" not in str(caught.value)
    if words != DEEP or "cannot be read" in str(caught.value):
        assert str(caught.value).startswith(f"{tmp_path / 't' / 'tokenizer_config.json'}: the chat template ")
    plain = ChatTemplate.of(make_tokenizer(tmp_path / "t", "{{ messages | length }}"))
    assert plain.render(CHAT) == "4"


def test_a_template_that_cannot_be_read_says_so_each_time(helper, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", HOSTILE["blocks"][0])
    for _ in range(2):
        with pytest.raises(UserError, match=r"the chat template cannot be read: "):
            ChatTemplate.of(tokenizer).render(CHAT)


def test_many_renderings_share_the_time(helper, monkeypatch, tmp_path):
    """Each is well within a second, and together they are not."""
    monkeypatch.setattr(confined, "PIECE_SECONDS", 0.001)
    template = ChatTemplate.of(
        make_tokenizer(tmp_path / "t", "{% for i in range(9) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    )
    assert template.render(CHAT) == ""
    with pytest.raises(LimitError, match="takes more than 1 seconds"):
        helper.call_each("data.templates:ask", template._fields, [("render", CHAT, False, None)] * 1000)


def test_a_conversation_that_is_nested_too_deeply(helper, tmp_path):
    tools = []
    for _ in range(5000):
        tools = [tools]
    template = ChatTemplate.of(make_tokenizer(tmp_path / "t", "{{ tools | tojson }}"))
    with pytest.raises(TemplateProblem, match="too deeply"):
        template.render(CHAT, tools=tools)


def test_a_helper_that_ends_or_hangs_is_replaced(helper, monkeypatch, tmp_path):
    template = ChatTemplate.of(make_tokenizer(tmp_path / "t", "{{ messages | length }}"))
    os.kill(helper._process.pid, signal.SIGSEGV)
    with pytest.raises(UserError, match=r"ends the process that it is tried in \(SIGSEGV\)"):
        template.render(CHAT)
    assert template.render(CHAT) == "4"
    monkeypatch.setattr(confined, "WALL_SECONDS", 0.2)
    os.kill(helper._process.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match="gave no answer within"):
        template.render(CHAT)
    monkeypatch.setattr(confined, "WALL_SECONDS", 60.0)
    assert template.render(CHAT[:1]) == "1"
