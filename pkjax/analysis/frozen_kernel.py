"""The tangent kernel with frozen gates, and what it lacks of the tangent kernel itself, leaf by leaf.

With f = Σ_p c_p v_p(θ) a_p(x, θ) x_s the gradient has two terms, ∇f = J_v^f J_θ^v + (the term through ∂a/∂θ). The first
alone makes Θ_frozen = J_v^f Π J_v^fᵀ, of which Theorem 1 speaks. Piecewise constant gates leave only the first term.

A coefficient a_p is a product of several, and each is split in two: its largest magnitude on the reference, to which it
is opened, belongs to Π, and how far it is open for an example, a number from −1 to 1, to J_v^f. So ReLU's gates,
from 0 to 1, are one case of it; A neither vanishes nor overflows however small the probabilities of attention are, and
no coefficient that is 0 for one example has to be divided by.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from pkjax.analysis.spectra import TangentSpectrum
from pkjax.linalg.memory import default_memory_limit
from pkjax.network import Network, read
from pkjax.path_kernel.gram import floating_entries, floating_leaves, read_paths, with_floating
from pkjax.paths.frozen import coefficient_places, held, opened
from pkjax.tangent_kernel.compilation import compiled
from pkjax.trees import ApplyFn, Choice, is_floating, leaf_names

__all__ = ["FrozenKernel", "FrozenLeaf", "Split", "frozen_kernel", "split_gates"]

ROWS = 1024
"""Rows NK of the kernels up to which their difference is taken over all examples."""


class FrozenLeaf(NamedTuple):
    """What the gradients of one leaf add to Θ, and how much of it is not in Θ_frozen."""

    name: str
    trace: float
    """The leaf's part of Tr Θ."""
    frozen_trace: float
    """The leaf's part of Tr Θ_frozen."""
    rest: float
    """‖Θ − Θ_frozen‖_F / ‖Θ‖_F of the leaf's parts of both."""
    rest_of_trace: float
    """(Tr Θ − Tr Θ_frozen) / Tr Θ of these parts; negative where the second is the larger."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FrozenKernel:
    """Θ_frozen, the tangent kernel with gates held, and the rest of Θ."""

    lam: Float[np.ndarray, "l"]
    """λ of Θ_frozen, descending, as many as of Θ."""
    trace: float
    """Tr Θ_frozen."""
    rest: float
    """‖Θ − Θ_frozen‖_F / ‖Θ‖_F."""
    rest_of_trace: float
    """(Tr Θ − Tr Θ_frozen) / Tr Θ; negative where the second is the larger."""
    samples: int
    """The first examples of the batch, over which the Frobenius norms are taken: all of them up to NK = 1024."""
    leaves: tuple[FrozenLeaf, ...]
    """The same for each leaf that trains."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, lists and strings that JSON can represent."""
        def plain(values: dict[str, Any]) -> dict[str, Any]:
            return {name: None if isinstance(v, float) and not np.isfinite(v) else v for name, v in values.items()}
        leaves = [plain(leaf._asdict()) for leaf in self.leaves]
        return {**plain(vars(self)), "lam": self.lam.tolist(), "leaves": leaves}


class Split(NamedTuple):
    """A network's coefficients, split between Π and J_v^f."""

    opened: ApplyFn
    """The network with its coefficients open: Π is its path kernel."""
    start: PyTree
    """The input of that path kernel."""
    units: dict[int, Array]
    """The largest magnitudes of the coefficients, by their places among the recorded gates: J_v^f counts in them."""
    held: Network
    """The network whose gradients are J_v^f J_θ^v."""


def split_gates(apply_fn: ApplyFn, params: PyTree, reference: PyTree, x: PyTree, network: Network, *,
                masks: PyTree | None, trainable: Choice) -> Split:
    """Split the coefficients of a network that has been read as a sum over paths."""
    signals, z = network.batch(reference, "reference"), network.batch(x, "x")
    # The coefficients of integers and of trees are those of the program on the signals that they make.
    on_signals = apply_fn if network.raw is None else partial(_of_signals, apply_fn, network.inputs)
    open_fn, largest = opened(on_signals, params, signals, masks)
    if not largest:
        return Split(apply_fn, x, {}, network)
    units = dict(zip(coefficient_places(network), largest, strict=True))
    return Split(open_fn, z, units, read_paths(held(network.fn), network.params, z, masks, trainable)[0])


def _of_signals(apply_fn: ApplyFn, inputs: tuple[Any, tuple[Any, ...]], params: PyTree, signals: Array) -> Array:
    """Evaluate a network on the signals of its inputs, of which structure and shapes are given."""
    structure, shapes = inputs
    example = jax.tree.unflatten(structure, [
        jax.ShapeDtypeStruct((1, *s.shape), signals.dtype if is_floating(s) else s.dtype) for s in shapes])
    fn = read(apply_fn, params, example, paths=True).fn
    return jax.vmap(lambda one: fn(params, one[None])[0])(signals)


def frozen_kernel(network: Network, held: Network, signals: Array, tangent: TangentSpectrum, frozen: TangentSpectrum
                  ) -> FrozenKernel:
    """Compare Θ with Θ_frozen, whose spectra are given, by blocks of their Jacobians that fit memory."""
    trained = [bool(np.any(np.asarray(t))) for t in floating_entries(network)]
    leaves, count, outputs = floating_leaves(network), len(signals), network.size
    row = 8 * outputs * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    size = max(1, min(count, default_memory_limit() // row, ROWS // outputs))
    samples = count if count * outputs <= ROWS else max(1, ROWS // outputs // size) * size
    traces, squares = np.zeros((2, len(leaves))), np.zeros((2, len(leaves) + 1))

    def rows(start: int) -> tuple[list[Array], list[Array]]:
        examples = signals[start:start + size]
        return _jacobian(network, examples), _jacobian(held, examples)

    for start in range(0, count, size):
        these = rows(start)
        for other in range(0, start + 1 if start < samples else 0, size):
            those, total = these if other == start else rows(other), np.zeros(())
            for i, (a, b) in enumerate(zip(zip(*these, strict=True), zip(*those, strict=True), strict=True)):
                blocks = _products(a, b)
                total = total + blocks
                squares[:, i] += (1 if other == start else 2) * _squares(blocks)
            squares[:, -1] += (1 if other == start else 2) * _squares(total)
        traces += [[float(_squared(leaf)) for leaf in jacobian] for jacobian in these]
    norms, rests = np.sqrt(squares)
    names = [name for name, leaf in zip(leaf_names(network.params), jax.tree.leaves(network.params), strict=True)
             if is_floating(leaf)]
    of_leaves = tuple(
        FrozenLeaf(name, float(whole), float(part), _share(rest, norm), _share(whole - part, whole))
        for name, whole, part, rest, norm, train in zip(names, *traces, rests, norms, trained, strict=False) if train)
    return FrozenKernel(lam=frozen.values, trace=frozen.trace, rest=_share(rests[-1], norms[-1]),
                        rest_of_trace=_share(tangent.trace - frozen.trace, tangent.trace), samples=samples,
                        leaves=of_leaves)


def _share(part: float, whole: float) -> float:
    """Divide; infinite where there is a part of nothing."""
    return float(part / whole) if whole else float(np.copysign(np.inf, part)) if part else 0.0


@compiled()
def _jacobian(network: Network, examples: Array) -> list[Array]:
    """∇f of each leaf, with 0 for what does not train: (NK, entries)."""
    def one(x: Array) -> list[Array]:
        def outputs(p: list[Array]) -> Array:
            return network.fn(with_floating(network, p).params, x[None])[0]
        _, pull = jax.vjp(outputs, floating_leaves(network))
        (rows,) = jax.vmap(pull)(jnp.eye(network.size, dtype=network.fn.out.dtype))
        return [jnp.where(t, r, 0) for t, r in zip(floating_entries(network), rows, strict=True)]
    return [r.reshape(r.shape[0] * r.shape[1], -1) for r in jax.vmap(one)(examples)]


def _products(a: tuple[Array, Array], b: tuple[Array, Array]) -> np.ndarray:
    """Blocks of a leaf's parts of Θ and of Θ_frozen: (2, NK, NK)."""
    return np.stack([np.asarray(_product(x, y), np.float64) for x, y in zip(a, b, strict=True)])


def _squares(blocks: np.ndarray) -> np.ndarray:
    """Squared norms of a part of Θ, and of what that of Θ_frozen is away from it."""
    return np.array([np.sum(blocks[0]**2), np.sum((blocks[0] - blocks[1])**2)])


@jax.jit
def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y.T, precision="highest")


@jax.jit
def _squared(x: Array) -> Array:
    return jnp.sum(x * x)
