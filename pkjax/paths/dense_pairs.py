"""Sums over the paths that are open for both of two inputs, for all pairs of a batch at once, in dense networks.

With every weight 1, the units of a dense layer hold the same number, s(x, x') for a pair of inputs; gates multiply it
by a factor g(x) g(x') for each unit. The next layer sums those factors: s ← s ∘ (g gᵀ), one Gram matrix of the batch
in place of a forward pass for every pair. A layer that mixes differently (a convolution, a residual sum of gated
signals) has no such form.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax.network import Network, read
from pkjax.paths.dense_layers import IDENTITIES, REARRANGEMENTS
from pkjax.paths.interpret import interpret
from pkjax.paths.interpreter import PathSum
from pkjax.programs.meshes import automatic_axes
from pkjax.trees import ApplyFn

__all__ = ["NotDensePairsError", "dense_pairs"]


class NotDensePairsError(ValueError):
    """The units of a layer differ by more than a factor for each input, so ``dense_pairs`` does not apply.

    Raised by ``dense_pairs``.

    Examples:
        >>> net = lambda w, x: jnp.maximum(x @ w, 0.) - x
        >>> dense_pairs(net, jnp.ones((2, 2)), jnp.ones((1, 2)), [jnp.ones((1, 1, 2))])
        Traceback (most recent call last):
            ...
        pkjax.paths.dense_pairs.NotDensePairsError: the operation 'sub' joins units that differ
    """


class PairSignal(NamedTuple):
    """A signal of shape s for all pairs: level[x, x'] · factor[x] ∘ factor[x']."""

    level: Array
    """(N, N)."""
    factor: Array | None
    """(N, *s); None where it is 1 throughout."""


UNITS = "ones"
"""What a parameter, or a constant without zeros, holds."""


class PairAlgebra:
    """The algebra of pairs of inputs: every weight and constant 1, gates as given."""

    signed = False
    known = False
    natural_max = False

    def __init__(self, gates: Sequence[Array]):
        self.gates = list(gates)
        self.used = 0

    def lift(self, constant: Any) -> str:
        """Accept a constant without zeros: all of its entries lie on paths."""
        if isinstance(constant, jax.core.Tracer) or not np.all(np.asarray(constant)):
            raise NotDensePairsError("a constant holds zeros, or is traced")
        return UNITS

    def true_value(self, operand: PathSum) -> Any:
        """Return None: true values are unknown."""
        return None

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> PairSignal:
        """Multiply by the next gate."""
        held: Any = operand.value
        if held is UNITS or self.used == len(self.gates) or self.gates[self.used].shape[1:] != operand.shape:
            raise NotDensePairsError("a gate differs in shape from its signal, as in max-pooling")
        g = self.gates[self.used].astype(held.level.dtype)
        self.used += 1
        return PairSignal(held.level, g if held.factor is None else held.factor * g)

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Any:
        """Rearrange a signal, or add to one whose units are alike."""
        signals = [s.value for s in operands if s.value is not UNITS]
        if len(operands) == 1 and (op in IDENTITIES or op in REARRANGEMENTS or op == "add"):
            if not signals or signals[0].factor is None:
                return operands[0].value
            return signals[0]._replace(factor=jax.vmap(fn)(signals[0].factor))
        if op not in ("add", "sub", "add_any") or any(s.factor is not None for s in signals):
            raise NotDensePairsError(f"the operation '{op}' joins units that differ")
        if not signals:
            raise NotDensePairsError(f"the operation '{op}' joins parameters")
        return PairSignal(sum(s.level for s in signals) + (len(operands) - len(signals)), None)

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Any:
        """Scale a signal, or sum over its units."""
        signal = a if a.value is not UNITS else b
        held = signal.value
        if op == "mul":
            if held is UNITS or held.factor is None:
                return held
            return held._replace(factor=jnp.broadcast_to(
                held.factor, (len(held.factor), *np.broadcast_shapes(a.shape, b.shape))))
        if op != "dot_general" or held is UNITS:
            raise NotDensePairsError(f"the operation '{op}' shares parameters between positions")
        contracted, batch = fn.keywords["dimension_numbers"]  # type: ignore[attr-defined]
        axes = contracted[0] if signal is a else contracted[1]
        if any(batch) or any(n != 1 for d, n in enumerate(signal.shape) if d not in axes):
            raise NotDensePairsError("a matrix acts on several positions")
        if held.factor is None:
            return held._replace(level=held.level * int(np.prod([signal.shape[d] for d in axes])))
        units = held.factor.reshape(len(held.factor), -1)
        return PairSignal(held.level * (units @ units.T), None)


@automatic_axes
def dense_pairs(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[Array, "N ..."]],
                gates: Sequence[Shaped[Array, "N ..."]]) -> Float[Array, "*K N N"]:
    """Sum a_p(x) a_p(x') x_s x'_s over the paths p to each output, for all pairs of inputs.

        A_k[x, x'] = Σ_{p→k} a_p(x) a_p(x') x_s x'_s

    Args:
        apply_fn: the network.
        params: its parameters, of which only shapes and types matter.
        X: (N, *input), the examples.
        gates: of each example as a batch of one, stacked: (N, 1, ...).

    Returns:
        (K, N, N).

    Raises:
        NotDensePairsError: a layer has no such form.
        NotPathNetworkError: an operation has no paths.

    Source: J_v^f J_v^fᵀ with the J_v^f below equation 10 of Gebhart, Saxena and Schrater (2021).

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.asarray([[1., 0.], [1., 2.]])
        >>> dense_pairs(lambda w, x: x @ w, jnp.ones((2, 1)), x, [])
        Array([[[1., 1.],
                [1., 5.]]], ...)
    """
    network = read(apply_fn, params, X, paths=True)
    return network_pairs(network, network.batch(X), gates)


def network_pairs(network: Network, X: Array, gates: Sequence[Array]) -> Float[Array, "*K N N"]:
    """Sum over the paths of a network that has been read, for a batch that it took in."""
    n = len(X)
    with jax.default_matmul_precision("highest"):
        out = interpret(PairAlgebra(gates), network.fn, network.params, X[:1], lambda _, leaf: UNITS,
                        lambda x: PairSignal(jnp.ones((n, n), x.dtype), X[:, None]))
    if out.value is UNITS:
        raise NotDensePairsError("the output does not depend on the input")
    level, factor = out.value
    if factor is None:
        return jnp.broadcast_to(level, (out.shape[1], n, n))
    return _outer(level, factor.reshape(n, -1).T)


@jax.jit
def _outer(level: Array, ends: Array) -> Array:
    """Scale s for each output, in one program: no copies of the result."""
    return level * ends[:, :, None] * ends[:, None, :]
