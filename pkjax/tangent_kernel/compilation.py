"""Programs of Θ, compiled without a fusion by which XLA computes some of them wrongly on processors."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pkjax.network import Network
from pkjax.programs.equations import floating_types
from pkjax.tangent_kernel.leaf_costs import uses

__all__ = ["NO_FUSION", "compiled", "is_curved"]

NO_FUSION = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Compiles without the fusion that is at fault."""
FAULT = ("XLA on this processor computes backward passes of several outputs through a normalisation wrongly (jaxlib "
         "0.10.2 to 0.12, float32): set XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= before JAX starts, or call "
         "pkjax outside of jit, where it compiles without that fusion")


def is_curved(network: Network) -> bool:
    """Whether XLA's fault may meet a network that computes in less than double precision, be it in part.

    Signals meet in it or go through a function that is curved, or a parameter meets itself, as where weights are
    standardised.
    """
    program = network.fn.program
    return uses(program, network.params, network.example).curved and (
        network.fn.out.dtype != np.float64 or floating_types(program.jaxpr) > {np.dtype(np.float64)})


def compiled(*, static_argnames: str | Sequence[str] = (), curved: Callable[..., bool] = is_curved
             ) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function of a network, its first argument; like ``jax.jit``, but safe from XLA's fault.

    Networks that are not curved, such as those of ReLU, do not meet the fault and are compiled as ever.
    """
    def decorate(fn: Callable[..., Any]) -> Any:
        usual = jax.jit(fn, static_argnames=static_argnames)

        @cache
        def safe() -> Any:
            return jax.jit(fn, static_argnames=static_argnames, compiler_options=NO_FUSION)

        @wraps(fn)
        def call(network: Any, *arguments: Any, **options: Any) -> Any:
            if jax.default_backend() != "cpu" or not curved(network) or not _is_at_fault():
                return usual(network, *arguments, **options)
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((network, arguments, options))):
                warnings.warn(FAULT, RuntimeWarning, stacklevel=2)
                return usual(network, *arguments, **options)
            return safe()(network, *arguments, **options)
        return call
    return decorate


@cache
def _is_at_fault() -> bool:
    """Whether XLA computes the backward pass of a normalisation wrongly here."""
    def normalised(x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True))

    draw = np.random.default_rng(0)
    x, cotangents = draw.normal(size=(64, 128)).astype(np.float32), draw.normal(size=(65, 64, 128)).astype(np.float32)
    with jax.ensure_compile_time_eval():
        found = np.asarray(jax.jit(lambda x, d: jax.vmap(lambda e: jax.vjp(normalised, x)[1](e)[0])(d))(x, cotangents))
    z, scale = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True), x.std(-1, keepdims=True)
    known = (cotangents - cotangents.mean(-1, keepdims=True) - z * (cotangents * z).mean(-1, keepdims=True)) / scale
    return bool(np.abs(found - known).max() > 1e-3 * np.abs(known).max())
