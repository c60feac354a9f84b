"""SynFlow's pruning loop by pkjax and by PyTorch on one card: seconds of the first and of later loops, equal masks.

    python -m benchmarks.accelerator.pruning [--small] [--networks ...] [--output FILE]

Both sides prune the same float32 weights by the same schedule, without TF32.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.accelerator.rows import Rows, message, options
from benchmarks.bench_pruning import NETWORKS, JaxSide, TorchSide, draw
from benchmarks.common import in_fresh_process

COMPRESSION = 2.0
STEPS = 100


def timed(call: Callable[[], Any], repeats: int = 5, most: float = 8.0) -> tuple[Any, dict[str, Any]]:
    """The last value, the seconds of the first call, and those of later ones (no more after `most` seconds)."""
    seconds: list[float] = []
    while len(seconds) <= repeats and (len(seconds) < 2 or sum(seconds[1:]) < most):
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


def compare(rows: Rows, name: str, steps: int) -> None:
    """Prune one network by both sides."""
    ours = JaxSide(name, draw(NETWORKS[name]))
    masks, figures = timed(lambda: jax.block_until_ready(ours.prune(10.0**-COMPRESSION, steps)))
    same = {"network": name, "weights": sum(mask.size for mask in masks.values()), "steps": steps,
            "compression": COMPRESSION}
    rows.add(**same, side="pkjax", **figures)
    theirs, figures = in_fresh_process(by_torch, name, steps)
    differing = sum(int((np.asarray(masks[leaf]) != mask).sum()) for leaf, mask in theirs.items())
    rows.add(**same, **figures, masks_differ=differing)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare both sides on every network; return how many failed."""
    parser = options(__doc__, "pruning", 40)
    parser.add_argument("--networks", nargs="*", choices=[*NETWORKS], default=["FC-500", "ResNet-20", "VGG-16-BN"])
    chosen = parser.parse_args(arguments)
    rows = Rows(chosen.output, type="float32 without TF32")
    for name in ["tiny"] if chosen.small else chosen.networks:
        if rows.seconds > chosen.seconds:
            rows.add(network=name, unfinished="no time left")
            continue
        try:
            compare(rows, name, 5 if chosen.small else STEPS)
        except Exception as error:      # the others are still wanted
            rows.add(network=name, error=message(error))
    return rows.failed


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
