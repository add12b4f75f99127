"""Programs that break one rule each, and programs that do not.

The line that breaks the rule ends in `# here`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify, io_callback, sparse
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainfw.backends import load_sdk
from trainfw.hardware import load_topology


@dataclass(frozen=True)
class Program:
    rule: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    x64: bool = False


BREAKS: dict[str, Program] = {}
LEGAL: dict[str, Program] = {}
WARNS: dict[str, Program] = {}


def breaks(rule: str, *args: Any, x64: bool = False, **options: Any) -> Callable[[Any], Any]:
    def register(fn: Any) -> Any:
        BREAKS[fn.__name__] = Program(rule, fn, args, options, x64)
        return fn

    return register


def legal(rule: str, *args: Any, **options: Any) -> Callable[[Any], Any]:
    """Near the border that `rule` draws."""

    def register(fn: Any) -> Any:
        LEGAL[fn.__name__] = Program(rule, fn, args, options)
        return fn

    return register


def warns(rule: str, *args: Any, x64: bool = False, **options: Any) -> Callable[[Any], Any]:
    def register(fn: Any) -> Any:
        WARNS[fn.__name__] = Program(rule, fn, args, options, x64)
        return fn

    return register


def array(*shape: Any, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


X, MATRIX, SCALAR = array(16), array(16, 16), array(dtype=jnp.int32)
INTEGERS, INTEGER_MATRIX = array(16, dtype=jnp.int32), array(16, 16, dtype=jnp.int32)
KEY = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
IMAGE, KERNEL = array(1, 3, 16, 16), array(3, 3, 3, 3)
(N,) = jax.export.symbolic_shape("n")

# --- Control flow --------------------------------------------------------------------------------


@breaks("control-cond", X)
def cond(x):
    return lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)  # here


@breaks("control-cond", X)
def switch_inside_a_scan(x):
    def body(carry, i):
        carry = lax.switch(i, [jnp.sin, jnp.cos], carry)  # here
        return carry, None

    return lax.scan(body, x, jnp.arange(3))[0]


@breaks("control-while", X)
def while_until_it_converges(x):
    return lax.while_loop(lambda x: x.sum() < 5, lambda x: x * 2, x)  # here


@breaks("control-while", SCALAR, X)
def fori_to_a_traced_bound(n, x):
    return lax.fori_loop(0, n, lambda i, x: x * 2, x)  # here


@breaks("control-callback", X)
def debug_print(x):
    jax.debug.print("{}", x)  # here
    return x


@breaks("control-callback", X)
def debug_callback(x):
    jax.debug.callback(print, x)  # here
    return x


@breaks("control-callback", X)
def pure_callback(x):
    return jax.pure_callback(np.sin, x, x)  # here


@breaks("control-callback", X)
def io_callback_in_a_helper(x):
    def log(x):
        return io_callback(lambda x: x, X, x)  # here

    return log(x)


@breaks("control-checkify", X)
def checkify_check(x):
    checkify.check(x[0] > 0, "negative")  # here
    return x


@legal("control-cond", X)
def where_instead_of_cond(x):
    return jnp.where(x > 0, jnp.sin(x), jnp.cos(x))


@legal("control-cond", X)
def platform_dependent(x):
    return lax.platform_dependent(x, default=jnp.sin, cpu=jnp.cos)


@legal("control-while", X)
def scan(x):
    return lax.scan(lambda x, _: (x * 2, x.sum()), x, None, length=3)


@legal("control-while", X)
def fori_to_a_constant(x):
    return lax.fori_loop(2, 9, lambda i, x: x * i, x)


@legal("control-while", X)
def while_that_counts(x):
    return lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 2, c[1] * 2), (1, x))


@legal("control-while", X)
def while_that_counts_down(x):
    return lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, c[1] * 2), (5, x))


@legal("control-while", X)
def bounds_that_are_constants_of_the_caller(x):
    zero = jnp.int32(0)

    def body(x, _):
        return lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] * 2), (zero, x))[1], None

    double = jax.jit(lambda x, n: lax.fori_loop(0, n, lambda i, x: x * 2, x))
    return lax.scan(body, double(x, 3), None, length=3)[0]


@legal("control-while", X)
def bounds_made_of_constants(x):
    low, high = jnp.minimum(jnp.int32(3) - 1, 5), jnp.int32(3) + jnp.int32(2) * jnp.maximum(2, jnp.uint8(1))
    high = jnp.clip(high, 0, 6)  # a function of its own
    return lax.fori_loop(low, high, lambda i, x: x * i, x)


@legal("control-cond", X)
def branches_chosen_while_compiling(x):
    x = lax.cond(jnp.bool_(True) & True, jnp.sin, jnp.cos, x)
    return lax.cond(True, jnp.sin, jnp.cos, x) + lax.switch(1, [jnp.sin, jnp.cos], x)


# --- Types ---------------------------------------------------------------------------------------


@breaks("dtype-f64", X, x64=True)
def float64(x):
    return x.astype(jnp.float64).astype(jnp.float32)  # here


@breaks("dtype-f64", array(16, dtype=jnp.float64), x64=True)
def float64_argument(x):
    return x.astype(jnp.float32)  # here


@breaks("dtype-complex", X)
def complex64(x):
    return lax.complex(x, x)  # here


@breaks("dtype-complex", X)
def parts_of_complex_numbers(x):
    return (lambda z: z.real * z.imag)(jnp.sort(lax.complex(x, x)))  # here


@breaks("dtype-complex", X)
def fft(x):
    return jnp.abs(jnp.fft.rfft(x))  # here


@breaks("dtype-f8e4m3fn", X)
def float8_e4m3fn(x):
    return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)  # here


@breaks("dtype-f8fnuz", X, hardware="trn3-gen2-ultraserver")
def float8_fnuz(x):
    return x.astype(jnp.float8_e4m3fnuz).astype(jnp.float32)  # here


@legal("dtype-f8e4m3fn", X, hardware="trn3-gen2-ultraserver")
def float8_e4m3fn_on_trainium3(x):
    return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)


@legal("dtype-f8e4m3fn", X)
def float8_e5m2(x):
    return x.astype(jnp.float8_e5m2).astype(jnp.float32)


@legal("dtype-f64", 1.5, np.ones(16))
def python_numbers_and_numpy_float64_without_x64(a, x):
    return a * x


# --- Random numbers ------------------------------------------------------------------------------


@breaks("rng-threefry", X)
def threefry(x):
    return x + jax.random.normal(jax.random.key(0), (16,))  # here


@breaks("rng-threefry", array(2, dtype=jnp.uint32))
def threefry_keys_of_the_old_kind(key):
    return jax.random.uniform(key, (16,))  # here


@breaks("rng-algorithm", array(4, dtype=jnp.uint32))
def philox(key):
    return lax.rng_bit_generator(key, (16,), algorithm=lax.RandomAlgorithm.RNG_PHILOX)  # here


@breaks("rng-randint", KEY)
def randint(key):
    return jax.random.randint(key, (16,), 0, 10)  # here


@breaks("rng-randint", KEY)
def choice(key):
    return jax.random.choice(key, 10, (4,))  # here


@legal("rng-threefry", KEY)
def rbg(key):
    a, b = jax.random.split(jax.random.fold_in(key, 3))
    return jax.random.normal(a, (16,)), jax.random.bernoulli(b, 0.1, (16,))


@legal("rng-threefry", SCALAR)
def rbg_key_made_inside(seed):
    return jax.random.uniform(jax.random.key(seed, impl="rbg"), (16,))


@legal("rng-randint", KEY)
def integers_by_uniform(key):
    return jnp.floor(10 * jax.random.uniform(key, (16,))).astype(jnp.int32)


@breaks("rng-threefry", X)
def threefry_in_the_body_of_a_loop(x):
    def body(i, x):
        jax.random.normal(jax.random.key(1), (16,))  # nothing comes of it
        return x + jax.random.normal(jax.random.key(0), (16,))  # here

    return lax.fori_loop(0, 3, body, x)


@legal("rng-randint", X)
def functions_of_that_name(x):
    def randint(x):
        return x * 2

    def _randint(x):
        return x * 3

    return jax.jit(randint)(x) + jax.jit(_randint)(x)


@breaks("reduce-variadic", X)
def a_fault_inside_a_function_of_that_name(x):
    def randint(x):
        return jnp.argmax(x)  # here

    return jax.jit(randint)(x)


@breaks("gather-fill", X, INTEGERS)
def another_fault_inside_a_function_of_that_name(x, i):
    @jax.jit
    def randint(x, i):
        return jnp.take(x, i)  # here

    return randint(x, i)


@legal("rng-threefry", X)
def random_numbers_that_nobody_uses(x):
    jax.random.normal(jax.random.key(0), (16,))
    return x


@legal("gather-fill", X, INTEGERS)
def gathers_that_nobody_uses(x, i):
    def body(carry):
        jnp.take(carry[1], i)
        return carry[0] + 1, carry[1] * 2

    jnp.take(x, i)
    return jax.jit(lambda x: (jnp.take(x, i), x)[1])(lax.while_loop(lambda c: c[0] < 3, body, (0, x))[1])


@breaks("control-callback", X)
def a_print_whose_result_nobody_uses(x):
    @jax.jit
    def log(x):
        jax.debug.callback(print, x)  # here
        return x * 2

    log(x)
    return x


# --- Operators -----------------------------------------------------------------------------------


@breaks("sort-comparator", X)
def sort_by_two_keys(x):
    return lax.sort((x, -x), num_keys=2)  # here


@breaks("reduce-variadic", X)
def argmax(x):
    return jnp.argmax(x)  # here


@breaks("reduce-variadic", X, INTEGERS)
def window_of_two_arrays(x, i):
    larger = lambda a, b: (jnp.maximum(a[0], b[0]), jnp.where(a[0] > b[0], a[1], b[1]))  # noqa: E731
    return lax.reduce_window((x, i), (-jnp.inf, jnp.int32(0)), larger, (2,), (2,), "VALID")  # here


@breaks("sparse", jax.eval_shape(lambda: sparse.BCOO.fromdense(jnp.eye(16), nse=16)), MATRIX)
def sparse_matmul(a, x):
    return a @ x  # here


@breaks("sparse", jax.eval_shape(lambda: sparse.BCOO.fromdense(jnp.eye(16), nse=16)))
def sparse_to_dense(a):
    return a.todense()  # here


@breaks("topk-integer", INTEGERS)
def top_k_of_integers(x):
    return lax.top_k(x, 3)  # here


@breaks("dot-integer", INTEGER_MATRIX)
def integer_matmul(x):
    return x @ x  # here


@breaks("scatter-integer", INTEGERS)
def count_by_scatter(i):
    return jnp.zeros(4, jnp.int32).at[i].add(1, mode="clip")  # here


@breaks("gather-fill", X, INTEGERS)
def take(x, i):
    return jnp.take(x, i)  # here


@breaks("gather-fill", MATRIX, INTEGERS)
def loss_by_take_along_axis(logits, targets):
    return jnp.take_along_axis(logits, targets[:, None], axis=-1).sum()  # here


@breaks("shape-dynamic", X)
def boolean_mask(x):
    return x[x > 0]  # here


@breaks("shape-dynamic", X)
def nonzero(x):
    return jnp.nonzero(x)  # here


@breaks("shape-dynamic", array(N))
def symbolic_shape(x):
    return x * 2  # here


@breaks("conv-dilation", IMAGE, KERNEL)
def both_dilations(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), [(2, 2)] * 2, lhs_dilation=(2, 2), rhs_dilation=(2, 2))  # here


@breaks("conv-stride-dilation", IMAGE, KERNEL)
def stride_and_input_dilation(x, w):
    return lax.conv_general_dilated(x, w, (2, 2), [(1, 1)] * 2, lhs_dilation=(2, 2))  # here


@breaks("reduce-window-dilation", X)
def dilated_window(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (2,), (1,), "VALID", window_dilation=(2,))  # here


@breaks("reduce-window-dilation", X)
def dilated_input_of_a_window(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (2,), (1,), "VALID", base_dilation=(2,))  # here


@breaks("op-triangular-solve", MATRIX, X)
def triangular_solve(a, b):
    return jax.scipy.linalg.solve_triangular(a, b)  # here


@breaks("op-triangular-solve", MATRIX, X)
def solve(a, b):
    return jnp.linalg.solve(a, b)  # here


@breaks("op-reduce-precision", X)
def reduce_precision(x):
    return lax.reduce_precision(x, 8, 7)  # here


@breaks("custom-call", MATRIX)
def qr(x):
    return jnp.linalg.qr(x)  # here


@breaks("op-no-lowering", MATRIX)
def svd(x):
    return jnp.linalg.svd(x)  # here


@breaks("buffer-size", array(2**16, 2**15, dtype=jnp.bfloat16))
def four_gigabytes_in(x):
    return x[0] * 2  # here


@breaks("buffer-size", array(2**15, dtype=jnp.bfloat16))
def four_gigabytes_out(x):
    return jnp.outer(jnp.concatenate([x, x]), x)  # here


@breaks("buffer-size", array(2**15, dtype=jnp.bfloat16))
def four_gigabytes_out_of_a_scan(x):
    return lax.scan(lambda carry, _: (carry * 2, carry), x, None, length=2**16)[1]  # here


@legal("sort-comparator", X)
def sorts(x):
    return jnp.sort(x), jnp.argsort(x), jnp.sort(x, descending=True)


@legal("reduce-variadic", X)
def argmax_by_top_k(x):
    return lax.top_k(x, 1)[1]


@legal("reduce-variadic", X)
def argmax_by_min(x):
    return jnp.min(jnp.where(x == x.max(), jnp.arange(16), 16))


@legal("dot-integer", INTEGER_MATRIX)
def matmul_in_float32(x):
    return x.astype(jnp.float32) @ x.astype(jnp.float32)


@legal("scatter-integer", INTEGERS)
def count_by_one_hot(i):
    return jnp.sum(jax.nn.one_hot(i, 4), axis=0)


@legal("gather-fill", X, INTEGERS)
def gathers_in_bounds(x, i):
    return x[i], jnp.take(x, i, mode="clip"), x.at[i].get(mode="promise_in_bounds")


@legal("scatter-drop", X, INTEGERS)
def scatter_in_bounds(x, i):
    return x.at[i].add(1.0, mode="promise_in_bounds")


@legal("scatter-drop", array(16, 8), INTEGERS)
def gradient_of_an_embedding(table, tokens):
    return jax.grad(lambda table: jnp.take(table, tokens, axis=0, mode="clip").sum())(table)


@legal("shape-dynamic", X)
def mask_by_where(x):
    return jnp.where(x > 0, x, 0.0).sum()


@legal("op-pow", X)
def powers_with_integers(x):
    return x**3 + x**-2 + x**2.0 + 0.9**x + jnp.sqrt(x)


@legal("dot-algorithm", MATRIX)
def precisions(x):
    y = lax.dot(x, x, precision=lax.Precision.HIGHEST)
    return lax.dot(y, x, precision=lax.DotAlgorithmPreset.DEFAULT, preferred_element_type=jnp.float32)


@legal("conv-dilation", IMAGE, KERNEL)
def kernel_dilation_with_stride(x, w):
    return lax.conv_general_dilated(x, w, (2, 2), [(2, 2)] * 2, rhs_dilation=(2, 2))


@legal("conv-stride-dilation", IMAGE, KERNEL)
def gradient_of_a_strided_convolution(x, w):
    return jax.grad(lambda x: lax.conv_general_dilated(x, w, (2, 2), [(1, 1)] * 2).sum())(x)


@legal("reduce-window-dilation", X)
def pooling_and_its_gradient(x):
    return jax.grad(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2,), (2,), "VALID").sum())(x)


@legal("op-unlisted", MATRIX)
def what_language_models_are_made_of(x):
    y = jax.nn.gelu(x) + jax.nn.silu(x) + jax.nn.softmax(x @ x) + jax.nn.logsumexp(x) + jnp.cumsum(x, axis=0)
    return jax.checkpoint(lambda y: jnp.tanh(jnp.sin(y)) * lax.rsqrt(jnp.mean(y * y) + 1e-5))(y)


@legal("buffer-size", array(2**16, 2**15 - 1, dtype=jnp.bfloat16))
def just_under_four_gigabytes(x):
    return x[0] * 2


# --- What only warns -----------------------------------------------------------------------------


@breaks("dtype-int64", X, x64=True)
def int64(x):
    return x * jnp.arange(16, dtype=jnp.int64).astype(jnp.float32)  # here


@breaks("dtype-int64", X, x64=True)
def uint64(x):
    return x * jnp.arange(16, dtype=jnp.uint64).astype(jnp.float32)  # here


@warns("op-pow", X)
def power_with_a_fraction(x):
    return x**2.5  # here


@warns("op-pow", X)
def power_with_an_array(x):
    return x**x  # here


@warns("dot-algorithm", MATRIX)
def product_with_an_algorithm(x):
    return lax.dot(x, x, precision=lax.DotAlgorithmPreset.BF16_BF16_F32)  # here


@warns("dtype-unlisted", X)
def int8(x):
    return x.astype(jnp.int8).astype(jnp.float32)  # here


@warns("op-unlisted", MATRIX)
def cholesky(x):
    return jnp.linalg.cholesky(x)  # here


@warns("scatter-drop", X, INTEGERS)
def scatter_by_default(x, i):
    return x.at[i].set(0.0)  # here


@warns("buffer-intermediate", array(2**16, 2, dtype=jnp.bfloat16))
def attention_scores_of_eight_gigabytes(x):
    return jnp.sum(x @ x.T)  # here


# --- Collectives ---------------------------------------------------------------------------------
# The 8 devices stand for the 8 cores of one Trainium2 chip at LNC 1, or the first 8 of a larger topology.

MESH = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("half", "quad"), axis_types=(AxisType.Auto,) * 2)
PAIRS = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("half", "quad"), axis_types=(AxisType.Auto,) * 2)
SHIFTED = Mesh(np.array(jax.devices()[:8])[[1, 2, 3, 4, 5, 6, 7, 0]].reshape(2, 4), ("half", "quad"))
BOTH = P(("half", "quad"))
ON_CHIP: dict[str, Any] = {"hardware": "trn2.3xlarge", "lnc": 1}


def sharded(fn: Callable[..., Any], over: Mesh = MESH) -> Callable[..., Any]:
    return jax.shard_map(fn, mesh=over, in_specs=BOTH, out_specs=BOTH, check_vma=False)


@breaks("collective-integer-all-reduce", INTEGERS, mesh=MESH, **ON_CHIP)
def integer_psum(x):
    return sharded(lambda x: x + lax.psum(x, "quad"))(x)  # here


@breaks(
    "collective-integer-all-reduce",
    jax.ShapeDtypeStruct((16,), jnp.int32, sharding=NamedSharding(MESH, BOTH)),
    **ON_CHIP,
)
def integer_sum_of_a_sharded_array(x):
    return jnp.sum(x)  # here


@breaks("collective-integer-reduce-scatter", array(64, dtype=jnp.int32), mesh=MESH, **ON_CHIP)
def integer_psum_scatter(x):
    return sharded(lambda x: lax.psum_scatter(x, "quad", tiled=True))(x)  # here


@breaks("collective-group", X, mesh=PAIRS, **ON_CHIP)
def groups_of_a_size_that_is_not_listed(x):
    groups = [[0, 1, 2], [3]]
    return sharded(lambda x: x + lax.psum(x, "half", axis_index_groups=groups).sum(), PAIRS)(x)  # here


@breaks("collective-group", X, mesh=SHIFTED, **ON_CHIP)
def groups_that_are_not_aligned(x):
    return sharded(lambda x: x + lax.psum(x, "quad"), SHIFTED)(x)  # here


@breaks("collective-group", X, **ON_CHIP)
def groups_that_are_not_aligned_of_a_mesh_that_only_the_function_names(x):
    return sharded(lambda x: x + lax.psum(x, "quad"), SHIFTED)(x)  # here


@breaks("collective-group", X, mesh=MESH, **ON_CHIP)
def groups_of_different_sizes(x):
    groups = [[0, 1, 2], [3]]
    return sharded(lambda x: lax.all_gather(x, "half") + lax.psum(x, "quad", axis_index_groups=groups))(x)[:16]  # here


@breaks("permute-circular", X, mesh=MESH, **ON_CHIP)
def shift_that_does_not_wrap(x):
    return sharded(lambda x: lax.ppermute(x, "quad", [(0, 1), (1, 2), (2, 3)]))(x)  # here


@breaks("permute-neighbours", X, mesh=MESH, hardware="trn1.32xlarge")  # 2 cores a chip: half 0 is on chips 0 and 1
def exchange_between_chips_that_are_not_neighbours(x):
    return sharded(lambda x: lax.ppermute(x, "half", [(0, 1), (1, 0)]))(x)  # here


@breaks(
    "communicators",
    X,
    mesh=MESH,
    sdk=load_sdk().model_copy(update={"communicators": 2}),
    **ON_CHIP,
)
def three_sets_of_groups_where_two_are_allowed(x):
    def body(x):
        x = lax.psum(x, "quad") + lax.psum(x, "half")
        return x + lax.psum(x, ("half", "quad"))  # here

    return sharded(body)(x)


@legal("collective-group", X, mesh=MESH, **ON_CHIP)
def groups_of_listed_shapes(x):
    return sharded(lambda x: x + lax.psum(x, "quad") + lax.psum(x, "half") + lax.psum(x, ("half", "quad")))(x)


@legal("communicators", X, mesh=MESH, sdk=load_sdk().model_copy(update={"communicators": 3}), **ON_CHIP)
def as_many_sets_of_groups_as_are_allowed(x):
    def body(x):
        x = lax.psum(x, "quad") + lax.psum(x, "half") + lax.psum(x, ("half", "quad"))
        return x + lax.all_gather(x, "quad", tiled=True)[: x.size]  # the groups of a psum

    return sharded(body)(x)


@legal("permute-circular", X, mesh=MESH, **ON_CHIP)
def ring(x):
    return sharded(lambda x: lax.ppermute(x, "quad", [(i, (i + 1) % 4) for i in range(4)]))(x)


@legal("collective-integer-all-reduce", array(16, 16), mesh=MESH, **ON_CHIP)
def reduce_in_float32(x):
    return sharded(lambda x: x + lax.psum(jnp.sum(x > 0, dtype=jnp.float32), "quad"))(x)


@legal("collective-group", X, mesh=PAIRS, hardware=load_topology("trn1.32xlarge"))
def pairs_are_chips_of_trainium1(x):
    return sharded(lambda x: x + lax.psum(x, "quad"), PAIRS)(x)
