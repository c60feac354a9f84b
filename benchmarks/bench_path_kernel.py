"""The path kernel's trace, exact counts and largest eigenvalues: time, peak memory, agreement, growth.

    python -m benchmarks.bench_path_kernel --output path_kernel.json --plot path_kernel.png

Figures exclude compilation, except for lists of eigenvalues: these are timed whole, compilation included, in a fresh
process together with their peak memory. The trace is compared with one forward and backward pass of the network on a
single example, in turns. Enumeration lists every path of small networks and diagonalises the explicit Π; its
eigenvalues must agree with those of `path_kernel.eigenvalues`.
"""

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
from pkjax import paths

from benchmarks import common

AGREEMENT = 1e-8
TURN = 0.2
"""Seconds."""


@dataclass(frozen=True)
class Case:
    """A network, how many eigenvalues to find, and their residual relative to the largest."""

    module: Callable[[], Any]
    shape: tuple[int, ...] = (28, 28, 1)
    top: int = 0
    tolerance: float = 1e-10
    counted: bool = True


IMAGE = (32, 32, 3)
CASES = {
    "tiny": Case(lambda: pk.models.fc(width=10, depth=1), top=5),
    "FC-100": Case(lambda: pk.models.fc(100), top=1000),
    "FC-2000": Case(lambda: pk.models.fc(2000), top=10),
    "ResNet-20": Case(pk.models.resnet20, IMAGE, top=160, tolerance=1e-5, counted=False),
    "VGG-16-BN": Case(pk.models.vgg16, IMAGE, counted=False),
}


def network(case: Case) -> tuple[Any, Any, jax.Array]:
    """(apply_fn, params, input of ones) of a case, initialised anew."""
    module, x = case.module(), jnp.ones((1, *case.shape), jnp.float32)
    return (*pk.from_linen(module, jax.jit(module.init)(jax.random.key(0), x)), x)


def trace_and_gradient(case: Case) -> dict[str, Callable[[], Any]]:
    """Tr Π, and one forward and backward pass of a single example."""
    apply_fn, params, x = network(case)
    example = jax.random.normal(jax.random.key(1), x.shape, x.dtype)
    trace = jax.jit(lambda p: pk.path_kernel.trace(apply_fn, p, x))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(apply_fn(p, example) ** 2)))
    return {"trace": lambda: trace(params), "gradient": lambda: gradient(params)}


def counts(case: Case, repeats: int) -> dict[str, Any]:
    """Seconds of one exact count: of the whole call, and of the elimination without reading the network."""
    from pkjax.path_kernel import inertia
    from pkjax.path_kernel.dense_gram import build

    apply_fn, params, x = network(case)
    level = float(pk.path_kernel.eigenvalues(apply_fn, params, x, k=1)[0]) / 10
    chain = build(paths.dense_layers(apply_fn, params, x), np.asarray(x, np.float64).ravel())
    sides = {"call": lambda: pk.path_kernel.count_above(apply_fn, params, x, [level]),
             "elimination": lambda: inertia.eliminate(chain, level).above}
    with inertia.one_thread(chain):
        timings, results = common.alternate(sides, repeats, TURN)
    return {"count": int(results["call"][0]), "level": level,
            "seconds": {side: timing.summary() for side, timing in timings.items()}}


def top(name: str) -> dict[str, Any]:
    """The largest eigenvalues of Π, timed in this process with the first call."""
    case = CASES[name]
    apply_fn, params, x = network(case)
    began = time.perf_counter()
    pairs = pk.path_kernel.eigenpairs(apply_fn, params, x, k=case.top, tolerance=case.tolerance)
    seconds = time.perf_counter() - began
    positive = pairs.values > 0
    return {"k": case.top, "seconds": seconds, "converged": bool(pairs.converged),
            "largest": float(pairs.values[0]), "last": float(pairs.values[-1]),
            "distinct": int(1 + np.sum(np.diff(pairs.values) < -1e-9 * pairs.values[0])),
            "bound": float((pairs.bounds / pairs.values)[positive].max()),
            "residual": float((pairs.residuals / pairs.values)[positive].max()),
            "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def enumerated(width: int, repeats: int) -> dict[str, Any]:
    """All eigenvalues of Π of a network width-width-width-2 by listing paths, and by pkjax."""
    keys = jax.random.split(jax.random.key(width), 3)
    params = [jax.random.normal(k, (width, n), jnp.float32) for k, n in zip(keys, (width, width, 2), strict=True)]

    def net(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(jax.nn.relu(x @ p[0]) @ p[1]) @ p[2]

    x, m = jnp.ones((1, width), jnp.float32), sum(p.size for p in params)

    def by_listing() -> np.ndarray:
        with jax.enable_x64(True):
            double = [np.asarray(p, np.float64) for p in params]
            pi = np.linalg.eigvalsh(np.asarray(paths.factorize(net, double, np.ones((1, width))).pi))[::-1]
        return np.pad(pi, (0, max(0, m - len(pi))))[:m]

    sides: dict[str, Callable[[], Any]] = {
        "enumeration": by_listing, "pkjax": lambda: pk.path_kernel.eigenvalues(net, params, x, k=m)}
    timings, results = common.alternate(sides, repeats)
    error = float(np.abs(results["enumeration"] - results["pkjax"]).max() / results["pkjax"][0])
    if not error < AGREEMENT:
        raise AssertionError(f"width {width}: enumeration differs from pkjax by {error:.1e} of the largest eigenvalue")
    return {"width": width, "paths": width**3 * 2, "parameters": m, "differ": error,
            "seconds": {side: timing.summary() for side, timing in timings.items()}}


def growth(quick: bool, repeats: int) -> dict[str, Any]:
    """Exponents of Tr Π and of one count with width, of Tr Π with depth."""
    widths, depths = ((8, 16), (1, 2)) if quick else ((250, 500, 1000, 2000), (8, 16, 32, 64))
    width, depth = (8, 1) if quick else (200, 6)

    def trace(module: Callable[[], Any]) -> float:
        timings, _ = common.alternate({"trace": trace_and_gradient(Case(module))["trace"]}, repeats, TURN)
        return float(timings["trace"].summary()["median"])

    def count(width: int) -> float:
        counted = counts(Case(partial(pk.models.fc, width, depth)), repeats)
        return float(counted["seconds"]["elimination"]["median"])

    return {"width (Tr Π)": common.fit(widths, [trace(partial(pk.models.fc, w, depth)) for w in widths]),
            "depth (Tr Π)": common.fit(depths, [trace(partial(pk.models.fc, width, d)) for d in depths]),
            "width (one count)": common.fit(widths[:3], [count(w) for w in widths[:3]])}


def measure(name: str, repeats: int) -> dict[str, Any]:
    """All figures of one case."""
    case = CASES[name]
    timings, _ = common.alternate(trace_and_gradient(case), repeats, TURN)
    figures: dict[str, Any] = {"seconds": {side: timing.summary() for side, timing in timings.items()}}
    figures["passes"] = figures["seconds"]["trace"]["median"] / figures["seconds"]["gradient"]["median"]
    if case.counted:
        figures["counting"] = counts(case, repeats)
    if case.top:
        figures["top"] = common.in_fresh_process(top, name)
    return figures


def table(name: str, figures: dict[str, Any]) -> str:
    """Format the figures for a terminal."""
    lines = [f"{name}:", f"  Tr Π {1e3 * figures['seconds']['trace']['median']:.2f} ms, "
                         f"{figures['passes']:.2f} forward and backward passes of one example"]
    if counting := figures.get("counting"):
        call, elimination = (1e3 * counting["seconds"][side]["median"] for side in ("call", "elimination"))
        lines.append(f"  {counting['count']} eigenvalues above π₁ / 10: {call:.1f} ms, of which elimination "
                     f"{elimination:.1f} ms")
    if pairs := figures.get("top"):
        lines.append(f"  top {pairs['k']}: {pairs['seconds']:.1f} s, {pairs['peak_resident_bytes'] / 1e9:.2f} GB, "
                     f"bounds {pairs['bound']:.0e}, residuals {pairs['residual']:.0e} relative")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; return the content of the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [n for n in CASES if n != "tiny"]
    parser.add_argument("--networks", nargs="*", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=5, help="warm turns of each side")
    parser.add_argument("--no-growth", action="store_true", help="leave out growth and enumeration")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to try the benchmark itself")
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--plot", help="picture of the growth, PNG or SVG")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"environment": common.environment(), "networks": {}, "enumeration": [], "growth": {}}
    print(", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    for name in ["tiny"] if options.quick else options.networks:
        report["networks"][name] = measure(name, options.repeats)
        print(table(name, report["networks"][name]), flush=True)
    if not options.no_growth:
        for width in (2, 4) if options.quick else (2, 4, 8, 12):
            listed = enumerated(width, options.repeats)
            report["enumeration"].append(listed)
            slow, fast = (listed["seconds"][side]["median"] for side in ("enumeration", "pkjax"))
            print(f"{listed['paths']} paths: enumeration {1e3 * slow:.1f} ms, pkjax {1e3 * fast:.1f} ms, "
                  f"differ by {listed['differ']:.0e}", flush=True)
        report["growth"] = growth(options.quick, options.repeats)
        for along, fitted in report["growth"].items():
            print(f"growth with {along}: exponent {fitted['exponent']:.2f} over {fitted['sizes']}", flush=True)
    report["environment"]["load_after"] = common.load()
    if options.output:
        common.write_json(options.output, report)
    if options.plot and report["growth"]:
        common.draw_growth(report["growth"], options.plot)
    return report


if __name__ == "__main__":
    main()
