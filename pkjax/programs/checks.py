"""What is checked of a network's numbers when it is read: parameters, masks, and the arrays that its function holds.

None of it can be checked of arrays that are traced, under ``jit`` or ``vmap``; there it is left out.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pkjax.programs.program import BoundProgram
from pkjax.trees import check_finite, is_floating, leaf_names

__all__ = ["HOLDS", "REMEDY", "all_finite", "check_constants", "check_parameters", "check_result", "check_some_kept",
           "empty_constants", "unfit_constants"]


def check_parameters(params: PyTree) -> None:
    """Raise ValueError naming a leaf of the parameters that does not hold real, finite numbers."""
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            raise ValueError(f"params leaf {name!r} is a {type(leaf).__name__}, not an array: functions of a network "
                             "take (apply_fn, params, x), in this order") from None
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(f"params leaf {name!r} is complex ({dtype}): parameters are real numbers; pass real and "
                             "imaginary parts as two leaves")
    check_finite(params, "params")


def check_some_kept(masks: PyTree | None, params: PyTree) -> None:
    """Raise ValueError where masks keep no entry of a floating-point leaf (traced masks pass).

    Examples:
        >>> check_some_kept({"kernel": jnp.zeros((3, 2), bool)}, {"kernel": jnp.ones((3, 2))})
        Traceback (most recent call last):
        ...
        ValueError: masks keep no parameter: all 6 are masked, so that nothing is left of the network. ...
    """
    pairs = zip(jax.tree.leaves(masks), jax.tree.leaves(params), strict=True) if masks is not None else ()
    held = [mask for mask, leaf in pairs if is_floating(leaf)]
    total = sum(np.size(mask) for mask in held)
    if total and not any(isinstance(mask, jax.core.Tracer) or np.asarray(mask).any() for mask in held):
        raise ValueError(f"masks keep no parameter: all {total:,} are masked, so that nothing is left of the network. "
                         "Masks are True where a weight is kept; prune less, or in more steps")


def check_constants(fn: BoundProgram, params: PyTree, x: PyTree) -> None:
    """Raise ValueError where arrays that a network closes over hold NaN or infinity and its outputs are NaN for it.

    Such numbers may be harmless, where ``where`` replaces them or a maximum leaves them out. So the network is
    evaluated, but only where there are any.

    Args:
        fn: the network's program.
        params: its parameters.
        x: shapes and types of its inputs.
    """
    unfit = unfit_constants(fn)
    if not unfit or any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves((fn, params))):
        return
    with jax.ensure_compile_time_eval():
        for sign in (1, -1):
            inputs = jax.tree.map(
                lambda s, sign=sign: np.full(s.shape, sign if is_floating(s) else (sign > 0), s.dtype), x)
            if not np.isfinite(np.asarray(_outputs(fn, params, inputs), np.float64)).all():
                raise ValueError(f"apply_fn closes over {unfit[0]}, and its outputs are not finite")


_outputs = jax.jit(lambda fn, params, x: fn(params, x))


def unfit_constants(fn: BoundProgram) -> list[str]:
    """Describe the arrays of a program that hold NaN or infinity (traced ones pass)."""
    unfit = []
    for value in _constants(fn):
        if is_floating(value):
            values = np.asarray(value)
            bad = int((~np.isfinite(values if values.dtype.kind == "f" else values.astype(np.float32))).sum())
            if bad:
                unfit.append(f"an array {_told(value)} that holds {bad} values that are NaN or infinite")
    return unfit


REMEDY = "pass float64 parameters and inputs (with jax_enable_x64), or rescale the weights"
"""What to do about numbers that leave the range of their type."""
HOLDS = "the network itself makes NaN or infinity, as 1/√0 of a variance of 0 without epsilon: mend its constants"
"""What stands behind numbers that are not finite although their exponents are kept aside."""


def check_result(result: PyTree, what: str, remedy: str = REMEDY) -> None:
    """Raise FloatingPointError where a result is not finite (traced ones pass)."""
    for leaf in jax.tree.leaves(result):
        if not isinstance(leaf, jax.core.Tracer) and is_floating(leaf) and not all_finite(leaf):
            raise FloatingPointError(f"{what} is not finite: numbers on the way to it are outside of what {leaf.dtype} "
                                     f"holds: {remedy}")


def all_finite(leaf: Any) -> bool:
    """Whether an array holds neither NaN nor infinity; NumPy compiles nothing for one that it can read in place.

    Examples:
        >>> all_finite(jnp.array([1.0, jnp.inf]))
        False
    """
    local = not isinstance(leaf, jax.Array) or all(d.platform == "cpu" for d in leaf.devices())
    return bool(np.isfinite(np.asarray(leaf)).all() if local and np.dtype(leaf.dtype).kind == "f" else _finite(leaf))


_finite = jax.jit(lambda leaf: jnp.isfinite(leaf).all())


def empty_constants(fn: BoundProgram) -> list[str]:
    """Describe the arrays of a program that have no rows: batches without an example."""
    return [_told(value) for value in _constants(fn) if np.shape(value)[:1] == (0,)]


def _constants(fn: BoundProgram) -> Sequence[Any]:
    held = (*fn.constants, *fn.program.consts)
    return [v for v in held if isinstance(v, jax.Array | np.ndarray | np.generic) and not isinstance(v, jax.core.Tracer)
            and not jnp.issubdtype(v.dtype, jax.dtypes.extended)]


def _told(value: Any) -> str:
    return f"{value.dtype}{list(np.shape(value))}"
