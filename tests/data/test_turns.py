"""Where the turns to learn stand in a rendered conversation."""

import pytest
from transformers import PreTrainedTokenizerFast

from trainfw.data import ChatTemplate, stop_ids
from trainfw.data.turns import TemplateProblem, Written

from .test_chat import CHAT, QWEN, SMOLLM2, TEMPLATES, make_tokenizer

THINKING = (  # as Qwen3 does: turns before the last of the user lose what they thought
    "{%- set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and '</think>' in m.content %}{% set said = m.content.split('</think>')[1] %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[1] %}"
    "{%- else %}{% set said = m.content %}{% set thought = '' %}{% endif %}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>' + thought + '</think>' }}{% endif %}"
    "{{- said + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_LAST = (  # as Mistral's later ones do
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages | rejectattr('role', 'equalto', 'system') | list %}{% for m in turns %}"
    "{% if m.role == 'user' %}[INST]{% if loop.index0 >= turns | length - 2 %}{{ system }}\n{% endif %}"
    "{{ m.content }}[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
CALLS = (  # as Llama 3.1 does: of a message that calls a tool, nothing but the call
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REVERSED = "{% for m in messages | reverse %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]


def turns(*texts: str, **last) -> list[dict]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    found: list[dict] = [{"role": roles[text[0]], "content": text[2:]} for text in texts]
    found[-1] |= last
    return found


def learnt(directory, source: str, messages: list[dict], role: str = "assistant", which=None) -> list[tuple[str, list]]:
    """Each text, and what of it is learnt."""
    template = ChatTemplate.of(make_tokenizer(directory / "t", source))
    wanted = [m["role"] == role if which is None else i in which for i, m in enumerate(messages)]
    return [(one.text, [one.text[slice(*s)] for s in one.spans]) for one in written(template, messages, wanted)]


def written(template: ChatTemplate, messages: list[dict], learnt: list[bool]) -> list[Written]:
    [answer] = template.write_learnt([(messages, learnt, None)])
    if isinstance(answer, TemplateProblem):
        raise answer
    return answer


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_is_what_the_template_writes_after_its_header(tmp_path, name):
    end = {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}.get(name, "<|im_end|>")
    space, strip = " " * (name == "mistral"), str.strip if name in ("llama3", "gemma") else str
    [(text, said)] = learnt(tmp_path, TEMPLATES[name], CHAT)
    contents = [message["content"] for message in CHAT]
    assert said == [space + strip(content) + end for content in contents[1::2]]
    assert text == ChatTemplate.of(make_tokenizer(tmp_path / "t", TEMPLATES[name])).render(CHAT)
    [(_, said)] = learnt(tmp_path, TEMPLATES[name], CHAT, role="user")
    assert [one.strip() for one in said] == [
        (strip(content) + (end if name != "mistral" else " [/INST]")).strip() for content in contents[0::2]
    ]


def test_generation_tags_say_what_is_learnt(tmp_path):
    """The same tokens as Transformers' assistant mask, but for what follows the end of the turn."""
    chat = turns("u:hi", "a: hello ", "u:and?", "a:bye")
    for source in (QWEN, QWEN.replace("{% endgeneration %}{{- '\\n' }}", "{{- '\\n' }}{% endgeneration %}")):
        [(_, said)] = learnt(tmp_path, source, chat)
        assert said == [" hello <|im_end|>", "bye<|im_end|>"]
        reference = PreTrainedTokenizerFast.from_pretrained(tmp_path / "t")
        theirs = reference.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        masked = [id_ for id_, mask in zip(theirs["input_ids"], theirs["assistant_masks"]) if mask]
        assert reference.decode(masked).replace("\n", "") == "".join(said)
    [(_, said)] = learnt(tmp_path, QWEN, chat, which=[3])
    assert said == ["bye<|im_end|>"]


def test_what_a_later_turn_rewrites_is_learnt_as_the_model_will_write_it(tmp_path):
    chat = turns("u:hi", "a:<think>hm</think>hello", "u:and?", "a:bye")
    start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    first = "<think>hm</think>hello<|im_end|>"
    whole = f"{start}hello<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    assert learnt(tmp_path, THINKING, chat) == [
        (start + first, [first]),
        (f"{whole}<think></think>bye<|im_end|>\n", ["<think></think>bye<|im_end|>"]),
    ]
    assert learnt(tmp_path, THINKING, chat, which=[1]) == [(start + first, [first])]
    tagged = THINKING.replace(
        "{{- said + '<|im_end|>\n' }}",
        "{%- if m.role == 'assistant' %}{% generation %}{{- said + '<|im_end|>\n' }}{% endgeneration %}"
        "{%- else %}{{- said + '<|im_end|>\n' }}{% endif %}",
    )
    # Tags that leave out what was thought are no help; else they count.
    assert learnt(tmp_path, tagged, chat) == learnt(tmp_path, THINKING, chat)
    [(text, said)] = learnt(tmp_path, tagged, turns("u:hi", "a:hello", "u:and?", "a:bye"))
    assert (text, said) == (f"{whole}<think></think>bye<|im_end|>\n", ["hello<|im_end|>", "bye<|im_end|>"])


def test_a_template_that_drops_what_was_thought(tmp_path):
    """Of the last turn too: then nobody would learn to think. Other spaces and tags are another form of the same."""
    said = "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    source = "{% for m in messages %}{{ m.role + ':' }}" + said + "{{ '</s>' }}{% endfor %}"
    with pytest.raises(TemplateProblem, match="leaves out something of a message to learn"):
        learnt(tmp_path, source, turns("u:hi", "a:<think>hm</think>hello"))
    other = source.replace("m.content.split('</think>')[-1]", "m.content | replace('think>', 'thought>\n')")
    assert learnt(tmp_path, other, turns("u:hi", "a:<think>hm</think>hello"))


def test_a_template_that_goes_on_with_the_next_turn(tmp_path):
    """What follows the end of a turn is not learnt, whatever there is of it."""
    source = SMOLLM2.replace(
        "{% if add_generation_prompt %}", "{% if messages[-1].role == 'assistant' or add_generation_prompt %}"
    )
    source = source.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant<|start_header_id|>'")
    [(_, said)] = learnt(tmp_path, source, turns("u:hi", "a:hello", "u:and?", "a:bye"))
    assert said == ["hello<|im_end|>", "bye<|im_end|>"]
    tokenizer = make_tokenizer(tmp_path / "t", source)
    assert stop_ids(tokenizer)[1:] == (tokenizer.backend.token_to_id("<|im_end|>"),)


def test_what_a_later_turn_moves_is_found(tmp_path):
    """Also where the same words stand elsewhere."""
    chat = turns("s:Be brief.", "u:hello", "a:hello", "u: hello</s", "a:hello \n", "u:hello", "a:bye")
    [(_, said)] = learnt(tmp_path, SYSTEM_LAST, chat)
    assert said == [" hello</s>", " hello</s>", " bye</s>"]
    template = ChatTemplate.of(make_tokenizer(tmp_path / "t", SYSTEM_LAST))
    [one] = written(template, chat, [i == 4 for i in range(7)])
    assert one.text[: one.spans[0][0]].endswith("[INST] hello</s[/INST]")


@pytest.mark.parametrize(
    ("source", "messages", "problem"),
    [
        (SMOLLM2, turns("u:hi", "a:", tool_calls=CALL), "writes nothing of a message to learn"),
        (SMOLLM2, turns("u:hi", "a:I call f", tool_calls=CALL), "writes nothing of tool_calls to learn"),
        (CALLS, turns("u:hi", "a:I call f", tool_calls=CALL), "leaves out something of a message to learn"),
        (REVERSED, turns("u:hi", "a:hello"), "writes a turn so that its beginning cannot be told"),
        (
            QWEN.replace("message.content + '<|im_end|>' }}{% end", "'<|im_end|>' }}{% end"),
            turns("u:hi", "a:x"),
            "writes nothing of a message to learn",
        ),
    ],
)
def test_what_the_template_does_not_write_is_not_learnt(tmp_path, source, messages, problem):
    with pytest.raises(TemplateProblem, match=problem):
        learnt(tmp_path, source, messages)


@pytest.mark.parametrize("role", ["system", "tool", "user"])
def test_a_message_that_the_template_has_no_place_for(tmp_path, role):
    source = (
        f"{{% for m in messages if m.role != '{role}' %}}{{{{ m.role + ':' + m.content + '</s>' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(TemplateProblem, match=f"the chat template writes nothing of a message of {role}"):
        learnt(tmp_path, source, turns("s:brief", "u:hi", "a:I look", "t:42", "a:hi in brief: 42."))


def test_markers_within_a_turn_do_not_end_it(tmp_path):
    """Where nothing ends it, all of it is learnt."""
    source = (
        "{% for m in messages %}{{ m.role + ':' + ('<|eot_id|>' if m.role == 'assistant' else '') + m.content + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    [(_, said)] = learnt(tmp_path, source, turns("u:hi", "a:ahoy"))
    assert said == ["<|eot_id|>ahoy\n"]


def test_a_call_without_words_is_learnt(tmp_path):
    [(_, said)] = learnt(tmp_path, CALLS, turns("u:hi", "a:", tool_calls=CALL))
    assert said == ['{"name": "f", "arguments": {"a": 1}}<|im_end|>']
