"""First calls, in first calls of the plain gradient of the same network; and what is traced and compiled for them.

    python -m benchmarks.bench_first_calls --networks ResNet-20 VGG-16 --output first_calls.json

The plain gradient is `jax.jit(jax.grad(lambda p: f(p, x).sum()))` on one example of ones. All first calls of a round
are made in one process, each of a network made anew and after `jax.clear_caches()`; the figures are medians of rounds,
with the least and the largest. `again` is a second call, not under `jit`.

Equations are the operations that JAX hands to XLA, instructions those of the programs that XLA makes of them; both are
counted in a process of its own, from what XLA writes down of every program, so that growth is seen.
"""

import argparse
import gc
import json
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import pkjax as pk

from benchmarks import common

NETWORKS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "tiny": (lambda: pk.models.fc(width=10, depth=1), (8, 8, 1)),
    "FC-100": (lambda: pk.models.fc(width=100), (28, 28, 1)),
    "ResNet-20": (pk.models.resnet20, (32, 32, 3)),
    "VGG-16": (pk.models.vgg16, (32, 32, 3)),
}
PLAIN = "plain gradient"
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = ", re.MULTILINE)


def functions(network: str) -> dict[str, Callable[[], Any]]:
    """The calls to time, without arguments."""
    build, shape = NETWORKS[network]
    module, x = build(), pk.ones_input(shape)
    f, params = pk.from_linen(module, jax.jit(module.init)(jax.random.key(0), x))
    X = jax.random.normal(jax.random.key(1), (2, *shape))
    jax.block_until_ready((params, X))

    def prune(steps: int) -> Any:
        return pk.prune(lambda p: pk.synflow(f, p, x), params, compression=1, steps=steps).masks

    return {PLAIN: lambda: jax.jit(jax.grad(lambda p: f(p, x).sum()))(params),
            "synflow": lambda: pk.synflow(f, params, x),
            "path_kernel.trace": lambda: pk.path_kernel.trace(f, params, x, log=True),
            "path_kernel.gated_trace, N = 2": lambda: pk.path_kernel.gated_trace(f, params, X),
            "prune, 1 step": lambda: prune(1), "prune, 100 steps": lambda: prune(100),
            "connectivity": lambda: pk.connectivity(f, params, x),
            "ntk, N = 2": lambda: pk.ntk(f, params, X)}


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def timed(network: str, rounds: int) -> dict[str, dict[str, Any]]:
    """First and second calls of each function."""
    warnings.simplefilter("ignore")
    jax.config.update("jax_enable_compilation_cache", False)
    names = list(functions(network))
    seconds(functions(network)[PLAIN])       # loads what every first call of a process needs
    first: dict[str, list[float]] = {name: [] for name in names}
    again: dict[str, float] = {}
    for _ in range(rounds):
        for name in names:
            call = functions(network)[name]     # a network that nobody has read
            gc.collect()
            jax.clear_caches()
            first[name].append(seconds(call))
            again[name] = seconds(call)
    return {name: {"first": statistics.median(times), "least": min(times), "largest": max(times),
                   "ratio": statistics.median(t / p for t, p in zip(times, first[PLAIN], strict=True)),
                   "again": again[name]} for name, times in first.items()}


def counted(network: str, name: str) -> dict[str, int]:
    """Programs that the first call of a function compiles, their equations and their instructions."""
    warnings.simplefilter("ignore")
    jax.config.update("jax_enable_compilation_cache", False)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text " + os.environ.get("XLA_FLAGS", "")
        calls = functions(network)
        before = {path.name for path in Path(folder).iterdir()}
        jax.block_until_ready(calls[name]())
        made = [path for path in Path(folder).iterdir() if path.name not in before]
        texts = {end: [path.read_text() for path in made if path.name.endswith(f"{end}_optimizations.txt")]
                 for end in ("before", "cpu_after")}
    return {"programs": len(texts["before"]),
            "equations": sum(len(_INSTRUCTION.findall(text)) for text in texts["before"]),
            "instructions": sum(len(_INSTRUCTION.findall(text)) for text in texts["cpu_after"])}


def measure(networks: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure every function of every network."""
    rows: dict[str, Mapping[str, Any]] = {}
    for network in networks:
        times = common.in_fresh_process(timed, network, rounds)
        rows[network] = {name: {**row, **common.in_fresh_process(counted, network, name)}
                         for name, row in times.items()}
        for name, row in rows[network].items():
            print(f"{network:10} {name:31} {row['first']:7.2f} s ({row['least']:.2f} to {row['largest']:.2f}), "
                  f"{row['ratio']:5.2f} plain gradients; again {1e3 * row['again']:8.1f} ms; {row['programs']:3} "
                  f"programs, {row['equations']:6,} equations, {row['instructions']:6,} instructions", flush=True)
    return {"environment": common.environment(), "rounds": rounds, "networks": rows, "load_after": common.load()}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="+", choices=[*NETWORKS], default=["FC-100", "ResNet-20", "VGG-16"])
    options.add_argument("--rounds", type=int, default=3, help="first calls of each function")
    options.add_argument("--output", type=Path, help="where to write the JSON")
    chosen = options.parse_args(arguments)
    report = measure(chosen.networks, chosen.rounds)
    if chosen.output:
        chosen.output.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
