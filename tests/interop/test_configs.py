"""config.json and `ModelConfig`, both ways."""

from __future__ import annotations

import copy
import dataclasses
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfw.errors import UserError
from trainfw.interop import config_from_huggingface, config_to_huggingface
from trainfw.interop.configs import unread_keys
from trainfw.interop.families import DEFAULTS, FAMILIES, FAMILY_KEYS
from trainfw.models import ModelConfig
from trainfw.models.family import load_presets

# As on the Hub today, keys that do not matter here left out: the form of Transformers 4.
HUB = {
    "llama3.2-1b": {
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma3-1b": {
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "initializer_range": 0.02,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "vocab_size": 50304,
    },
}


@pytest.mark.parametrize("preset", HUB)
def test_configs_of_the_hub_are_our_presets(preset):
    config = config_from_huggingface(HUB[preset])
    ours = ModelConfig(preset=preset)
    if ours.moe is not None:
        ours = ModelConfig(preset=preset, moe={"dispatch": "dropless"})  # as Transformers computes it
    assert config == ours.model_copy(update={"preset": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "LLaMA"}, "'LLaMA' is not supported; did you mean 'llama'"),
        # Of another design, each: no near name may be offered.
        ({"model_type": "ministral"}, "'ministral' is not supported; one of: llama, mistral, qwen2"),
        ({"model_type": "olmo2"}, "'olmo2' is not supported; one of: "),
        ({"hidden_size": None}, "no hidden_size"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
    ],
)
def test_what_the_model_lacks_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config_from_huggingface(HUB["llama3.2-1b"] | changes)


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
        ("qwen3-30b-a3b", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported"),
        ("olmoe-1b-7b", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
    ],
)
def test_mixtures_that_the_model_lacks_are_refused(preset, changes, message):
    with pytest.raises(UserError, match=message):
        config_from_huggingface(HUB[preset] | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "big"}, "hidden_size = 'big': expected a whole number of 1 or more"),
        ({"hidden_size": 2048.0}, "hidden_size = 2048.0: expected a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True: expected a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: expected 10,000 at most"),
        ({"vocab_size": -1}, "vocab_size = -1: expected a whole number of 1 or more"),
        ({"vocab_size": 2**40}, "vocab_size = 1099511627776: expected a whole number of 1 or more"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: expected a number from"),
        ({"rope_theta": float("inf")}, "rope_theta = inf: expected a number from"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1: expected true or false"),
        ({"rope_scaling": "llama3"}, "rope_scaling = 'llama3': expected an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling: factor = '2': expected a number"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of type 'linear' has no factor"),
        ({"num_attention_heads": 30}, "num_heads = 30 does not divide by num_kv_heads = 8"),
        ({"model_type": "gemma3"}, "Gemma3ForCausalLM.from_pretrained"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq' are not supported"),
        ({"model_type": 7}, "model_type = 7: expected text"),
    ],
)
def test_values_that_make_no_sense_are_named(changes, message):
    with pytest.raises(UserError) as error:
        config_from_huggingface(HUB["llama3.2-1b"] | changes)
    assert message in str(error.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        (
            "mistral-7b",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": YARN},
            "rope_parameters.rope_type = 'default', but rope_scaling.rope_type = 'yarn'",
        ),
        (
            "mistral-7b",
            {"rope_parameters": {"rope_theta": 5e5}},
            "rope_theta = 10000.0, but rope_parameters.rope_theta",
        ),
        ("mistral-7b", {"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2.0}}, "rope_scaling.type"),
        (
            "llama3.2-1b",
            {"original_max_position_embeddings": 4096},
            "original_max_position_embeddings = 4096, but rope",
        ),
        (
            "mistral-7b",
            {"rope_scaling": {"rope_type": "linear", "factor": 2, "mscale": 1}},
            "rope_scaling.mscale = 1 is",
        ),
        (
            "mistral-7b",
            {"partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "default", "partial_rotary_factor": 1.0}},
            "partial_rotary_factor = 0.5, but rope_scaling.partial_rotary_factor = 1.0",
        ),
        (
            "gemma3-1b",
            {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}, "full_attention": {}}},
            "rope_local_base_freq = 10000, but rope_parameters.sliding_attention.rope_theta = 5.0",
        ),
        (
            "gemma3-1b",
            {"rope_parameters": {"rope_theta": 777.0}},
            "expected full_attention and sliding_attention",
        ),
        (
            "llama3.2-1b",
            {"rope_parameters": {"full_attention": {"rope_theta": 9.0}}},
            "expected one for all layers",
        ),
        ("gemma3-1b", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping = 5.0 of a gemma3_text"),
        ("gemma3-1b", {"hidden_act": "silu"}, "hidden_activation = 'gelu_pytorch_tanh', but hidden_act = 'silu'"),
        ("olmoe-1b-7b", {"num_local_experts": 8}, "num_experts = 64, but num_local_experts = 8"),
        (
            "qwen2.5-0.5b",
            {"layer_types": ["full_attention"] * 23 + ["sliding_attention"]},
            "1 sliding layers of 24, but qwen2 with sliding_window = 32768, use_sliding_window = False has 0",
        ),
        (
            "mistral-7b",
            {"layer_types": ["full_attention"] * 32},
            "0 sliding layers of 32, but mistral with sliding_window = 4096 has 32",
        ),
        ("llama3.2-1b", {"layer_types": ["sliding_attention"] * 16}, "llama with no sliding_window has 0"),
    ],
)
def test_keys_that_disagree_are_both_named(preset, changes, message):
    with pytest.raises(UserError) as error:
        config_from_huggingface(HUB[preset] | changes)
    assert message in str(error.value)


ROPE = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear"]),
        "type": st.sampled_from(["default", "linear"]),
        "rope_theta": st.sampled_from([1e4, 5e5]),
        "factor": st.sampled_from([2.0, 4.0]),
    },
)


@settings(max_examples=80, deadline=None)
@given(
    keys=st.fixed_dictionaries({"rope_parameters": ROPE, "rope_scaling": ROPE}, optional={"rope_theta": st.just(5e5)})
)
def test_rope_is_that_of_transformers_or_refused(keys):
    hub = {key: value for key, value in HUB["mistral-7b"].items() if "rope" not in key} | {"sliding_window": None}
    try:
        config = config_from_huggingface(hub | copy.deepcopy(keys))
    except UserError:
        return
    theirs = transformers.MistralConfig(**{key: value for key, value in hub.items() if key != "model_type"}, **keys)
    rope = theirs.rope_parameters
    assert config.rope_theta == rope["rope_theta"]
    assert (config.rope_scaling.kind if config.rope_scaling else "default") == rope["rope_type"]
    assert config.rope_scaling is None or config.rope_scaling.factor == rope["factor"]


CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "olmoe": "Olmoe",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
}


@pytest.mark.parametrize("family", CLASSES)
def test_what_transformers_reads_is_read_refused_or_computes_nothing(family):
    fields = {field.name for field in dataclasses.fields(getattr(transformers, f"{CLASSES[family]}Config"))}
    unread = unread_keys({**dict.fromkeys(fields, "set"), "model_type": family})
    assert set(unread) <= {"attention_dropout", "router_jitter_noise"}


OTHERS = {
    "attention_bias": True,
    "mlp_bias": True,
    "use_bidirectional_attention": True,
    "clip_qkv": 8.0,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 2,
    "norm_topk_prob": True,
    "use_sliding_window": True,
    "rope_local_base_freq": 77.0,
    "query_pre_attn_scalar": 999,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 5.0,
}
# What is no field of Transformers' class, and yet read by it, or in the files of every such model.
BESIDE_FIELDS = {"gemma3_text": {"sliding_window_pattern", "rope_local_base_freq"}, "qwen3_moe": {"max_window_layers"}}


@pytest.mark.parametrize("family", CLASSES)
def test_keys_of_other_families_are_as_absent_and_said(family):
    theirs = getattr(transformers, f"{CLASSES[family]}Config")
    fields = {field.name for field in dataclasses.fields(theirs)} | BESIDE_FIELDS.get(family, set())
    fields |= {name for pair in theirs.attribute_map.items() for name in pair}
    hub = {"model_type": family} | SHAPE
    for key in FAMILY_KEYS:
        assert (key in FAMILIES[family].reads) == (key in fields), key
        if key not in fields:
            odd = hub | {key: OTHERS.get(key, 3)}
            assert config_from_huggingface(odd) == config_from_huggingface(hub), key
            assert unread_keys(odd) == [key]


@pytest.mark.parametrize("family", CLASSES)
def test_a_null_that_transformers_refuses_is_refused(family):
    theirs = getattr(transformers, f"{CLASSES[family]}Config")
    for key in {**DEFAULTS, **FAMILIES[family].defaults}:
        config = {"model_type": family} | SHAPE | {key: None}
        try:
            theirs(**config)
        except (StrictDataclassError, TypeError):
            with pytest.raises(UserError, match=f"{key} = null: expected "):
                config_from_huggingface(config)


SHAPE = {
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 99,
}


WINDOWS = {
    "sliding_window": st.none() | st.just(8),
    "use_sliding_window": st.booleans(),
    "max_window_layers": st.integers(0, 3),
    "layer_types": st.none()
    | st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=3, max_size=3),
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_windows_are_those_of_transformers_or_refused(family, data):
    keys = data.draw(st.fixed_dictionaries({}, optional=WINDOWS))
    shape = SHAPE | {"hidden_act" if family != "gemma2" else "hidden_activation": "silu"}
    try:
        config = config_from_huggingface({"model_type": family} | shape | keys)
        theirs = getattr(transformers, f"{CLASSES[family]}Config")(**shape, **keys)
    except (UserError, StrictDataclassError):
        return
    window = getattr(theirs, "sliding_window", None) if family != "llama" else None
    if family in ("qwen2", "qwen3", "gemma2"):
        if window is None:  # its layers would fail where they slide
            return
        kinds = [{"full_attention": "global", "sliding_attention": "sliding"}[name] for name in theirs.layer_types]
    else:
        kinds = ["global" if window is None else "sliding"] * 3
    assert list(config.layer_kinds) == kinds
    assert "sliding" not in kinds or config.sliding_window == window


def test_layer_types_are_one_a_layer():
    with pytest.raises(UserError, match="layer_types has 1 entries for 26 layers"):
        config_from_huggingface(HUB["gemma3-1b"] | {"layer_types": ["full_attention"]})


def as_computed(config: ModelConfig) -> ModelConfig:
    """As config.json says it: without the preset's name, the experts dispatched as Transformers does."""
    moe = None if config.moe is None else config.moe.model_copy(update={"dispatch": "dropless"})
    return config.model_copy(update={"preset": None, "moe": moe})


@pytest.mark.parametrize("preset", load_presets("trainfw.models.decoder"))
def test_every_preset_is_said_by_a_family(preset):
    config = ModelConfig(preset=preset)
    written = config_to_huggingface(config, extra={"eos_token_id": 3})
    assert config_from_huggingface(written) == as_computed(config)
    assert written["eos_token_id"] == 3
    if preset in HUB:
        assert written["model_type"] == HUB[preset]["model_type"]


@pytest.mark.parametrize("preset", HUB)
def test_a_config_that_still_holds_is_kept_as_it_is(preset):
    original = HUB[preset] | {"eos_token_id": [1, 2], "of our own": {"kept": True}}
    assert config_to_huggingface(config_from_huggingface(original), extra=original) == original


def test_a_changed_config_keeps_what_does_not_describe_the_model():
    original = HUB["gemma3-1b"] | {"eos_token_id": [1, 106], "cache_implementation": "hybrid"}
    config = config_from_huggingface(original).model_copy(update={"vocab_size": 262_208})
    written = config_to_huggingface(config, extra=original)
    assert config_from_huggingface(written) == config
    assert (written["vocab_size"], written["model_type"]) == (262_208, "gemma3_text")
    assert (written["eos_token_id"], written["cache_implementation"]) == ([1, 106], "hybrid")


GEMMA = {"zero_centered_norm": True, "post_norms": True, "scale_embeddings": True}
# What models of each family have, and which of their layers may slide.
FEATURES = {
    "llama": ({}, "none"),
    "mistral": ({}, "all"),
    "qwen2": ({"qkv_bias": True}, "any"),
    "qwen3": ({"qk_norm": True}, "any"),
    "mixtral": ({"moe": {"normalize_weights": True}}, "all"),
    "qwen3_moe": ({"qk_norm": True, "moe": {}}, "all"),
    "olmoe": ({"qk_norm": "all_heads", "moe": {}}, "none"),
    "gemma2": ({**GEMMA, "attention_softcap": 30.0, "final_softcap": None}, "any"),
    "gemma3_text": ({**GEMMA, "qk_norm": True}, "any"),
}


@pytest.mark.parametrize("family", FEATURES)
@settings(max_examples=30)
@given(data=st.data())
def test_what_is_written_reads_back(family, data):
    fields, sliding = FEATURES[family]
    kv_heads, group, layers = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9)))
    kind = st.sampled_from({"none": ["global"], "all": ["global", "sliding"], "any": ["global", "sliding"]}[sliding])
    kinds = [data.draw(kind)] if sliding != "any" else data.draw(st.lists(kind, min_size=1, max_size=layers))
    slides = "sliding" in kinds
    if "moe" in fields:
        experts = data.draw(st.integers(1, 9))
        moe = {"num_experts": experts, "experts_per_token": data.draw(st.integers(1, experts)), "dispatch": "dropless"}
        fields = fields | {"moe": {"normalize_weights": data.draw(st.booleans())} | fields["moe"] | moe}
    if "gemma" in family:
        fields = fields | {"query_scale": data.draw(st.integers(1, 999)) ** -0.5}
    if family == "gemma3_text" and slides:
        fields = fields | {"rope_local_theta": data.draw(st.floats(10, 1e7))}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 64}
    config = ModelConfig(
        vocab_size=data.draw(st.integers(1, 999)),
        hidden_size=data.draw(st.integers(1, 999)),
        intermediate_size=data.draw(st.integers(1, 999)),
        num_layers=layers,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=2 * data.draw(st.integers(1, 128)),
        tie_embeddings=data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(["silu", "gelu_tanh"])),
        norm_eps=data.draw(st.floats(1e-9, 1e-2)),
        rope_theta=data.draw(st.floats(10, 1e7)),
        rope_scaling=data.draw(
            st.sampled_from(
                [None, {"kind": "linear", "factor": 2.5}, {"kind": "llama3", "factor": 2.5, **llama3}],
            )
        ),
        max_position=data.draw(st.integers(1, 2**20)),
        sliding_window=data.draw(st.integers(1, 999)) if slides else None,
        layer_pattern=tuple(kinds),
        init_std=data.draw(st.floats(1e-3, 1)),
        **fields,
    )
    found = config_from_huggingface(config_to_huggingface(config))
    assert found.layer_kinds == config.layer_kinds
    same = {"layer_pattern": ()}
    assert found.model_copy(update=same) == config.model_copy(update=same)


@pytest.mark.parametrize(
    ("preset", "fields", "message"),
    [
        ("olmoe-1b-7b", {"moe": {"shared_intermediate_size": 8}}, "moe.shared_intermediate_size: None for 8"),
        (
            "llama3.2-1b",
            {"qkv_bias": True, "qk_norm": True},
            "the nearest, qwen2, would differ in qk_norm: False for True",
        ),
        ("llama3.2-1b", {"attention_softcap": 5.0}, "nearest, llama, would differ in attention_softcap: None for 5"),
        ("gemma2-2b", {"query_scale": 0.3}, "the nearest, gemma2, would differ in query_scale"),
    ],
)
def test_what_no_family_can_say_is_refused(preset, fields, message):
    with pytest.raises(UserError, match="no Hugging Face family has a model like this") as error:
        config_to_huggingface(ModelConfig(preset=preset, **fields))
    assert message in str(error.value)
