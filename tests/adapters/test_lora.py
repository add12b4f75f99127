"""Adapters in the step: what learns and what does not, on one device and on meshes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import equations, quicker, random_batches, tiny_recipe, write_recipe
from trainfw import UserError, build_program, load_recipe
from trainfw.models import AdapterInputs
from trainfw.quantization import Quantized

ADAPTER = {"rank": 4, "alpha": 8.0}
# Sizes that no two dims share.
MODEL = {"preset": "tiny", "vocab_size": 258, "num_layers": 4, "hidden_size": 64, "intermediate_size": 160}
MOE = {"num_experts": 4, "experts_per_token": 2, "dispatch": "capacity", "capacity_factor": 2.0}


def program_of(directory, adapter=None, devices=1, model=None, **sections):
    path = write_recipe(directory, adapter=ADAPTER | (adapter or {}), model=MODEL | (model or {}), **sections)
    return build_program(load_recipe(path), jax.devices()[:devices])


def disturbed(params, seed=0):
    """Parameters with every B off zero."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noise = [
        jax.device_put(np.float32(0.05) * rng.standard_normal(leaf.shape, np.float32), leaf.sharding) for leaf in leaves
    ]
    return jax.tree.unflatten(tree, [leaf + n for leaf, n in zip(leaves, noise, strict=True)])


def names(tree):
    return {".".join(str(key.key) for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_training_starts_from_the_base_itself(tmp_path):
    program = program_of(tmp_path)
    state = program.init()
    batch = random_batches(program.recipe, 1)[0]
    plain = build_program(
        tiny_recipe(tmp_path, *(f"model.{key}={value}" for key, value in MODEL.items() if key != "preset")),
        jax.devices()[:1],
    )
    found = program.eval_step(state.params, state.frozen, program.shard_batch(batch))["loss"].value()
    # Of the base alone, and with any B but zero not so.
    base = {**state.frozen["base"]}
    expected = plain.eval_step(base, {}, plain.shard_batch(batch))["loss"].value()
    assert found == expected
    moved = program.eval_step(disturbed(state.params), state.frozen, program.shard_batch(batch))["loss"].value()
    assert abs(moved - expected) > 1e-4
    a = state.params["layers"]["attention"]["query"]["adapter"]["lora_a"]
    assert float(jnp.abs(a).max()) <= 1 / np.sqrt(64)
    assert float(jnp.std(a)) == pytest.approx(1 / np.sqrt(3 * 64), rel=0.1)


def test_only_the_adapter_learns(tmp_path):
    program = program_of(tmp_path, {"kind": "dora"})
    state = program.init()
    before, start = jax.tree.map(np.asarray, (state.frozen, state.params))
    assert {name.rpartition(".")[2] for name in names(state.params)} == {"lora_a", "lora_b", "magnitude"}
    assert names(state.frozen["base"]) >= {"embedding.table", "layers.mlp.up.kernel", "final_norm.scale"}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 1)
    assert moments == 2 * program.num_parameters
    for batch in random_batches(program.recipe, 2):
        state, _ = program.train_step(state, program.shard_batch(batch))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state.frozen))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), start, state.params)
    assert all(jax.tree.leaves(moved))


def dots(program):
    """Dims of the results of all products in the compiled step, as sets."""
    text = program.compile_train_step().as_text()
    return {frozenset(map(int, dims.split(","))) for dims in re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)}


def test_no_gradient_of_the_base_is_computed(tmp_path):
    """The products that make one have the dims of a weight, and are in the step that trains the weights."""
    full = build_program(load_recipe(write_recipe(tmp_path, model=MODEL, train={"loss_chunk": 128})), jax.devices()[:1])
    weights = {frozenset(dims) for dims in [(64, 160), (64, 32), (258, 64)]}
    assert weights <= dots(full)
    assert not weights & dots(program_of(tmp_path, train={"loss_chunk": 128}))


@pytest.mark.parametrize("remat", quicker(["none", "dots", "full"], ["full"]))
def test_quantised_weights_are_widened_one_at_a_time(tmp_path, remat):
    """No array in the compiled step is a stack of all layers' weights in a float dtype."""
    program = program_of(tmp_path, {"base": "nf4", "block": 32}, train={"remat": remat})
    text = program.compile_train_step().as_text()
    stacks = re.findall(r"(?:f32|bf16)\[4,(?:64,160|160,64|64,64|64,32)\]", text)
    assert not stacks
    assert re.findall(r"f32\[(?:1,)?64,160\]", text)


@pytest.mark.long
def test_unrolled_layers_keep_no_copies_of_frozen_weights(tmp_path):
    """The step's memory beside its arguments grows with the layers' inputs, not with their weights."""
    taken, frozen = [], []
    for num_layers in (2, 8):
        model = {"intermediate_size": 1024, "num_layers": num_layers}
        program = program_of(tmp_path, {"rank": 1}, model=model, train={"remat": "full", "scan_layers": False})
        taken.append(program.compile_train_step().memory_analysis().temp_size_in_bytes)
        frozen.append(4 * program.num_frozen)
    assert taken[1] - taken[0] < 0.5 * (frozen[1] - frozen[0])


def test_a_base_in_four_bits_takes_little_more(tmp_path):
    """All arguments of the compiled step that are the base's, over its parameters: at most 0.6 bytes."""
    model = {"hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "num_kv_heads": 2}
    sizes = {}
    for base in ("nf4", "int8", "bfloat16", "float32"):
        program = program_of(tmp_path, {"base": base, "rank": 1}, model=model)
        arguments = program.compile_train_step().memory_analysis().argument_size_in_bytes
        others = sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(
                (program.abstract_state.params, program.abstract_state.opt_state, program.abstract_batch)
            )
        )
        sizes[base] = (arguments - others) / program.num_frozen
    assert sizes["nf4"] < 0.6
    assert sizes["int8"] == pytest.approx(1.0, rel=0.05)
    assert sizes["bfloat16"] == pytest.approx(2.0, rel=0.01)
    assert sizes["float32"] == pytest.approx(4.0, rel=0.01)


# The first with NF4 and the next two with DoRA in the quicker suite; all of them with --all.
LAYOUTS = {
    "fsdp, tensor": ({"fsdp": 2, "tensor": 2, "data": 2}, {}),
    "fsdp, prefetched": ({"fsdp": 4, "data": 2}, {"remat": "full"}),
    "pipeline, interleaved": ({"pipeline": 2, "interleave": 2, "fsdp": 2, "tensor": 2}, {"remat": "full"}),
    "context": ({"context": 2, "tensor": 2, "data": 2}, {}),
    "gradients": ({"fsdp": 4, "data": 2, "fsdp_shards": "gradients"}, {}),
}


ADAPTERS = {"dora": {"kind": "dora"}, "nf4": {"base": "nf4", "block": 16, "targets": ["all-linear", "embedding"]}}
QUICKER = {(2, "dora")}
COMBINATIONS = [
    pytest.param(layout, adapter, marks=[] if (i, adapter) in QUICKER else pytest.mark.long)
    for i, layout in enumerate(LAYOUTS)
    for adapter in ADAPTERS
]


@pytest.mark.parametrize(("layout", "adapter"), COMBINATIONS)
def test_every_layout_trains_the_same_adapter(tmp_path, layout, adapter):
    parallel, train = LAYOUTS[layout]
    losses = {}
    for devices in (1, 8):
        program = program_of(
            tmp_path,
            ADAPTERS[adapter],
            devices,
            parallel=parallel if devices > 1 else {},
            train=train,
            optimizer={"learning_rate": 0.02, "warmup_steps": 1},
        )
        state = program.init()
        losses[devices] = []
        for batch in random_batches(program.recipe, 3):
            state, metrics = program.train_step(state, program.shard_batch(batch))
            losses[devices].append((metrics["loss"].value(), metrics["grad_norm"].value()))
    np.testing.assert_allclose(losses[8], losses[1], rtol=2e-5)
    assert losses[1][-1][0] < losses[1][0][0]


@pytest.mark.long
@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_experts_have_adapters_of_their_own(tmp_path, dispatch):
    losses = {}
    for devices in (1, 4):
        program = program_of(
            tmp_path,
            {"targets": "mlp"},
            devices,
            model={"moe": MOE | {"dispatch": dispatch}},
            parallel={"expert": 2, "tensor": 2} if devices > 1 else {},
            optimizer={"learning_rate": 0.02, "warmup_steps": 1},
        )
        state = program.init()
        assert state.params["layers"]["mlp"]["up"]["adapter"]["lora_a"].shape == (4, 4, 64, 4)
        assert "router" not in state.params["layers"]["mlp"]
        losses[devices] = []
        for batch in random_batches(program.recipe, 3):
            state, metrics = program.train_step(state, program.shard_batch(batch))
            losses[devices].append((metrics["loss"].value(), metrics["grad_norm"].value()))
    if dispatch == "dropless":  # with capacity what is dropped depends on the layout
        np.testing.assert_allclose(losses[4], losses[1], rtol=2e-5)
    assert losses[1][-1][0] < losses[1][0][0]


def test_dropout_draws_anew_for_every_step_row_and_layer(tmp_path):
    inputs = AdapterInputs(key=jnp.array([1, 2, 3, 0], jnp.uint32), ids_B=jnp.arange(4), layer=jnp.int32(0))
    part = jnp.int32(0)

    def bits(inputs, salt=5, part=part):
        return np.asarray(jax.random.bits(inputs.draws(salt, part), (64,)))

    others = [
        AdapterInputs(inputs.rows_B, inputs.key, inputs.ids_B + 4, inputs.layer),
        AdapterInputs(inputs.rows_B, inputs.key, inputs.ids_B, inputs.layer + 1),
        AdapterInputs(inputs.rows_B, inputs.key.at[0].add(1), inputs.ids_B, inputs.layer),
    ]
    drawn = [bits(inputs), *map(bits, others), bits(inputs, salt=6), bits(inputs, part=part + 1)]
    assert np.array_equal(drawn[0], bits(inputs))
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert np.sum(one == other) == 0


@pytest.mark.long
def test_dropout_is_for_training_alone(tmp_path):
    program = program_of(tmp_path, {"dropout": 0.5})
    plain = program_of(tmp_path, {})
    state = program.init()
    state, bare = ((type(s))(s.step, disturbed(s.params), s.opt_state, s.rng, s.frozen) for s in (state, plain.init()))
    batch = program.shard_batch(random_batches(program.recipe, 1)[0])
    evaluated = [p.eval_step(s.params, s.frozen, batch)["loss"].value() for p, s in ((program, state), (plain, bare))]
    assert evaluated[0] == evaluated[1]
    trained = [p.train_step(s, batch)[1]["loss"].value() for p, s in ((program, state), (plain, bare))]
    assert trained[1] == pytest.approx(evaluated[1], rel=1e-6)
    assert abs(trained[0] - trained[1]) > 1e-4


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"targets": "attentoin"}, "targets: 'attentoin' matches nothing; did you mean 'attention'?"),
        ({"targets": ["layers.attention.qurey"]}, "did you mean 'layers.attention.query'?"),
        ({"patterns": {"layers.mlp.gaet": {"rank": 2}}}, "did you mean 'layers.mlp.gate'?"),
        ({"kind": "dora", "targets": "embeddings"}, "is for linear maps, not embedding"),
        ({"dropout": 0.1, "targets": ["embedding"]}, "dropout = 0.1: is not for embedding"),
        ({"base": "nf4", "block": 48}, "block = 48: expected an even number that divides 64"),
        ({"base": "nf4", "block": 32, "exclude": ["embeding"]}, "did you mean"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, adapter, message):
    with pytest.raises(UserError) as error:
        program_of(tmp_path, adapter)
    assert message in str(error.value)
    assert "adapter" in str(error.value)


def test_ranks_by_pattern(tmp_path):
    program = program_of(
        tmp_path, {"patterns": {"layers.attention.*": {"rank": 2}, "layers.attention.value": {"alpha": 1.0}}}
    )
    layers = program.abstract_state.params["layers"]
    assert layers["attention"]["value"]["adapter"]["lora_b"].shape == (4, 2, 32)
    assert layers["mlp"]["up"]["adapter"]["lora_b"].shape == (4, 4, 160)
    assert (
        program.model(program.abstract_state.params, program.abstract_state.frozen).layers.attention.value.adapter.scale
        == 0.5
    )


def test_quantised_weights_are_nodes_of_the_state(tmp_path):
    program = program_of(tmp_path, {"base": "nf4", "block": 32, "exclude": ["embedding", "layers.mlp.*"]})
    frozen = program.abstract_state.frozen["base"]
    assert isinstance(frozen["layers"]["attention"]["query"]["kernel"], Quantized)
    assert frozen["embedding"]["table"].dtype == jnp.bfloat16
    assert frozen["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert program.num_frozen == program_of(tmp_path).num_frozen


@pytest.mark.parametrize("dtype", quicker(["float32", "bfloat16"], ["bfloat16"]))
def test_dots_does_no_product_of_a_frozen_kernel_again(tmp_path, dtype):
    """Products with feed-forward kernels; `full` does those of gate and up once more."""

    def step(remat):
        program = program_of(tmp_path, train={"remat": remat, "compute_dtype": dtype})
        jaxpr = program.train_step.trace(program.abstract_state, program.abstract_batch).jaxpr
        return [e for e in equations(jaxpr.jaxpr) if e.primitive.name in ("dot_general", "scan")]

    def products(remat):
        sides = [{v.aval.shape for v in e.invars} for e in step(remat) if e.primitive.name == "dot_general"]
        return sum(bool(shapes & {(64, 160), (160, 64)}) for shapes in sides)

    def narrow(remat):
        """Products with a LoRA's A, or with B in the backward pass."""
        made = [e.outvars[0].aval.shape for e in step(remat) if e.primitive.name == "dot_general"]
        return sum(shape[-1] == 4 for shape in made)

    assert products("none") == products("dots") == products("full") - 2
    assert narrow("none") == narrow("dots") < narrow("full")
    # Of gate and up their sums, not the two products of each, in the dtype in which they are used.
    scans = [e for e in step("dots") if e.primitive.name == "scan"]
    kept = [v.aval.dtype.name for e in scans for v in e.outvars if v.aval.shape == (4, 8, 32, 160)]
    assert kept == [dtype, dtype]
