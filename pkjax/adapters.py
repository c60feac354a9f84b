"""From Flax modules to `apply_fn(params, x)`, and the inputs of data-free functions.

Every function of pkjax takes a network as `(apply_fn, params)`. A module becomes one in its evaluation mode:
BatchNorm is frozen at its running averages and Dropout is inert, so that it is a sum over paths.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from pkjax.trees import ApplyFn, leaf_names

__all__ = ["ModuleFunction", "from_linen", "from_nnx", "linen_init", "mean_input", "mode_flags", "ones_input"]

# The names under which a module's __call__ chooses between training and evaluation; the value for evaluation.
_EVALUATION = {"train": False, "training": False, "is_training": False, "use_running_average": True,
               "deterministic": True}


def mode_flags(call: Callable[..., Any], training: bool) -> dict[str, bool]:
    """Find the keywords that put a module into training or evaluation mode, as far as its signature names them."""
    named = inspect.signature(call).parameters
    return {name: value != training for name, value in _EVALUATION.items()
            if name in named and named[name].kind not in (inspect.Parameter.POSITIONAL_ONLY,
                                                          inspect.Parameter.VAR_POSITIONAL,
                                                          inspect.Parameter.VAR_KEYWORD)}


def linen_init(module: Any) -> Callable[[Array, Array], PyTree]:
    """Return the compiled initialisation of a Linen module: (key, x) → variables.

    It is in evaluation mode, for a module whose `__call__` has an argument such as `train` without a default.
    """
    return jax.jit(partial(module.init, **mode_flags(type(module).__call__, training=False)))


class ModuleFunction:
    """A function made from a module. Where two are equal and what they hold is unchanged, one tracing serves both."""


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are equal, False where they cannot be compared (a module may hold arrays)."""
    try:
        return bool(a == b)
    except Exception:
        return False


def _same_arrays(a: PyTree, b: PyTree) -> bool:
    if _equal(jax.tree.structure(a), jax.tree.structure(b)):
        return all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return False


def from_linen(module: Any, variables: Mapping[str, Any]) -> tuple[ApplyFn, PyTree]:
    """Turn a Flax Linen module and its variables into `(apply_fn, params)`.

    `apply_fn(params, x)` is the module in evaluation mode. The arguments of `__call__` named `train`, `training`,
    `is_training`, `use_running_average` and `deterministic` are set accordingly; a BatchNorm layer that nobody told
    which mode to take (inside `nn.Sequential`, say) uses its running averages, and Dropout does nothing. `params` is
    the collection of that name; all others (`batch_stats` …) are constants. The batch `x`, an array (N, *input) or a
    tree of such arrays, is passed on as it is.

    Functions of the same module and the same constants are equal, and are traced once.

    Args:
        module: the module.
        variables: what `module.init` returns.

    Returns:
        `apply_fn`, which maps a batch (N, *input) to (N, *output), and `params`, nested dictionaries of arrays.

    Raises:
        TypeError: `module` is not a Linen module.
        ValueError: `variables` has no collection `params`; when `apply_fn` is called, the module draws random numbers
            or updates its state in evaluation mode.

    Examples:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> def dense(n, m):
        ...     return {"kernel": jnp.ones((n, m), jnp.float32), "bias": jnp.zeros(m, jnp.float32)}
        >>> module = nn.Sequential([nn.Dense(3), nn.Dropout(0.5), nn.relu, nn.Dense(2)])
        >>> x = jnp.ones((1, 4), jnp.float32)
        >>> variables = {"params": {"layers_0": dense(4, 3), "layers_3": dense(3, 2)}}
        >>> apply_fn, params = from_linen(module, variables)
        >>> apply_fn(params, x)
        Array([[12., 12.]], dtype=float32)
    """
    import flax.linen as nn

    if not isinstance(module, nn.Module):
        raise TypeError(f"from_linen takes a flax.linen.Module, got {type(module).__name__}"
                        + ("; use pkjax.from_nnx" if _is_nnx(module) else ""))
    if not isinstance(variables, Mapping) or "params" not in variables:
        held = f"holds {sorted(variables)}" if isinstance(variables, Mapping) else f"is {variables!r:.60}"
        raise ValueError(f"variables has no collection 'params' (it {held}); pass what "
                         "module.init(key, x) returns, or {'params': params}")
    constants = {name: value for name, value in variables.items() if name != "params"}
    return _LinenFunction(module, constants), _plain(variables["params"])


@dataclass(frozen=True, eq=False)
class _LinenFunction(ModuleFunction):
    """A Linen module in evaluation mode, with all its collections but the parameters."""

    module: Any
    constants: PyTree

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, _LinenFunction) and _equal(self.module, other.module)
                and _same_arrays(self.constants, other.constants))

    def __hash__(self) -> int:
        return hash(type(self.module))        # fields and constants may change, or have no hash

    def __call__(self, params: PyTree, x: PyTree) -> Array:
        import flax.linen as nn
        from flax import errors

        def evaluate(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer = context.module
            if context.method_name == "__call__":
                if isinstance(layer, nn.Dropout):
                    return args[0] if args else kwargs["inputs"]
                if isinstance(layer, nn.BatchNorm) and layer.use_running_average is None:
                    args, kwargs = args[:1], {**kwargs, "use_running_average": True}
            return call(*args, **kwargs)

        name, flags = type(self.module).__name__, mode_flags(type(self.module).__call__, training=False)
        try:
            with nn.intercept_methods(evaluate):
                return self.module.apply({"params": params, **self.constants}, x, **flags)
        except errors.ModifyScopeVariableError as error:
            raise ValueError(f"{name} updates its state when it evaluates, as BatchNorm in training mode does: use "
                             "running averages (give __call__ an argument `train` and build "
                             f"BatchNorm(use_running_average=not train)). Flax says: {error}") from error
        except errors.InvalidRngError as error:
            raise ValueError(f"{name} draws random numbers when it evaluates, so it is not a fixed function of its "
                             f"parameters: switch that off. Flax says: {error}") from error


def from_nnx(module: Any) -> tuple[ApplyFn, PyTree]:
    """Turn a Flax NNX module into `(apply_fn, params)`.

    `params` is a plain tree (nested dictionaries of arrays) of the module's `nnx.Param`; everything else is constant.
    `apply_fn(params, x)` is the module in evaluation mode (BatchNorm frozen, Dropout inert), with the arguments of
    `__call__` set as `from_linen` does; an argument `rngs` that has no default is given a fixed `nnx.Rngs`, of which
    nothing may depend. The module is not changed, and later changes of it change nothing.

    Functions of modules of one definition and the same constants are equal, and are traced once.

    Args:
        module: the module.

    Returns:
        `apply_fn`, which maps a batch (N, *input) to (N, *output), and `params`.

    Raises:
        TypeError: `module` is not an NNX module.
        ValueError: `module` has no parameters; when `apply_fn` is called, the output depends on random numbers or on
            state that the call updates, or the call updates averages of BatchNorm.

    Examples:
        >>> from flax import nnx
        >>> apply_fn, params = from_nnx(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
        >>> {name: value.shape for name, value in params.items()}
        {'bias': (2,), 'kernel': (4, 2)}
    """
    from flax import nnx

    if not _is_nnx(module):
        raise TypeError(f"from_nnx takes a flax.nnx.Module, got {type(module).__name__}; "
                        "for a flax.linen.Module use pkjax.from_linen")
    model = nnx.clone(module)
    model.eval()
    definition, state, constants = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(state)
    if not jax.tree.leaves(params):
        raise ValueError(f"{type(module).__name__} has no nnx.Param: nothing to analyse")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    return _NnxFunction(type(module), definition, shapes, constants), params


@dataclass(frozen=True, eq=False)
class _NnxFunction(ModuleFunction):
    """An NNX module in evaluation mode, without its parameters."""

    kind: type
    definition: Any
    params: PyTree           # their shapes
    constants: PyTree

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, _NnxFunction) and _equal(self.definition, other.definition)
                and _equal(self.params, other.params) and _same_arrays(self.constants, other.constants))

    def __hash__(self) -> int:
        return hash(self.kind)

    def __call__(self, params: PyTree, x: PyTree) -> Array:
        from flax import nnx

        state = (self.constants, nnx.state(nnx.Rngs(0)))
        out, after = self._evaluate(params, x, state)
        changed = [i for i, (new, old) in enumerate(zip(after, jax.tree.leaves(state), strict=True)) if new is not old]
        if changed:
            self._refuse_if_used(changed, params, x, state)
        return out

    def _evaluate(self, params: PyTree, x: PyTree, state: Any) -> tuple[Array, list[Any]]:
        """The output, and the leaves of the state after the call, which writes into copies."""
        from flax import nnx

        constants, streams = state
        filled = jax.tree.map(lambda leaf: leaf, self.params)
        nnx.replace_by_pure_dict(filled, params)
        module = nnx.merge(self.definition, filled, constants, copy=True)
        rngs = nnx.merge(nnx.graphdef(nnx.Rngs(0)), streams, copy=True)
        asked = inspect.signature(self.kind.__call__).parameters.get("rngs")
        given = {"rngs": rngs} if asked is not None and asked.default is inspect.Parameter.empty else {}
        out = module(x, **given, **mode_flags(self.kind.__call__, training=False))
        after = dict(nnx.to_flat_state(nnx.state(module)))      # the call may add variables, as sow does
        return out, jax.tree.leaves(([after[path] for path, _ in nnx.to_flat_state(constants)], nnx.state(rngs)))

    def _refuse_if_used(self, changed: list[int], params: PyTree, x: PyTree, state: Any) -> None:
        """Raise ValueError where the call updates averages, or the output depends on other state that it updates."""
        from flax import nnx

        leaves, structure = jax.tree.flatten(state)
        variables = [each for tree in state for each in nnx.to_flat_state(tree)]

        def updated(indices: list[int], kind: type) -> list[str]:
            return ["/".join(map(str, variables[i][0])) for i in indices if isinstance(variables[i][1], kind)]

        def output(values: list[Any]) -> Array:
            filled = dict(enumerate(leaves)) | dict(zip(changed, values, strict=True))
            return self._evaluate(params, x, jax.tree.unflatten(structure, filled.values()))[0]

        name = self.kind.__name__
        if averages := updated(changed, nnx.BatchStat):
            raise ValueError(f"{name} updates {averages} when it evaluates, as BatchNorm in training mode does: use "
                             "running averages")
        traced = jax.make_jaxpr(output)([leaves[i] for i in changed]).jaxpr
        needed = _needed(traced)
        used = [i for i, variable in zip(changed, traced.invars, strict=True) if variable in needed]
        if drawn := updated(used, nnx.RngState):
            raise ValueError(f"{name} draws random numbers when it evaluates ({drawn} changes), so it is not a fixed "
                             "function of its parameters: switch that off")
        if used:
            raise ValueError(f"{name} updates {updated(used, nnx.Variable)} when it evaluates, and its output depends "
                             "on them, so it is not a fixed function of its parameters: switch that off")


def _needed(jaxpr: Any) -> set[Any]:
    """The variables that the results depend on."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return needed


def _is_nnx(module: Any) -> bool:
    from flax import nnx

    return isinstance(module, nnx.Module)


def _plain(params: Any) -> PyTree:
    """Make plain dictionaries of a Linen collection (FrozenDict or not) and open its partitioning boxes."""
    from flax.core import meta, unfreeze

    return meta.unbox(unfreeze(params))


def ones_input(shape: PyTree, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Make the all-ones input of the data-free functions: 1 for every entry of one example.

    Args:
        shape: the shape of one example, without the batch, or a tree of shapes for a network that takes a tree.
        dtype: a type of real numbers. An integer 1 is a byte or a token to the network, not a signal of 1.

    Returns:
        Ones of shape (1, *shape), or a tree of such arrays.

    Raises:
        ValueError: `shape` is not a shape, nor a tree of them; `dtype` is not a type of real numbers.

    Source: the input 𝟙 of R in Gebhart, Saxena and Schrater (2021), equations 15 and 16.

    Examples:
        >>> ones_input((28, 28, 1)).shape
        (1, 28, 28, 1)
        >>> ones_input({"age": (), "year": (2,)}, jnp.float16)
        {'age': Array([1.], dtype=float16), 'year': Array([[1., 1.]], dtype=float16)}
    """
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(f"ones_input takes a type of real numbers, got {jnp.dtype(dtype)}")

    def ones(sizes: Any) -> Array:
        if not _is_shape(sizes):
            raise ValueError("ones_input takes the shape of one example, such as (28, 28, 1), or a tree of shapes, got "
                             f"{shape!r}")
        return jnp.ones((1, *sizes), dtype)

    return jax.tree.map(ones, shape, is_leaf=_is_shape)


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(hasattr(n, "__index__") and int(n) >= 0 for n in value)


def mean_input(X: PyTree, *, absolute: bool = False) -> PyTree:
    """Average the examples, μ = (1/N) Σ_n X_n: the input of SynFlow-Dist and SynFlow-L2-Dist.

    The path polynomial needs an input z ≥ 0. With `absolute` the result is |μ|, for normalised images.

    Args:
        X: a batch (N, *input), or a tree of such arrays. Integers are averaged as numbers, which makes sense for
            bytes of images, not for tokens.
        absolute: return |μ|.

    Returns:
        The mean, (1, *input), in floating point.

    Raises:
        ValueError: `X` is empty or holds complex numbers; outside of `jit`, the mean is negative somewhere.

    Source: Gebhart, Saxena and Schrater (2021), section 4.2.

    Examples:
        >>> import jax.numpy as jnp
        >>> mean_input(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
        Array([[2., 3.]], ...)
    """
    sizes = [jnp.shape(leaf) for leaf in jax.tree.leaves(X)]
    if not sizes or not all(sizes) or len({size[0] for size in sizes}) != 1 or sizes[0][0] == 0:
        raise ValueError("mean_input takes a batch (N, *input) of at least one example, or a tree of arrays with one "
                         f"such N, got shape {sizes[0] if len(sizes) == 1 else sizes}")

    def mean(name: str, leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(f"mean_input takes real numbers, but {name} holds {leaf.dtype}")
        average = jnp.mean(leaf, axis=0, keepdims=True)
        if absolute:
            return jnp.abs(average)
        if not isinstance(average, jax.core.Tracer) and bool((average < 0).any()):
            raise ValueError(f"the mean of {name} is negative in {int((average < 0).sum())} of {average.size} entries, "
                             "but the path polynomial needs an input of at least 0: pass raw images, or absolute=True "
                             "for |mean|")
        return average

    X = jax.tree.map(lambda leaf: leaf, X)      # `Dataset.images` become one array
    names = leaf_names(X)
    names = ["X"] if names == ["(root)"] else [f"X's {name!r}" for name in names]
    return jax.tree.map(mean, jax.tree.unflatten(jax.tree.structure(X), names), X)
