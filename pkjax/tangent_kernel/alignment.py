"""Kernel–target alignment, plain and centred: of a kernel that is given, or of Θ from products alone."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, Shaped

from pkjax.linalg.stochastic import Estimate, frobenius
from pkjax.network import Network, read
from pkjax.programs.meshes import automatic_axes
from pkjax.tangent_kernel.arguments import check_kernel
from pkjax.tangent_kernel.products import examples_at_once, ntk_trace, theta_times
from pkjax.trees import ApplyFn, Choice, check_finite, is_floating

__all__ = ["as_targets", "kernel_alignment", "ntk_alignment"]

NOISE = 16
"""Times the precision of the numbers: what centring leaves of a constant."""


def kernel_alignment(theta: Shaped[Array | np.ndarray, "..."], y: Shaped[Array | np.ndarray, "..."], *,
                     centered: bool = False) -> Float[Array, ""]:
    """Alignment of a kernel with targets: the cosine between Θ and y yᵀ as vectors.

        ⟨Θ, y yᵀ⟩ / (‖Θ‖_F ‖y yᵀ‖_F) = yᵀ Θ y / (‖Θ‖_F ‖y‖²)

    With ``centered`` both are centred first, output by output: H Θ H and H y with H = (I − 1 1ᵀ / N) ⊗ I_K.

    Args:
        theta: Θ of shape (N, N, *out, *out), as `ntk` returns it. A Gram matrix (N, N) goes with targets (N,).
        y: targets (N, *out), floating point: one-hot vectors of labels (`jax.nn.one_hot`), say.
        centered: whether to centre both.

    Returns:
        The alignment, a scalar: between 0 and 1 for a kernel that is positive semidefinite.

    Raises:
        ValueError: shapes do not match; Θ or y is 0 (centred, where that is asked), NaN or infinite (unless traced).
        TypeError: y is not floating point.

    Source: Cristianini et al. (2001), definition 1; Cortes, Mohri and Rostamizadeh (2012), definition 4, for the
    centred alignment.

    Examples:
        >>> import jax.numpy as jnp
        >>> y = jnp.array([1.0, -1.0])
        >>> [round(float(kernel_alignment(theta, y)), 4) for theta in (jnp.outer(y, y), jnp.eye(2))]
        [1.0, 0.7071]
    """
    y = as_targets(y, "y")
    theta = jnp.asarray(theta)
    n, out = len(y), y.shape[1:]
    if theta.shape != (n, n, *out, *out):
        raise ValueError(f"theta must have the shape (N, N, *out, *out) = {(n, n, *out, *out)} for targets of shape "
                         f"{y.shape}, but has {theta.shape}")
    check_finite(theta, "theta")
    flat, blocks = y.reshape(n, -1), theta.reshape(n, n, y[0].size, y[0].size)
    if centered:
        flat = _centred(flat)
        middle = blocks - blocks.mean(0) - blocks.mean(1, keepdims=True) + blocks.mean((0, 1))
        blocks = _beyond_rounding(middle, blocks)
    size = jnp.abs(blocks).max()
    blocks = blocks / jnp.where(size > 0, size, 1)       # squares stay in range
    flat = _unit(flat)
    with jax.default_matmul_precision("highest"):
        value = jnp.einsum("nk,nmkl,ml", flat, blocks, flat) / jnp.sqrt(jnp.sum(blocks**2))
    _check_defined(value, centered)
    return value


@automatic_axes
def ntk_alignment(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[Array | np.ndarray, "N ..."]],
                  y: Shaped[Array | np.ndarray, "..."], *, key: Key[Array, ""], centered: bool = False,
                  probes: int = 32, masks: PyTree | None = None, trainable: Choice = None,
                  batch_size: int | None = None) -> Estimate:
    """Estimate the alignment of Θ with targets from products alone, for kernels too large to form.

        yᵀ Θ y / (‖Θ‖_F ‖y‖²),   ‖Θ‖_F² = E ‖Θ s‖² over random signs s

    The numerator is one exact product; the norm is estimated as by `ntk_frobenius`. `kernel_alignment` takes Θ itself.

    Args:
        apply_fn: the network.
        params: its parameters θ.
        X: (N, *input), the inputs.
        y: targets (N, *out), floating point, of the shape of the outputs.
        key: a typed random key.
        centered: whether to centre Θ and y over the examples, as `kernel_alignment` does.
        probes: number of random vectors s.
        masks: booleans like `params`; masked weights are absent and do not train.
        trainable: which parameters Θ differentiates, as in `ntk`.
        batch_size: number of examples taken at a time, as in `ntk_matvec`.

    Returns:
        The estimate with its standard error, scalars of the outputs' dtype.

    Raises:
        ValueError: fewer than 2 probes; y has another shape than the outputs; Θ or y is 0 (centred, where that is
            asked; unless traced); and as for `ntk`.
        TypeError: y is not floating point.
        FloatingPointError: Θ overflows or vanishes in the type of its numbers (not checked under `jit`).

    Source: Cortes, Mohri and Rostamizadeh (2012), definition 4; Hutchinson (1990) for the norm.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> y = jnp.array([[1.0], [-1.0]])
        >>> value, error = ntk_alignment(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.eye(2), y, key=jax.random.key(0))
        >>> round(float(value), 4), round(float(error), 4)       # Θ is the identity
        (0.7071, 0.0)
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes}")
    network = read(apply_fn, params, X, masks=masks, trainable=trainable)
    X, y = network.batch(X), as_targets(y, "y")
    if y.shape != (shape := (len(X), *network.outputs)):
        raise ValueError(f"y must have the shape {shape} of the network's outputs, got {y.shape}")
    dtype, size = network.fn.out.dtype, examples_at_once(network, X, batch_size)
    scale = ntk_trace(network.fn, params, X, masks=masks, trainable=trainable).astype(dtype)
    estimate = _alignment(network, X, y.reshape(len(X), -1).astype(dtype), key, scale, centered=centered, probes=probes,
                          size=size)
    _check_defined(estimate.value, centered)
    check_kernel(network, X, (estimate, scale), "the alignment of Θ")
    return estimate


@partial(jax.jit, static_argnames=("centered", "probes", "size"))
def _alignment(network: Network, X: Array, y: Array, key: Array, scale: Array, *, centered: bool, probes: int,
               size: int) -> Estimate:
    centre: Callable[[Array], Array] = _centred if centered else lambda v: v
    unit = _unit(centre(y))
    scale = jnp.where(scale > 0, scale, 1)

    def times(v: Array) -> Array:
        held = centre(v.reshape(y.shape))
        product = theta_times(network, X, held, size=size)
        return product - product.mean(0) if centered else product

    signs = jax.random.rademacher(key, (probes, y.size), y.dtype)
    mean, error = frobenius(times, signs, scale)
    if centered:
        mean = jnp.where(mean > (NOISE * jnp.finfo(mean.dtype).eps) ** 2, mean, 0)
    value = jnp.sum(unit * times(unit)) / scale / jnp.sqrt(mean)
    return Estimate(value, jnp.abs(value) * error / (2 * mean))


def as_targets(y: Shaped[Array | np.ndarray, "..."], name: str) -> Array:
    """Check targets, and return them as an array on the device.

    Raises:
        ValueError: there is no example, or a number is NaN or infinite.
        TypeError: the targets are not floating point.
    """
    y = jnp.asarray(y)
    if not is_floating(y):
        raise TypeError(f"{name} must be floating-point targets (N, *out), but is {y.dtype} of shape {y.shape}: make "
                        "one-hot vectors of labels, jax.nn.one_hot(labels, classes)")
    if y.ndim == 0 or y.size == 0:
        raise ValueError(f"{name} must be targets (N, *out) of at least one example, but has shape {y.shape}")
    check_finite(y, name)
    return y


def _centred(y: Array) -> Array:
    return _beyond_rounding(y - y.mean(0), y)


def _beyond_rounding(difference: Array, whole: Array) -> Array:
    """A difference, or 0 where all of it is rounding."""
    noise = NOISE * jnp.finfo(whole.dtype).eps * jnp.abs(whole).max()
    return jnp.where(jnp.abs(difference).max() <= noise, 0, difference)


def _unit(y: Array) -> Array:
    """A multiple of norm 1."""
    y = y / jnp.abs(y).max()
    return y / jnp.linalg.norm(y)


def _check_defined(value: Array, centered: bool) -> None:
    if not isinstance(value, jax.core.Tracer) and not np.isfinite(value):
        raise ValueError("the alignment is 0 / 0: " + (
            "centred, the kernel or the targets are 0, as targets are that all examples share" if centered else
            "the kernel or the targets are 0"))
