"""Runs of adapters: what their checkpoints hold, on which base they go on, and several of them at once."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from transformers import GenerationConfig

import trainfw
from tests.data.test_chat import SMOLLM2, make_tokenizer
from tests.helpers import write_recipe
from trainfw import UserError, load_recipe
from trainfw.checkpoint import SavedParameters
from trainfw.data import byte_tokenizer, load_tokenizer, stop_ids
from trainfw.formats import read_header
from trainfw.interop import parameter_shapes, save_model
from trainfw.models import AdapterInputs, ModelConfig
from trainfw.serving import generate_batch
from trainfw.weights import export_model, merge_adapter, read_adapter

CONFIG = ModelConfig(
    vocab_size=258, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, tie_embeddings=True
)


def write_base(directory, seed=0):
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(CONFIG)

    def read(name):
        return np.float32(0.3) * rng.standard_normal(shapes[name], np.float32) + np.float32("scale" in name)

    save_model(directory, CONFIG, read, companions=lambda path: byte_tokenizer().save(path))
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("models") / "base")


def recipe(directory, model, *overrides, adapter=None):
    """A tiny recipe on the model at a path: of an adapter, or (False) of all weights."""
    path = write_recipe(directory, data={"tokenizer": {"name": "bytes"}}, optimizer={"learning_rate": 0.03})
    tree = yaml.safe_load(path.read_text()) | {"model": {"from": str(model)}}
    if adapter is not False:
        tree["adapter"] = {"rank": 4, "alpha": 8.0} | (adapter or {})
    path.write_text(yaml.safe_dump(tree))
    return load_recipe(path, overrides)


def train(directory, model, name, *overrides, adapter=None):
    loaded = recipe(directory, model, *overrides, adapter=adapter)
    return trainfw.train(loaded, run_dir=directory / name, devices=jax.devices()[:1])


def rows(run):
    return [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def test_a_checkpoint_holds_the_adapter_and_goes_on_bit_for_bit(tmp_path, base):
    whole = train(tmp_path, base, "whole", adapter={"dropout": 0.2})
    train(tmp_path, base, "halves", "train.steps=4", adapter={"dropout": 0.2})
    moved = shutil.copytree(base, tmp_path / "moved")
    halves = train(tmp_path, moved, "halves", adapter={"dropout": 0.2})
    # The schedule of a run of 4 steps is another: only its own second half is compared with an own first.
    train(tmp_path, base, "again", "train.steps=4", adapter={"dropout": 0.2})
    again = train(tmp_path, base, "again", adapter={"dropout": 0.2})
    assert rows(halves.run_dir) == rows(again.run_dir)
    assert len(rows(whole.run_dir)) == 8
    assert all(".adapter." in name for name in SavedParameters(whole.run_dir / "checkpoints" / "8").arrays)
    assert set(SavedParameters(whole.run_dir / "checkpoints" / "8").meta["base"]) == {"path", "hash"}


def test_another_base_is_refused_and_nothing_is_harmed(tmp_path, base):
    run = train(tmp_path, base, "run", "train.steps=4").run_dir
    other = write_base(tmp_path / "other", seed=1)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for act in (
        lambda: train(tmp_path, other, "run"),
        lambda: merge_adapter(str(run), str(tmp_path / "merged"), base=str(other)),
        lambda: trainfw.load_model(other, adapters={"a": run}),
    ):
        with pytest.raises(UserError, match="is not the base that what is in"):
            act()
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert not (tmp_path / "merged").exists()


@pytest.mark.long
def test_an_adapter_goes_on_from_another(tmp_path, base):
    first = train(tmp_path, base, "first", "train.steps=4", adapter={"targets": ["layers.mlp.*"]}).run_dir
    export_model(str(first), str(tmp_path / "peft"), format="peft")
    with pytest.raises(UserError, match=f"^{base}/tokenizer.json: a tokenizer without merges"):
        export_model(str(base), str(tmp_path / "model.gguf"), format="gguf")
    for source in (first, tmp_path / "peft"):
        loaded = recipe(tmp_path, base, f"adapter={{from: {source}}}", "train.steps=1")
        assert loaded.adapter.rank == 4
        state = trainfw.build_program(loaded, jax.devices()[:1]).init()
        adapter = read_adapter(str(first), loaded.model)
        found = state.params["layers"]["mlp"]["up"]["adapter"]["lora_b"]
        np.testing.assert_array_equal(found, adapter.arrays["layers.mlp.up.adapter.lora_b"])
        assert float(jnp.abs(found).max()) > 0
    wrong = recipe(tmp_path, base, f"adapter={{from: {first}, rank: 4, targets: all-linear}}")
    program = trainfw.build_program(wrong, jax.devices()[:1])
    with pytest.raises(UserError, match=r"adapter.from.*layers.attention.key.adapter.lora_a is not in it"):
        program.init()


@pytest.mark.long
def test_layers_in_another_order_read_the_same_base(tmp_path, base):
    """In interleaved stages the layers are stacked in another order than they run in."""
    settings = ["parallel.pipeline=2", "parallel.fsdp=2", "train.steps=1"]
    loaded = recipe(tmp_path, base, *settings)
    program = trainfw.build_program(loaded, jax.devices()[:4])
    plain = trainfw.build_program(recipe(tmp_path, base), jax.devices()[:1]).init()
    state = program.init()
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(np.asarray, program.frozen_in_true_order(state.frozen)),
        jax.tree.map(np.asarray, plain.frozen),
    )


PROMPTS = [[256, *b"document 3: w"], [256, *b"word1 = 2; word"], [256, *b"doc"], [256, *b"word5 ="]]


@pytest.mark.long
def test_rows_with_their_own_adapters_get_what_each_gives_alone(tmp_path, base):
    """Bitwise, at the same shape of batch: logits and tokens."""
    runs = {
        "a": train(tmp_path, base, "a", "train.steps=6").run_dir,
        "b": train(
            tmp_path, base, "b", "train.steps=6", "train.seed=3", adapter={"kind": "dora", "targets": "mlp"}
        ).run_dir,
    }
    tokens = jnp.asarray([prompt[:4] for prompt in PROMPTS])

    def logits(model, rows):
        inputs = AdapterInputs(rows_B=jnp.asarray(rows))
        x, _ = jax.jit(lambda: model.forward(tokens, adapters=inputs))()
        return np.asarray(model.logits(x))

    both, _ = trainfw.load_model(base, adapters=runs)
    mixed = logits(both, [0, 1, 2, 1])
    alone = {name: trainfw.load_model(base, adapters={name: run})[0] for name, run in runs.items()}
    of_a, of_b = (logits(alone[name], [0] * 4) for name in "ab")
    bare = logits(alone["a"], [1] * 4)
    np.testing.assert_array_equal(mixed[0], of_a[0])
    np.testing.assert_array_equal(mixed[[1, 3]], of_b[[1, 3]])
    np.testing.assert_array_equal(mixed[2], bare[2])
    assert np.abs(of_a - of_b).max() > 0.1
    assert np.abs(of_a - bare).max() > 0.1
    # Without a bank: the base, and the adapters by themselves, within rounding.
    plain, _ = trainfw.load_model(base)
    np.testing.assert_allclose(np.asarray(plain(tokens)), bare, atol=1e-4)
    for name, found in (("a", of_a), ("b", of_b)):
        np.testing.assert_allclose(np.asarray(trainfw.load_model(runs[name])[0](tokens)), found, atol=1e-4)

    chosen = ["a", "b", None, "b"]
    written = generate_batch(both, PROMPTS, max_tokens=12, adapters=chosen)
    for name, row, ids in zip(chosen, range(4), written, strict=True):
        others = generate_batch(alone[name or "a"], PROMPTS, max_tokens=12, adapters=[name] * 4)
        assert ids == others[row]
    with pytest.raises(UserError, match="no 'c'"):
        generate_batch(both, PROMPTS, max_tokens=1, adapters=["c"] * 4)


@pytest.mark.parametrize(
    "adapter",
    [
        {"base": "nf4", "block": 16},  # what was trained on is what is merged into
        pytest.param({"targets": ["embedding", "mlp"]}, marks=pytest.mark.long),
    ],
    ids=["nf4", "embedding"],
)
@pytest.mark.long
def test_merging_writes_what_the_adapter_computes(tmp_path, base, adapter):
    run = train(tmp_path, base, "run", "train.steps=4", adapter=adapter).run_dir
    tokens = jnp.asarray([PROMPTS[0]])
    expected = np.asarray(trainfw.load_model(run)[0](tokens))
    merge_adapter(str(run), str(tmp_path / "merged"))
    model, _ = trainfw.load_model(tmp_path / "merged")
    np.testing.assert_allclose(np.asarray(model(tokens)), expected, rtol=1e-4, atol=1e-4)
    # The head keeps what the embedding's adapter changes.
    assert model.config.tie_embeddings == ("targets" not in adapter)


@pytest.mark.long
def test_a_model_fine_tuned_whole_is_exported(tmp_path, base):
    run = train(tmp_path, base, "run", "train.steps=2", adapter=False).run_dir
    export_model(str(run), str(tmp_path / "model"))
    tokens = jnp.asarray([PROMPTS[0]])
    found, expected = (np.asarray(trainfw.load_model(p)[0](tokens)) for p in (tmp_path / "model", run))
    np.testing.assert_array_equal(found, expected)
    # And a run can be started from.
    loaded = recipe(tmp_path, run, "train.steps=1", adapter=False)
    state = trainfw.build_program(loaded, jax.devices()[:1]).init()
    np.testing.assert_array_equal(
        np.asarray(trainfw.build_program(loaded, jax.devices()[:1]).model(state.params)(tokens)), expected
    )


@pytest.mark.long
def test_a_base_drawn_from_a_seed_and_a_model_are_not_one(tmp_path, base):
    """Both ways: a run goes on with the kind of base that it began with."""
    on_model = train(tmp_path, base, "on model", "train.steps=2").run_dir
    spelled = CONFIG.model_dump(exclude={"preset", "from_"}, exclude_defaults=True)
    path = tmp_path / "recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["model"] = spelled | {"tie_embeddings": True}
    path.write_text(yaml.safe_dump(tree))
    drawn = load_recipe(path, ["train.steps=2"])
    with pytest.raises(UserError, match="draws its base from a seed"):
        trainfw.train(drawn, run_dir=on_model, devices=jax.devices()[:1])
    run = trainfw.train(drawn, run_dir=tmp_path / "drawn", devices=jax.devices()[:1]).run_dir
    with pytest.raises(UserError, match="base drawn from a seed, not on a model"):
        train(tmp_path, base, "drawn", "train.steps=2")
    assert run.is_dir()


@pytest.mark.long
def test_banks_take_adapters_of_any_targets(tmp_path, base):
    """Lists of patterns, ranks by pattern, and what PEFT's form gives back."""
    several = {"targets": ["attention", "layers.mlp.up"], "patterns": {"layers.attention.*": {"rank": 2}}}
    run = train(tmp_path, base, "run", "train.steps=2", adapter=several).run_dir
    export_model(str(run), str(tmp_path / "peft"), format="peft")
    model, _ = trainfw.load_model(base, adapters={"run": run, "peft": tmp_path / "peft"})
    tokens = jnp.asarray([prompt[:4] for prompt in PROMPTS])
    x, _ = model.forward(tokens, adapters=AdapterInputs(rows_B=jnp.asarray([0, 1, 0, 1])))
    expected = np.asarray(trainfw.load_model(run)[0](tokens))
    np.testing.assert_allclose(np.asarray(model.logits(x)), expected, atol=1e-4)


@pytest.mark.long
def test_what_is_written_stops_where_training_taught_to(tmp_path):
    """In Transformers and in llama.cpp; the base's own files name only the end of a document."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer", SMOLLM2)
    config = CONFIG.model_copy(update={"vocab_size": tokenizer.vocab_size})
    shapes = parameter_shapes(config)
    base = tmp_path / "base"
    save_model(base, config, lambda name: np.full(shapes[name], 0.1, np.float32), companions=tokenizer.save)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_id, "top_k": 5}))
    chats = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}] for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = {"source": str(tmp_path / "chats.jsonl"), "format": "chat", "tokenizer": {"name": "file", "path": str(base)}}
    changes = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
    run = str(train(tmp_path, base, "run", "train.steps=1", "data.sequence_length=256", *changes).run_dir)
    merge_adapter(run, str(tmp_path / "merged"))
    stops = GenerationConfig.from_pretrained(tmp_path / "merged")
    ends = tokenizer.backend.token_to_id("<|im_end|>")
    assert (stops.eos_token_id, stops.top_k) == ([tokenizer.eos_id, ends], 5)
    assert stop_ids(load_tokenizer(run)) == (tokenizer.eos_id, ends)
    said = export_model(run, str(tmp_path / "peft"), format="peft")
    assert f"generate(..., eos_token_id={[tokenizer.eos_id, ends]})" in said
    said = export_model(run, str(tmp_path / "a.gguf"), format="gguf-lora")
    assert f"tokens that end a turn here ({[tokenizer.eos_id, ends]}), and llama.cpp reads those" in said
    export_model(str(tmp_path / "merged"), str(tmp_path / "m.gguf"), format="gguf")
    assert set(stop_ids(load_tokenizer(tmp_path / "m.gguf"))) == {tokenizer.eos_id, ends}
    assert read_header(tmp_path / "m.gguf").metadata["tokenizer.ggml.eot_token_id"] == ends


@pytest.mark.long
def test_what_is_written_has_the_tokenizer_that_was_trained_with(tmp_path, base):
    """Not the base's, where the recipe names another."""
    other = byte_tokenizer()
    other.backend.add_special_tokens(["<|extra|>"])
    tokenizer_dir = tmp_path / "tokenizer"
    other.save(tokenizer_dir)
    larger = tmp_path / "larger"
    config = CONFIG.model_copy(update={"vocab_size": 260})
    shapes = parameter_shapes(config)
    save_model(larger, config, lambda name: np.full(shapes[name], 0.1, np.float32), companions=byte_tokenizer().save)
    tokenizer = f"data.tokenizer={{name: file, path: {tokenizer_dir}}}"
    run = train(tmp_path, larger, "run", "train.steps=1", tokenizer).run_dir
    merge_adapter(str(run), str(tmp_path / "merged"))
    whole = train(tmp_path, larger, "whole", "train.steps=1", tokenizer, adapter=False).run_dir
    export_model(str(whole), str(tmp_path / "exported"))
    expected = load_tokenizer(tokenizer_dir).fingerprint()
    assert load_tokenizer(larger).fingerprint() != expected
    for written in ("merged", "exported"):
        assert load_tokenizer(tmp_path / written).fingerprint() == expected
        assert load_tokenizer(tmp_path / written).prefix_ids == [256], "a text starts as documents did in training"


def test_adapters_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, base):
    narrow = {"targets": ["layers.mlp.up"], "kind": "dora"}
    run = train(tmp_path, base, "run", "train.steps=1", adapter=narrow).run_dir
    export_model(str(run), str(tmp_path / "peft"), format="peft")
    wide = tmp_path / "wide"
    config = CONFIG.model_copy(update={"intermediate_size": 64})
    shapes = parameter_shapes(config)
    save_model(wide, config, lambda name: np.full(shapes[name], 0.1, np.float32), companions=byte_tokenizer().save)
    acts = (
        lambda: merge_adapter(str(tmp_path / "peft"), str(tmp_path / "out"), base=str(wide)),
        lambda: trainfw.load_model(wide, adapters={"a": tmp_path / "peft"}),
        lambda: train(tmp_path, wide, "out", f"adapter={{from: {tmp_path / 'peft'}}}"),
    )
    for act in acts:
        with pytest.raises(UserError, match=r"layers.mlp.up.adapter.lora_b is of shape"):
            act()
    assert not (tmp_path / "out").exists()
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if "magnitude" not in name}, weights)
    with pytest.raises(UserError, match="magnitude is missing"):
        merge_adapter(str(tmp_path / "peft"), str(tmp_path / "out"), base=str(base))
    assert not (tmp_path / "out").exists()


def test_muon_is_refused(tmp_path, base):
    with pytest.raises(UserError, match=r"optimizer.name = 'muon'.*an adapter trains none"):
        trainfw.build_program(recipe(tmp_path, base, "optimizer.name=muon"), jax.devices()[:1])


@pytest.mark.long
def test_a_base_that_was_moved_is_named_anew(tmp_path, base):
    """In the run's own recipe too, whose tokenizer was at the old place; and to evaluate it."""
    first = shutil.copytree(base, tmp_path / "first")
    path = tmp_path / "recipe.yaml"
    recipe(tmp_path, first)
    tree = yaml.safe_load(path.read_text())
    del tree["data"]["tokenizer"]
    path.write_text(yaml.safe_dump(tree))
    run = trainfw.train(
        load_recipe(path, ["train.steps=2"]), run_dir=tmp_path / "run", devices=jax.devices()[:1]
    ).run_dir
    second = first.rename(tmp_path / "second")
    again = load_recipe(run / "recipe.yaml", [f"model.from={second}", "train.steps=4"])
    assert trainfw.train(again, run_dir=run, devices=jax.devices()[:1]).step == 4
    validation, _ = trainfw.evaluate(run, [f"model.from={second}"])
    assert validation.count > 0
