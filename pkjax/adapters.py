"""From Flax modules to ``apply_fn(params, x)``, and the inputs that data-free functions take.

Every function of pkjax takes a network as ``(apply_fn, params)``. A module becomes one in its evaluation
mode: BatchNorm is frozen at its running averages and Dropout is inert, so that it is a sum over paths.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, Shaped

from pkjax.trees import ApplyFn

__all__ = ["ModuleFunction", "from_linen", "from_nnx", "mean_input", "mode_flags", "ones_input"]

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


def from_linen(module: Any, variables: Mapping[str, Any]) -> tuple[ApplyFn, PyTree]:
    """Turn a Flax Linen module and its variables into ``(apply_fn, params)``.

    ``apply_fn(params, x)`` is the module in evaluation mode. Where ``__call__`` has an argument named
    ``train``, ``training``, ``is_training``, ``use_running_average`` or ``deterministic`` it is set
    accordingly; BatchNorm layers that nobody told which mode to take (inside ``nn.Sequential``, say) use
    their running averages, and Dropout does nothing. ``params`` is the collection of that name; all others
    (``batch_stats`` …) are closed over as constants.

    Shapes: apply_fn maps a batch (N, *input) to (N, K).

    Raises TypeError where module is not a Linen module, and ValueError where variables holds no collection
    ``params`` or, when apply_fn is called, where the module draws random numbers or updates its state even
    in evaluation mode.

    Source: definition; frozen BatchNorm is a linear map, which keeps the network a sum over paths.

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
    return _LinenFunction(module, _Arrays(constants)), _plain(variables["params"])


class ModuleFunction:
    """A frozen function made from a module: where two are equal they compute the same, so that one tracing serves."""


class _Arrays:
    """A tree of arrays that equals itself and trees of the same array objects."""

    def __init__(self, tree: PyTree):
        self.tree = tree
        leaves, structure = jax.tree.flatten(tree)
        self._leaves: list[Any] = leaves
        self._structure: Any = structure

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Arrays) and self._structure == other._structure and all(
            a is b for a, b in zip(self._leaves, other._leaves, strict=True))

    def __hash__(self) -> int:
        return hash((self._structure, *map(id, self._leaves)))


@dataclass(frozen=True)
class _LinenFunction(ModuleFunction):
    """A Linen module in evaluation mode, with all its collections but the parameters."""

    module: Any
    constants: _Arrays

    def __hash__(self) -> int:
        return hash((type(self.module), self.constants))     # modules may hold what cannot be hashed

    def __call__(self, params: PyTree, x: Array) -> Array:
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
                return self.module.apply({"params": params, **self.constants.tree}, x, **flags)
        except errors.ModifyScopeVariableError as error:
            raise ValueError(f"{name} updates its state when it evaluates, as BatchNorm in training mode does: use "
                             "running averages (give __call__ an argument `train` and build "
                             f"BatchNorm(use_running_average=not train)). Flax says: {error}") from error
        except errors.InvalidRngError as error:
            raise ValueError(f"{name} draws random numbers when it evaluates, so it is not a fixed function of its "
                             f"parameters: switch that off. Flax says: {error}") from error


def from_nnx(module: Any) -> tuple[ApplyFn, PyTree]:
    """Turn a Flax NNX module into ``(apply_fn, params)``.

    ``params`` is a plain tree (nested dictionaries of arrays) of the module's ``nnx.Param``; everything else
    is closed over as a constant. ``apply_fn(params, x)`` is the module in evaluation mode (BatchNorm frozen,
    Dropout inert), with the arguments of ``__call__`` set as `from_linen` does. The module is not changed.

    Shapes: apply_fn maps a batch (N, *input) to (N, K).

    Raises TypeError where module is not an NNX module, and ValueError where it has no parameters or, when
    apply_fn is called, where it updates its state even in evaluation mode.

    Source: definition.

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
    return _NnxFunction(definition, _Arrays((state, constants)), type(module)), params


@dataclass(frozen=True)
class _NnxFunction(ModuleFunction):
    """An NNX module in evaluation mode, without its parameters."""

    definition: Any
    arrays: _Arrays
    kind: type

    def __call__(self, params: PyTree, x: Array) -> Array:
        from flax import nnx

        state, constants = self.arrays.tree
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, params)
        merged = nnx.merge(self.definition, filled, constants, copy=True)   # a call must not write into constants
        out = merged(x, **mode_flags(self.kind.__call__, training=False))
        after = jax.tree.leaves(nnx.state(merged, nnx.Not(nnx.Param)))
        if any(new is not old for new, old in zip(after, jax.tree.leaves(constants), strict=True)):
            raise ValueError(f"{self.kind.__name__} updates its state when it evaluates, as BatchNorm in training mode "
                             "does: use running averages")
        return out


def _is_nnx(module: Any) -> bool:
    from flax import nnx

    return isinstance(module, nnx.Module)


def _plain(params: Any) -> PyTree:
    """Make plain dictionaries of a Linen collection (FrozenDict or not) and open its partitioning boxes."""
    from flax.core import meta, unfreeze

    return meta.unbox(unfreeze(params))


def ones_input(shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Shaped[Array, "1 ..."]:
    """Make the all-ones input of the data-free functions: 1 for every entry of one example.

    Shapes: ``shape`` is that of one example, without the batch; the result is (1, *shape).

    Raises what ``jnp.ones`` raises for a shape or type that is none.

    Source: the input 𝟙 of R in Gebhart, Saxena and Schrater (2021), equations 15 and 16.

    >>> ones_input((28, 28, 1)).shape
    (1, 28, 28, 1)
    """
    return jnp.ones((1, *shape), dtype)


def mean_input(X: Float[Array, "n ..."] | Float[np.ndarray, "n ..."], *,
               absolute: bool = False) -> Float[Array, "1 ..."]:
    """Average the examples, μ = (1/N) Σ_n X_n: the input of SynFlow-Dist and SynFlow-L2-Dist.

    The path polynomial needs an input z ≥ 0. With ``absolute`` the result is |μ|, for normalised images.

    Shapes: X is a batch (N, *input); the result is (1, *input).

    Raises ValueError where X is empty or, outside of ``jit``, where the mean is negative somewhere.

    Source: Gebhart, Saxena and Schrater (2021), section 4.2.

    >>> import jax.numpy as jnp
    >>> mean_input(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    Array([[2., 3.]], ...)
    """
    if jnp.ndim(X) < 1 or X.shape[0] == 0:
        raise ValueError("mean_input takes a batch (N, *input) of at least one example, "
                         f"got shape {jnp.shape(X)}")
    mean = jnp.mean(jnp.asarray(X), axis=0, keepdims=True)
    if absolute:
        return jnp.abs(mean)
    if not isinstance(mean, jax.core.Tracer) and bool((mean < 0).any()):
        raise ValueError(f"the mean of X is negative in {int((mean < 0).sum())} of {mean.size} entries, but "
                         "the path polynomial needs an input of at least 0: pass raw images, or "
                         "absolute=True for |mean|")
    return mean
