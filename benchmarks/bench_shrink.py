"""What `pk.shrink` saves: parameters, operations, seconds and memory of a forward pass before and after.

    python -m benchmarks.bench_shrink --output benchmarks/results/shrink.json

Networks are pruned by SynFlow at initialisation. Both forward passes are compiled and timed in turns on one batch; the
first is that of the network with its masks.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk

from benchmarks import common

NETWORKS = {"FC-100": ("fc", (28, 28, 1)), "VGG-11": ("vgg11", (32, 32, 3)), "VGG-16": ("vgg16", (32, 32, 3)),
            "ResNet-20": ("resnet20", (32, 32, 3))}


def measure(name: str, compression: float, steps: int, batch: int, repeats: int) -> dict[str, Any]:
    """Prune a network, shrink it, and measure both."""
    kind, shape = NETWORKS[name]
    module, ones = getattr(pk.models, kind)(), pk.ones_input(shape)
    apply_fn, params = pk.from_linen(module, jax.jit(module.init)(jax.random.key(0), ones))
    masks = pk.prune(lambda p: pk.synflow(apply_fn, p, ones), params, compression=compression, steps=steps).masks
    kept = pk.apply_masks(params, masks)
    began = time.perf_counter()
    smaller = pk.shrink(apply_fn, params, ones, masks=masks)
    took = time.perf_counter() - began
    X = jax.random.normal(jax.random.key(1), (batch, *shape), ones.dtype)
    forward, small = jax.jit(apply_fn), jax.jit(smaller.apply_fn)
    calls = {"before": lambda: forward(kept, X), "after": lambda: small(smaller.params, X)}
    timings, outputs = common.alternate(calls, repeats, least=0.5)
    difference = float(jnp.abs(outputs["before"] - outputs["after"]).max() / jnp.abs(outputs["before"]).max())
    sizes = {"parameters": smaller.parameters, "operations": smaller.flops}
    report = {"network": name, "compression": compression, "steps": steps, "batch": batch, "difference": difference,
              "shrink_seconds": took,
              "weights_kept": int(sum(np.asarray(m).sum() for m in jax.tree.leaves(masks)))}
    for i, when in enumerate(("before", "after")):
        report[when] = {**{what: both[i] for what, both in sizes.items()}, **timings[when].summary(),
                        "peak_bytes": common.peak_memory(calls[when])}
        row = report[when]
        print(f"{name} {when:6} {row['parameters']:12,} parameters, {row['operations'] / 1e6:9.2f} million operations, "
              f"{1e3 * row['median']:8.2f} ms, {(row['peak_bytes'] or 0) / 2**20:8.1f} MiB", flush=True)
    print(f"{name}: outputs differ by {difference:.1e}, shrink took {took:.1f} s", flush=True)
    return report


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="+", choices=[*NETWORKS], default=["VGG-16"])
    options.add_argument("--compression", type=float, default=2.0)
    options.add_argument("--steps", type=int, default=100, help="steps of SynFlow")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--output", type=Path, help="where to write the JSON")
    chosen = options.parse_args(arguments)
    report = {"environment": common.environment(),
              "networks": [measure(name, chosen.compression, chosen.steps, chosen.batch, chosen.repeats)
                           for name in chosen.networks], "load_after": common.load()}
    if chosen.output:
        common.write_json(chosen.output, report)
    return report


if __name__ == "__main__":
    main()
