"""What is known of a network's arrays before a program is traced: which hold nothing but zeros, which are near 1.

Programs on scaled values are smaller for it: zeros, such as biases at initialisation, have no say in any exponent, and
products of numbers near 1 leave the range of their type only after a while. It is part of what a compiled program is
kept by.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pkjax.network import Network
from pkjax.paths.exponents import NEAR, NOTHING, Scaled, Scaling, raised
from pkjax.trees import is_floating

__all__ = ["Magnitudes", "assumed", "magnitudes", "size_of"]

SMALLEST = -16.0
"""The binary logarithm of the largest entry of an array that is known to be near 1, at least."""


@dataclass(frozen=True)
class Magnitudes:
    """What is known of the sizes of a network's parameters, its constants and an input; hashable."""

    leaves: tuple[str, ...]
    constants: tuple[str, ...]
    start: str
    lean: bool
    """Whether mantissas are brought back as seldom as possible: all sizes are known, and what follows is checked."""
    bound: float = NEAR
    """The binary logarithm that no entry of a constant exceeds, in steps, so that it seldom makes another program."""

    @property
    def apart(self) -> bool:
        """Whether powers of a parameter may leave the range of their type."""
        return "extreme" in self.leaves

    @property
    def careful(self) -> "Magnitudes":
        """The same for a program in which every mantissa is brought back."""
        return replace(self, lean=False)

    def scaling(self, skip_zeros: bool, dtype: Any) -> Scaling:
        """How far mantissas of a type may grow."""
        return Scaling(skip_zeros, dtype, self.bound) if self.lean else Scaling(skip_zeros)

    def settled(self, network: Network) -> Network:
        """The network with the zeros among its arrays written down, so that a trace knows of them."""
        def written(size: str, value: Any) -> Any:
            return np.zeros(value.shape, value.dtype) if size == "zero" else value
        leaves, structure = jax.tree.flatten(network.params)
        params = jax.tree.unflatten(structure, map(written, self.leaves, leaves))
        constants = tuple(map(written, self.constants, network.fn.constants))
        return replace(network, params=params, fn=replace(network.fn, constants=constants))

    def held(self, i: int, leaf: Any, power: int, apart: bool = False) -> Scaled:
        """Hold |leaf|^power of the parameter i: with its exponent kept apart where the sizes ask for it.

        With ``apart`` it is wherever the parameter is not known to be near 1.
        """
        size = self.leaves[i]
        if size == "zero":
            return Scaled(leaf, NOTHING, 0.0)
        if size != "near" and (apart or self.apart):
            return raised(leaf, power)
        return Scaled(jnp.abs(leaf) ** power, 0, power * NEAR if size == "near" else math.nan)

    def input(self, value: Array) -> Scaled:
        """Hold the input."""
        return Scaled(value, 0, NEAR if self.start == "near" else math.nan)


_ASSUMED: ContextVar[tuple[tuple[Any, str], ...]] = ContextVar("assumed", default=())


@contextlib.contextmanager
def assumed(leaves: Sequence[Any], sizes: Sequence[str]) -> Iterator[None]:
    """Let traced arrays be of sizes that are known from outside, or smaller; whoever does so repeats what is not sure.

    Examples:
        >>> with assumed(["not an array"], ["near"]):
        ...     size_of(jnp.ones(2))
        'near'
    """
    before = _ASSUMED.set((*_ASSUMED.get(), *zip(leaves, sizes, strict=True)))
    try:
        yield
    finally:
        _ASSUMED.reset(before)


def magnitudes(network: Network, x: Any, power: int) -> Magnitudes:
    """Look at a network's arrays and an input, of which a program is to take powers up to ``power``.

    Nothing is known of traced arrays.

    Examples:
        >>> from pkjax.network import read
        >>> w, x = {"a": jnp.ones((2, 3)), "b": jnp.zeros(3)}, jnp.ones((1, 2))
        >>> magnitudes(read(lambda w, x: x @ w["a"] + w["b"], w, x), x, 2).leaves
        ('near', 'zero')
    """
    leaves = jax.tree.leaves(network.params)
    sizes = tuple(size_of(leaf, power) for leaf in leaves)
    constants, start = network.fn.constants, size_of(x)
    # Who assumes sizes of traced parameters repeats what is not sure of traced constants, too.
    known = any(map(_traced, leaves)) or not any(map(_traced, constants))
    lean = known and not _traced(x) and start != "zero" and {*sizes} <= {"zero", "near", "whole"}
    return Magnitudes(sizes, tuple(map(size_of, constants)), start, lean, _bound(constants))


def _traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def _bound(constants: Sequence[Any]) -> float:
    """The binary logarithm that no entry of these arrays exceeds: NEAR, or so many times 4 more.

    Of traced ones, such as coefficients in a pruning program, nobody knows: they are taken to stay below 1024.
    """
    if any(map(_traced, constants)):
        return NEAR + 8
    peaks = [float(np.abs(np.asarray(c)).max(initial=0)) for c in constants if is_floating(c)]
    peak = max((p for p in peaks if math.isfinite(p)), default=0.0)
    return NEAR + 4 * max(math.ceil((math.log2(peak) - NEAR) / 4), 0) if peak else NEAR


def size_of(value: Any, power: int = 1) -> str:
    """Say of which size the largest entry of an array is.

    "zero" where a scalar or a vector, such as biases, is all 0; "near" up to 2^2, and not below 2^−16 or all 0;
    "extreme" where its power may leave the range of its type; "whole" where it holds no floating-point numbers; and
    else, or where it is traced, "unknown".

    Examples:
        >>> size_of(jnp.zeros(2)), size_of(jnp.ones(2)), size_of(np.float32([1e-30, 0]), 4), size_of(jnp.array(1e9))
        ('zero', 'near', 'extreme', 'unknown')
    """
    if not is_floating(value):
        return "whole"
    if isinstance(value, jax.core.Tracer):
        return next((size for leaf, size in reversed(_ASSUMED.get()) if leaf is value), "unknown")
    values = np.asarray(value)
    peak = float(np.abs(values).max(initial=0))
    if not peak:      # a matrix of zeros is one that masks have emptied: other masks are the same program
        return "zero" if values.ndim < 2 else "near"
    if not math.isfinite(peak):
        return "unknown"
    size = math.log2(peak)
    if SMALLEST <= size <= NEAR:
        return "near"
    return "extreme" if abs(size) * power > float(jnp.finfo(values.dtype).maxexp) * 3 / 4 else "unknown"
