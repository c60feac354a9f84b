"""The headline comparison: the path kernel's trace against the tangent kernel's spectrum, network by network."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree, Shaped

from pkjax.analysis.comparison import Comparison
from pkjax.analysis.measurement import Case, Key
from pkjax.path_kernel.gram import read_paths, widened
from pkjax.paths.frozen import LONE_REFERENCE, is_frozen
from pkjax.programs.meshes import automatic_axes
from pkjax.pruning.plan import whole
from pkjax.tables import Progress, reporter
from pkjax.trees import ApplyFn, Choice, check_masks

__all__ = ["compare"]


def compare(apply_fn: ApplyFn, params: PyTree, X: PyTree[Shaped[ArrayLike, "N ..."]], *, masks: Mapping[Any, Any],
            seeds: Mapping[int | str, PyTree] | None = None, trainable: Choice = None, k: int | None = None,
            x: PyTree | None = None, progress: Progress = False, gates: str | None = None,
            reference: PyTree[Shaped[ArrayLike, "M ..."]] | None = None) -> Comparison:
    """Compare traces of the path kernel with spectra of the tangent kernel over maskings of a network.

        Tr Π,   T_g,   Tr Θ = Σ λ_i,   Σ ν_i π_i,   λ_1,   Tr(Θ)² / ‖Θ‖_F²,   λ_1 ≥ λ_2 ≥ …

    All on one batch, and Tr Π without data. Every masking passes through the same compiled programs, as does every
    other choice of parameters: nothing is compiled for the second one.

    Args:
        apply_fn: the network.
        params: its parameters θ, concrete.
        X: (N, *input), the batch, or a tree of arrays with one N.
        masks: name → masks, booleans like ``params``, or None for the dense network. A key may also be
            (name, compression) or (name, compression, seed): correlations are taken over each of the three.
        seeds: seed → parameters that take the place of ``params`` in the entries of that seed, where initialisations
            differ.
        trainable: which parameters Θ and Π differentiate; all floating-point leaves by default.
        k: how many π to find for Σ ν_i π_i; 0 leaves that sum out. By default NK where the spectrum of Π is exact, and
            8 where it comes from an iteration (large networks that are not fully connected), fewer above a million
            parameters; the rest of the sum then lies between bounds.
        x: (1, *input), the input of the path kernel; all ones by default. Integers (tokens, bytes) have no default.
        progress: True prints a line as each network begins; a function is called with it.
        gates: "frozen" takes networks that are not piecewise linear too, as in ``analyze``: Tr Π, the gated trace and
            Σ ν_i π_i are then of Θ_frozen = J_v^f Π J_v^fᵀ, all else of Θ. Coefficients are frozen anew for each entry.
        reference: with "frozen", the examples (M, *input) to whose coefficients Π is opened, as in ``analyze``; X by
            default.

    Returns:
        A ``Comparison``. A number that is outside of its type's range is NaN with a note that says why; logarithms of
        the traces of Π are known at any size. Networks in which nothing is left have zeros.

    Raises:
        ValueError: no masks, keys of another form, a seed without parameters, two entries of one key; shapes, masks or
            k that do not fit; numbers that are not finite; gates that are neither None nor "frozen", or a reference
            without frozen gates.
        TypeError: masks are not booleans, k is not an integer, or an array is traced, as under `jit`.
        NotPathNetworkError: an operation has no paths.

    Source: Gebhart, Saxena and Schrater (2021), section 3.1, where Tr Π stands for the spectrum of Θ.

    Examples:
        >>> import jax.numpy as jnp
        >>> net = lambda w, x: jnp.maximum(x @ w["a"], 0.) @ w["b"]
        >>> w = {"a": jnp.array([[1., -2.], [0.5, 1.]]), "b": jnp.array([[3.], [5.]])}
        >>> half = {"a": jnp.array([[True, False], [True, True]]), "b": jnp.ones((2, 1), bool)}
        >>> result = compare(net, w, jnp.array([[1., 2.], [2., -1.]]), masks={"dense": None, "half": half})
        >>> [row.trace_pi > row.parameters for row in result.rows], result.spectra["half", None, None].round(2)
        ([True, True], array([153.09,  47.16]))
    """
    entries = _entries(masks, seeds)
    k = None if k is None else whole("k", k, 0)
    if not is_frozen(gates) and reference is not None:
        raise ValueError(LONE_REFERENCE)
    arrays = jax.tree.leaves((params, X, x, reference, list(entries.values()), list((seeds or {}).values())))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in arrays):
        raise TypeError("compare takes concrete arrays, but got traced ones: call it outside of jit, grad and vmap")
    networks = [params if seeds is None or seed is None else seeds[seed] for _, _, seed in entries]
    return _compared(apply_fn, jax.tree.map(jnp.asarray, X), x, list(entries), networks, list(entries.values()),
                     trainable=trainable, k=k, progress=progress, frozen=is_frozen(gates), reference=reference)


@automatic_axes
def _compared(apply_fn: ApplyFn, X: PyTree, x: PyTree | None, keys: list[Key], networks: list[PyTree],
              masks: list[Any], *, trainable: Choice, k: int | None, progress: Progress, frozen: bool,
              reference: PyTree | None) -> Comparison:
    """Measure each network."""
    tell = reporter(progress)
    X = widened(apply_fn, X)
    if frozen:
        reference = X if reference is None else widened(apply_fn, jax.tree.map(jnp.asarray, reference))
    rows, spectra = [], {}
    for n, (key, params, mask) in enumerate(zip(keys, networks, masks, strict=True), 1):
        tell(f"{n} of {len(keys)}: {' '.join(str(part) for part in key if part is not None)}")
        theta = widened(apply_fn, params)
        case = Case(apply_fn, theta, X, x, _full(mask, theta, key), trainable, reference)
        row, spectra[key] = case.measure(key, k)
        rows.append(row)
    out = read_paths(apply_fn, theta, X, None, trainable)[0].fn.out
    return Comparison(rows=tuple(rows), spectra=spectra, samples=len(jax.tree.leaves(X)[0]), outputs=out.shape[-1],
                      dtype=str(out.dtype))


def _entries(masks: Mapping[Any, Any], seeds: Mapping[int | str, PyTree] | None) -> dict[Key, Any]:
    """Bring the keys to one form, and check them."""
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError("masks must map names to masks, as in {'dense': None, 'pruned': result.masks}, but got "
                         f"{'nothing' if isinstance(masks, Mapping) else type(masks).__name__}")
    if seeds is not None and not isinstance(seeds, Mapping):
        raise ValueError(f"seeds must map seeds to parameters, as in {{0: params}}, but got {type(seeds).__name__}")
    entries: dict[Key, Any] = {}
    for given, mask in masks.items():
        parts = given if isinstance(given, tuple) else (given,)
        name, compression, seed = (*parts, None, None, None)[:3]
        compression, seed = (value.item() if isinstance(value, np.generic) else value for value in (compression, seed))
        if not (1 <= len(parts) <= 3 and isinstance(name, str) and isinstance(compression, int | float | None)
                and isinstance(seed, int | str | None)):
            raise ValueError("a key of masks must be a name, (name, compression) or (name, compression, seed), but "
                             f"got {given!r}")
        if compression is not None and not math.isfinite(compression):
            raise ValueError(f"the compression of a key of masks must be finite, but got {given!r}")
        if seeds is not None and seed is not None and seed not in seeds:
            raise ValueError(f"the key {given!r} of masks names a seed for which seeds has no parameters; it has them "
                             f"for {', '.join(map(repr, seeds)) or 'none'}")
        if (key := (name, compression, seed)) in entries:
            raise ValueError(f"masks has two entries of the key {key!r}")
        entries[key] = mask
    return entries


def _full(masks: PyTree | None, params: PyTree, key: Key) -> PyTree:
    """Masks of the dense network too, so that it passes through the program of the others."""
    if masks is not None:
        try:
            check_masks(masks, params)
        except (ValueError, TypeError) as error:
            of = f"{key[0]!r}" if key[1:] == (None, None) else repr(key)
            raise type(error)(f"the entry {of} of masks: {error}") from None
        return jax.tree.map(np.asarray, masks)
    return jax.tree.map(lambda leaf: np.ones(np.shape(leaf), bool), params)
