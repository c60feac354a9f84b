"""Operations without a rule, and why: what errors say of them.

Together with the rules these are all primitives that functions of ``jax.numpy``, ``jax.nn`` and ``jax.lax`` emit. An
operation that is in neither table is refused too, without a reason.
"""

__all__ = ["HOMOGENEITY", "REFUSED", "UNLIKE_SIGNALS"]

HOMOGENEITY = "is not positively homogeneous"
"""The reason of functions that act entry by entry."""
_REASONS = {
    HOMOGENEITY: (
        "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "cos", "cosh",
        "cumlogsumexp", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "igamma", "igamma_grad_a",
        "igammac", "lgamma", "log", "log1p", "log2", "logistic", "one_minus_square", "polygamma", "polynomial", "pow",
        "random_gamma_grad", "regularized_incomplete_beta", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh", "zeta"),
    "rounds its operand, whose derivative is 0": ("ceil", "floor", "nextafter", "rem", "round"),
    "reads a signal's bits": ("bitcast_convert_type",),
    "multiplies entries of one array with each other": ("cumprod", "reduce_prod"),
    "stops the gradient, so that paths through it would have none": ("stop_gradient",),
    "approximates a selection": ("approx_top_k",),
    "computes with complex numbers": ("complex", "conj", "fft", "imag", "real"),
    "solves equations or decomposes matrices, which divides by entries": (
        "cholesky", "custom_linear_solve", "eig", "eigh", "hessenberg", "householder_product", "lu",
        "lu_pivots_to_permutation", "qr", "schur", "svd", "triangular_solve", "tridiagonal", "tridiagonal_solve"),
    "contracts groups of rows, which JAX does not batch over examples": ("ragged_dot_general",),
    "multiplies two quantised arrays": ("scaled_dot",),
    "loops until a condition holds: only loops of a fixed length (lax.scan, lax.fori_loop) have paths": ("while",),
    "joins the values of several devices": (
        "all_gather", "all_gather_invariant", "all_to_all", "axis_index", "pbroadcast", "pcast", "pmax", "pmin",
        "ppermute", "precv", "psend", "psum", "psum_invariant", "pvary", "ragged_all_to_all", "reduce_scatter",
        "shard_map"),
    "is expanded by JAX only when it compiles": ("call_hi_primitive",),
    "runs code that JAX cannot see": ("io_callback", "pallas_call", "pure_callback", "ffi_call", "custom_partitioning"),
    "is defined for whole numbers and booleans, or orders effects": (
        "after_all", "and", "clz", "create_token", "dce_sink", "empty", "empty2", "eq_to", "iota", "le_to", "lt_to",
        "mulhi", "not", "or", "platform_index", "population_count", "random_bits", "random_clone", "random_fold_in",
        "random_gamma", "random_seed", "random_split", "random_unwrap", "random_wrap", "reduce_and", "reduce_or",
        "reduce_xor", "rng_bit_generator", "rng_uniform", "shift_left", "shift_right_arithmetic", "shift_right_logical",
        "threefry2x32", "xor"),
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names}
"""Name of a primitive → why no rule reads it where an operand is a path sum."""
UNLIKE_SIGNALS = frozenset(name for name, reason in REFUSED.items() if reason.startswith((
    HOMOGENEITY, "rounds", "reads a signal's bits", "stops", "is defined for whole")))
"""Operations that are not linear, or cut the signal off: with frozen gates, paths start at the parameter after them.
Others without a rule might be linear, or multiply signals."""
