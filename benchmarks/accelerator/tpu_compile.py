"""Compiles the library for a TPU on a machine that has none: memory, operations, collectives, a roofline.

    pip install 'jax[tpu]'
    python -m benchmarks.accelerator.tpu_compile [--networks ...] [--functions ...] [--output FILE]

XLA's TPU compiler (the wheel `libtpu`) compiles for a topology of v5e chips; nothing runs. Of each function and
network: seconds of lowering and compiling, bytes of arguments, result and temporary arrays, operations and bytes
moved as the compiler counts them, collectives, and the least time that these take at the chip's peak rates, where a
float32 product counts as six of bfloat16 (the training step's as one). The body of a loop counts once, whatever its
number of turns, so that the times are lower bounds. What fails is a row that says how. `--markdown FILE` writes the
table of a JSON file.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pkjax as pk
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from pkjax.models.resnet import ResNet

from benchmarks.accelerator.rows import Rows, message

TOPOLOGY = "v5e:2x2"
CHIP = {"operations per second": 197e12, "bytes per second": 819e9, "memory": 16 * 10**9}
"""Of one v5e: operations in bfloat16, and its HBM."""
PASSES = 6
"""Products of bfloat16 that one of float32 at the highest precision takes."""
MESH, WIDE = "ntk (mesh of 4)", "path_kernel.matvec in float64"
"""Beside the functions of `functions`."""
NETWORKS: dict[str, tuple[Callable[[], Any], tuple[int, ...], int]] = {
    "FC-100": (lambda: pk.models.fc(100), (28, 28, 1), 64),
    "ResNet-8": (lambda: ResNet((16, 32, 64), (1, 1, 1)), (32, 32, 3), 4),
    "ResNet-20": (pk.models.resnet20, (32, 32, 3), 16),
    "VGG-16": (pk.models.vgg16, (32, 32, 3), 8),
}
TOLD = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""What libtpu would ask the cloud for."""
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Net:
    """A network in shapes and functions of it."""

    def __init__(self, name: str) -> None:
        build, shape, n = NETWORKS[name]
        self.name, self.shape, self.n, self.module = name, shape, n, build()
        self.variables = jax.eval_shape(self.module.init, jax.random.key(0), jnp.ones((1, *shape)))
        self.state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), {
            key: value for key, value in self.variables.items() if key != "params"})
        self.params = self.variables["params"]
        self.one, self.X = (jax.ShapeDtypeStruct((count, *shape), jnp.float32) for count in (1, n))
        self.labels = jax.ShapeDtypeStruct((n,), jnp.int32)

    def f(self, params: Any, x: Any) -> Any:
        """The network."""
        return self.module.apply({"params": params, **self.state}, x)

    def loss(self, x: Any, y: Any, params: Any) -> Any:
        """Cross entropy of a batch."""
        return optax.softmax_cross_entropy_with_integer_labels(self.f(params, x), y).mean()


def functions(net: Net) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Public functions, each with the shapes of its arguments."""
    f, p, x, X, y = net.f, net.params, net.one, net.X, net.labels
    key = partial(jax.random.key, 0)
    v = jax.ShapeDtypeStruct((net.n, 10), jnp.float32)

    def prune(p: Any, x: Any, score: Callable[..., Any]) -> Any:
        return pk.prune(lambda q: score(f, q, x), p, compression=2, steps=100).masks

    return {
        "synflow": (lambda p, x: pk.synflow(f, p, x), (p, x)),
        "synflow_l2": (lambda p, x: pk.synflow_l2(f, p, x), (p, x)),
        "prune (100 steps, synflow)": (partial(prune, score=pk.synflow), (p, x)),
        "snip": (lambda p, X, y: pk.snip(partial(net.loss, X, y), p), (p, X, y)),
        "grasp": (lambda p, X, y: pk.grasp(partial(net.loss, X, y), p), (p, X, y)),
        "magnitude": (lambda p: pk.magnitude(p), (p,)),
        "random": (lambda p: pk.random(p, key=key()), (p,)),
        "path_kernel.trace": (lambda p, x: pk.path_kernel.trace(f, p, x), (p, x)),
        "path_kernel.matvec": (lambda p, x, u: pk.path_kernel.matvec(f, p, x)(u), (p, x, p)),
        "paths.log_count": (lambda p, x: pk.paths.log_count(f, p, x), (p, x)),
        "path_kernel.effective_rank": (lambda p, x: pk.path_kernel.effective_rank(f, p, x, key=key()), (p, x)),
        "path_kernel.density": (lambda p, x: vars(pk.path_kernel.density(f, p, x, key=key())), (p, x)),
        "path_kernel.gated_trace": (lambda p, X: pk.path_kernel.gated_trace(f, p, X), (p, X)),
        "training step": (partial(step, net), (p, p, p, X, y)),
        "ntk_matvec": (lambda p, X, v: pk.ntk_matvec(f, p, X)(v), (p, X, v)),
        "dynamics.linearize": (lambda p, q, X: pk.dynamics.linearize(f, p, X)(q), (p, p, X)),
        "ntk_trace": (lambda p, X: pk.ntk_trace(f, p, X), (p, X)),
        "ntk": (lambda p, X: pk.ntk(f, p, X), (p, X)),
        "data_factor": (lambda p, X: pk.data_factor(f, p, X), (p, X)),
        "ntk_frobenius": (lambda p, X: pk.ntk_frobenius(f, p, X, key=key()), (p, X)),
        "ntk_trace_estimate": (lambda p, X: pk.ntk_trace_estimate(f, p, X, key=key()), (p, X)),
        "ntk_effective_rank": (lambda p, X: pk.ntk_effective_rank(f, p, X, key=key()), (p, X)),
        "ntk_density": (lambda p, X: vars(pk.ntk_density(f, p, X, key=key())), (p, X)),
        "ntk_trace_saliency": (lambda p, X: pk.ntk_trace_saliency(f, p, X), (p, X)),
        "path_exclusion": (lambda p, X: pk.path_exclusion(f, p, X), (p, X)),
    }


def step(net: Net, params: Any, first: Any, second: Any, x: Any, y: Any) -> Any:
    """One step of Adam under masks that keep half, BatchNorm in training mode."""
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), net.params)
    optimizer = pk.masked(optax.adam(1e-3), masks)

    def loss(params: Any) -> Any:
        logits, _ = net.module.apply({"params": params, **net.state}, x, train=True, mutable=[*net.state]) if (
            net.state) else (net.f(params, x), None)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, slope = jax.value_and_grad(loss)(params)
    fresh = optimizer.init(params)
    adam = optax.tree_utils.tree_set(fresh, mu=first, nu=second)
    updates, state = optimizer.update(slope, adam, params)
    return optax.apply_updates(params, updates), state, value


def on(sharding: Any, tree: Any) -> Any:
    """Shapes with a place."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def lower(net: Net, label: str, devices: Sequence[Any]) -> Any:
    """Lower a function for one chip, or `ntk(mesh=)` for all."""
    if label == WIDE:
        shapes = net.params, net.one, net.params
        wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), shapes)
        with jax.enable_x64(True):
            fn, _ = functions(net)["path_kernel.matvec"]
            return jax.jit(fn).lower(*on(SingleDeviceSharding(devices[0]), wide))
    if label != MESH:
        fn, arguments = functions(net)[label]
        return jax.jit(fn).lower(*on(SingleDeviceSharding(devices[0]), arguments))
    from pkjax.network import read
    from pkjax.tangent_kernel import kernel, tiles

    mesh = Mesh(np.asarray(devices), ("chips",))

    def program(params: Any, rows: Any, columns: Any) -> Any:
        network = read(net.f, params, rows[0])
        return tiles._sharded(kernel._Block(network.whole, "structured"), mesh,
                              (network.fn, network.params, network.entries), rows, columns)

    spread, everywhere = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("chips",), ()))
    tile = jax.ShapeDtypeStruct((len(devices), net.n // 2, *net.shape), jnp.float32)
    return jax.jit(program).lower(on(everywhere, net.params), *on(spread, (tile, tile)))


def figures(compiled: Any, chips: int, passes: int) -> dict[str, Any]:
    """Memory, operations and collectives of a compiled program, and the least time of one chip."""
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    held = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "generated_code")}
    operations, moved = float(cost.get("flops", 0)), float(cost.get("bytes accessed", 0))
    seconds = {"operations": passes * operations / CHIP["operations per second"],
               "memory": moved / CHIP["bytes per second"]}
    counts = {name: len(re.findall(rf"= \S+ {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    types = [name for name in ("f64", "s64", "u64") if re.search(rf"\b{name}\[", text)]
    return {"bytes": held, "fits": sum(held.values()) <= CHIP["memory"], "operations": operations, "bytes moved": moved,
            "roofline": max(seconds.values()), "bound by": max(seconds, key=lambda name: seconds[name]),
            "loops": len(re.findall(r"= .* while\(", text)), "chips": chips, "64 bits": types,
            "collectives": {name: count for name, count in counts.items() if count}}


def table(content: Mapping[str, Any]) -> str:
    """The rows as Markdown."""
    def mega(number: float) -> str:
        return f"{number / 1e6:,.0f}" if number >= 1e7 else f"{number / 1e6:.2g}"

    lines = ["| network | function | compiles, s | arguments and result, MB | temporary, MB | operations, G | "
             "roofline, ms | bound by |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in content["rows"]:
        name = f"| {row['network']}, N = {row['examples']} | `{row['function']}` "
        if "error" in row:
            lines.append(f"{name}| {row['error']} | | | | | |")
            continue
        held, loops = row["bytes"], "*" if row["loops"] else ""
        cells = (f"{row['compiling']:.0f}", mega(held["argument"] + held["output"]), mega(held["temp"]),
                 f"{row['operations'] / 1e9:.3g}{loops}", f"{1e3 * row['roofline']:.2g}{loops}", row["bound by"])
        lines.append(f"{name}| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile; return how many functions fail."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", choices=[*NETWORKS], default=[*NETWORKS][:3])
    parser.add_argument("--functions", nargs="*", help="names, as in the table")
    parser.add_argument("--seconds", type=float, default=3600, help="after which nothing new begins")
    parser.add_argument("--output", type=Path, default=Path("tpu_v5e.json"))
    parser.add_argument("--markdown", type=Path, help="write the table of the JSON file here, and compile nothing")
    chosen = parser.parse_args(arguments)
    if chosen.markdown:
        chosen.markdown.write_text(table(json.loads(chosen.output.read_text())), encoding="utf-8")
        return 0
    os.environ |= TOLD
    jax.config.update("jax_platforms", "cpu")
    devices = topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices
    rows = Rows(chosen.output, topology=TOPOLOGY, chip=CHIP, note="compiled for the topology, not run on a TPU")
    for net in map(Net, chosen.networks):
        for label in chosen.functions or [*functions(net), MESH, WIDE]:
            row: dict[str, Any] = {"network": net.name, "examples": net.n, "function": label}
            try:
                if rows.seconds > chosen.seconds:
                    raise TimeoutError("no time left")
                began = time.perf_counter()
                with mock.patch.object(jax, "default_backend", return_value="tpu"):      # as on a TPU's host
                    lowered = lower(net, label, devices)
                row["lowering"] = time.perf_counter() - began
                began = time.perf_counter()
                compiled = lowered.compile()
                row["compiling"] = time.perf_counter() - began
                chips, passes = len(devices) if label == MESH else 1, 1 if label == "training step" else PASSES
                row |= figures(compiled, chips, passes)
            except Exception as error:      # the others are still wanted
                row["error"] = message(error)
            rows.add(**row)
    return rows.failed


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
