"""Calls of the public functions of JAX that take arrays, and the primitives that they emit."""

import functools
import inspect
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from pkjax.programs.equations import closed, opened


def floats(*shape):
    return np.linspace(0.1, 0.9, int(np.prod(shape)), dtype=np.float32).reshape(shape)


V, M, T, Q, Z = floats(4), floats(3, 3), floats(2, 3, 4), floats(1, 2, 4, 4), floats()
I, B = np.arange(4, dtype=np.int32), np.arange(4) > 1
COMPLEX = V.astype(np.complex64)

TRIED = [(V,), (V, V), (M,), (M, M), (V, V, V), (I,), (I, I), (B,), (B, B), (V, I), (M, 1), (M, 0, 1), (V, 2),
         ([V, V],), ((2, 2),),
         (T,), (1, V), (B, V), (B, V, V), (V, (2, 2)), (Z, V, Z), (V, np.float16), (M, (3, 3)), (V, Z)]
"""Arguments that are tried in turn, until two calls succeed."""

GATHER = lax.GatherDimensionNumbers((1,), (0,), (0,))
SCATTER = lax.ScatterDimensionNumbers((1,), (0,), (0,))
ROWS, AT = floats(2, 3), np.asarray([[0], [2]], np.int32)
CONVOLUTION = (Q, floats(3, 2, 2, 2), (1, 1), "SAME")

SAMPLES = {
    "jax.numpy": {
        "apply_along_axis": [(jnp.sort, 0, M)], "apply_over_axes": [(jnp.sum, M, (0,))],
        "bincount": [(I, V, {"length": 4})], "choose": [(I, [V, V, V, V], {"mode": "clip"})],
        "dsplit": [(T, 2)], "fill_diagonal": [(M, Z, {"inplace": False})], "polyfit": [(V, V, 1)],
        "put": [(V, I, V, {"inplace": False})],
        "put_along_axis": [(M, I[:3].reshape(3, 1), M[:, :1], 1, {"inplace": False})],
        "permute_dims": [(T, (1, 0, 2))],
        "ravel_multi_index": [((I, I), (4, 4), {"mode": "clip"})], "unpackbits": [(I.astype(np.uint8),)],
        "place": [(V, B, V, {"inplace": False})],
        "piecewise": [(V, [V > 0.3], [jnp.negative, jnp.abs])], "select": [([B], [V])], "searchsorted": [(V, V)],
        "bitwise_count": [(I,)], "packbits": [(B,)], "pad": [(V, 2, "linear_ramp"), (V, 2, "reflect")],
        "median": [(M, 1)], "quantile": [(V, 0.3)], "take": [(V, I), (V, I, 0)], "where": [(B, V, V)],
        "interp": [(V, V, V)], "unwrap": [(V,)], "clip": [(V, 0.2, 0.4)], "angle": [(COMPLEX,)],
    },
    "jax.nn": {"scaled_dot_general": [(M, M, (((1,), (0,)), ((), ())))], "dot_product_attention": [
        (floats(1, 2, 2, 4),) * 3], "one_hot": [(I, 4)]},
    "jax.lax": {
        "argmax": [(V, 0, np.int32)], "argmin": [(V, 0, np.int32)],
        "associative_scan": [(jnp.add, V), (jnp.maximum, V)],
        "broadcast_in_dim": [(V, (2, 4), (1,))], "concatenate": [([V, V], 0)],
        "cond": [(B[3], jnp.negative, jnp.abs, V)], "conv": [CONVOLUTION], "conv_general_dilated": [CONVOLUTION],
        "conv_general_dilated_local": [(Q, floats(3, 8, 3, 3), (1, 1), "VALID", (2, 2))],
        "conv_general_dilated_patches": [(Q, (2, 2), (1, 1), "SAME")], "conv_with_general_padding": [
            (Q, floats(3, 2, 2, 2), (1, 1), ((1, 0), (0, 1)), (1, 1), (1, 1))],
        "conv_transpose": [(floats(1, 4, 4, 2), floats(2, 2, 2, 3), (2, 2), "SAME")],
        "custom_linear_solve": [(lambda v: 2 * v, V, lambda _, b: b / 2, lambda _, b: b / 2)],
        "custom_root": [(lambda v: v - 1, Z, lambda f, v: v, lambda g, y: y)],
        "dot_general": [(M, M, (((1,), (0,)), ((), ())))], "dynamic_slice": [(V, (I[0],), (2,))],
        "dynamic_update_index_in_dim": [(V, Z, I[0], 0)], "dynamic_update_slice": [(V, V[:2], (I[0],))],
        "dynamic_update_slice_in_dim": [(V, V[:2], I[0], 0)], "expand_dims": [(V, (0,))],
        "fft": [(COMPLEX, "FFT", (4,)), (V, "RFFT", (4,))], "fori_loop": [(0, 3, lambda i, v: 2 * v, V), (
            0, I[2], lambda i, v: 2 * v, V)], "gather": [(M, AT, GATHER, (1, 3))], "imag": [(COMPLEX,)],
        "real": [(COMPLEX,)], "index_take": [(M, (I[:2],), [0])], "map": [(jnp.sort, M)],
        "pad": [(V, Z, ((1, 1, 1),))], "ragged_dot": [(M, floats(2, 3, 3), I[1:3])],
        "reduce": [(V, Z, jnp.add, (0,)), (V, Z, jnp.multiply, (0,))],
        **{f"reduce_{name}": [(V, (0,))] for name in ("max", "min", "prod", "sum")},
        **{f"reduce_{name}": [(B, (0,))] for name in ("and", "or", "xor")},
        "reduce_precision": [(V, 5, 10)], "reduce_window": [(V, Z, lax.add, (2,), (1,), "SAME"), *(
            (V, start, operation, (2,), (1,), "SAME") for start, operation in (
                (0.0, lax.add), (-np.inf, lax.max), (np.inf, lax.min)))], "rev": [(V, (0,))],
        "scan": [(lambda c, x: (c + x, c), Z, V)],
        "scatter_apply": [(M, AT, jnp.negative, SCATTER, {"update_shape": (2, 3)})],
        **{f"scatter{name}": [(M, AT, ROWS, SCATTER)] for name in ("", "_add", "_max", "_min", "_mul", "_sub")},
        "slice": [(V, (1,), (3,))], "squeeze": [(V[:1], (0,))], "switch": [(I[0], [jnp.negative, jnp.abs], V)],
        "transpose": [(M, (1, 0))], "while_loop": [(lambda v: v[0] < 1, lambda v: 2 * v, V)],
        "top_k": [(V, 2), (M, 2)], "approx_max_k": [(V, 2)], "approx_min_k": [(V, 2)], "tile": [(V, (2,))],
        "rng_uniform": [(Z, Z + 1, (2,))], "optimization_barrier": [(V,)], "stop_gradient": [(V,)],
        "integer_pow": [(V, 3)], "clamp": [(Z, V, Z)], "sort": [(V,), ((V, V),)], "cumsum": [(V,)],
    },
}
"""Arguments for functions that the usual ones do not fit, beside those."""

SKIPPED = {
    "jax.numpy": {
        # no arrays in: numbers, files, text
        "arange", "array_repr", "array_str", "bartlett", "blackman", "diag_indices", "einsum_path", "eye",
        "from_dlpack", "frombuffer", "fromfile", "fromfunction", "fromiter", "frompyfunc", "fromstring", "full",
        "get_printoptions", "hamming", "hanning", "identity", "load", "mask_indices", "printoptions", "promote_types",
        "result_type", "save", "savez", "set_printoptions", "tri", "tril_indices", "triu_indices", "vectorize",
        # shapes that depend on values: these need concrete arrays
        "argwhere", "extract", "flatnonzero", "intersect1d", "nonzero", "roots", "setdiff1d", "setxor1d", "trim_zeros",
        "union1d", "unique", "unique_all", "unique_counts", "unique_inverse", "unique_values", "compress"},
    "jax.nn": {"get_scaled_dot_general_config", "scaled_matmul"},      # the latter for accelerators
    "jax.lax": {
        # no arrays in, or shapes and types alone
        "ConvGeneralDilatedDimensionNumbers", "PrecisionLike", "DotDimensionNumbers", "after_all", "broadcasted_iota",
        "conv_dimension_numbers", "conv_general_permutations", "conv_general_shape_tuple", "conv_shape_tuple",
        "conv_transpose_shape_tuple", "dtype", "empty", "full", "iota", "padtype_to_pads", "reduce_window_shape_tuple",
        # several devices
        "all_gather", "all_to_all", "axis_index", "axis_size", "pbroadcast", "pcast", "pmean", "ppermute", "precv",
        "psend",
        "pshuffle", "psum_scatter", "psum_scatter_start", "pswapaxes", "ragged_all_to_all", "with_sharding_constraint",
        # functions of functions, called in the tests of rules
        "composite", "platform_dependent", "ragged_dot_general"},
}


def functions(module):
    """The names of a module's public functions."""
    return [name for name, value in vars(module).items() if not name.startswith("_") and callable(value)
            and not inspect.isclass(value)] + [name for name in dir(module) if name not in vars(module)]


@functools.cache
def emitted(module, name):
    """The primitives that calls of a function emit, or None where no call succeeds."""
    function, own = getattr(module, name), SAMPLES[module.__name__].get(name, [])
    names, successes = set(), 0
    for number, args in enumerate(itertools.chain(own, TRIED)):
        if successes >= 2 and number >= len(own):
            break
        try:
            with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
                warnings.simplefilter("ignore")
                names |= primitives(traced(function, args))
            successes += 1
        except Exception:      # arguments that do not fit
            continue
    return frozenset(names) if successes else None


def traced(function, args):
    """The jaxpr of a call, with arrays as its arguments."""
    leaves, structure = jax.tree.flatten(args)
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, np.ndarray | np.generic)]

    def call(*values):
        full = list(leaves)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        args = jax.tree.unflatten(structure, full)
        return function(*args[:-1], **args[-1]) if isinstance(args[-1], dict) else function(*args)
    return jax.make_jaxpr(call)(*(leaves[i] for i in moving)).jaxpr


def primitives(jaxpr):
    """The names of all operations in a jaxpr and in those within it."""
    inner = (opened(part)[0] for eqn in jaxpr.eqns for part in closed(eqn.params))
    return {eqn.primitive.name for eqn in jaxpr.eqns}.union(*map(primitives, inner))
