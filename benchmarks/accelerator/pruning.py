"""SynFlow's pruning loop by pkjax and by PyTorch on one card: seconds of the first and of later loops, equal masks.

    python -m benchmarks.accelerator.pruning [--small] [--networks ...] [--output FILE]

Both sides prune the same float32 weights by the same schedule, without TF32. Where time is left, small networks are
pruned in float64 on the processor as well: `masks_differ_float64` says how many weights rounding decides on each side.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.accelerator.rows import GRACE, Rows, message, options
from benchmarks.bench_pruning import NETWORKS, JaxSide, TorchSide, draw
from benchmarks.common import in_fresh_process

COMPRESSION = 2.0
STEPS = 100
FEW = 2 * 10**6
"""Weights of the networks that are pruned in float64, too: others take a processor too long."""
Masks = Mapping[str, np.ndarray]
"""By kernel."""


def timed(call: Callable[[], Any], repeats: int = 5, most: float = 4.0) -> tuple[Any, dict[str, Any]]:
    """The last value, the seconds of the first call, and those of later ones: one, or as many as fit into `most`."""
    seconds: list[float] = []
    while len(seconds) <= repeats and (len(seconds) < 2 or sum(seconds[1:]) + seconds[-1] < most):
        began = time.perf_counter()
        value = call()
        seconds.append(time.perf_counter() - began)
    first, *later = seconds
    return value, {"first": first, "median": statistics.median(later), "min": min(later), "max": max(later),
                   "calls": len(later)}


def by_torch(name: str, steps: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """PyTorch's masks and seconds, in a process of its own: it and JAX each bring CUDA libraries."""
    jax.config.update("jax_platforms", "cpu")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    side = TorchSide(name, draw(NETWORKS[name]), device)

    def call() -> Any:
        masks = side.prune(10.0**-COMPRESSION, steps)
        if device == "cuda":
            torch.cuda.synchronize()
        return masks

    masks, figures = timed(call)
    return ({leaf: side.synflow.from_torch(mask) > 0 for leaf, mask in masks.items()},
            {"side": f"torch on {device}", **figures})


def in_float64(name: str, steps: int) -> dict[str, np.ndarray]:
    """Masks by pkjax in float64 on the processor, of the same weights."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), draw(NETWORKS[name]))
    return jax.device_get(JaxSide(name, variables).prune(10.0**-COMPRESSION, steps))


def differing(masks: Masks, others: Masks) -> int:
    """How many weights are in one of two masks alone."""
    return sum(int((masks[leaf] != other).sum()) for leaf, other in others.items())


def compare(rows: Rows, name: str, steps: int) -> tuple[Masks, Masks]:
    """Prune one network by both sides; return their masks."""
    ours = JaxSide(name, draw(NETWORKS[name]))
    found, figures = timed(lambda: jax.block_until_ready(ours.prune(10.0**-COMPRESSION, steps)))
    masks = jax.device_get(found)
    same = {"network": name, "weights": sum(mask.size for mask in masks.values()), "steps": steps,
            "compression": COMPRESSION}
    rows.add(**same, side="pkjax", **figures)
    theirs, figures = in_fresh_process(by_torch, name, steps)
    rows.add(**same, **figures, masks_differ=differing(masks, theirs))
    return masks, theirs


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare both sides on every network; return how many failed."""
    parser = options(__doc__, "pruning", 40)
    parser.add_argument("--networks", nargs="*", choices=[*NETWORKS], default=["FC-500", "ResNet-20", "VGG-16-BN"])
    chosen = parser.parse_args(arguments)
    rows = Rows(chosen.output, type="float32 without TF32")
    names, steps = (["tiny"], 5) if chosen.small else (chosen.networks, STEPS)
    found: dict[str, tuple[Masks, Masks]] = {}
    for at, name in enumerate(names):
        if rows.seconds > chosen.seconds:
            rows.add(network=name, unfinished="no time left")
            continue
        try:
            with rows.within(chosen.seconds + GRACE, *({"network": each} for each in names[at:])):
                found[name] = compare(rows, name, steps)
        except Exception as error:      # the others are still wanted
            rows.add(network=name, error=message(error))
    for name, sides in found.items():
        if rows.seconds < chosen.seconds and sum(mask.size for mask in sides[0].values()) < FEW:
            row = {"network": name, "side": "float64 on the processor"}
            with rows.within(chosen.seconds + GRACE, row):
                exact = in_fresh_process(in_float64, name, steps)
                rows.add(**row, masks_differ_float64={label: differing(masks, exact) for label, masks in zip(
                    ("pkjax", "torch"), sides, strict=True)})
    return rows.failed


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
