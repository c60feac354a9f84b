"""Tangent kernels by pkjax and by neural-tangents: time, peak memory, agreement, growth.

    python -m benchmarks.bench_ntk --networks FC-100 ResNet-20 --output ntk.json

Both sides compute the same Θ (N, N, K, K) of the same float32 network in one process, in turns, compiled, on all cores.
neural-tangents runs its implementations 1 (Jacobian contraction) and 2 (NTK-vector products), through pkjax's loader;
each must agree with pkjax to 1e-4 of the largest entry. Where neither is feasible (FC-2000: a Jacobian of 86 GB),
random projections take their place: `uᵀ Θ u = ‖J_θᵀ u‖²` from one backward pass of the network.

A turn lasts half a second or one call, whichever is longer, and counts as the median of its calls. Peak memory is the
memory that one warm call adds to a fresh process. Growth with N, width and depth is the exponent of a power law fitted
to the median times; `--plot` draws it.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
from flax import nnx
from pkjax.tangent_kernel import neural_tangents
from pkjax.tangent_kernel.compilation import NO_FUSION

from benchmarks import common

AGREEMENT = 1e-4
TURN = 0.5
"""Seconds."""


@dataclass(frozen=True)
class Case:
    """A network and its number of examples; `peers` are the implementations of neural-tangents that can run it."""

    module: Callable[[], Any]
    """Makes a Linen module, or an NNX module."""
    shape: tuple[int, ...]
    examples: int
    peers: tuple[int, ...] = (1, 2)
    tokens: int = 0
    """Number of different tokens, where inputs are tokens."""
    engines: tuple[str, ...] = ()
    """Engines of pkjax to compare with."""


CASES = {
    "tiny": Case(lambda: pk.models.fc(width=10, depth=1), (28, 28, 1), 4),
    "FC-100": Case(lambda: pk.models.fc(100), (28, 28, 1), 100),
    "FC-500": Case(lambda: pk.models.fc(500), (28, 28, 1), 100, (2,)),
    "FC-2000": Case(lambda: pk.models.fc(2000), (28, 28, 1), 100, ()),
    "ResNet-20": Case(pk.models.resnet20, (32, 32, 3), 16),
    "ResNet-20, N = 32": Case(pk.models.resnet20, (32, 32, 3), 32),
    "VGG-11": Case(pk.models.vgg11, (32, 32, 3), 8, (1,)),
    "ViT-tiny": Case(lambda: pk.models.vit_tiny(10, image=32, patch=4, rngs=nnx.Rngs(0)), (32, 32, 3), 8, (1,),
                     engines=("jacobian",)),
    "GPT": Case(lambda: pk.models.gpt(last=True, rngs=nnx.Rngs(0)), (64,), 8, (1,), tokens=65, engines=("jacobian",)),
}
GROWTH = {
    "examples": [(Case(lambda: pk.models.fc(100), (28, 28, 1), n, ()), n) for n in (50, 100, 200, 400)],
    "width": [(Case(partial(pk.models.fc, w), (28, 28, 1), 50, ()), w) for w in (250, 500, 1000, 2000)],
    "depth": [(Case(partial(pk.models.fc, 200, d), (28, 28, 1), 50, ()), d) for d in (4, 8, 16, 32)],
}


def network(case: Case) -> tuple[Any, Any, jax.Array]:
    """(apply_fn, params, inputs) of a case, drawn anew."""
    module, key = case.module(), jax.random.key(1)
    if case.tokens:
        x = jax.random.randint(key, (case.examples, *case.shape), 0, case.tokens)
    else:
        x = jax.random.normal(key, (case.examples, *case.shape), jnp.float32)
    if isinstance(module, nnx.Module):
        return (*pk.from_nnx(module), x)
    return (*pk.from_linen(module, jax.jit(module.init)(jax.random.key(0), x[:1])), x)


def calls(case: Case) -> dict[str, Callable[[], jax.Array]]:
    """One call for each side."""
    apply_fn, params, x = network(case)
    sides: dict[str, Callable[[], jax.Array]] = {"pkjax": lambda: pk.ntk(apply_fn, params, x)}
    for engine in case.engines:
        sides[engine] = lambda engine=engine: pk.ntk(apply_fn, params, x, engine=engine)  # type: ignore[misc]
    for implementation in case.peers:
        # What pkjax compiles networks with normalisations without, as XLA computes them wrongly.
        safe = NO_FUSION if case.engines and jax.default_backend() == "cpu" else None
        theirs = jax.jit(neural_tangents.ntk_fn(apply_fn, implementation=implementation), compiler_options=safe)
        sides[f"neural-tangents {implementation}"] = lambda theirs=theirs: theirs(x, None, params)  # type: ignore[misc]
    return sides


def peak(case_name: str, side: str) -> int | None:
    """Bytes that one warm call adds to this process."""
    return common.peak_memory(calls(CASES[case_name])[side])


def projections(case: Case, theta: jax.Array, count: int = 3) -> float:
    """Largest relative error of `uᵀ Θ u` for random u, against the squared norm of one backward pass."""
    apply_fn, params, x = network(case)
    _, pullback = jax.vjp(lambda p: apply_fn(p, x), params)
    worst = 0.0
    for key in jax.random.split(jax.random.key(2), count):
        u = jax.random.normal(key, (theta.shape[0], theta.shape[2]), theta.dtype)
        want = sum(float(np.sum(np.asarray(g, np.float64) ** 2)) for g in jax.tree.leaves(pullback(u)))
        v = np.asarray(u, np.float64)
        got = np.einsum("nk,nmkl,ml->", v, np.asarray(theta, np.float64), v, optimize=True)
        worst = max(worst, abs(got / want - 1))
    return worst


def measure(name: str, repeats: int, memory: bool = True) -> dict[str, Any]:
    """Times, agreement, peak memory and the plan of one case."""
    case = CASES[name]
    timings, results = common.alternate(calls(case), repeats, TURN)
    theta = results["pkjax"]
    scale = float(jnp.abs(theta).max())
    differing = {side: float(jnp.abs(other - theta).max()) / scale for side, other in results.items()
                 if side != "pkjax"}
    differing["projections"] = projections(case, theta)
    for side, error in differing.items():
        if not error < AGREEMENT:
            raise AssertionError(f"{name}: {side} differs from pkjax by {error:.1e} of the largest entry")
    plan = pk.ntk_plan(*network(case))
    figures: dict[str, Any] = {
        "parameters": sum(p.size for p in jax.tree.leaves(network(case)[1])),
        "examples": case.examples, "outputs": int(theta.shape[2]), "differ": differing,
        "seconds": {side: timing.summary() for side, timing in timings.items()},
        "plan": {"operations": plan.operations, "bytes": plan.bytes, "peak_memory": plan.peak_memory,
                 "routes": sorted({leaf.route for leaf in plan.leaves})},
    }
    del results, theta
    if memory:
        figures["peak_bytes"] = {side: common.in_fresh_process(peak, name, side) for side in timings}
    best = min((t["median"] for side, t in figures["seconds"].items() if side != "pkjax"), default=None)
    figures["times_faster"] = None if best is None else best / figures["seconds"]["pkjax"]["median"]
    return figures


def growth(along: str, repeats: int, points: int | None = None) -> dict[str, Any]:
    """Median seconds of pkjax along one size, and the exponent of the fitted power."""
    sizes, seconds = [], []
    for case, size in GROWTH[along][:points]:
        timings, _ = common.alternate({"pkjax": calls(case)["pkjax"]}, repeats, TURN)
        sizes.append(size)
        seconds.append(timings["pkjax"].summary()["median"])
    return common.fit(sizes, seconds)


def table(name: str, figures: dict[str, Any]) -> str:
    """Format the figures for a terminal."""
    lines = [f"{name}, N = {figures['examples']}, K = {figures['outputs']}:"]
    for side, t in figures["seconds"].items():
        memory = figures.get("peak_bytes", {}).get(side)
        shown = "" if memory is None else f", {memory / 1e6:.0f} MB"
        lines.append(f"  {side:18} {1e3 * t['median']:9.1f} ms ({1e3 * t['min']:.1f}..{1e3 * t['max']:.1f}){shown}, "
                     f"first call {t['first']:.1f} s")
    if figures["times_faster"] is not None:
        lines.append(f"  {figures['times_faster']:.1f} times as fast as the faster of them")
    lines.append("  differ by " + ", ".join(f"{error:.1e} ({side})" for side, error in figures["differ"].items()))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; return the content of the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", choices=[n for n in CASES if n != "tiny"],
                        default=[n for n in CASES if n != "tiny"])
    parser.add_argument("--repeats", type=int, default=5, help="warm calls of each side")
    parser.add_argument("--no-growth", action="store_true", help="leave out growth with N, width and depth")
    parser.add_argument("--quick", action="store_true", help="a tiny network, to try the benchmark itself")
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--plot", help="picture of the growth, PNG or SVG")
    options = parser.parse_args(arguments)
    names = ["tiny"] if options.quick else options.networks
    environment = common.environment(("jax", "jaxlib", "numpy", "neural-tangents"))
    report: dict[str, Any] = {"environment": environment, "networks": {}, "growth": {}}
    print(", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    for name in names:
        report["networks"][name] = measure(name, options.repeats, memory=not options.quick)
        print(table(name, report["networks"][name]), flush=True)
    if not options.no_growth:
        for along in GROWTH:
            figures = growth(along, options.repeats, 2 if options.quick else None)
            report["growth"][along] = figures
            print(f"growth with {along}: exponent {figures['exponent']:.2f} over {figures['sizes']}", flush=True)
    report["environment"]["load_after"] = common.load()
    if options.output:
        common.write_json(options.output, report)
    if options.plot and report["growth"]:
        common.draw_growth(report["growth"], options.plot)
    return report


if __name__ == "__main__":
    main()
