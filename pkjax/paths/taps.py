"""Taps: an additive zero at the output of every operation that uses a parameter.

The derivative of the network with respect to a tap is the cotangent δ of that operation's output; with the operation's
other operand h it gives the parameter's gradient. That is all that a per-layer contraction of the NTK needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax.network import read
from pkjax.paths.algebras import TrueValues
from pkjax.paths.convolution import as_columns, as_matrix, patches
from pkjax.paths.interpret import interpret
from pkjax.paths.interpreter import PathSum
from pkjax.programs.meshes import automatic_axes
from pkjax.programs.program import BoundProgram
from pkjax.trees import ApplyFn, is_floating

__all__ = ["Site", "network_sites", "network_tapped", "sites", "tapped"]


@dataclass(frozen=True)
class Site:
    """One use of a parameter leaf by an operation of the network.

    Returned by ``sites``.

    Examples:
        >>> (site,), _ = sites(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((1, 3)))
        >>> site.kind, site.shape, site.operand
        ('dense', (1, 2), (1, 3))
    """

    kind: str
    """"dense" (h @ leaf over h's last axis), "convolution", "elementwise" (a bias or a scale) or "other"."""
    leaf: int
    """The parameter leaf, in flattening order."""
    shape: tuple[int, ...]
    """Shape of the operation's output, and of its tap, for a batch of one."""
    dtype: Any
    """Type of the tap."""
    operand: tuple[int, ...] | None
    """Shape of the operation's other operand h for a batch of one; None where it has none (a bias)."""
    pullback: Callable[[Array | None, Array], Array]
    """(operand h or None, cotangent δ of the output) → cotangent of the leaf, for a batch of one."""
    matrices: "Matrices | None" = None
    """The operation as a product of matrices, where it is one: of a dense layer or an ungrouped convolution."""


class Matrices(NamedTuple):
    """An operation on a batch of one as rows (places, I) times a matrix (I, J) of the leaf's entries."""

    rows: Callable[[Any], Array]
    """Operand h → (places, I); the places of several images one after the other."""
    columns: Callable[[Array], Array]
    """The output, or its cotangent δ → (places, J)."""
    entries: Callable[[Array], Array]
    """What is shaped like the leaf → (I, J)."""


class View(NamedTuple):
    """A parameters-only value as a linear function of one leaf."""

    leaf: int
    fn: Callable[[Array], Array]
    whole: bool


class Held(NamedTuple):
    """The true value of a path sum, and how it depends on a leaf, if it does on one alone."""

    array: Any
    view: View | None


class Tapped(TrueValues):
    """The network as it stands, with a tap at every site."""

    def __init__(self, leaves: Sequence[Any], taps: Sequence[Array] | None):
        super().__init__()
        self.leaves = leaves
        self.taps = taps
        self.sites: list[Site] = []
        self.operands: list[Array | None] = []
        self.uncovered: set[int] = set()

    def lift(self, constant: Any) -> Held:
        """Hold the constant itself; the sites keep it, so that it must outlive the walk."""
        return Held(constant, None)

    def true_value(self, operand: PathSum) -> Any:
        """Return the true value."""
        return operand.value.array

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Held:
        """Multiply by the gate."""
        return Held(self._multiplied(operand.value.array, operand, gate), None)

    def gated_again(self, operand: PathSum, gate: Array) -> Held:
        """Multiply by a gate that stands recorded already."""
        return Held(operand.value.array * gate, None)

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Held:
        """Apply the operation; a parameter added to a signal is a site."""
        arrays = [s.value.array for s in operands]
        out = fn(*arrays)
        parameters = [i for i, s in enumerate(operands) if s.degree and not _varies(s)]

        kinds = [(s.shape, s.dtype) for s in operands]    # what outlives the walk must not hold its values

        def alone(i: int, v: Array) -> Array:
            return fn(*(v if j == i else jnp.zeros(*kind) for j, kind in enumerate(kinds)))
        if not any(map(_varies, operands)) and not getattr(fn, "of_input", False):
            view = operands[parameters[0]].value.view if len(parameters) == 1 else None
            if view is not None:
                i, leaf_to = parameters[0], view.fn
                view = View(view.leaf, lambda leaf: alone(i, leaf_to(leaf)), False)
            return Held(out, view)
        for i in parameters:
            view = operands[i].value.view
            if view is None or op not in ("add", "sub", "add_any"):
                self._uncover(operands[i])
                continue
            # The other operand fills the output's shape, so that adding a parameter needs no operand h.
            pullback = partial(_transposed, self.leaves[view.leaf], view, partial(_added, alone, i))
            out = self._tap("elementwise", view, out, None, pullback)
        return Held(out, None)

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Held:
        """Apply the operation; a parameter that multiplies a signal is a site."""
        out = fn(a.value.array, b.value.array)
        h, w = (a, b) if _varies(a) or not a.degree else (b, a)

        first = h is a

        def use(operand: Any, parameter: Any) -> Array:
            return fn(operand, parameter) if first else fn(parameter, operand)
        view = w.value.view
        if not _varies(h):
            if h.degree or view is None:
                return Held(out, None)
            leaf_to, constant = view.fn, h.value.array
            return Held(out, View(view.leaf, lambda leaf: use(constant, leaf_to(leaf)), False))
        if not w.degree or _varies(w):      # nothing trains, or what does is tapped where it met the input
            return Held(out, None)
        if view is None:
            self._uncover(w)
            return Held(out, None)
        plain = h is a and op == "dot_general" and view.whole and len(w.shape) == 2 and fn.keywords[  # type: ignore[attr-defined]
            "dimension_numbers"] == (((len(h.shape) - 1,), (0,)), ((), ()))
        kind, matrices = "elementwise" if op == "mul" else "other", None
        if plain:
            kind, matrices = "dense", Matrices(_rows, _rows, lambda leaf: leaf)
        elif h is a and op == "conv_general_dilated" and view.whole:
            params = fn.keywords  # type: ignore[attr-defined]
            if params["feature_group_count"] == params["batch_group_count"] == 1:
                kind = "convolution"
                matrices = Matrices(partial(patches, params, w.shape), partial(as_columns, params),
                                    partial(as_matrix, params))
        pullback = partial(_transposed, self.leaves[view.leaf], view, use)
        return Held(self._tap(kind, view, out, h.value.array, pullback, matrices), None)

    def _tap(self, kind: str, view: View, out: Array, h: Array | None, pullback: Callable[..., Array],
             matrices: Matrices | None = None) -> Array:
        n = len(self.sites)
        self.sites.append(Site(kind, view.leaf, out.shape, out.dtype, None if h is None else jnp.shape(h),
                               pullback, matrices))
        self.operands.append(h)
        return out if self.taps is None else out + self.taps[n]

    def _uncover(self, parameter: PathSum) -> None:
        self.uncovered.update(label[0] for label in parameter.degree)


def _transposed(leaf: Any, view: View, use: Callable[[Any, Any], Array], h: Array | None, delta: Array) -> Array:
    """Pull a cotangent of an operation's output back to the leaf."""
    # Not linear_transpose, which knows no scatter at indices that may coincide.
    _, pull = jax.vjp(lambda value: use(h, view.fn(value)), jnp.zeros(leaf.shape, leaf.dtype))
    (cotangent,) = pull(delta)
    return cotangent


def _varies(value: PathSum) -> bool:
    """Whether a value differs between examples."""
    return value.on_input or value.of_input


def _rows(signal: Array) -> Array:
    return signal.reshape(-1, signal.shape[-1])


def _added(alone: Callable[[int, Array], Array], i: int, h: None, parameter: Array) -> Array:
    return alone(i, parameter)


def _walk(fn: BoundProgram, params: PyTree, x: ArrayLike, taps: Sequence[Array] | None) -> tuple[Tapped, Array]:
    leaves = jax.tree.leaves(params)
    algebra = Tapped([jax.ShapeDtypeStruct(jnp.shape(v), jnp.result_type(v)) for v in leaves], taps)
    out = interpret(algebra, fn, params, x, lambda i, leaf: Held(leaf, View(i, lambda v: v, True)),
                    lambda z: Held(z, None))
    if not _varies(out):
        algebra._uncover(out)
    return algebra, out.value.array


@automatic_axes
def sites(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]] | jax.ShapeDtypeStruct
          ) -> tuple[tuple[Site, ...], dict[int, tuple[int, ...]]]:
    """Find where a network uses its parameters.

    Args:
      apply_fn: the network.
      params: its parameters θ (shapes suffice).
      x: (1, *input), a batch of one (its shape suffices).

    Returns:
      The sites, in the order of the operations, and for each covered leaf (by flattening order) its sites. A leaf that
      is absent from the dictionary enters some operation in another way (multiplied by another parameter, say).

    Raises:
      NotPathNetworkError: an operation has no paths.

    Source: δ is the error signal of back-propagation (Rumelhart, Hinton and Williams 1986).

    Examples:
        >>> import jax.numpy as jnp
        >>> w = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
        >>> found, of_leaf = sites(lambda w, x: x @ w["a"] + w["b"], w, jnp.ones((1, 3)))
        >>> [s.kind for s in found], of_leaf
        (['dense', 'elementwise'], {0: (0,), 1: (1,)})
    """
    network = read(apply_fn, params, x)
    return network_sites(network.fn, network.params, network.example)


def network_sites(fn: BoundProgram, params: PyTree, x: Any
                  ) -> tuple[tuple[Site, ...], dict[int, tuple[int, ...]]]:
    """Find the sites of a network that has been read; under a transformation they live as long as its trace does."""
    Found = tuple[tuple[Site, ...], dict[int, tuple[int, ...]]]
    leaves, treedef = jax.tree.flatten(params)
    moving = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]
    # Pullbacks keep what parameters are multiplied by and gathered at: constants and integers stay what they are.
    held = [jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in leaves]
    known: list[Found] = []
    abstract = any(isinstance(c, jax.ShapeDtypeStruct) for c in fn.constants)

    def walk(fn: BoundProgram, values: Sequence[Any], z: Any) -> Array:
        full = list(held)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        walked, out = _walk(fn, jax.tree.unflatten(treedef, full), z, None)
        # Of shapes alone there are no pullbacks, which would hold the constants.
        kept = tuple(replace(s, pullback=_no_pullback) if abstract else s for s in walked.sites)
        known.append((kept, {i: tuple(n for n, s in enumerate(kept) if s.leaf == i)
                              for i in range(len(leaves)) if i not in walked.uncovered}))
        return out

    floating = [leaves[i] for i in moving]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((fn, params))):
        walk(fn, [jnp.zeros(jnp.shape(v), jnp.result_type(v)) for v in floating], jnp.zeros(jnp.shape(x), x.dtype))
    elif abstract:
        jax.eval_shape(walk, fn, floating, x)
    else:
        jax.eval_shape(partial(walk, fn), floating, x)
    return known[-1]


def _no_pullback(h: Array | None, delta: Array) -> Array:
    raise ValueError("the sites of a program that is bound to shapes have no pullbacks")


@automatic_axes
def tapped(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], taps: Sequence[Float[Array, "..."]]
           ) -> tuple[Float[Array, "N ..."], tuple[Float[Array, "..."] | None, ...]]:
    """Evaluate a network with taps added at its sites; return its outputs and each site's operand h (None for a bias).

        ∂f/∂tap = δ, the cotangent of the operation's output;   ∂f/∂θ = Σ h δᵀ over the places of a dense layer

    Args:
        apply_fn: the network.
        params: its parameters θ.
        x: (1, *input), a batch of one.
        taps: one for each site, of its shape; zeros leave the network as it is.

    Returns:
        The outputs (1, K), and the operands in the order of ``sites``.

    Raises:
        NotPathNetworkError: an operation has no paths.

    Examples:
        >>> import jax.numpy as jnp
        >>> w = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
        >>> f, (h, _) = tapped(lambda w, x: x @ w["a"] + w["b"], w, jnp.ones((1, 3)), [jnp.zeros((1, 2))] * 2)
        >>> f, h
        (Array([[4., 4.]], ...), Array([[1., 1., 1.]], ...))
    """
    network = read(apply_fn, params, x)
    return network_tapped(network.fn, network.params, network.batch(x, "x"), taps)


def network_tapped(fn: BoundProgram, params: PyTree, x: Array, taps: Sequence[Array]
                   ) -> tuple[Array, tuple[Array | None, ...]]:
    """Evaluate a network that has been read with taps added at its sites."""
    algebra, out = _walk(fn, params, x, taps)
    return out, tuple(algebra.operands)
