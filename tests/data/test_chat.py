"""Chat templates, against Transformers'."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainfw.data import ChatTemplate, Tokenizer, chat_prompt, load_tokenizer, stop_ids
from trainfw.data.tokenizer import _byte_names
from trainfw.data.turns import TemplateProblem
from trainfw.errors import UserError

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}\n"
    "{%- for message in messages %}{%- set role = message.role %}\n"
    "{{- '<|im_start|>' + role + '\\n' }}{%- if role == 'assistant' %}{% generation %}"
    "{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- message.content + '<|im_end|>\\n' }}{%- endif %}\n{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
TEMPLATES = {"smollm2": SMOLLM2, "llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL, "gemma": GEMMA}
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]
CHAT = [
    {"role": "user", "content": " Wie geht's? \n"},
    {"role": "assistant", "content": "Gut — 好的 🎉, and you?"},
    {"role": "user", "content": "user assistant\nsystem"},
    {"role": "assistant", "content": "  assistant  "},
]


def make_tokenizer(directory: Path, template: str | None) -> Tokenizer:
    """A byte-level BPE with merges across spaces and letters, whose post-processor trims the places of tokens."""
    names = _byte_names()
    merges = [("Ġ", "a"), ("s", "s"), ("i", "s"), ("Ċ", "Ċ"), ("u", "s"), ("us", "e"), ("use", "r"), ("Ġ", "G")]
    vocab = {name: i for i, name in enumerate([*names, *("".join(pair) for pair in merges)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.add_special_tokens(SPECIAL)
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory)


@pytest.fixture(params=TEMPLATES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ChatTemplate, PreTrainedTokenizerFast]:
    template = ChatTemplate.of(make_tokenizer(tmp_path / "t", TEMPLATES[request.param]))
    assert template is not None
    return template, PreTrainedTokenizerFast.from_pretrained(tmp_path / "t")


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_text_and_tokens_are_those_of_transformers(pair, turns):
    template, reference = pair
    for prompt in (False, True):
        text = template.render(CHAT[:turns], add_generation_prompt=prompt)
        options = {"tokenize": False, "add_generation_prompt": prompt}
        assert text == reference.apply_chat_template(CHAT[:turns], **options)
        ids = reference.apply_chat_template(CHAT[:turns], add_generation_prompt=prompt, return_dict=False)
        assert template.encode([text])[0].ids == ids


def test_tools_and_namespaces(tmp_path):
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if loop.last %}{% break %}"
        "{% endif %}{% endfor %}{{ ns.n }}{{ tools | tojson(indent=1) }}{{ eos_token }}{{ strftime_now('x') }}"
    )
    template = ChatTemplate.of(make_tokenizer(tmp_path / "t", source))
    tools = [{"name": "é<"}]
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path / "t")
    expected = reference.apply_chat_template(CHAT, tools=tools, tokenize=False)
    assert template.render(CHAT, tools=tools) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ dict.__init__.__globals__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{{ lipsum() }}",
    ],
)
def test_a_template_is_kept_from_python(tmp_path, source):
    with pytest.raises(TemplateProblem, match="the chat template refuses it"):
        ChatTemplate.of(make_tokenizer(tmp_path / "t", source)).render(CHAT)


def test_a_template_that_is_none(tmp_path):
    for source in ("{% for", "{{ messages | random }}"):
        with pytest.raises(UserError, match="chat template cannot be read"):
            ChatTemplate.of(make_tokenizer(tmp_path / "t", source))
    assert ChatTemplate.of(make_tokenizer(tmp_path / "t", None)) is None
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    tokenizer = make_tokenizer(tmp_path / "t", None)
    tokenizer.settings["chat_template"] = several
    assert ChatTemplate.of(tokenizer).source == "y"


@pytest.mark.parametrize(
    ("name", "ends"),
    [("smollm2", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>"), ("gemma", "<end_of_turn>")],
)
def test_generation_stops_at_what_ends_a_turn(tmp_path, name, ends):
    """The template's end of a turn, the end of a document, and what generation_config.json lists."""
    tokenizer = make_tokenizer(tmp_path / "t", TEMPLATES[name])
    id_of = tokenizer.backend.token_to_id
    assert set(stop_ids(tokenizer)) == {id_of("</s>"), id_of(ends)}
    (tmp_path / "t" / "config.json").write_text('{"eos_token_id": 7}')
    assert 7 in stop_ids(load_tokenizer(tmp_path / "t"))
    (tmp_path / "t" / "generation_config.json").write_text('{"eos_token_id": [3, 5, 100000, -1]}')
    tokenizer = load_tokenizer(tmp_path / "t")
    assert set(stop_ids(tokenizer)) == {3, 5, id_of("</s>"), id_of(ends)}
    tokenizer.save(tmp_path / "copy")
    assert stop_ids(load_tokenizer(tmp_path / "copy")) == stop_ids(tokenizer)
    (tmp_path / "t" / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(UserError, match=r"eos_token_id = \['</s>'\]: expected an id, or a list of them"):
        load_tokenizer(tmp_path / "t")


def test_markers_that_were_not_added_as_special(tmp_path):
    """They stand around turns all the same; what a message may hold (`<think>`) is none."""
    tokenizer = make_tokenizer(tmp_path / "t", SMOLLM2.replace("<|im_", "<turn_").replace("|>", ">"))
    tokenizer.backend.add_tokens(["<turn_start>", "<turn_end>", "<think>"])
    template = ChatTemplate.of(tokenizer)
    assert {"<turn_start>", "<turn_end>"} <= set(template.markers)
    assert "<think>" not in template.markers
    assert stop_ids(tokenizer)[1:] == (tokenizer.backend.token_to_id("<turn_end>"),)


def test_a_system_prompt_that_the_template_has_no_place_for(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", "{{ messages[-1].content }}")
    assert chat_prompt(tokenizer, "hi") == tokenizer.encode("hi")
    with pytest.raises(UserError, match="the chat template writes nothing of a message of system"):
        chat_prompt(tokenizer, "hi", "Be kind.")
