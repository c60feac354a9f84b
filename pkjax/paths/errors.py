"""The errors for networks that are no sum over paths, or not of the shape that a method needs."""

__all__ = ["NotFullyConnectedError", "NotPathNetworkError"]


class NotPathNetworkError(ValueError):
    """The network holds an operation that has no paths; the message names it, its source line and the way out."""


class NotFullyConnectedError(ValueError):
    """The network is no chain of fully connected layers, which exact eigenvalue counting needs."""
