"""SynFlow's pruning loop by pkjax and by PyTorch on one card: seconds of the first and of later loops, equal masks.

    python -m benchmarks.accelerator.pruning [--small] [--networks ...] [--output FILE]

Both sides prune the same float32 weights by the same schedule, without TF32.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks.accelerator.rows import Rows, message, options
from benchmarks.bench_pruning import NETWORKS, JaxSide, TorchSide, draw

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


def compare(rows: Rows, name: str, steps: int) -> None:
    """Prune one network by both sides."""
    import torch

    device, density = "cuda" if torch.cuda.is_available() else "cpu", 10.0**-COMPRESSION
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    variables = draw(NETWORKS[name])
    ours, theirs = JaxSide(name, variables), TorchSide(name, variables, device)

    def by_torch() -> Any:
        masks = theirs.prune(density, steps)
        if device == "cuda":
            torch.cuda.synchronize()
        return masks

    same = {"network": name, "weights": theirs.weights, "steps": steps, "compression": COMPRESSION}
    masks, figures = timed(lambda: jax.block_until_ready(ours.prune(density, steps)))
    rows.add(**same, side="pkjax", **figures)
    other, figures = timed(by_torch)
    rows.add(**same, side=f"torch on {device}", **figures, masks_differ=theirs.differing(masks, other))


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
