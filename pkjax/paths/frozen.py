"""Networks with frozen gates: what is not linear in the signal becomes constants, its values for a reference input.

What comes out is a network like any other, of linear maps, constants and positively homogeneous activations, so that
all that is known of paths holds for it. Activations of which a path network is made keep their gates.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree, Shaped

from pkjax.network import Network, arrays, read
from pkjax.paths.algebras import TrueValues
from pkjax.paths.interpret import interpret
from pkjax.paths.interpreter import PathSum, Value
from pkjax.programs.checks import check_result
from pkjax.programs.equations import equation_function
from pkjax.programs.program import BoundProgram
from pkjax.trees import ApplyFn, as_array, is_floating

__all__ = ["LONE_REFERENCE", "coefficient_places", "frozen", "held", "is_frozen", "noticed", "opened",
           "unit_coefficients", "with_gates"]

LONE_REFERENCE = 'reference is the input that gates are frozen at: pass gates="frozen" with it'
"""What is wrong with a reference where gates are not frozen."""
_NOTICE: ContextVar[list[int] | None] = ContextVar("frozen", default=None)


class Recorder(TrueValues):
    """The network as it stands, with its coefficients recorded, and no gates."""

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Any:
        """Multiply by the gate."""
        return operand.value * jax.lax.stop_gradient(jnp.asarray(gate()).astype(operand.dtype))

    refine = None  # type: ignore[assignment]


class Placed(TrueValues):
    """The network as it stands, with the places noted that its coefficients take among the recorded gates."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []

    def coefficient(self, value: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        """Note and record a coefficient."""
        self.places.append(len(self.recorded))
        return super().coefficient(value, shape, dtype)


class Replayed:
    """The network again on other parameters and inputs, with the coefficients that have been recorded.

    An operation that no coefficient touches is evaluated as it stands, whatever its rule has made of it.
    """

    signed = True
    known = False
    natural_max = False

    def __init__(self, coefficients: Sequence[Array]):
        self.coefficients = coefficients
        self.used = 0

    def lift(self, constant: Any) -> Any:
        """Hold the constant itself."""
        return constant

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Any:
        """Apply the operation."""
        return fn(*(s.value for s in operands))

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Any:
        """Apply the operation."""
        return fn(a.value, b.value)

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Any:
        """Hold anything: the whole operation is evaluated in place of its gates."""
        return operand.value

    def coefficient(self, value: None, shape: tuple[int, ...], dtype: Any) -> Any:
        """Hold the next coefficient."""
        self.used += 1
        return self.coefficients[self.used - 1].astype(dtype)

    def true_value(self, operand: PathSum) -> Any:
        """Return nothing: coefficients are given."""
        return None

    def replay(self, eqn: Any, ins: list[Value], outs: Sequence[Value]) -> list[Value]:
        """Evaluate one operation."""
        values = equation_function(eqn)(*(v.value for v in ins))
        values = values if eqn.primitive.multiple_results else [values]
        return [replace(out, value=value) for out, value in zip(outs, values, strict=True)]


def frozen(apply_fn: ApplyFn, params: PyTree, reference: PyTree[Shaped[ArrayLike, "N ..."]], *,
           masks: PyTree | None = None) -> ApplyFn:
    """Freeze what is not linear in the signal at its values for a reference input: a network that has paths.

        f(x, θ) = Σ_p c_p v_p(θ) a_p(x, θ) x_s    becomes    Σ_p (c_p a_p(x₀, θ₀)) v_p(θ) g_p(x, θ) x_s

    Attention, GELU, SiLU, LayerNorm and gated units are coefficients a_p times what they act on; the gates g_p of
    ReLU and its like stay gates. At (x₀, θ₀) both networks have the same outputs; their gradients differ by the term
    through ∂a/∂θ.

    - An operation that is not linear makes a coefficient, and a product of a coefficient and a signal is a path.
    - σ(z) that acts entry by entry and is used as a signal is σ(0) + a z with a = (σ(z) − σ(0))/z, at 0 σ'(0).
    - Of two signals multiplied, the one that came through more coefficients is one itself (the gate of a gated unit).
      Where neither did (q·k), or each came through some that the other did not (σ(z)·tanh(y)), the product is a
      coefficient, and must not be used as a signal; ``jax.lax.stop_gradient`` marks the one that is the gate.

    A coefficient of exactly 0 carries no path, so that counts depend on precision: far below 0 GELU's gate is 0 in
    float32 where it is tiny in float64.

    Args:
        apply_fn: maps (params, inputs (N, *input)) to outputs (N, *out).
        params: θ₀.
        reference: x₀, an array (N, *input) or a tree of such; of several examples the coefficients are averaged.
        masks: booleans like ``params``; a masked weight is 0.

    Returns:
        A function like ``apply_fn``, to be passed in its place; ``apply_fn`` itself where nothing is to be frozen.

    Raises:
        NotPathNetworkError: a product of two signals, neither of which is a gate, is used as a signal.
        ValueError: an index depends on the signal and there are several references.
        FloatingPointError: a coefficient is not finite.

    Source: the paths of Gebhart, Saxena and Schrater (2021), equation 9, with any real numbers for a_p.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from pkjax import paths
        >>> net = lambda w, x: jax.nn.silu(x @ w["a"]) @ w["b"]
        >>> w = {"a": jnp.array([[1., -2.]]), "b": jnp.array([[3.], [5.]])}
        >>> linear = frozen(net, w, jnp.ones((1, 1)))
        >>> bool(jnp.allclose(linear(w, jnp.ones((1, 1))), net(w, jnp.ones((1, 1)))))
        True
        >>> float(paths.log_count(linear, w, jnp.ones((4, 1))[:1])) == float(jnp.log10(2.))
        True
    """
    return _fixed(apply_fn, params, reference, masks, largest=False)[0]


def opened(apply_fn: ApplyFn, params: PyTree, reference: PyTree[Shaped[ArrayLike, "N ..."]],
           masks: PyTree | None = None) -> tuple[ApplyFn, tuple[Array, ...]]:
    """The network with every coefficient as far open as it is for any example of a reference, and these coefficients.

        a_p    becomes    max_x |a_p(x)|, coefficient by coefficient

    Gates of ReLU and its like are left as they are; that network's path kernel opens them, as it does everywhere.
    """
    return _fixed(apply_fn, params, reference, masks, largest=True)


def _fixed(apply_fn: ApplyFn, params: PyTree, reference: PyTree, masks: PyTree | None, largest: bool,
           name: str = "reference") -> tuple[ApplyFn, tuple[Array, ...]]:
    """A network with constants for its coefficients, and the constants."""
    reference = arrays(reference, name)
    network = read(apply_fn, params, reference, masks=masks, name=name)
    network.count(reference, name)
    fn = _as_given(network)
    coefficients = _recorded(fn, network.params, reference, largest)
    if not coefficients:
        return apply_fn, ()
    if (counts := _NOTICE.get()) is not None:
        counts.append(len(coefficients))
    check_result(coefficients, "a coefficient", "choose a reference at which the network is finite, and "
                 "normalisations with an epsilon")
    return partial(_replayed, apply_fn, fn, coefficients, network.outputs), coefficients


def _as_given(network: Network) -> BoundProgram:
    """The program on inputs as they are given, integers among them."""
    return network.fn if network.raw is None else network.raw


def _alone(x: PyTree) -> PyTree:
    """One example as a batch."""
    return jax.tree.map(lambda leaf: leaf[None], x)


@partial(jax.jit, static_argnums=3)
def _recorded(fn: BoundProgram, params: PyTree, reference: PyTree, largest: bool) -> tuple[Array, ...]:
    """Coefficients, averaged over the examples, or their largest magnitudes."""
    def one(x: PyTree) -> tuple[Array, ...]:
        recorder = Recorder()
        interpret(recorder, fn, params, _alone(x), lambda _, leaf: leaf, lambda z: z, frozen=True)
        return tuple(recorder.recorded)

    if len(jax.tree.leaves(reference)[0]) == 1:
        alone = one(jax.tree.map(lambda leaf: leaf[0], reference))
        return tuple(jnp.abs(c) if largest and is_floating(c) else c for c in alone)
    each = jax.vmap(one)(reference)
    if not all(map(is_floating, each)):
        raise ValueError("the network chooses entries by its signal, and choices have no average: pass one reference")
    return tuple(jnp.abs(c).max(0) if largest else c.mean(0) for c in each)


def _replayed(apply_fn: ApplyFn, fn: BoundProgram, coefficients: tuple[Array, ...], outputs: tuple[int, ...],
              params: PyTree, x: PyTree) -> Array:
    """Evaluate a network with the coefficients of another input."""
    x = jax.tree.map(as_array, x)
    types = [jnp.result_type(leaf) for leaf in jax.tree.leaves((params, x))]
    variables = fn.program.jaxpr.invars
    given = [leaf.shape[1:] for leaf in jax.tree.leaves(x)]
    frozen_at = [v.aval.shape[1:] for v in variables[-len(given):]]
    if given != frozen_at:
        raise ValueError(f"gates are frozen at a reference of examples of shapes {frozen_at}, but the input's have "
                         f"{given}: freeze the network at a reference like the input")
    if types != [v.aval.dtype for v in variables]:      # a program is of one type
        fn = _as_given(read(apply_fn, params, x))

    def one(x: PyTree) -> Array:
        return interpret(Replayed(coefficients), fn, params, _alone(x), lambda _, leaf: leaf, lambda z: z,
                         frozen=True).value

    n = len(jax.tree.leaves(x)[0])
    values = one(jax.tree.map(lambda leaf: leaf[0], x)) if n == 1 else jax.vmap(one)(x)
    return values.reshape(n, *outputs)


@contextlib.contextmanager
def noticed() -> Iterator[list[int]]:
    """List the numbers of coefficients of the networks that ``frozen`` makes within.

    Examples:
        >>> with noticed() as counts:
        ...     net = frozen(lambda w, x: jax.nn.silu(x @ w), jnp.ones((1, 1)), jnp.ones((1, 1)))
        >>> counts
        [1]
    """
    counts: list[int] = []
    token = _NOTICE.set(counts)
    try:
        yield counts
    finally:
        _NOTICE.reset(token)


def unit_coefficients(network: ApplyFn) -> ApplyFn:
    """A network from ``frozen`` with 1 for every coefficient: it has all paths that any coefficients leave.

    Any other network is returned as it is.

    Examples:
        >>> net = frozen(lambda w, x: jax.nn.silu(x @ w), jnp.ones((1, 1)), jnp.ones((1, 1)))
        >>> unit_coefficients(net)(jnp.ones((1, 1)), jnp.ones((1, 1)))
        Array([[1.]], dtype=float...)
    """
    if not (isinstance(network, partial) and network.func is _replayed):
        return network
    apply_fn, fn, coefficients, outputs = network.args
    ones = tuple(jnp.ones_like(c) if is_floating(c) else c for c in coefficients)
    return partial(_replayed, apply_fn, fn, ones, outputs)


def held(fn: BoundProgram) -> ApplyFn:
    """The network itself, in whose derivatives every gate and every coefficient is a constant.

    Its outputs are those of the network, and its gradient is J_v^f J_θ^v: ∇f without the term through ∂a/∂θ.
    """
    def one(params: PyTree, x: Array) -> Array:
        return interpret(TrueValues(), fn, params, x[None], lambda _, leaf: leaf, lambda z: z, frozen=True).value[0]
    return jax.vmap(one, in_axes=(None, 0))


def coefficient_places(network: Network) -> list[int]:
    """Which of a network's recorded gates are coefficients."""
    placed = Placed()

    def walk(network: Network, x: Array) -> Array:
        return interpret(placed, network.fn, network.params, x, lambda _, leaf: leaf, lambda z: z, frozen=True).value
    jax.eval_shape(walk, network, network.example)
    return placed.places


def is_frozen(gates: str | None) -> bool:
    """Whether ``gates`` are "frozen"; ValueError where they are neither that nor None."""
    if gates is None or (isinstance(gates, str) and gates == "frozen"):
        return gates is not None
    raise ValueError(f'gates must be None or "frozen", but got {gates!r}')


def with_gates(apply_fn: ApplyFn, params: PyTree, x: PyTree, gates: str | None, reference: PyTree | None,
               masks: PyTree | None = None) -> ApplyFn:
    """The network that ``gates="frozen"`` and ``reference=`` ask for: by default the one that there is.

    Raises:
        ValueError: gates are neither None nor "frozen", or there is a reference without frozen gates or whose examples
            are unlike those of x.
    """
    if gates is None:
        if reference is not None:
            raise ValueError(LONE_REFERENCE)
        return apply_fn
    is_frozen(gates)
    if reference is None:
        return _fixed(apply_fn, params, x, masks, largest=False, name="X")[0]
    _check_reference(reference, x)
    return _fixed(apply_fn, params, reference, masks, largest=False)[0]


def _check_reference(reference: PyTree, x: PyTree) -> None:
    """Raise ValueError unless the examples of a reference are like those of an input; their precision may differ."""
    def example(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf)[1:])}", tree)

    def form(tree: PyTree) -> tuple[Any, list[Any]]:
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(jnp.shape(leaf)[1:], is_floating(leaf)) for leaf in leaves]

    reference, x = arrays(reference, "reference"), arrays(x, "X")
    if form(reference) != form(x):
        raise ValueError(f"reference holds examples of {example(reference)}, but the input holds {example(x)}: pass a "
                         "reference (M, *input) like the input")
