"""What `save_gguf` writes runs in llama.cpp, and gives there what it gives in Transformers."""

import json

import numpy as np
import pytest
import torch
import transformers

from tests.gguf_files import byte_level, sentencepiece, smollm2_file
from tests.gguf_models import MODELS, Arrays, reference, tensors_of
from tests.helpers import quicker
from tests.llama import Llama
from trainfw.data import load_tokenizer
from trainfw.interop import GGUFTensors, gguf_config, save_gguf, window_note
from trainfw.models import ModelConfig

TOKENS = [5, 300, 17, 42, 99, 4, 250, 251, 8, 8, 130, 77, 64, 31, 200, 12, 6, 90]


def theirs(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def greedy(model, tokens, count) -> tuple[list[int], np.ndarray]:
    """Tokens that llama.cpp chooses, each the likeliest, and the logits that it chose by."""
    rows = [model.logits(tokens)[-1]]
    while len(rows) < count:
        rows.append(model.logits([int(rows[-1].argmax())])[-1])
    return [int(row.argmax()) for row in rows], np.stack(rows)


def assert_greedy_tokens_agree(model, llama, prompt, count):
    """The same `count` tokens (eos like any other), and none of them a near tie, in which rounding would choose."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),  # else the padding token's places are hidden
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = torch.cat(output.logits).numpy()
    chosen, found = greedy(llama, prompt, count)
    assert chosen == output.sequences[0, len(prompt) :].tolist()
    # At every place: how far the choice is ahead, and how far off the logits of the tokens that contend are.
    best = np.argsort(expected, axis=-1)[:, :-9:-1]
    ahead = -np.diff(np.take_along_axis(expected, best, -1)[:, :2])[:, 0]
    error = np.abs(np.take_along_axis(found - expected, best, -1)).max(-1)
    assert (ahead > 2 * error).all(), np.stack([ahead, error])[:, ahead <= 2 * error]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("tokenizer"), size=320)


@pytest.mark.parametrize(
    "name", quicker(MODELS, ["llama, llama3 scaling", "mistral, sliding", "olmoe", "gemma3, linear scaling"])
)
def test_logits_of_every_family(name, tmp_path, tokenizer_dir):
    family, changes = MODELS[name]
    model = reference(family, changes)
    file = tmp_path / "model.gguf"
    save_gguf(
        file, json.loads(model.config.to_json_string()), Arrays(tensors_of(model)), tokenizer_dir, quantization="F32"
    )
    expected = theirs(model, TOKENS)
    with Llama(file) as llama:
        difference = np.abs(llama.logits(TOKENS) - expected).max()
        assert difference < 1e-3 * np.abs(expected).max(), difference


@pytest.mark.parametrize(("kind", "seed"), [("byte-level", 10), ("sentencepiece", 5)])  # seeds without near ties
def test_greedy_tokens_of_a_tiny_llama(kind, seed, tmp_path, tokenizer_dir):
    directory = tokenizer_dir if kind == "byte-level" else sentencepiece(tmp_path / "tokenizer", prefix=True, size=400)
    tokenizer = load_tokenizer(directory)
    changes = {"vocab_size": 512, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    model = reference("Llama", changes, seed)
    file = tmp_path / "model.gguf"
    save_gguf(file, json.loads(model.config.to_json_string()), Arrays(tensors_of(model)), directory)
    with Llama(file) as llama:
        prompt = llama.tokenize("def merge(left, right):\n    return 42")
        assert prompt == tokenizer.encode("def merge(left, right):\n    return 42")
        assert (llama.bos, llama.eos) == (tokenizer.bos_id, tokenizer.eos_id)
        assert_greedy_tokens_agree(model, llama, prompt, 48)


@pytest.mark.long  # test_smollm2.py has a merged adapter of it there
def test_greedy_tokens_of_smollm2(tmp_path):
    source = smollm2_file()
    tokenizer = load_tokenizer(source)
    tokenizer.save(tmp_path / "tokenizer")
    file = tmp_path / "model.gguf"
    save_gguf(file, gguf_config(source), GGUFTensors(source), tmp_path / "tokenizer")
    # Both have the weights as F16 has them.
    config = transformers.AutoConfig.for_model(**gguf_config(file))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    written = GGUFTensors(file)
    state = {name: torch.from_numpy(written.read(name).astype(np.float32)) for name in written.infos}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    model.float().eval()
    text = "<|im_start|>user\nExplain what a list is in Python.<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.backend.encode_special_tokens = False
    prompt = tokenizer.encode(text)
    with Llama(file) as llama:
        assert llama.tokenize(text, special=True) == prompt
        assert_greedy_tokens_agree(model, llama, prompt, 64)
        template = llama.metadata("tokenizer.chat_template")
    assert template == tokenizer.settings["chat_template"]


def test_a_window_that_llama_cpp_does_not_have_is_said():
    config = ModelConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=1, num_kv_heads=1, sliding_window=16
    )
    assert not window_note(config), "no layer has it"
    slides = config.model_copy(update={"layer_pattern": ["sliding"]})
    assert "the model to the last 16" in window_note(slides)
    assert not window_note(slides.model_copy(update={"max_position": 16}))
