"""The errors for networks that are not a sum over paths, or not of the form that a method requires."""

__all__ = ["NotFullyConnectedError", "NotPathNetworkError"]


class NotPathNetworkError(ValueError):
    """The network has an operation without paths; the message names it, its source line and a remedy.

    Raised by whatever reads a network as a sum over paths.

    Examples:
        >>> import jax.numpy as jnp
        >>> from pkjax import paths
        >>> paths.polynomial(lambda w, x: jnp.tanh(x @ w), jnp.ones((2, 1)), jnp.ones((1, 2)), q=1)
        Traceback (most recent call last):
            ...
        pkjax.paths.errors.NotPathNetworkError: ...tanh...
    """


class NotFullyConnectedError(ValueError):
    """The network is not a chain of fully connected layers, which exact eigenvalue counting requires.

    Raised by ``paths.dense_layers`` and ``path_kernel.count_above``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from pkjax import paths
        >>> paths.dense_layers(lambda w, x: x + x @ w, jnp.ones((2, 2)), jnp.ones((1, 2)))
        Traceback (most recent call last):
            ...
        pkjax.paths.errors.NotFullyConnectedError: ...
    """
