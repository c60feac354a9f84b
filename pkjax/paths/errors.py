"""The errors for networks that are no sum over paths, or not of the shape that a method needs."""

__all__ = ["NotFullyConnectedError", "NotPathNetworkError"]


class NotPathNetworkError(ValueError):
    """The network holds an operation that has no paths; the message names it, its source line and the way out.

    Raised by whatever reads a network as a sum over paths.

    >>> import jax.numpy as jnp
    >>> from pkjax import paths
    >>> paths.polynomial(lambda w, x: jnp.tanh(x @ w), jnp.ones((2, 1)), jnp.ones((1, 2)), q=1)
    Traceback (most recent call last):
        ...
    pkjax.paths.errors.NotPathNetworkError: ...tanh...
    """


class NotFullyConnectedError(ValueError):
    """The network is no chain of fully connected layers, which exact eigenvalue counting needs.

    Raised by ``paths.dense_layers`` and ``path_kernel.count_above``.

    >>> import jax.numpy as jnp
    >>> from pkjax import paths
    >>> paths.dense_layers(lambda w, x: x + x @ w, jnp.ones((2, 2)), jnp.ones((1, 2)))
    Traceback (most recent call last):
        ...
    pkjax.paths.errors.NotFullyConnectedError: ...
    """
