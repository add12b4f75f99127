"""Adapters that come and go: each row writes what its adapter alone would, and nothing is compiled for it."""

import numpy as np
import pytest
from flax import nnx

from tests.serving.engines import drawn, engine_of, prompts
from trainfw.adapters import AdapterConfig, adaptable, attach_bank, config_targets
from trainfw.errors import UserError
from trainfw.serving import Sampling, adapters, generate_batch
from trainfw.weights.open import Adapter

CONFIGS = {
    "lora": AdapterConfig(rank=4, alpha=32.0),
    "rslora": AdapterConfig(kind="rslora", rank=2, alpha=16.0, targets=["attention"]),
    "dora": AdapterConfig(kind="dora", rank=3, alpha=24.0, targets=["mlp"]),
    "wide": AdapterConfig(rank=5),
    "head": AdapterConfig(rank=2, targets=["head"]),
}


def random_adapter(name):
    model, random = drawn("dense"), np.random.default_rng(len(name))
    config, modules, arrays = CONFIGS[name], adaptable(drawn("dense")), {}
    for module, (rank, _) in config_targets(config, model.config).items():
        *stack, ins, outs = modules[module].kernel.get_value().shape
        shapes = {"lora_a": (*stack, ins, rank), "lora_b": (*stack, rank, outs), "magnitude": (*stack, outs)}
        for part in shapes if config.kind == "dora" else ("lora_a", "lora_b"):
            drawn_ = random.standard_normal(shapes[part]).astype(np.float32)
            arrays[f"{module}.adapter.{part}"] = 1.0 + 0.3 * drawn_ if part == "magnitude" else 0.1 * drawn_
    return Adapter(config, arrays, None, name)


@pytest.fixture(scope="module", params=[{}, {"layout": {"tensor": 2}, "scan_layers": True}], ids=["one", "tensor"])
def served(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "read_adapter", lambda path, config: random_adapter(path))
        engine, _ = engine_of(drawn("dense"), adapters=2, rank=4, **request.param)
        yield engine
        engine.close()


def test_adapters_share_a_batch_and_come_and_go(served):
    asked = prompts(6)
    served.add_adapter("a", "lora")
    first, loaded = None, {"a": "lora"}
    for old, new in ((None, "dora"), ("b", "rslora"), ("a", "dora")):
        if old is not None:
            served.remove_adapter(old)
        served.add_adapter(old or "b", new)
        loaded |= {old or "b": new}
        model = nnx.clone(drawn("dense"))
        attach_bank(model, {name: (CONFIGS[at], random_adapter(at).arrays) for name, at in loaded.items()})
        names = [None, "a", "b"] * 2
        want = generate_batch(model, asked, max_tokens=8, adapters=names)
        answers = [served.submit(p, Sampling(max_tokens=8, adapter=name)) for p, name in zip(asked, names)]
        assert [[each.token for each in answer] for answer in answers] == want
        assert want != first
        first = want
    assert served._places._fill._cache_size() == 1  # compiled once; the other functions are so before
    with pytest.raises(UserError, match="all 2 places are taken"):
        served.add_adapter("c", "lora")
    with pytest.raises(UserError, match="there already"):
        served.add_adapter("a", "lora")
    served.remove_adapter("a")
    with pytest.raises(UserError, match="no 'a'"):
        served.submit([1], Sampling(max_tokens=1, adapter="a"))
    with pytest.raises(UserError, match=r"rank 5; this server has places for rank 4"):
        served.add_adapter("a", "wide")
    with pytest.raises(UserError, match=r"adapts head; a server has places in linear maps of the layers alone"):
        served.add_adapter("a", "head")
