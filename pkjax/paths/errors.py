"""The error for networks that are no sum over paths."""

__all__ = ["NotPathNetworkError"]


class NotPathNetworkError(ValueError):
    """The network holds an operation that has no paths; the message names it, its source line and the way out."""
