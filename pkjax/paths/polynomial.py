"""The path polynomial of a network, its gates, and what follows from them at once."""

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from pkjax.network import Network, read
from pkjax.paths.algebras import Polynomial, TrueValues
from pkjax.paths.evaluation import evaluate_paths
from pkjax.paths.exponents import Scaling, plain
from pkjax.paths.frozen import is_frozen, with_gates
from pkjax.paths.interpret import interpret
from pkjax.paths.magnitudes import Magnitudes
from pkjax.paths.scaled import scaled_values
from pkjax.paths.scaled_signals import ScaledSignals
from pkjax.programs.checks import REMEDY, check_result
from pkjax.programs.meshes import automatic_axes
from pkjax.programs.program import BoundProgram, Program
from pkjax.trees import ApplyFn, as_array, shapes

__all__ = ["checked_gates", "gates", "network_tied", "path_sum", "polynomial", "record", "recorded_gates", "tied"]


@automatic_axes
def polynomial(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, q: float | int,
               gates: Sequence[Shaped[ArrayLike, "..."]] | str | None = None, pool: str = "sum",
               masks: PyTree | None = None, reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None
               ) -> Float[Array, "N ..."]:
    """Evaluate the path polynomial of every output by one forward pass, without listing paths.

    R_q(φ, z)_k = Σ_{p→k} |c_p|^q (Π_{j∈p} φ_j) z_s(p): the parameters are replaced by φ, every gate is open, every
    fixed constant c becomes |c|^q (0 where c = 0), every subtraction an addition, and the input is z. With |θ| and
    q = 1 its sum is the SynFlow objective; with θ² and q = 2 the path-kernel objective.

    Args:
      apply_fn: a network of linear maps and positively homogeneous activations.
      params: φ, exactly as it enters (pass |θ| or θ² yourself).
      x: z, of shape (N, *input).
      q: exponent of the fixed constants.
      gates: factors on the path sums, in the order of ``pkjax.paths.gates``: those of a batch of the same size, or
        any function of them (squares, products of two inputs' gates). None opens every gate. "frozen" takes networks
        whose activations are not piecewise linear too, and opens every gate of those that are
        (``pkjax.paths.frozen``): coefficients are those of the network at the parameters as they enter, so of another
        θ pass ``frozen(apply_fn, θ, reference)`` as the network.
      pool: "sum" (paths: a max-pool adds its window) or "max" (published pruning codes leave max-pools in place).
      masks: booleans like ``params``; a masked weight carries no path.
      reference: with "frozen", the input whose coefficients are taken, averaged over several; each z its own by
        default.

    Returns:
      (N, K). Works under jit, vmap, grad and jvp of grad, with respect to ``params``, ``x`` and ``gates``.

    Raises:
      NotPathNetworkError: an operation has no paths.
      ValueError: unknown ``pool``, mismatched masks or gates.
      FloatingPointError: a value is outside of the range of its type (under jit it is infinite or 0 there);
        ``scaled_polynomial`` has no such bound.

    Source: Gebhart, Saxena and Schrater (2021), equations 15 and 16.

    Examples:
        >>> import jax.numpy as jnp
        >>> net = lambda w, x: jnp.maximum(x @ w["a"], 0.) @ w["b"]
        >>> w = {"a": jnp.array([[1., -2.]]), "b": jnp.array([[3.], [5.]])}
        >>> polynomial(net, {k: abs(v) for k, v in w.items()}, jnp.ones((1, 1)), q=1)  # |1·3| + |2·5|
        Array([[13.]], ...)
    """
    if isinstance(gates, str):
        X = jax.tree.map(as_array, x)
        if reference is None and gates == "frozen" and any(jnp.ndim(v) and len(v) > 1 for v in jax.tree.leaves(X)):
            def one(z: PyTree) -> Array:
                z = jax.tree.map(lambda v: v[None], z)
                return polynomial(apply_fn, params, z, q=q, gates="frozen", pool=pool, masks=masks)[0]
            values = jax.vmap(one)(X)
            check_result(values, "R_q", REMEDY)
            return values
        apply_fn, gates = with_gates(apply_fn, params, x, gates, reference, masks), None
    elif reference is not None:
        with_gates(apply_fn, params, x, None, reference)
    elif gates is not None and not isinstance(gates, Iterable):
        raise ValueError(f'gates must be None, "frozen" or a sequence of arrays (pkjax.paths.gates), but got {gates!r}')
    network = read(apply_fn, params, x, masks=masks, paths=True)
    z = network.batch(x, "x")
    values = evaluate_paths(partial(Polynomial, q), network, z, gates, pool)
    remedy = f"paths.scaled_polynomial keeps the exponent aside; or {REMEDY}"
    check_result(values, "R_q", remedy)
    checked = not isinstance(values, jax.core.Tracer) and q == int(q) >= 0
    if checked and not np.all(values):
        mantissas = scaled_values(network, z, int(q), gates, pool, True)[0]
        if bool(((values == 0) & (mantissas != 0)).any()):
            raise FloatingPointError(f"R_q vanishes: it is not 0, but below what {values.dtype} holds: {remedy}")
    return network.shaped(values, 1)


@automatic_axes
def path_sum(apply_fn: ApplyFn, params: PyTree, x: ArrayLike, *, gates: Sequence[ArrayLike],
             masks: PyTree | None = None) -> Float[Array, "N ..."]:
    """Sum c_p v_p(θ) a_p x_s(p) over all paths, with gates as given: f(x) where they are the gates of x.

    Examples:
        >>> import jax.numpy as jnp
        >>> net = lambda w, x: jnp.maximum(x @ w, 0.)
        >>> path_sum(net, -jnp.eye(2), jnp.ones((1, 2)), gates=(jnp.array([[1., 0.]]),))
        Array([[-1., -0.]], ...)
    """
    network = read(apply_fn, params, x, masks=masks, paths=True)
    return network.shaped(evaluate_paths(partial(Polynomial, None), network, network.batch(x, "x"), gates), 1)


@automatic_axes
def gates(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, masks: PyTree | None = None,
          gates: str | None = None) -> tuple[Shaped[Array, "..."], ...]:
    """Record the gates a_p of a batch: 0 or 1 for ReLU, 1 or the slope for leaky ReLU, one-hot for max-pooling.

    Args:
      apply_fn: the network.
      params: its parameters θ.
      x: (N, *input).
      masks: booleans like ``params``; a masked weight is 0.
      gates: "frozen" records the coefficients of networks whose activations are not piecewise linear among them
        (``pkjax.paths.frozen``): any real numbers, which stand where ``polynomial`` takes them up.

    Returns:
      One array per gate, in the order of the network's operations, each of the gated signal's shape (a max-pool's has
      one more axis, over its window); to feed back to ``polynomial``.

    Raises:
      NotPathNetworkError: an operation has no paths.
      ValueError: mismatched masks.

    Source: a_p of Gebhart, Saxena and Schrater (2021), equation 9, gate by gate.

    Examples:
        >>> import jax.numpy as jnp
        >>> gates(lambda w, x: jnp.maximum(x @ w, 0.), jnp.array([[1., -2.]]), jnp.ones((1, 1)))
        (Array([[1., 0.]], ...),)
    """
    return record(apply_fn, params, x, masks=masks, frozen=is_frozen(gates))[1]


@automatic_axes
def record(apply_fn: ApplyFn, params: PyTree, x: ArrayLike, *, masks: PyTree | None = None, frozen: bool = False
           ) -> tuple[Float[Array, "N ..."], tuple[Array, ...]]:
    """Evaluate the network through its paths: its outputs, and the gates."""
    network = read(apply_fn, params, x, masks=masks, paths=True)
    values, recorded = recorded_gates(network, network.batch(x, "x"), frozen)
    return network.shaped(values, 1), recorded


def recorded_gates(network: Network, x: Array, frozen: bool = False) -> tuple[Float[Array, "N ..."], tuple[Array, ...]]:
    """Outputs and gates of a batch that the network took in; the gates are right where signals overflow or vanish."""
    values, gates, _ = checked_gates(network, x, None, frozen)
    return values, gates


def checked_gates(network: Network, x: Array, known: Magnitudes | None, frozen: bool = False
                  ) -> tuple[Float[Array, "N ..."], tuple[Array, ...], Bool[Array, ""]]:
    """The same, and whether they are sure, by the small program where sizes are known."""
    lean = known is not None and known.lean

    def one(x: Array) -> tuple[Array, tuple[Array, ...], Array]:
        algebra = ScaledSignals(Scaling(True) if known is None else known.scaling(True, x.dtype), known)
        held = interpret(algebra, network.fn, network.params, x[None], algebra.parameter, algebra.input,
                         frozen=frozen).value
        if lean:
            held = algebra.scaling.back(held)
        sure = algebra.scaling.sure() if lean else jnp.asarray(True)
        return plain(held.mantissa, held.exponent), tuple(algebra.recorded), sure

    if len(x) == 1:
        return one(x[0])
    values, recorded, sure = jax.vmap(one)(x)
    return values[:, 0], tuple(g if g.ndim < 2 else g.reshape(-1, *g.shape[2:]) for g in recorded), sure.all()


@automatic_axes
def tied(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]] | jax.ShapeDtypeStruct
         ) -> tuple[bool, ...]:
    """Say of every parameter leaf, in flattening order, whether one of its entries may lie twice on one path.

    Convolutions share weights between paths, never within one; layers that use the same matrix twice in a row do.

    Args:
        apply_fn: the network.
        params: its parameters (shapes suffice).
        x: (N, *input) (its shape suffices).

    Raises:
        NotPathNetworkError: an operation has no paths.

    Source: where it is True, the exponents p_j of the path values (Gebhart, Saxena and Schrater 2021,
    section 3) exceed 1, which the paper rules out.

    Examples:
        >>> import jax.numpy as jnp
        >>> tied(lambda w, x: (x @ w["a"]) @ w["a"] @ w["b"], {"a": jnp.eye(2), "b": jnp.eye(2)}, jnp.ones((1, 2)))
        (True, False)
    """
    return network_tied(read(apply_fn, params, x, paths=True))


def network_tied(network: Network, frozen: bool = False) -> tuple[bool, ...]:
    """Say the same of a network that has been read."""
    return _tied(network.fn.program, tuple(jax.tree.leaves(shapes(network.params))), network.example, frozen)


@lru_cache(maxsize=256)
def _tied(program: Program, leaves: tuple[jax.ShapeDtypeStruct, ...], x: jax.ShapeDtypeStruct, frozen: bool
          ) -> tuple[bool, ...]:
    """Look up once for each program which leaves may lie twice on a path."""
    twice: set[int] = set()

    def walk(fn: BoundProgram, p: list[Array], z: Array) -> Array:
        algebra = TrueValues() if frozen else Polynomial(1, None, False)
        out = interpret(algebra, fn, p, z, lambda _, leaf: leaf, lambda v: v, frozen=frozen)
        twice.update(label[0] for label, n in out.degree.items() if n > 1)
        return out.value
    jax.eval_shape(walk, program.shapes, list(leaves), x)
    return tuple(i in twice for i in range(len(leaves)))
