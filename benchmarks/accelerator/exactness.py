"""Float32 on the default device against float64 on the processor, function by function: relative errors and seconds.

    python -m benchmarks.accelerator.exactness [--small] [--networks ...] [--functions ...] [--output FILE]

Each row is written as soon as it is measured. ``first`` is a call with compilation, ``again`` the median of five.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk

from benchmarks.common import environment

CPU = jax.devices("cpu")[0]
KEY = jax.random.key(7)
LARGE = {"fc-100": (lambda: pk.models.fc(width=100, depth=6), (28, 28, 1), 64),
         "fc-500": (lambda: pk.models.fc(width=500, depth=6), (28, 28, 1), 64),
         "resnet20": (pk.models.resnet20, (32, 32, 3), 16)}
SMALL = {"fc-20": (lambda: pk.models.fc(width=20, depth=3), (8, 8, 1), 8)}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ntk": lambda f, p, X, one: pk.ntk(f, p, X),
    "ntk_trace": lambda f, p, X, one: pk.ntk_trace(f, p, X),
    "path_kernel.trace": lambda f, p, X, one: pk.path_kernel.trace(f, p, one, log=True),
    "synflow": lambda f, p, X, one: pk.synflow(f, p, one),
    "log_count": lambda f, p, X, one: pk.paths.log_count(f, p, one),
    "ntk_eigenpairs": lambda f, p, X, one: pk.ntk_eigenpairs(f, p, X, k=4).values,
    "masks": lambda f, p, X, one: pk.prune(lambda q: pk.synflow(f, q, one), p, compression=1, steps=10).masks,
}


def network(build: Callable[[], Any], shape: tuple[int, ...], n: int, dtype: Any) -> tuple[Any, ...]:
    """A network with the same parameters and inputs in any type."""
    module = build()
    variables = module.init(jax.random.key(0), jnp.ones((1, *shape), jnp.float32))
    cast = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), variables)
    apply_fn, params = pk.from_linen(module, jax.tree.map(jnp.asarray, cast))
    X = np.random.default_rng(1).normal(size=(n, *shape)).astype(np.float32)
    return apply_fn, params, jnp.asarray(X, dtype), jnp.ones((1, *shape), dtype)


def difference(value: Any, want: Any) -> float:
    """The largest difference, relative to the largest entry; of masks the share of entries that differ."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(want), strict=True)]
    if pairs[0][0].dtype == bool:
        return sum(int((a != b).sum()) for a, b in pairs) / sum(a.size for a, _ in pairs)
    size = max(float(np.abs(b).max(initial=0)) for _, b in pairs)
    return max(float(np.abs(a.astype(np.float64) - b).max(initial=0)) for a, b in pairs) / size


def measured(function: Callable[..., Any], case: tuple[Any, ...]) -> tuple[Any, float, float]:
    """The value, and the seconds of a first and of later calls."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        value = jax.block_until_ready(function(*case))
        times.append(time.perf_counter() - began)
    return value, times[0], statistics.median(times[1:])


def main() -> None:
    """Measure every function on every network."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--small", action="store_true", help="one tiny network")
    options.add_argument("--networks", nargs="*", choices=[*LARGE], default=[*LARGE])
    options.add_argument("--functions", nargs="*", choices=[*FUNCTIONS], default=[*FUNCTIONS])
    options.add_argument("--output", type=Path, default=Path("exactness.json"))
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    networks = SMALL if chosen.small else {name: LARGE[name] for name in chosen.networks}
    for name, (build, shape, n) in networks.items():
        for label in chosen.functions:
            function = FUNCTIONS[label]
            row = {"network": name, "examples": n, "function": label}
            try:
                value, row["first"], row["again"] = measured(function, network(build, shape, n, np.float32))
                with jax.enable_x64(True), jax.default_device(CPU):
                    row["error"] = difference(value, function(*network(build, shape, n, np.float64)))
            except Exception as error:      # the others are still wanted
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
            print(json.dumps(row), flush=True)
            chosen.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
