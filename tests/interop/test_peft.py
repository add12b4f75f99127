"""Adapters beside PEFT's: the same numbers, and each reads what the other writes."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import trainfw
from tests.helpers import quicker
from trainfw import UserError, build_program, load_recipe
from trainfw.adapters import AdapterConfig
from trainfw.data import byte_tokenizer
from trainfw.interop import peft_fields, read_model_config, read_peft, save_model, save_peft
from trainfw.models import abstract_model
from trainfw.serving import generate
from trainfw.weights import merge, read_adapter
from trainfw.weights.export import _kept_elsewhere

ROWS, LENGTH = 4, 24
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": {"target_modules": LINEAR},
    "rslora, patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"q_proj": 5},
    },
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama, untied, with grouped heads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    directory = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save(directory)
    return directory


def reference(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)


def written(base, directory, **fields):
    """A PEFT adapter with every weight off its start, and the model that has it."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(reference(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def recipe(base, directory, *overrides):
    file = directory / "recipe.yaml"
    file.write_text(
        f"name: adapter\nmodel: {{from: {base}}}\nadapter: {{rank: 4, alpha: 8.0}}\n"
        f"data: {{source: [{directory}/*.txt], tokenizer: {{name: bytes}}, sequence_length: {LENGTH}, "
        f"validation_fraction: 0.3}}\n"
        f"train: {{steps: 6, global_batch_size: {ROWS}, log_every: 3, validation_batches: 1}}\n"
        "optimizer: {learning_rate: 3.0e-2, clip_norm: null}\n"
    )
    for i in range(12):
        (directory / f"{i}.txt").write_text(f"document {i}: " + " ".join(f"{i * k % 5} + {k}" for k in range(30)))
    return load_recipe(file, overrides)


def batch_of():
    tokens = np.random.default_rng(0).integers(0, 258, (ROWS, LENGTH + 1)).astype(np.int32)
    index = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "positions": index,
        "loss_mask": np.ones((ROWS, LENGTH), np.float32),
    }


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_loss_and_gradients_are_those_of_peft(base, tmp_path, adapter):
    model = written(base, tmp_path / "peft", **ADAPTERS[adapter])
    batch = batch_of()
    logits = model(input_ids=torch.from_numpy(batch["tokens"]).long()).logits
    targets = torch.from_numpy(batch["targets"]).long()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()

    loaded = recipe(base, tmp_path, f"adapter={{from: {tmp_path / 'peft'}}}")
    program = build_program(loaded, jax.devices()[:1])
    state = program.init()
    grads, metrics = program.gradients(state.params, state.frozen, program.shard_batch(batch))
    assert metrics["loss"].value() == pytest.approx(float(loss.detach()), rel=1e-4)

    # Theirs, in the form of a saved adapter, read as one.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    model.save_pretrained(tmp_path / "gradients")
    _, expected = read_peft(tmp_path / "gradients", loaded.model)
    found = {".".join(map(str, path)): grad for path, grad in nnx.to_flat_state(nnx.State(grads))}
    assert set(found) == set(expected)
    for name, grad in found.items():
        difference = np.linalg.norm(np.asarray(grad) - expected[name]) / np.linalg.norm(expected[name])
        assert difference < 1e-4, (name, difference)


def greedy(model, prompt, count):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def ours(model, prompt, count):
    return list(generate(model, prompt, max_tokens=count, temperature=0.0))


PROMPT = [256, *b"document 3: 1 + 2"]


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.long), "dora"])
def test_an_adapter_trained_here_is_the_same_in_peft(base, tmp_path, kind):
    loaded = recipe(base, tmp_path, f"adapter.kind={kind}")
    result = trainfw.train(loaded, run_dir=tmp_path / "run", devices=jax.devices()[:1])
    model, _ = trainfw.load_model(result.run_dir)
    tokens = ours(model, PROMPT, 24)
    assert tokens != ours(trainfw.load_model(base)[0], PROMPT, 24)

    adapter = read_adapter(str(result.run_dir), loaded.model)
    save_peft(tmp_path / "peft", adapter.config, adapter.arrays, loaded.model, str(base))
    theirs = peft.PeftModel.from_pretrained(reference(base), tmp_path / "peft")
    assert greedy(theirs, PROMPT, 24) == tokens
    assert greedy(theirs.merge_and_unload(), PROMPT, 24) == tokens

    merged = merge(str(result.run_dir))
    save_model(
        tmp_path / "merged",
        merged.config,
        lambda name: merged.read(name, jax.ShapeDtypeStruct(shapes(merged.config)[name], jnp.float32)),
    )
    byte_tokenizer().save(tmp_path / "merged")
    assert greedy(reference(tmp_path / "merged"), PROMPT, 24) == tokens
    assert ours(trainfw.load_model(tmp_path / "merged")[0], PROMPT, 24) == tokens


def shapes(config):
    return {
        ".".join(map(str, path)): p.shape for path, p in nnx.to_flat_state(nnx.state(abstract_model(config), nnx.Param))
    }


@pytest.mark.parametrize("adapter", quicker(ADAPTERS, ["rslora, patterns", "embeddings and head"]))
def test_an_adapter_of_peft_is_the_same_here(base, tmp_path, adapter):
    model = written(base, tmp_path / "peft", **ADAPTERS[adapter])
    tokens = greedy(model, PROMPT, 24)
    loaded = recipe(base, tmp_path, f"adapter={{from: {tmp_path / 'peft'}}}", "train.steps=1")
    program = build_program(loaded, jax.devices()[:1])
    state = program.init()
    assert ours(program.model(state.params, state.frozen), PROMPT, 24) == tokens
    merged = merge(str(tmp_path / "peft"), str(base))
    save_model(
        tmp_path / "merged",
        merged.config,
        lambda name: merged.read(name, jax.ShapeDtypeStruct(shapes(merged.config)[name], jnp.float32)),
    )
    assert greedy(reference(tmp_path / "merged"), PROMPT, 24) == tokens


SINGLE_LAYERS = {
    "target_modules": ["q_proj", "v_proj", "o_proj", "embed_tokens"],
    "exclude_modules": ["o_proj"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 7, "^model.layers.(0|2).self_attn.v_proj": 3},
    "alpha_pattern": {"layers.1.self_attn.q_proj": 64, r"layers\.2\..*v_proj": 3, "^q_proj": 50},
}


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}], ids=str)
def test_settings_of_single_layers_count_there(base, tmp_path, kind):
    fields = SINGLE_LAYERS | kind
    if kind.get("use_dora"):  # of linear maps alone
        fields["target_modules"] = fields["target_modules"][:3]
    model = written(base, tmp_path / "peft", init_lora_weights="gaussian", **fields)
    loaded = recipe(base, tmp_path, f"adapter={{from: {tmp_path / 'peft'}}}")
    program = build_program(loaded, jax.devices()[:1])
    state = program.init()
    tokens = batch_of()["tokens"]
    expected = model(input_ids=torch.from_numpy(tokens).long()).logits.detach().numpy()
    adapted = nnx.jit(lambda model, tokens_BS: model(tokens_BS))(program.model(state.params, state.frozen), tokens)
    assert np.abs(adapted - expected).max() < 1e-4 * np.abs(expected).max()


def test_an_adapter_goes_on_at_its_own_scale(base, tmp_path):
    written(base, tmp_path / "peft", target_modules=["q_proj"])
    build_program(recipe(base, tmp_path, f"adapter={{from: {tmp_path / 'peft'}}}"), jax.devices()[:1]).init()
    fields = f"{{from: {tmp_path / 'peft'}, rank: 4, alpha: 9, targets: [layers.attention.query]}}"
    with pytest.raises(UserError, match=r"query: A B is scaled by 2 there, as of kind lora.* by 2.25 in this recipe"):
        build_program(recipe(base, tmp_path, f"adapter={fields}"), jax.devices()[:1]).init()


@pytest.mark.parametrize("layer", [".base_layer", ""])
def test_a_table_saved_beside_an_adapter_is_that_of_the_base(base, tmp_path, layer):
    fields = ADAPTERS["embeddings and head"] if layer else {"target_modules": ["q_proj"]}
    written(base, tmp_path / "peft", **fields)
    file, tables = tmp_path / "peft" / "adapter_model.safetensors", load_file(base / "model.safetensors")
    tensors = load_file(file)
    for module in ("model.embed_tokens", "lm_head"):  # as by save_pretrained(..., save_embedding_layers=True)
        tensors[f"base_model.model.{module}{layer}.weight"] = tables[f"{module}.weight"].copy()
    save_file(tensors, file)
    merge(str(tmp_path / "peft"), str(base))
    peft_fields(tmp_path / "peft")
    for module, ours in (("model.embed_tokens", "embedding.table"), ("lm_head", "head.kernel")):
        name = f"base_model.model.{module}{layer}.weight"
        own = tensors[name].copy()
        tensors[name][[77, 257], 3] += 1
        save_file(tensors, file)
        with pytest.raises(UserError, match=rf"holds the {ours} of its base, which differs .* in 2 of 258 rows"):
            merge(str(tmp_path / "peft"), str(base))
        tensors[name] = own
    save_file(tensors | {name: np.zeros((260, 32), np.float32)}, file)
    with pytest.raises(UserError, match=r"the adapter is of a resized model\. .*resize_token_embeddings\(260\)"):
        merge(str(tmp_path / "peft"), str(base))


@pytest.mark.parametrize(("kept", "said"), [("nf4", "load_in_4bit=True"), ("int8", "load_in_8bit"), ("float32", None)])
def test_an_export_says_how_its_base_was_kept(base, tmp_path, kept, said):
    note = _kept_elsewhere("runs/mine", recipe(base, tmp_path, f"adapter.base={kept}").adapter)
    assert (f"trained on the base in {kept}" in note and said in note) if said else note == ""


def test_files_are_for_whom_the_umask_says(base, tmp_path):
    written(base, tmp_path / "peft", target_modules=["q_proj"])
    model = read_model_config(base)
    save_peft(tmp_path / "again", *read_peft(tmp_path / "peft", model), model, "base")
    merged = merge(str(tmp_path / "peft"), str(base))
    held = {
        name: np.asarray(merged.read(name, jax.ShapeDtypeStruct(s, jnp.float32))) for name, s in shapes(model).items()
    }
    save_model(tmp_path / "merged", merged.config, held.__getitem__, companions=byte_tokenizer().save)
    (tmp_path / "plain").write_text("")
    modes = {
        file.name: oct(file.stat().st_mode) for file in tmp_path.rglob("*") if file.parent.name in ("again", "merged")
    }
    assert set(modes.values()) == {oct((tmp_path / "plain").stat().st_mode)}, modes


def tensors_of(directory):
    tensors = load_file(directory / "adapter_model.safetensors")
    return {name: value for name, value in tensors.items() if not name.endswith("base_layer.weight")}


def test_what_is_read_is_written_again(base, tmp_path):
    for name, fields in ADAPTERS.items():
        written(base, tmp_path / name, **fields)
        model = read_model_config(base)
        config, arrays = read_peft(tmp_path / name, model)
        save_peft(tmp_path / f"{name} again", config, arrays, model, "base")
        before, after = (tensors_of(d) for d in (tmp_path / name, tmp_path / f"{name} again"))
        assert set(before) == set(after)
        for key in before:
            np.testing.assert_array_equal(before[key], after[key])
        again, _ = read_peft(tmp_path / f"{name} again", model)
        assert again == config
        assert set(AdapterConfig(**peft_fields(tmp_path / name)).targets) == set(config.targets)
        peft.PeftModel.from_pretrained(reference(base), tmp_path / f"{name} again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3': expected LORA"),
        ({"r": "four"}, "r = 'four': expected a whole number above 0"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not supported"),
        ({"r": 5}, "has rank 4, but adapter_config.json says 5"),
        ({"layers_to_transform": [0]}, "layers_to_transform = [0] is not supported"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying = True is not supported"),
        ({"a key of the future": {"on": 1}}, "a key of the future = {'on': 1} is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': not one that leaves the base's weights as they are"),
        ({"init_lora_weights": "loftq", "loftq_config": None}, "init_lora_weights = 'loftq'"),
        ({"lora_dropout": "much"}, "lora_dropout = 'much': expected a number from 0"),
        ({"use_dora": "no"}, "use_dora = 'no': expected true or false"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern.q_proj = 0: expected a number above 0"),
        ({"rank_pattern": {"layers.2.self_attn.q_proj": 5}}, "layers.2.self_attn.q_proj has rank 4, but"),
        (
            {"target_modules": ["v_proj"]},
            "q_proj.lora_A.weight is of a module that adapter_config.json does not target",
        ),
        ({"target_modules": None}, "target_modules = None: expected a list of names"),
        (b"{", "JSON"),
    ],
)
def test_damaged_adapters_are_refused(base, tmp_path, change, message):
    written(base, tmp_path / "peft", target_modules=["q_proj"])
    file = tmp_path / "peft" / "adapter_config.json"
    if isinstance(change, bytes):
        file.write_bytes(change)
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for read in (lambda path: read_peft(path, read_model_config(base)), peft_fields):
        with pytest.raises(UserError) as error:
            read(tmp_path / "peft")
        assert message in str(error.value)


def test_dora_of_an_embedding_is_refused(base, tmp_path):
    written(base, tmp_path / "peft", target_modules=["q_proj", "embed_tokens"], use_dora=True)
    for read in (lambda path: read_peft(path, read_model_config(base)), peft_fields):
        with pytest.raises(UserError, match=r"use_dora = true is not supported for model.embed_tokens, an embedding"):
            read(tmp_path / "peft")


def test_keys_of_the_future_that_are_off_are_read_over(base, tmp_path):
    written(base, tmp_path / "peft", target_modules=["q_proj"])
    file = tmp_path / "peft" / "adapter_config.json"
    before = read_peft(tmp_path / "peft", read_model_config(base))[0]
    off = {"use_a": False, "b_config": None, "c_pattern": {}, "d_layers": [], "revision": "main"}
    file.write_text(json.dumps(json.loads(file.read_text()) | off))
    assert read_peft(tmp_path / "peft", read_model_config(base))[0] == before


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "layer", "truncated"])
def test_tensors_that_do_not_fit_are_refused(base, tmp_path, damage):
    written(base, tmp_path / "peft", target_modules=["q_proj"])
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors[name.replace("q_proj", "w_proj")] = tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:-1]
    elif damage == "layer":
        tensors = {key: value for key, value in tensors.items() if ".1." not in key}
    save_file(tensors, file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError) as error:
        read_peft(tmp_path / "peft", read_model_config(base))
    assert "adapter_model.safetensors" in str(error.value)
