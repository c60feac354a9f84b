"""Explicit factorisation of small networks: an algebra of path tables lists every path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax import tables
from pkjax.linalg.memory import default_memory_limit
from pkjax.network import Network, read
from pkjax.paths.interpret import interpret
from pkjax.paths.interpreter import PathSum
from pkjax.paths.polynomial import recorded_gates
from pkjax.programs.evaluate import evaluate
from pkjax.programs.meshes import automatic_axes
from pkjax.trees import ApplyFn, leaf_names

__all__ = ["Factorization", "Path", "factorize"]


class Path(NamedTuple):
    """One path: where it starts, the parameters on it, the output it ends in.

    A part of ``Factorization``, so returned by ``factorize``.

    Examples:
        >>> Path(source=0, parameters=("a[0,1]", "b[1,0]"), output=0).parameters
        ('a[0,1]', 'b[1,0]')
    """

    source: int | None
    """The input entry, counted in the flattened example; None where it starts at a bias or a constant."""
    parameters: tuple[str, ...]
    """The parameters on it, by leaf and index, in the order of the operations."""
    output: int
    """The output k."""


@dataclass(frozen=True, eq=False)
class Factorization:
    """The factors of a small network's Jacobian and NTK, one column of J_v^f (row of J_θ^v) for each path.

    ∇f = ``jvf @ jtv`` and Θ = ``jvf @ pi @ jvf.T``; rows of ``jvf`` run over (example, output), example first, and
    columns of ``jtv`` over the entries of all parameter leaves in flattening order.

    Returned by ``factorize``. Prints as a short text and, in a notebook, as a table of its paths.

    Source: Gebhart, Saxena and Schrater (2021), equation 10 and the two below it.

    Examples:
        >>> import jax.numpy as jnp
        >>> factorize(lambda w, x: x @ w, jnp.array([[3.0], [5.0]]), jnp.ones((1, 2)))
        Factorization(
            jvf=float64[1,2],
            jtv=float64[2,2],
            values=float64[2] 3 … 5,
            paths=<2 of Path>
        )
    """

    jvf: Float[np.ndarray, "NK P"]
    """J_v^f: the gates times the input entry, a_p(x) x_s(p)."""
    jtv: Float[np.ndarray, "P m"]
    """J_θ^v: ∂v_p/∂θ_j, the path's constants included."""
    values: Float[np.ndarray, "P"]
    """v_p: the product of the constants and parameters on the path."""
    paths: tuple[Path, ...]
    """Start, parameters and end of each path."""

    __repr__ = tables.brief

    def _repr_html_(self) -> str:
        rows = []
        for i in tables.spread(len(self.paths)):
            path, value = self.paths[i], float(self.values[i])
            start = "bias or constant" if path.source is None else f"input {path.source}"
            rows.append([str(i), start, " · ".join(path.parameters), f"output {path.output}",
                         tables.format_number(value)])
        return tables.html(["path", "from", "parameters", "to", "value"], rows, caption=f"{len(self.paths):,} paths",
                           left=4)

    @property
    def pi(self) -> Float[np.ndarray, "P P"]:
        """The path kernel Π = J_θ^v J_θ^vᵀ."""
        return self.jtv @ self.jtv.T


@dataclass(frozen=True, eq=False)
class Table:
    """The paths that reach the entries of an array, one row each."""

    node: np.ndarray        # (P,) the entry, in the flattened array
    constant: np.ndarray    # (P,)
    source: np.ndarray      # (P,) input entry, or -1
    gates: np.ndarray       # (P, N) product of the gates, for each example
    factors: np.ndarray     # (P, L) parameters on the path in order, -1 where there are fewer

    def rows(self, which: np.ndarray) -> "Table":
        """Select paths."""
        return Table(self.node[which], self.constant[which], self.source[which], self.gates[which],
                     self.factors[which])


MOVES = ("reshape", "transpose", "broadcast_in_dim", "slice", "rev", "squeeze", "expand_dims", "split", "gather",
         "dynamic_slice", "concatenate", "pad", "windows", "select_n", "add", "sub", "add_any", "neg", "copy",
         "convert_element_type")
"""Operations that move entries, each to any number of places, and change at most a sign."""


class Enumeration:
    """The algebra of path tables."""

    signed = True
    known = False
    natural_max = False

    def __init__(self, gates: Sequence[np.ndarray], examples: int, max_paths: int):
        self.gates = iter(gates)
        self.examples = examples
        self.max_paths = max_paths

    def start(self, node: np.ndarray, *, constant: np.ndarray | None = None, source: np.ndarray | None = None,
              factor: np.ndarray | None = None) -> Table:
        """List paths of length one or none."""
        n = node.size
        factors = np.zeros((n, 0), int) if factor is None else factor[:, None]
        return Table(node, np.ones(n) if constant is None else constant, np.full(n, -1) if source is None else source,
                     np.ones((n, self.examples)), factors)

    def lift(self, constant: Any) -> Table:
        """Start a path at every constant that is not zero."""
        flat = np.asarray(constant, dtype=np.float64).ravel()
        node = np.flatnonzero(flat)
        return self.start(node, constant=flat[node])

    def true_value(self, operand: PathSum) -> Any:
        """Return None: gates are given."""
        return None

    def gated(self, operand: PathSum, gate: Callable[[], Any]) -> Table:
        """Multiply each path by the gate of the entry that it reaches, example by example."""
        table: Table = operand.value
        factor = next(self.gates).reshape(self.examples, -1)[:, table.node].T
        return Table(table.node, table.constant, table.source, table.gates * factor, table.factors)

    def linear(self, op: str, fn: Callable[..., Any], operands: Sequence[PathSum]) -> Table:
        """Extend the paths of all operands along the non-zero entries of the operation's matrix."""
        zeros = [jnp.zeros(s.shape, s.dtype) for s in operands]
        pieces = []
        for i, s in enumerate(operands):
            def one(v: Any, i: int = i) -> Any:
                return fn(*zeros[:i], v, *zeros[i + 1:])
            if op in MOVES:
                # Numbered entries show where each one goes, which spares differentiating the operation.
                numbers = 1.0 + jnp.arange(prod(s.shape), dtype=zeros[i].dtype).reshape(s.shape)
                moved = np.asarray(evaluate(one, numbers)).ravel()
                to = np.flatnonzero(moved)
                start, coefficient = np.abs(moved[to]).astype(int) - 1, np.sign(moved[to])
            else:
                self._affordable(op, prod(s.shape) * prod(jax.eval_shape(one, zeros[i]).shape))
                matrix = np.asarray(evaluate(jax.jacfwd(one), zeros[i])).reshape(-1, prod(s.shape))
                to, start = np.nonzero(matrix)
                coefficient = matrix[to, start]
            pieces.append(self._follow(s.value, start, to, coefficient))
        width = max(p.factors.shape[1] for p in pieces)
        columns = [np.concatenate(c) for c in zip(*((p.node, p.constant, p.source, p.gates, _padded(p.factors, width))
                                                    for p in pieces), strict=True)]
        return Table(*columns)

    def bilinear(self, op: str, fn: Callable[..., Any], a: PathSum, b: PathSum) -> Table:
        """Join the paths of both operands along the non-zero entries of the operation's tensor."""
        if op == "mul":
            shape = np.broadcast_shapes(a.shape, b.shape)
            at_a, at_b = (np.broadcast_to(np.arange(prod(s.shape)).reshape(s.shape), shape).ravel() for s in (a, b))
            to, coefficient = np.arange(prod(shape)), np.ones(prod(shape))
        else:
            x, w = jnp.zeros(a.shape, a.dtype), jnp.zeros(b.shape, b.dtype)
            self._affordable(op, prod(a.shape) * prod(b.shape) * prod(jax.eval_shape(fn, x, w).shape))
            inner = jax.jacfwd(lambda v: jax.jacfwd(partial(fn, v))(w))
            tensor = np.asarray(evaluate(inner, x)).reshape(-1, prod(b.shape), prod(a.shape))
            to, at_b, at_a = np.nonzero(tensor)
            coefficient = tensor[to, at_b, at_a]
        return self._join(a.value, b.value, at_a, at_b, to, coefficient)

    def _follow(self, table: Table, start: np.ndarray, to: np.ndarray, coefficient: np.ndarray) -> Table:
        """Extend each path at node start[e] along edge e."""
        path, edge = _matches(table.node, start, self._check)
        t = table.rows(path)
        return Table(to[edge], t.constant * coefficient[edge], t.source, t.gates, t.factors)

    def _join(self, a: Table, b: Table, at_a: np.ndarray, at_b: np.ndarray, to: np.ndarray,
              coefficient: np.ndarray) -> Table:
        """Join each path of a at at_a[e] with each of b at at_b[e]."""
        of_a, edge = _matches(a.node, at_a, self._check)
        of_b, pair = _matches(b.node, at_b[edge], self._check)
        edge, x, y = edge[pair], a.rows(of_a[pair]), b.rows(of_b)
        return Table(to[edge], x.constant * y.constant * coefficient[edge], np.maximum(x.source, y.source),
                     x.gates * y.gates, np.concatenate([x.factors, y.factors], axis=1))

    def _check(self, count: int) -> None:
        if count > self.max_paths:
            raise ValueError(f"the network has more than max_paths = {self.max_paths:,} paths ({count:,} reach one of "
                             "its layers): enumerate a smaller network, raise max_paths, or use pkjax.path_kernel and "
                             "pkjax.data_factor, which do not list paths")

    def _affordable(self, op: str, entries: int) -> None:
        if entries > min(2**28, default_memory_limit() // 8):
            raise ValueError(f"enumeration tabulates '{op}' with {entries:,} entries, too many: enumerate a smaller "
                             "network, or use pkjax.path_kernel and pkjax.data_factor")


def _padded(factors: np.ndarray, width: int) -> np.ndarray:
    return np.pad(factors, ((0, 0), (0, width - factors.shape[1])), constant_values=-1)


def _matches(node: np.ndarray, wanted: np.ndarray, check: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """Pair every row whose node is wanted[e] with e: the indices of both."""
    order = np.argsort(node, kind="stable")
    low = np.searchsorted(node[order], wanted, "left")
    count = np.searchsorted(node[order], wanted, "right") - low
    check(int(count.sum()))
    e = np.repeat(np.arange(wanted.size), count)
    within = np.arange(e.size) - np.repeat(np.cumsum(count) - count, count)
    return order[low[e] + within], e


@automatic_axes
def factorize(apply_fn: ApplyFn, params: PyTree, x: PyTree[Shaped[ArrayLike, "N ..."]], *, max_paths: int = 200_000,
              masks: PyTree | None = None) -> Factorization:
    """List every path of a small network: the explicit factors J_v^f, J_θ^v and Π of its NTK.

    Θ = J_v^f Π J_v^fᵀ, ∇f = J_v^f J_θ^v, f = J_v^f v.

    Args:
        apply_fn: the network.
        params: its parameters θ, concrete.
        x: (N, *input), the examples; evaluated in float64 where JAX allows it.
        max_paths: refuse networks with more paths than this.
        masks: booleans like ``params``; a masked weight carries no path.

    Returns:
        The factors, in float64. A path that no example activates is still listed.

    Raises:
        ValueError: the network has more than ``max_paths`` paths.
        FloatingPointError: a product of weights overflows float64.
        NotPathNetworkError: an operation has no paths.

    Source: Gebhart, Saxena and Schrater (2021), equations 9 to 11.

    Examples:
        >>> import jax.numpy as jnp
        >>> net = lambda w, x: jnp.maximum(x @ w["a"], 0.) @ w["b"]
        >>> w = {"a": jnp.array([[1., -2.]]), "b": jnp.array([[3.], [5.]])}
        >>> factors = factorize(net, w, jnp.array([[2.]]))
        >>> factors.values, factors.jvf
        (array([  3., -10.]), array([[2., 0.]]))
        >>> factors.paths[0]
        Path(source=0, parameters=('a[0,0]', 'b[0,0]'), output=0)
    """
    network = read(apply_fn, params, x, masks=masks, paths=True)
    x = network.batch(x, "x")
    leaves = jax.tree.leaves(params)
    alive = [True] * len(leaves) if masks is None else jax.tree.leaves(masks)
    recorded = _gates(network, x)
    algebra = Enumeration([np.asarray(g, dtype=np.float64) for g in recorded], x.shape[0], max_paths)
    sizes = [int(np.size(leaf)) for leaf in leaves]
    offsets = np.cumsum([0, *sizes])

    def source(i: int, leaf: Any) -> Table:
        node = np.flatnonzero(np.broadcast_to(np.asarray(alive[i]), np.shape(leaf)))
        return algebra.start(node, factor=offsets[i] + node)

    def signal(z: Any) -> Table:
        return algebra.start(np.arange(z.size), source=np.arange(z.size))
    table = interpret(algebra, network.fn, network.params, x[:1], source, signal).value
    theta = np.concatenate([np.asarray(leaf, dtype=np.float64).ravel() for leaf in leaves])
    values, jtv = _derivatives(table, theta)
    inputs = np.asarray(x, dtype=np.float64).reshape(x.shape[0], -1)
    reach = table.gates.T * np.where(table.source < 0, 1.0, inputs[:, table.source])
    jvf = np.where(table.node == np.arange(network.size)[:, None], reach[:, None], 0.0)
    names = [f"{name}[{','.join(map(str, np.unravel_index(i, np.shape(leaf))))}]" if np.ndim(leaf) else name
             for name, leaf in zip(leaf_names(params), leaves, strict=True) for i in range(np.size(leaf))]
    paths = tuple(Path(None if s < 0 else int(s), tuple(names[j] for j in f if j >= 0), int(k))
                  for s, f, k in zip(table.source, table.factors, table.node, strict=True))
    factors = Factorization(jvf.reshape(-1, table.node.size), jtv, values, paths)
    if not all(np.isfinite(v).all() for v in (jvf, jtv, values)):
        raise FloatingPointError("products of weights along paths are outside of what float64 holds: rescale them")
    return factors


@jax.jit
def _gates(network: Network, x: Array) -> tuple[Array, ...]:
    return jax.vmap(lambda one: recorded_gates(network, one[None])[1])(x)


def _derivatives(table: Table, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute v_p and ∂v_p/∂θ_j without dividing by θ_j."""
    present = table.factors >= 0
    factor = np.where(present, theta[table.factors], 1.0)
    jtv = np.zeros((table.node.size, theta.size))
    rows = np.arange(table.node.size)
    for column in range(factor.shape[1]):
        others = table.constant * np.delete(factor, column, axis=1).prod(axis=1)
        at = present[:, column]
        np.add.at(jtv, (rows[at], table.factors[at, column]), others[at])
    return table.constant * factor.prod(axis=1), jtv
