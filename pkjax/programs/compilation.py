"""Programs of which the first call matters: compiled with few optimisations where these cost more than they save."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial, wraps
from typing import Any

import jax
import numpy as np

__all__ = ["compiled_for_few_calls"]

SMALL = 1 << 20
"""Entries of arrays in all up to which a program is small: what its loops take is little beside its compilation."""


def _entries(*arguments: Any, **options: Any) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves((arguments, options)))


def compiled_for_few_calls(*, static_argnames: str | Sequence[str] = (), donate_argnames: str | Sequence[str] = (),
                           most: int = SMALL, work: Callable[..., int] = _entries
                           ) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that is rather called a few times than in a loop, in half the time.

    On a processor, where ``work`` of its arguments (the entries of all arrays) is at most so much, outside of other
    programs. Matrix products are a library's and lose nothing; ResNet-20's programs run in 12 ms for 5 and compile a
    second sooner. Elsewhere it is ``jax.jit``.

    Examples:
        >>> import jax.numpy as jnp
        >>> double = compiled_for_few_calls()(lambda x: 2 * x)
        >>> double(jnp.ones(2)).tolist()
        [2.0, 2.0]
    """
    def decorate(fn: Callable[..., Any]) -> Any:
        compiled = partial(jax.jit, fn, static_argnames=static_argnames, donate_argnames=donate_argnames)
        usual = compiled()

        @lru_cache(maxsize=1)
        def soon() -> Any:
            return compiled(compiler_options={"xla_backend_optimization_level": 0})

        @wraps(fn)
        def call(*arguments: Any, **options: Any) -> Any:
            traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((arguments, options)))
            few = jax.default_backend() == "cpu" and not traced and work(*arguments, **options) <= most
            return (soon() if few else usual)(*arguments, **options)

        call.lower = usual.lower  # type: ignore[attr-defined]
        return call
    return decorate
