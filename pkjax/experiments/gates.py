"""Frozen gates in runs and on the command line: their references, what is pruned with them, and who needs them."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import pkjax as pk
from pkjax.data.dataset import Dataset
from pkjax.experiments.measurements import choose
from pkjax.tables import listed
from pkjax.trees import ApplyFn, Choice, leaf_names, select

__all__ = ["REFERENCES", "check_gates", "check_paths", "left_out", "prunable_with", "reference_input",
           "warn_of_left_out"]

REFERENCES = ("ones", "images")
"""Where coefficients are taken: at an input of ones, or at images, averaged."""
IMAGES = 16
"""How many images a run takes, chosen by its seed."""


def check_gates(gates: str | None, reference: str | None, prefix: str = "") -> str | None:
    """Return where coefficients are taken: None where gates are not frozen.

    Args:
        gates: None or "frozen".
        reference: one of `REFERENCES`, or None for the first.
        prefix: what stands before the names in errors, as "--".

    Raises:
        ValueError: they are something else, or there is a reference without frozen gates.

    Examples:
        >>> check_gates(None, None), check_gates("frozen", None), check_gates("frozen", "images")
        (None, 'ones', 'images')
    """
    if gates not in (None, "frozen"):
        raise ValueError(f"{prefix}gates must be frozen, or left out, got {gates!r}")
    if reference not in (None, *REFERENCES):
        raise ValueError(f"{prefix}reference must be {' or '.join(REFERENCES)}, got {reference!r}")
    if gates is None and reference is not None:
        raise ValueError(f"{prefix}reference says where gates are frozen: set {prefix}gates to frozen with it")
    return None if gates is None else reference or REFERENCES[0]


def reference_input(reference: str | None, dataset: Dataset, seed: int | None = None) -> Any:
    """Return the input (M, H, W, C) that a reference names; None for None.

    Args:
        reference: one of `REFERENCES`, or None.
        dataset: images.
        seed: chooses 16 of them; None takes all.

    Examples:
        >>> digits = pk.data.load("digits", samples=20)
        >>> [reference_input(name, digits, 0).shape for name in REFERENCES]
        [(1, 8, 8, 1), (16, 8, 8, 1)]
    """
    if reference is None:
        return None
    if reference == "ones":
        return pk.ones_input(dataset.pixels.shape[1:])
    few = dataset if seed is None else choose(dataset, min(IMAGES, len(dataset)), seed)
    return jnp.asarray(few.images)


def prunable_with(gates: str | None, apply_fn: ApplyFn, params: PyTree, shape: Sequence[int]) -> Choice:
    """Choose the leaves to prune: all kernels, with frozen gates those on paths."""
    return pk.kernels if gates is None else pk.on_paths(apply_fn, params, pk.ones_input(shape), gates=gates)


def left_out(params: PyTree, prunable: Choice) -> list[str]:
    """Name the kernels that are not pruned.

    Examples:
        >>> left_out({"key": jnp.ones((2, 2)), "value": jnp.ones((2, 2))}, {"key": False, "value": True})
        ['key']
    """
    both = zip(leaf_names(params), *(jax.tree.leaves(select(choice, params)) for choice in (pk.kernels, prunable)),
               strict=True)
    return [name for name, kernel, chosen in both if kernel and not chosen]


def warn_of_left_out(names: Sequence[str]) -> None:
    """Warn, by name, of leaves that are not pruned; of none, not at all."""
    if names:
        warnings.warn(f"not pruned, as they make coefficients and lie on no path: {listed(names)}", UserWarning,
                      stacklevel=3)


def check_paths(name: str, apply_fn: ApplyFn, params: PyTree, shape: Sequence[int], gates: str | None, remedy: str
                ) -> None:
    """Refuse a network without paths before anything long is computed: it is traced, and not evaluated.

    Raises:
        NotPathNetworkError: the message names the network, the operation, and the remedy where gates are not frozen.
    """
    z = pk.ones_input(shape)
    try:
        jax.eval_shape(partial(pk.paths.polynomial, apply_fn, x=z, q=1, gates=gates), params)
    except pk.NotPathNetworkError as error:
        if gates is not None:
            raise
        reasons = str(error).partition("\n  what to do: ")[0].replace("\n  ", "; ")
        raise pk.NotPathNetworkError(f"{name} is not a sum over paths: {reasons}; what to do: {remedy}") from None
