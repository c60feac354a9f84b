"""What a run measures of its network: at initialisation, and after each epoch."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import pkjax as pk
from pkjax.data.dataset import Dataset

__all__ = ["choose", "initial_traces", "measurements", "spectra"]


def choose(dataset: Dataset, samples: int | None, seed: int) -> Dataset:
    """Choose examples by the seed; ValueError where there are fewer.

    Examples:
        >>> choose(pk.data.load("digits"), 3, seed=0).pixels.shape
        (3, 8, 8, 1)
    """
    if samples is None:
        return dataset
    if samples > len(dataset):
        raise ValueError(f"{dataset.name} has {len(dataset)} examples in this split, fewer than the {samples} wanted")
    rows = np.random.default_rng(seed).permutation(len(dataset))[:samples]
    return Dataset(dataset.pixels[rows], dataset.labels[rows], dataset.mean, dataset.std, dataset.classes,
                   dataset.name, dataset.levels)


@lru_cache(maxsize=8)
def initial_traces(module: Any, gates: str | None = None) -> Callable[..., dict[str, Array]]:
    """Compile (params, state, masks, images) → the traces at initialisation."""
    def traces(params: PyTree, state: PyTree, masks: PyTree, images: Array) -> dict[str, Array]:
        apply_fn, _ = pk.from_linen(module, {"params": params, **state})
        return {"trace_ntk": pk.ntk_trace(apply_fn, params, images, masks=masks),
                "gated_trace": pk.path_kernel.gated_trace(apply_fn, params, images, masks=masks, gates=gates)}

    # What frozen gates stand for XLA may compute wrongly, unless `ntk_trace` compiles its own program.
    return traces if gates == "frozen" else jax.jit(traces)


@lru_cache(maxsize=8)
def measurements(module: Any, gates: str | None = None) -> Callable[..., dict[str, Array]]:
    """Compile (params, state, (masks, (θ₀, state₀), images, reference)) → the row of an epoch."""
    @jax.jit
    def measured(params: PyTree, state: PyTree, about: PyTree) -> dict[str, Array]:
        masks, (before, state_before), images, reference = about
        ones = pk.ones_input(images.shape[1:])

        def network(params: PyTree, state: PyTree) -> Any:
            return pk.from_linen(module, {"params": params, **state})[0]

        now = network(params, state)
        f, first = now(params, images), network(before, state_before)(before, images)
        moved = sum(jnp.sum(d**2) for d in jax.tree.leaves(jax.tree.map(jnp.subtract, params, before)))
        return {"ln_trace_pi": pk.path_kernel.trace(now, params, ones, masks=masks, log=True, gates=gates,
                                                    reference=reference),
                "weight_change": jnp.sqrt(moved), "output_norm": jnp.linalg.norm(f),
                "output_change": jnp.linalg.norm(f - first)}

    return measured


def spectra(module: Any, variables: PyTree, masks: PyTree, images: Any, tell: Callable[[str], None],
            **gates: Any) -> dict[str, Any]:
    """Analyze the spectra on a few images; with `gates="frozen"` and `reference=`, as `pk.analyze` takes them."""
    apply_fn, params = pk.from_linen(module, variables)
    report = pk.analyze(apply_fn, params, images, masks=masks, progress=lambda part: tell(f"spectra: {part}"), **gates)
    count = min(len(report.nu), len(report.pi))
    return {"bound": float((report.nu[:count] * report.pi[:count]).sum()),
            "captured": np.cumsum(report.carried).tolist(),
            "lam": report.lam.tolist(), "nu": report.nu.tolist(), "pi": report.pi.tolist(),
            "trace_ntk": report.trace_ntk, "effective_rank": report.effective_rank,
            "claims": {name: [claim.holds, claim.slack] for name, claim in report.claims.items()},
            "checks": all(check.passed for check in report.checks.values())}
