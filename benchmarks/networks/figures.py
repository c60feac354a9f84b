"""What is measured of networks with frozen gates: exactness of slim ones, paths, scores and traces of full ones."""

import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
from pkjax.paths.polynomial import path_sum
from pkjax.trees import leaf_names

from benchmarks.networks import libraries
from benchmarks.networks.catalogue import Entry

GATED = 1_000_000
"""Parameters from which a full network's gated trace is left out: it is the slowest figure."""


def relative(got: Any, want: Any) -> float:
    """The largest difference, relative to the largest entry."""
    want = np.asarray(want)
    assert np.abs(want).max() > 1e-6, "nothing to compare with"
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


def inputs(shape: tuple[int, ...], tokens: int, dtype: Any) -> tuple[Any, Any]:
    """A normal input at which gates are frozen, and 𝟙; of tokens, the same random ones twice."""
    rng = np.random.default_rng(1)
    if tokens:
        drawn = jnp.asarray(rng.integers(tokens, size=(1, *shape)), jnp.int32)
        return drawn, drawn
    return jnp.asarray(rng.normal(size=(1, *shape)), dtype), jnp.ones((1, *shape), dtype)


def frozen_refusal(entry: Entry) -> dict[str, str] | None:
    """Read a slim network with frozen gates: None, or what refuses it, and why."""
    assert entry.slim is not None
    built = entry.slim(entry.slim_shape)
    apply_fn, params = built.network(libraries.drawn(built, jnp.float64))
    try:
        pk.paths.frozen(apply_fn, params, inputs(entry.slim_shape, entry.slim_tokens, jnp.float64)[0])
    except pk.NotPathNetworkError as error:
        reason, *lines = str(error).split("\n  ")
        told = dict(line.split(": ", 1) for line in lines)
        return {"operation": told["operation"], "reason": reason, "what_to_do": told["what to do"]}
    return None


def frozen_exactness(entry: Entry) -> dict[str, float]:
    """Relative differences of a slim network with frozen gates.

    - sum over paths: Σ c_p v_p(θ) a_p x_s(p) at the reference, with its coefficients, from f of the library.
    - conservation: Σ θ ∘ ∂R/∂θ of the last layer, through which every path leads once, from R_1(|θ|, 𝟙).
    """
    assert entry.slim is not None
    built = entry.slim(entry.slim_shape)
    apply_fn, params = built.network(libraries.drawn(built, jnp.float64))
    x, ones = inputs(entry.slim_shape, entry.slim_tokens, jnp.float64)
    linear = pk.paths.frozen(apply_fn, params, x)
    sums = path_sum(linear, params, x, gates=pk.paths.gates(linear, params, x))
    whole = pk.paths.polynomial(linear, jax.tree.map(jnp.abs, params), ones, q=1).sum()
    scores = jax.tree_util.tree_leaves_with_path(
        pk.synflow(apply_fn, params, ones, gates="frozen", reference=x))
    last = sum(score.sum() for path, score in scores if entry.last in jax.tree_util.keystr(path))
    return {"sum over paths": relative(sums, apply_fn(params, x)), "conservation": relative(last, whole)}


def frozen_sizes(entry: Entry) -> dict[str, Any]:
    """Paths, scores of SynFlow, Tr Π at 𝟙, and the gated trace of the reference itself, of a full network in float32.

    Seconds are of the processor, all cores together, of the first call of each.
    """
    built = entry.full(entry.shape)
    apply_fn, params = built.network(libraries.drawn(built, jnp.float32))
    x, ones = inputs(entry.shape, entry.tokens, jnp.float32)
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = call()
        jax.block_until_ready(jax.tree.leaves(result))
        seconds[name] = time.process_time() - began
        return result

    linear = timed("frozen", lambda: pk.paths.frozen(apply_fn, params, x))
    paths = timed("log_count", lambda: pk.paths.log_count(linear, params, ones))
    scores = timed("synflow", lambda: pk.synflow(linear, params, ones))
    trace = timed("trace", lambda: pk.path_kernel.trace(linear, params, ones, log=True))
    figures: dict[str, Any] = {}
    if libraries.parameters(built) < GATED:
        gated = timed("gated_trace", lambda: pk.path_kernel.gated_trace(apply_fn, params, x, gates="frozen"))
        figures["log10_gated_trace"] = math.log10(float(jnp.sum(gated)))
    zeros = {name: float((leaf == 0).mean()) for name, leaf in zip(leaf_names(scores), jax.tree.leaves(scores),
                                                                    strict=True)}
    off = [name for name, share in zeros.items() if share == 1]
    number = sum(leaf.size for leaf in jax.tree.leaves(scores))
    return {**figures, "log10_paths": float(paths), "log10_trace": float(trace) / math.log(10),
            "scores_finite": all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(scores)),
            "zero_scores": sum(int((leaf == 0).sum()) for leaf in jax.tree.leaves(scores)) / number,
            "leaves": len(zeros), "leaves_off_paths": off,
            "leaves_partly_off": {name: share for name, share in zeros.items() if 0 < share < 1}, "seconds": seconds}


def parted(names: list[str]) -> tuple[list[str], list[str]]:
    """Arrays without scores, into those on no path, and biases whose scores are too small for float32.

    A bias lies on a path where the weights of its layer do: they end in the same units.

    Examples:
        >>> parted(["query/kernel", "query/bias", "head/bias"])
        (['query/kernel', 'query/bias'], ['head/bias'])
    """
    def small(name: str) -> bool:
        layer, _, last = name.rpartition("/")
        return last == "bias" and not {f"{layer}/{weight}" for weight in ("kernel", "scale", "weight")} & set(names)

    return [name for name in names if not small(name)], [name for name in names if small(name)]


def layers(names: list[str]) -> str:
    """Names of the arrays' layers, or of arrays that are in none, without their numbers.

    Examples:
        >>> layers(["blocks/0/query/kernel", "query_1_2/bias", "Dense_3/bias", "position_0_1"])
        'Dense, position, query'
    """
    return ", ".join(sorted({re.sub(r"(_\d+)+$", "", name.split("/")[-2:][0]) for name in names}))
