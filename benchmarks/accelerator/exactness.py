"""Float32 on the default device against float64 on the processor, function by function: relative errors and seconds.

    python -m benchmarks.accelerator.exactness [--small] [--networks ...] [--functions ...] [--output FILE]

`first` is a call with compilation (less what an earlier function of the same process has compiled), `again` the median
of later ones. Several processes share the card: seconds are upper bounds. "ntk" runs under JAX's default precision,
"ntk, highest" under the highest: the same error in both says that no product is in TF32 or bfloat16.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk

from benchmarks.accelerator.rows import Rows, message, options

NETWORKS = {"fc-100": (lambda: pk.models.fc(width=100, depth=6), (28, 28, 1), 64),
            "resnet20": (pk.models.resnet20, (32, 32, 3), 16),
            "fc-500": (lambda: pk.models.fc(width=500, depth=6), (28, 28, 1), 64),
            "fc-20": (lambda: pk.models.fc(width=20, depth=3), (8, 8, 1), 8)}
"""In the order of importance; the last is for the processor."""
FIRST = ("fc-100", "resnet20", "fc-20")
"""Networks of which all functions but the last come before those of others."""
CARD, PROCESSOR = 2, 4
"""Processes: more on one card compile no faster, as each times candidates on it (XLA's autotuning)."""


def _report(f: Any, p: Any, X: Any, one: Any) -> dict[str, Any]:
    """Theorem 1's report: spectra, traces, and which claims hold."""
    report = pk.analyze(f, p, X[:8], k=8)
    return {"lam": report.lam, "nu": report.nu, "pi": report.pi, "trace Θ": report.trace_ntk,
            "trace Π": report.trace_pi, "gated trace": report.gated_trace,
            "claims": {name: bool(claim.holds) for name, claim in report.claims.items()},
            "checks": sorted(name for name, check in report.checks.items() if not check.passed)}


def _highest(f: Any, p: Any, X: Any, one: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return pk.ntk(f, p, X)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ntk": lambda f, p, X, one: pk.ntk(f, p, X),
    "ntk, highest": _highest,
    "path_kernel.trace": lambda f, p, X, one: pk.path_kernel.trace(f, p, one, log=True),
    "synflow": lambda f, p, X, one: pk.synflow(f, p, one),
    "masks": lambda f, p, X, one: pk.prune(lambda q: pk.synflow(f, q, one), p, compression=1, steps=10).masks,
    "path_kernel.eigenpairs": lambda f, p, X, one: pk.path_kernel.eigenpairs(f, p, one, k=1).values,
    "ntk_eigenpairs": lambda f, p, X, one: pk.ntk_eigenpairs(f, p, X, k=4).values,
    "ntk_trace": lambda f, p, X, one: pk.ntk_trace(f, p, X),
    "synflow_l2": lambda f, p, X, one: pk.synflow_l2(f, p, one),
    "log_count": lambda f, p, X, one: pk.paths.log_count(f, p, one),
    "path_kernel.gated_trace": lambda f, p, X, one: pk.path_kernel.gated_trace(f, p, X),
    "data_factor": lambda f, p, X, one: pk.data_factor(f, p, X),
    "analyze": _report,
}
"""In the order of importance: what the time does not reach is unfinished."""


def ordered(networks: Sequence[str], functions: Sequence[str]) -> list[tuple[str, str]]:
    """Every function of every network, the important ones first and Theorem 1's report last."""
    place = {label: at for at, label in enumerate(FUNCTIONS)}
    return sorted(((name, label) for label in functions for name in networks), key=lambda task: (
        task[1] == "analyze", task[0] not in FIRST, place[task[1]], [*NETWORKS].index(task[0])))


def network(name: str, dtype: Any) -> tuple[Any, ...]:
    """A network with the same parameters and inputs in any type, drawn on the host."""
    build, shape, n = NETWORKS[name]
    module, rng = build(), np.random.default_rng(0)
    empty = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))

    def fill(path: Any, leaf: Any) -> jax.Array:
        if path[-1].key == "kernel":
            values = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            values = np.full(leaf.shape, path[-1].key in ("scale", "var"))
        return jnp.asarray(values.astype(np.float32), dtype)

    apply_fn, params = pk.from_linen(module, jax.tree_util.tree_map_with_path(fill, empty))
    X = rng.normal(size=(n, *shape)).astype(np.float32)
    return apply_fn, params, jnp.asarray(X, dtype), jnp.ones((1, *shape), dtype)


def difference(value: Any, want: Any) -> float:
    """The largest difference, relative to the largest entry; of masks the share of entries that differ."""
    if isinstance(want, dict) and "claims" in want:
        return max(difference(value[name], want[name]) for name in want if name not in ("claims", "checks"))
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(want), strict=True)]
    if pairs[0][0].dtype == bool:
        return sum(int((a != b).sum()) for a, b in pairs) / sum(a.size for a, _ in pairs)
    size = max(float(np.abs(b).max(initial=0)) for _, b in pairs)
    return max(float(np.abs(a.astype(np.float64) - b).max(initial=0)) for a, b in pairs) / size


def measured(name: str, label: str, calls: int = 6) -> tuple[Any, float, float]:
    """In float32: the value, and the seconds of the first call and of later ones (of long ones a single one)."""
    case, times = network(name, np.float32), list[float]()
    while len(times) < calls and not (len(times) > 1 and times[-1] > 2):
        began = time.perf_counter()
        value = jax.block_until_ready(FUNCTIONS[label](*case))
        times.append(time.perf_counter() - began)
    return jax.device_get(value), times[0], statistics.median(times[1:])


def exact(name: str, label: str) -> Any:
    """In float64, in a process where the processor is the only device."""
    return jax.device_get(FUNCTIONS[label](*network(name, np.float64)))


def _on_processor() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)


def compare(rows: Rows, name: str, label: str, ours: "Future[Any]", reference: "Future[Any]", limit: float) -> None:
    """Wait for both sides of one comparison, and write its row."""
    row = {"network": name, "examples": NETWORKS[name][2], "function": label}
    try:
        value, row["first"], row["again"] = ours.result(timeout=max(0, limit - rows.seconds))
        want = reference.result(timeout=max(0, limit - rows.seconds))
        row["difference"] = difference(value, want)
        if label == "analyze":
            row["claims that differ"] = [claim for claim in want["claims"]
                                         if value["claims"][claim] != want["claims"][claim]]
            row["failed checks"] = {"float32": value["checks"], "float64": want["checks"]}
    except TimeoutError:
        late = "float64 on the processor" if "first" in row else "float32"
        row["unfinished"] = f"{late} is not ready after {limit:.0f} s"
    except Exception as error:      # the others are still wanted
        row["error"] = message(error)
    rows.add(**row)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare every function on every network; return how many failed."""
    parser = options(__doc__, "exactness", 90)
    parser.add_argument("--networks", nargs="*", choices=[*NETWORKS], default=[*NETWORKS][:-1])
    parser.add_argument("--functions", nargs="*", choices=[*FUNCTIONS], default=[*FUNCTIONS])
    chosen = parser.parse_args(arguments)
    names = ["fc-20"] if chosen.small else chosen.networks
    rows = Rows(chosen.output, type="float32 against float64")
    tasks = ordered(names, chosen.functions)
    spawn = multiprocessing.get_context("spawn")
    most = max(1, (os.cpu_count() or 2) // 2)
    with (ProcessPoolExecutor(min(CARD, most), mp_context=spawn) as here,
          ProcessPoolExecutor(min(PROCESSOR, most), mp_context=spawn, initializer=_on_processor) as processor):
        pairs = {task: (here.submit(measured, *task), processor.submit(exact, *task)) for task in tasks}
        waiting = dict(pairs)
        while waiting:
            wait([future for pair in waiting.values() for future in pair if not future.done()], timeout=0.5,
                 return_when="FIRST_COMPLETED")
            for task, pair in list(waiting.items()):
                if all(future.done() for future in pair) or rows.seconds > chosen.seconds:
                    compare(rows, *task, *waiting.pop(task), limit=chosen.seconds)
        unfinished = rows.seconds > chosen.seconds
        for pool in (here, processor):
            pool.shutdown(wait=not unfinished, cancel_futures=True)
        for process in multiprocessing.active_children() if unfinished else []:
            process.kill()
    return rows.failed


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
