import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

from trainfw.models import ModelConfig, RopeScaling
from trainfw.models.family import load_presets

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
}


@pytest.mark.parametrize("name", load_presets("trainfw.models.decoder"))
def test_a_preset_survives_dump_and_load(name):
    config = ModelConfig(preset=name)
    assert ModelConfig.model_validate(config.model_dump()) == config
    assert ModelConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    assert hash(ModelConfig(preset=name)) == hash(config)


def test_an_overridden_preset_survives_dump_and_load():
    config = ModelConfig(preset="llama3.2-1b", num_layers=4, rope_scaling=None)
    assert (config.num_layers, config.rope_scaling, config.hidden_size) == (4, None, 2048)
    assert ModelConfig.model_validate(config.model_dump()) == config


def test_what_a_preset_says_of_experts_is_overridden_one_by_one():
    config = ModelConfig(preset="olmoe-1b-7b", moe={"dispatch": "dropless"})
    assert config.moe == ModelConfig(preset="olmoe-1b-7b").moe.model_copy(update={"dispatch": "dropless"})
    assert ModelConfig(preset="olmoe-1b-7b", moe=None).moe is None


def test_head_dim_follows_from_the_heads():
    assert ModelConfig(**SMALL).head_dim == 4
    assert ModelConfig(**SMALL, head_dim=6).head_dim == 6


def test_layer_kinds_repeat_the_pattern():
    config = ModelConfig(preset="gemma3-1b", num_layers=8)
    assert config.layer_kinds == ("sliding",) * 5 + ("global",) + ("sliding",) * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "lama2-7b"}, "unknown preset 'lama2-7b'; did you mean 'llama2-7b'?"),
        ({"vocab_size": 0}, "greater than 0"),
        ({"vocab_size": "32"}, "valid integer"),
        ({"hiden_size": 3}, "Extra inputs"),
        ({"num_kv_heads": 3}, "num_heads = 4 does not divide by num_kv_heads = 3"),
        ({"head_dim": 5}, "head_dim = 5 is odd"),
        ({"hidden_size": 18}, "hidden_size = 18 does not divide by num_heads = 4: give head_dim"),
        ({"layer_pattern": ["sliding"]}, "give sliding_window"),
        ({"layer_pattern": ["local"]}, "'global' or 'sliding'"),
        ({"layer_pattern": []}, "at least 1 item"),
        ({"rope_local_theta": 1e4}, "rope_local_theta applies to sliding layers"),
        ({"qk_norm": "all"}, "'all_heads'"),
        ({"moe": {"num_experts": 2, "experts_per_token": 3}}, "experts_per_token = 3 is more than num_experts = 2"),
        ({"moe": {"num_experts": 2}}, "Field required"),
        ({"moe": {"num_experts": 2, "experts_per_token": 1, "dispatch": "drop"}}, "'capacity' or 'dropless'"),
        ({"moe": {"num_experts": 2, "experts_per_token": 1, "capacity_factor": 0.0}}, "greater than 0"),
        ({"rope_scaling": {"kind": "llama3", "factor": 8.0}}, "low_freq_factor is required by kind: llama3"),
        (
            {"rope_scaling": {"kind": "linear", "factor": 8.0, "low_freq_factor": 1.0}},
            "low_freq_factor does not apply to kind: linear",
        ),
    ],
)
def test_errors_say_what_is_wrong(changes, message):
    with pytest.raises(ValidationError) as caught:
        ModelConfig(**SMALL | changes)
    assert message in str(caught.value)


def test_without_a_preset_the_shape_is_required():
    with pytest.raises(ValidationError) as caught:
        ModelConfig(vocab_size=32, num_heads=4)
    missing = {error["loc"][0] for error in caught.value.errors() if error["type"] == "missing"}
    assert missing == {"hidden_size", "intermediate_size", "num_layers", "num_kv_heads", "head_dim"}


def test_llama3_scaling_needs_its_factors_in_order():
    with pytest.raises(ValidationError, match="low_freq_factor = 4 must be less than high_freq_factor = 1"):
        RopeScaling(kind="llama3", factor=8, low_freq_factor=4, high_freq_factor=1, original_max_position=64)


def test_reading_a_config_does_not_import_jax():
    code = (
        "import sys, trainfw.models; trainfw.models.ModelConfig(preset='tiny'); "
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
