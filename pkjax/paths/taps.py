"""Taps: an additive zero at every operation that uses a parameter.

The derivative of the network with respect to a tap is the cotangent δ of what it is added to; with the operation's
other operand h it gives the parameter's gradient. That is all that a per-layer contraction of the NTK needs, and it
exists for every network: a value that the input has a part in is evaluated as it stands, whatever the operation, and
a value that is made of parameters alone is followed to where it meets such a one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax.network import read
from pkjax.paths.activations import pooled
from pkjax.paths.convolution import prefers_products, products
from pkjax.paths.interpreter import evaluate
from pkjax.paths.refusals import HOMOGENEITY, REFUSED
from pkjax.paths.sites import Site, View, matrices_of, pulled
from pkjax.programs.equations import CALLS, closed, equation_function, live_equations, opened
from pkjax.programs.meshes import automatic_axes
from pkjax.programs.program import BoundProgram, Hoisted
from pkjax.trees import ApplyFn, is_floating

__all__ = ["network_sites", "network_tapped", "sites", "tapped"]

WHOLE = ("reshape", "transpose", "squeeze", "expand_dims", "copy", "copy_p")
"""Operations that move entries."""
AFFINE = (*WHOLE, "broadcast_in_dim", "slice", "rev", "concatenate", "pad", "reduce_sum", "cumsum", "neg", "stack",
          "tile", "split", "unstack", "convert_element_type", "add", "add_any", "sub", "mul", "dot_general",
          "conv_general_dilated", "gather", "dynamic_slice", "dynamic_update_slice", "scatter", "scatter-add",
          "select_n", "reduce_window_sum", "sharding_constraint", "mesh_cast", "reshard")
"""Operations that are affine in each of their floating-point operands, the others held fixed."""
SUMS = ("add", "add_any", "sub")
PRODUCTS = ("mul", "dot_general", "conv_general_dilated")
"""Operations that a parameter and a signal enter linearly."""
MEETINGS = (*PRODUCTS, "div")
"""Operations that are curved where both operands are made of the same, as in normalisations."""
MATRICES = {"dot_general": "dense", "conv_general_dilated": "convolution", "gather": "lookup"}
"""Operations that may be products of matrices → the kind of their sites where they are."""
CURVED = frozenset(name for name, reason in REFUSED.items() if reason == HOMOGENEITY) | {"integer_pow", "square"}
POOLINGS = ("reduce_window_max", "reduce_window_min")
UNROLLED = 128
"""Steps up to which a loop over stacked matrices is read step by step, with sites in each."""


@dataclass(frozen=True, eq=False)
class Held:
    """A value of the network."""

    array: Any
    varies: bool
    """Whether the input has a part in it, so that it differs between examples."""
    leaves: frozenset[int] = frozenset()
    """The parameter leaves that a value is made of in which the input has no part."""
    view: View | None = None
    """How it depends on a leaf, if it is affine in one and made of no other."""


class Walk:
    """Evaluates a network operation by operation, and taps it where parameters meet the signal."""

    def __init__(self, fn: BoundProgram, leaves: Sequence[Any], taps: Sequence[Array] | None, apart: Iterable[int]):
        self.constants = fn.constants
        self.leaves = [jax.ShapeDtypeStruct(jnp.shape(v), jnp.result_type(v)) for v in leaves]
        self.taps = taps
        self.sites: list[Site] = []
        self.operands: list[Array | None] = []
        self.apart = frozenset(apart)
        """Leaves that are tapped themselves: from there on they are signals."""
        self.unreached: set[int] = set()
        """Leaves that no tap on an operation reaches."""
        self.curved = False
        """Whether signals meet or go through a function that is curved, or a parameter meets itself."""

    def source(self, i: int, leaf: Any) -> Held:
        """A parameter leaf; integers are constants."""
        if not is_floating(leaf):
            return Held(leaf, False)
        whole = View(i, lambda v: v, True)
        if i not in self.apart:
            return Held(leaf, False, frozenset((i,)), whole)
        return Held(self.tap("leaf", whole, leaf, None, lambda h, delta: delta), True)

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Held]) -> list[Held]:
        """Evaluate an open jaxpr."""
        held = [Held(self.constants[c.index] if isinstance(c, Hoisted) else c, False) for c in consts]
        env: dict[Any, Held] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*held, *args), strict=True))

        def value(atom: Any) -> Held:
            return Held(atom.val, False) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in live_equations(jaxpr):
            env.update(zip(eqn.outvars, self.equation(eqn, [value(a) for a in eqn.invars]), strict=True))
        return [value(a) for a in jaxpr.outvars]

    def inside(self, called: Any, args: Sequence[Held]) -> list[Held]:
        """Evaluate a closed jaxpr, or an open one without constants."""
        if isinstance(called, jex.ClosedJaxpr):
            return self.run(called.jaxpr, called.consts, args)
        return self.run(called, [], args)

    def equation(self, eqn: Any, ins: list[Held]) -> list[Held]:
        """Evaluate one operation."""
        name = eqn.primitive.name
        if name in CALLS:
            return self.inside(next(closed(eqn.params)), ins)
        if not any(v.leaves for v in ins):
            return self.evaluated(eqn, ins)
        if name == "scan" and (outs := self.steps(eqn, ins)) is not None:
            return outs
        if not any(v.varies for v in ins):
            return self.of_parameters(eqn, ins)
        return self.met(eqn, ins)

    def evaluated(self, eqn: Any, ins: Sequence[Held]) -> list[Held]:
        """Evaluate an operation as it stands."""
        arrays = [v.array for v in ins]
        if any(v.varies for v in ins):
            meet = eqn.primitive.name in MEETINGS and all(v.varies for v in ins)
            self.curved = self.curved or meet or _names(eqn) & CURVED != set()
            outs = as_function(eqn)(*arrays)
            return [Held(out, True) for out in (outs if eqn.primitive.multiple_results else [outs])]
        return [Held(out, False) for out in evaluate(eqn, arrays)]

    def of_parameters(self, eqn: Any, ins: Sequence[Held]) -> list[Held]:
        """Evaluate an operation on parameters and constants."""
        name = eqn.primitive.name
        leaves = frozenset().union(*(v.leaves for v in ins))
        meets = name in MEETINGS and ins[0].leaves & ins[1].leaves != set()
        inner = _names(eqn)     # a whole normalisation, if it has a rule or a loop of its own
        self.curved = self.curved or meets or (inner & CURVED != set() and not inner.isdisjoint(MEETINGS))
        outs = evaluate(eqn, [v.array for v in ins])
        made = [i for i, v in enumerate(ins) if v.leaves]
        view, at = ins[made[0]].view, made[0]
        affine = name in AFFINE or (name == "div" and at == 0)
        floating = all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (eqn.invars[at], *eqn.outvars))
        if len(made) > 1 or view is None or not affine or not floating:
            return [Held(out, False, leaves) for out in outs]
        others = [None if i == at else v.array for i, v in enumerate(ins)]

        def part(k: int, leaf: Array) -> Array:
            values = [view.fn(leaf) if i == at else other for i, other in enumerate(others)]
            return evaluate(eqn, values)[k]
        whole = view.whole and name in WHOLE
        return [Held(out, False, leaves, View(view.leaf, partial(part, k), whole)) for k, out in enumerate(outs)]

    def met(self, eqn: Any, ins: Sequence[Held]) -> list[Held]:
        """Evaluate an operation in which parameters meet a signal, with a tap."""
        name, arrays = eqn.primitive.name, [v.array for v in ins]
        at = next(i for i, v in enumerate(ins) if v.leaves)
        view = ins[at].view
        self.curved = self.curved or _names(eqn) & CURVED != set()
        if view is not None and (name in SUMS or name in PRODUCTS or (name == "gather" and at == 0)):
            apply, first, other = as_function(eqn), at == 0, ins[1 - at].array
            shape, dtype = jnp.shape(other), jnp.result_type(other)

            def use(h: Any, leaf: Array) -> Array:
                h = jnp.zeros(shape, dtype) if h is None else h
                return apply(view.fn(leaf), h) if first else apply(h, view.fn(leaf))
            matrices = matrices_of(eqn, [jnp.shape(a) for a in arrays], at, view)
            kind = "elementwise" if name not in MATRICES else MATRICES[name] if matrices else "other"
            out, h = apply(*arrays), None if name in SUMS else other
            return [Held(self.tap(kind, view, out, h, partial(pulled, self.leaves[view.leaf], use), matrices), True)]
        for i, value in enumerate(ins):
            if not value.leaves or not jnp.issubdtype(eqn.invars[i].aval.dtype, jnp.inexact):
                continue
            if value.view is None:
                self.unreached |= value.leaves
                continue
            pullback = partial(pulled, self.leaves[value.view.leaf], partial(_viewed, value.view))
            arrays[i] = self.tap("operand", value.view, arrays[i], None, pullback)
        return [Held(out, True) for out in evaluate(eqn, arrays)]

    def steps(self, eqn: Any, ins: list[Held]) -> list[Held] | None:
        """Evaluate a loop over stacked matrices step by step; None where it is to be evaluated as it stands."""
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        inner = body.jaxpr if isinstance(body, jex.ClosedJaxpr) else body
        # What is scanned and what is stacked has one axis less within the loop. JAX's own counts changed their names.
        n_carry = sum(o.aval.ndim == i.aval.ndim for o, i in zip(eqn.outvars, inner.outvars, strict=True))
        n_consts = sum(o.aval.ndim == i.aval.ndim for o, i in zip(eqn.invars, inner.invars, strict=True)) - n_carry
        consts, carry, stacks = ins[:n_consts], ins[n_consts:n_consts + n_carry], ins[n_consts + n_carry:]
        matrices = (v.leaves and sum(d > 1 for d in jnp.shape(v.array)[1:]) > 1 for v in stacks)
        if not 0 < length <= UNROLLED or not any(matrices):
            return None
        rows: list[list[Held]] = [[]] * length
        for i in range(length)[::-1] if eqn.params["reverse"] else range(length):
            outs = self.inside(body, [*consts, *carry, *(_entry(v, i) for v in stacks)])
            carry, rows[i] = outs[:n_carry], outs[n_carry:]
        return [*carry, *map(_stacked, zip(*rows, strict=True))]

    def tap(self, kind: str, view: View, array: Array, h: Any, pullback: Callable[..., Array], matrices: Any = None
            ) -> Array:
        """Note a site, and add its tap."""
        n = len(self.sites)
        self.sites.append(Site(kind, view.leaf, jnp.shape(array), jnp.result_type(array),
                               None if h is None else jnp.shape(h), pullback, matrices))
        self.operands.append(h)
        return array if self.taps is None else array + self.taps[n]


def as_function(eqn: Any) -> Callable[..., Any]:
    """An operation as a function of its operands, in the form whose derivatives take the least time on this machine."""
    name, shapes = eqn.primitive.name, [v.aval.shape for v in eqn.invars]
    if name == "conv_general_dilated" and prefers_products(eqn.params, shapes[0], shapes[1], False):
        return partial(products, **eqn.params)
    if name in POOLINGS and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return partial(pooled, params=eqn.params, largest=name == POOLINGS[0])
    return equation_function(eqn)


def _viewed(view: View, h: None, leaf: Array) -> Array:
    return view.fn(leaf)


def _names(eqn: Any) -> set[str]:
    """Names of an operation and of those within it."""
    return {eqn.primitive.name}.union(*(_names(e) for inner in closed(eqn.params) for e in opened(inner)[0].eqns))


def _entry(stack: Held, i: int) -> Held:
    """One step's slice of what a loop goes over."""
    view = stack.view
    part = None if view is None else View(view.leaf, lambda leaf: view.fn(leaf)[i], False)
    return replace(stack, array=stack.array[i], view=part)


def _stacked(steps: Sequence[Held]) -> Held:
    """What a loop gives back of its steps."""
    return Held(jnp.stack([v.array for v in steps]), any(v.varies for v in steps),
                frozenset().union(*(v.leaves for v in steps if not v.varies)))


def _walk(fn: BoundProgram, params: PyTree, x: Any, taps: Sequence[Array] | None, apart: Iterable[int]
          ) -> tuple[Walk, Array]:
    leaves = jax.tree.leaves(params)
    walk = Walk(fn, leaves, taps, apart)
    (out,) = walk.run(fn.program.jaxpr, fn.program.consts,
                      [*(walk.source(i, leaf) for i, leaf in enumerate(leaves)), Held(x, True)])
    walk.unreached |= out.leaves
    return walk, out.array


@automatic_axes
def sites(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]] | jax.ShapeDtypeStruct
          ) -> tuple[tuple[Site, ...], dict[int, tuple[int, ...]]]:
    """Find where a network uses its parameters.

    Args:
      apply_fn: the network.
      params: its parameters θ (shapes suffice).
      x: (1, *input), a batch of one (its shape suffices).

    Returns:
      The sites, in the order of the operations, and for each floating-point leaf (by flattening order) its sites. A
      leaf that enters in a way that is not linear (multiplied by another, say) has one, "leaf", of its own shape.

    Source: δ is the error signal of back-propagation (Rumelhart, Hinton and Williams 1986).

    Examples:
        >>> import jax.numpy as jnp
        >>> w = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
        >>> found, of_leaf = sites(lambda w, x: x @ w["a"] + w["b"], w, jnp.ones((1, 3)))
        >>> [s.kind for s in found], of_leaf
        (['dense', 'elementwise'], {0: (0,), 1: (1,)})
    """
    network = read(apply_fn, params, x)
    return network_sites(network.fn, network.params, network.example)[:2]


def network_sites(fn: BoundProgram, params: PyTree, x: Any
                  ) -> tuple[tuple[Site, ...], dict[int, tuple[int, ...]], bool]:
    """Find the sites of a network that has been read; under a transformation they live as long as its trace does.

    Returns as well whether signals meet or go through a function that is curved, or a parameter meets itself.
    """
    leaves, treedef = jax.tree.flatten(params)
    moving = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]
    # Pullbacks keep what parameters are multiplied by and gathered at: constants and integers stay what they are.
    held = [jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in leaves]
    found: tuple[Site, ...] = ()
    unreached: set[int] = set(moving)
    curved: bool | None = None      # as the network stands: a leaf that is tapped itself is no signal
    abstract = any(isinstance(c, jax.ShapeDtypeStruct) for c in fn.constants)

    def walk(apart: set[int], fn: BoundProgram, values: Sequence[Any], z: Any) -> Array:
        full = list(held)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        nonlocal found, unreached, curved
        walked, out = _walk(fn, jax.tree.unflatten(treedef, full), z, None, apart)
        # Of shapes alone there are no pullbacks, which would hold the constants.
        found = tuple(replace(s, pullback=_no_pullback) if abstract else s for s in walked.sites)
        unreached, curved = walked.unreached, walked.curved if curved is None else curved
        return out

    floating = [leaves[i] for i in moving]
    apart: set[int] = set()
    while unreached:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((fn, params))):
            walk(apart, fn, [jnp.zeros(jnp.shape(v), jnp.result_type(v)) for v in floating],
                 jnp.zeros(jnp.shape(x), x.dtype))
        elif abstract:
            jax.eval_shape(partial(walk, apart), fn, floating, x)
        else:
            jax.eval_shape(partial(walk, apart, fn), floating, x)
        apart = apart | unreached
    return found, {i: tuple(n for n, s in enumerate(found) if s.leaf == i) for i in moving}, bool(curved)


def _no_pullback(h: Array | None, delta: Array) -> Array:
    raise ValueError("the sites of a program that is bound to shapes have no pullbacks")


@automatic_axes
def tapped(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], taps: Sequence[Float[Array, "..."]]
           ) -> tuple[Float[Array, "N ..."], tuple[Shaped[Array, "..."] | None, ...]]:
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
        ValueError: x is not a batch of one, or taps are not arrays of the sites' shapes, in their order.

    Examples:
        >>> import jax.numpy as jnp
        >>> w = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
        >>> f, (h, _) = tapped(lambda w, x: x @ w["a"] + w["b"], w, jnp.ones((1, 3)), [jnp.zeros((1, 2))] * 2)
        >>> f, h
        (Array([[4., 4.]], ...), Array([[1., 1., 1.]], ...))
    """
    network = read(apply_fn, params, x)
    found, *_ = network_sites(network.fn, network.params, network.example)
    z = network.batch(x, "x")
    if len(z) != 1:
        raise ValueError(f"x must be a batch of one, (1, *input), but has {len(z)} examples: use jax.vmap for several")
    given, wanted = [jnp.shape(tap) for tap in taps], [site.shape for site in found]
    if given != wanted:
        raise ValueError(f"taps must have the shapes of the network's sites, {wanted}, got {given}")
    return network_tapped(network.fn, network.params, z, taps, found)


def network_tapped(fn: BoundProgram, params: PyTree, x: Array, taps: Sequence[Array], found: Sequence[Site]
                   ) -> tuple[Array, tuple[Array | None, ...]]:
    """Evaluate a network that has been read with taps added at the sites that were found."""
    walk, out = _walk(fn, params, x, taps, {s.leaf for s in found if s.kind == "leaf"})
    return out, tuple(walk.operands)
