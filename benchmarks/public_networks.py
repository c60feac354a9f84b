"""Which public networks are sums over paths: parameters, paths and Tr Π at full size, exactness at a slim one.

    python -m benchmarks.public_networks --output benchmarks/results/public_networks.json

Networks are accepted or refused by their operations alone, before anything is computed. What is refused is written down
as pkjax says it. The slim networks, of the same operations, are evaluated in float64. Networks with frozen gates
(`--frozen`) are accepted or refused at their slim size.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
from pkjax.paths.polynomial import path_sum

from benchmarks import common
from benchmarks.networks import libraries
from benchmarks.networks.catalogue import ENTRIES, Entry
from benchmarks.networks.figures import frozen_refusal, frozen_sizes, layers, parted, relative
from benchmarks.networks.frozen import FROZEN


def refusal(entry: Entry) -> dict[str, str] | None:
    """Read a full network, whose numbers are unknown: None, or what refuses it, why, and what to do."""
    built = entry.full(entry.shape)

    def read(values: Any) -> Any:
        apply_fn, params = built.network(values)
        return pk.paths.polynomial(apply_fn, params, jnp.ones((1, *entry.shape), jnp.float32), q=1)

    try:
        jax.eval_shape(read, built.shapes)
    except pk.NotPathNetworkError as error:
        reason, *lines = str(error).split("\n  ")
        told = dict(line.split(": ", 1) for line in lines)
        remedy = told["what to do"].split("; or freeze")[0]       # the page says so once
        return {"operation": told["operation"], "reason": reason, "what_to_do": remedy}
    return None


def exactness(entry: Entry) -> dict[str, float]:
    """Relative differences of a slim network from what its own library computes.

    - sum over paths: Σ c_p v_p(θ) a_p x_s(p) of normal inputs, with their gates a, from f.
    - polynomial: R_1(|θ|, 𝟙), with max-pools, from f at |θ| and running means of 0, where every gate is open.
    - conservation: Σ θ ∘ ∂R/∂θ of the last layer, through which every path leads once, from the same.
    """
    assert entry.slim is not None
    built = entry.slim(entry.slim_shape)
    values = libraries.drawn(built, jnp.float64)
    centred = libraries.without_means(values)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, *entry.slim_shape)))
    ones = jnp.ones((1, *entry.slim_shape), jnp.float64)

    @jax.jit
    def theirs(values: Any, centred: Any) -> Any:
        apply_fn, params = built.network(values)
        opened, size = built.network(centred)
        return apply_fn(params, x), opened(jax.tree.map(abs, size), ones).sum()

    @jax.jit
    def ours(values: Any, centred: Any) -> Any:
        apply_fn, params = built.network(values)
        sums = path_sum(apply_fn, params, x, gates=pk.paths.gates(apply_fn, params, x))
        apply_fn, params = built.network(centred)
        scores = jax.tree_util.tree_leaves_with_path(pk.synflow(apply_fn, params, ones, pool="max"))
        last = sum(score.sum() for path, score in scores if entry.last in jax.tree_util.keystr(path))
        size = jax.tree.map(abs, params)
        return sums, pk.paths.polynomial(apply_fn, size, ones, q=1, pool="max").sum(), last

    (outputs, whole), (sums, polynomial, last) = theirs(values, centred), ours(values, centred)
    return {"sum over paths": relative(sums, outputs), "polynomial": relative(polynomial, whole),
            "conservation": relative(last, whole)}


def sizes(entry: Entry) -> dict[str, float]:
    """Paths and Tr Π of a full network with weights of He's size, in decades."""
    built = entry.full(entry.shape)
    apply_fn, params = built.network(libraries.drawn(built, jnp.float32))
    ones = pk.ones_input(entry.shape)
    return {"log10_paths": float(pk.paths.log_count(apply_fn, params, ones)),
            "log10_trace": float(pk.path_kernel.trace(apply_fn, params, ones, log=True)) / math.log(10)}


def row(name: str, quick: bool = False) -> dict[str, Any]:
    """Everything about one network, or what its operations and shapes alone say."""
    entry = ENTRIES[name]
    said = {"library": entry.library, "input": list(entry.shape), "refused": refusal(entry),
            "parameters": libraries.parameters(entry.full(entry.shape)), "source": entry.source}
    if said["refused"] or quick:
        return said
    with jax.enable_x64(True):
        said["differences"] = exactness(entry)
    began = time.perf_counter()
    return {**said, **sizes(entry), "seconds": time.perf_counter() - began}


def frozen_row(name: str, quick: bool = False) -> dict[str, Any]:
    """Everything about one network with frozen gates, or whether its slim one is refused."""
    entry = FROZEN[name]
    measured: dict[str, Any] = {"library": entry.library, "input": list(entry.shape), "source": entry.source,
                                "parameters": libraries.parameters(entry.full(entry.shape))}
    with jax.enable_x64(True):
        measured["refused"] = frozen_refusal(entry)
    return measured if quick or measured["refused"] else {**measured, **frozen_sizes(entry)}


def tables(networks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The rows of the accepted networks and of the refused ones, in Markdown."""
    rule = "| --- | --- | --- | --- | --- | --- |"
    lines = ["| network | layers of | input | parameters | log10 paths | log10 Tr Π |", rule]
    for name, figures in networks.items():
        if not figures["refused"]:
            lines.append(f"| {name} | {figures['library']} | {_shape(figures)} | {figures['parameters']:,} | "
                         f"{_decades(figures, 'log10_paths')} | {_decades(figures, 'log10_trace')} |")
    refused = ["| network | layers of | parameters | operation | why | what to do |", rule]
    for name, figures in networks.items():
        if why := figures["refused"]:
            refused.append(f"| {name} | {figures['library']} | {figures['parameters']:,} | `{why['operation']}` | "
                           f"{why['reason']} | {why['what_to_do']} |")
    return ["\n".join(lines), "\n".join(refused)]


def frozen_table(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each network with frozen gates, in Markdown."""
    lines = ["| network | layers of | input | parameters | log10 paths | log10 Tr Π | log10 Tr of the input | "
             "no path through | scores below float32 | first call, s |", "| --- " * 10 + "|"]
    for name, figures in networks.items():
        start = f"| {name} | {figures['library']} | {_shape(figures)} | {figures['parameters']:,} | "
        if why := figures["refused"]:
            lines.append(f"{start}refused: {why['reason']} | | | | | |")
        elif "seconds" in figures:
            off, small = parted(figures["leaves_off_paths"])
            where = f"{len(off)} of {figures['leaves']}" + (f": {layers(off)}" if off else "")
            below = f"{len(small)} bias" + "es" * (len(small) > 1) if small else "none"
            seconds = figures["seconds"]
            lines.append(f"{start}{_decades(figures, 'log10_paths')} | {_decades(figures, 'log10_trace')} | "
                         f"{_decades(figures, 'log10_gated_trace')} | {where} | {below} | "
                         f"{seconds['frozen'] + seconds['synflow']:.0f} |")
        else:
            lines.append(f"{start}" + "not measured | " * 5 + "not measured |")
    return "\n".join(lines)


def _shape(figures: Mapping[str, Any]) -> str:
    return "×".join(map(str, figures["input"]))


def _decades(figures: Mapping[str, Any], name: str) -> str:
    return f"{figures[name]:.1f}" if name in figures else "not measured"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; rows of a file that exists are kept where they are not measured anew."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="*", choices=[*ENTRIES], default=[*ENTRIES], metavar="NAME")
    options.add_argument("--frozen", nargs="*", choices=[*FROZEN], default=[*FROZEN], metavar="NAME")
    options.add_argument("--quick", action="store_true", help="compute nothing: parameters and refusals alone")
    options.add_argument("--output", type=Path, help="where to write the JSON")
    chosen = options.parse_args(arguments)
    known = json.loads(chosen.output.read_text()) if chosen.output and chosen.output.exists() else {}
    report = {"networks": {}, "frozen": {}, **known}
    kinds = {"networks": (ENTRIES, row, chosen.networks, "environment"),
             "frozen": (FROZEN, frozen_row, chosen.frozen, "frozen_environment")}
    for kind, (entries, measure, names, environment) in kinds.items():
        for name in names:
            rows = {**report[kind], name: measure(name, chosen.quick)}
            jax.clear_caches()
            print(name, json.dumps(rows[name], ensure_ascii=False), flush=True)
            report[kind] = {each: rows[each] for each in entries if each in rows}
            report[environment] = common.environment(("jax", "jaxlib", "flax", "dm-haiku", "equinox"))
            if chosen.output:
                common.write_json(chosen.output, report)
    print(*tables(report["networks"]), frozen_table(report["frozen"]), sep="\n\n")
    return report


if __name__ == "__main__":
    main()
