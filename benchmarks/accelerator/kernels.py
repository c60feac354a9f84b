"""Tangent kernels on one card by pkjax, neural-tangents and torch.func: seconds, peak memory, agreement.

    python -m benchmarks.accelerator.kernels [--small] [--cases ...] [--sides ...] [--output FILE]

All sides compute the same Θ (N, N, K, K) of the same float32 weights, without TF32. Implementation 1 contracts
Jacobians, 2 takes products with unit vectors. Each case and side has a process of its own, with its own peak of
allocated memory. Processes make their first calls together (`first` is an upper bound), and are then timed one at a
time: `median`, `min` and `max` of `calls`. Where Jacobians are large, first calls come one at a time too; a Jacobian
larger than the card is not tried.
"""

import contextlib
import itertools
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk

from benchmarks.accelerator.rows import Rows, message, options
from benchmarks.bench_pruning import Network, draw

SIDES = ("pkjax", "neural-tangents 1", "neural-tangents 2", "torch.func 1", "torch.func 2")
LARGE = 4 * 10**9
"""Bytes of Jacobians that are not held by two processes at a time."""
CALLS, SECONDS = 20, 2.0
"""Warm calls at most, and seconds after which no more are made."""
CORNER = 4
"""Examples whose block of Θ is compared."""


@dataclass(frozen=True)
class Case:
    """A network and a number of examples."""

    network: Network
    examples: int

    @property
    def jacobian(self) -> int:
        """Bytes of the Jacobian of all examples (of 10 outputs)."""
        shapes = jax.eval_shape(self.network.module().init, jax.random.key(0), pk.ones_input(self.network.shape))
        return 4 * 10 * self.examples * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


def _fc(width: int) -> Network:
    return Network(partial(pk.models.fc, width), lambda t: t.fc(width), (28, 28, 1))


RESNET20 = Network(pk.models.resnet20, lambda t: t.resnet20(), (32, 32, 3))
CASES = {
    "FC-100, N = 100": Case(_fc(100), 100),
    "FC-100, N = 1000": Case(_fc(100), 1000),
    "FC-500, N = 100": Case(_fc(500), 100),
    "ResNet-20, N = 16": Case(RESNET20, 16),
    "ResNet-20, N = 128": Case(RESNET20, 128),
    "VGG-16, N = 32": Case(Network(pk.models.vgg16, lambda t: t.vgg16(), (32, 32, 3)), 32),
    "ResNet-18 at 64x64, N = 16": Case(Network(pk.models.resnet18, lambda t: t.resnet18(), (64, 64, 3)), 16),
    "FC-2000, N = 100": Case(_fc(2000), 100),
    "FC-500, N = 1000": Case(_fc(500), 1000),
    "FC-2000, N = 1000": Case(_fc(2000), 1000),
    "tiny, N = 8": Case(_fc(10), 8),
}
"""Those whose first calls go together come first; the last is for a processor."""
WAVE = 5
"""Cases whose processes run at a time."""


Built = tuple[Callable[[], Any], Callable[[], int | None]]
"""One call, and the peak of memory so far."""


def jax_side(case: Case, side: str) -> Built:
    """By JAX; neural-tangents is compiled here, which takes no memory of the card."""
    from pkjax.tangent_kernel import neural_tangents

    apply_fn, params = pk.from_linen(case.network.module(), draw(case.network))
    x = jnp.asarray(_inputs(case))
    if side == "pkjax":
        call = partial(pk.ntk, apply_fn, params, x)
    else:
        theirs = jax.jit(neural_tangents.ntk_fn(apply_fn, implementation=int(side[-1])))
        call = partial(theirs.lower(x, None, params).compile(), x, None, params)
    return (lambda: jax.block_until_ready(call())), lambda: (jax.devices()[0].memory_stats() or {}).get(
        "peak_bytes_in_use")


def torch_side(case: Case, side: str) -> Built:
    """By PyTorch."""
    import torch

    from benchmarks import torch_kernels, torch_synflow

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = torch_synflow.load(case.network.torch_module(torch_synflow), draw(case.network)).to(device)
    values = _inputs(case)
    flat = values.reshape(len(values), -1) if values.shape[-1] == 1 else values.transpose(0, 3, 1, 2)
    x = torch.tensor(np.ascontiguousarray(flat), device=device)
    theta = torch_kernels.theta(network, int(side[-1]))

    def call() -> Any:
        result = theta(x)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return call, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None


def _inputs(case: Case) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((case.examples, *case.network.shape), np.float32)


def work(connection: Any, name: str, side: str) -> None:
    """Be one side of one case: build, call for the first time when told, be timed when told."""
    try:
        if side.startswith("torch"):
            jax.config.update("jax_platforms", "cpu")
        began = time.perf_counter()
        call, peak = (torch_side if side.startswith("torch") else jax_side)(CASES[name], side)
        building = time.perf_counter() - began
        connection.send({})
        connection.recv()
        began = time.perf_counter()
        result = call()
        first = time.perf_counter() - began
        connection.send({"first": first + building if side.startswith("neural") else first})
        connection.recv()
        seconds: list[float] = []
        while len(seconds) < CALLS and sum(seconds) < SECONDS:
            del result
            began = time.perf_counter()
            result = call()
            seconds.append(time.perf_counter() - began)
        corner = result[:CORNER, :CORNER]
        corner = corner.cpu().numpy() if side.startswith("torch") else np.asarray(corner)
        connection.send({"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds),
                         "calls": len(seconds), "peak_bytes": peak(), "corner": corner.astype(np.float64)})
    except Exception as error:      # out of memory, or a library that does not run here
        connection.send({"error": message(error)})


class Side:
    """A process for one side of one case."""

    def __init__(self, name: str, side: str, alone: bool) -> None:
        """Start it; `alone` asks for the card for itself."""
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.name, self.side, self.alone, self.figures = name, side, alone, dict[str, Any]()
        self.process = spawn.Process(target=work, args=(theirs, name, side), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self) -> None:
        """Let it go on."""
        with contextlib.suppress(OSError):
            self.connection.send("go on")

    def hear(self, until: float) -> bool:
        """Take what it has to report, until a time; whether it is well."""
        if "error" not in self.figures:
            try:
                ready = self.connection.poll(max(0.0, until - time.monotonic()))
                self.figures |= self.connection.recv() if ready else {"error": "takes too long"}
            except (EOFError, OSError):
                self.figures["error"] = "its process died"
        return "error" not in self.figures

    def end(self) -> dict[str, Any]:
        """End the process, whose memory is free then; return the figures."""
        self.process.kill()
        self.process.join()
        return {"case": self.name, "side": self.side, **self.figures}


def measure(names: Sequence[str], sides: Sequence[str], first: float, end: float) -> Iterator[dict[str, Any]]:
    """Figures of some cases, whose first calls go together; nothing begins after the time `end`."""
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    running = list[Side]()
    for name, side in itertools.product(names, sides):
        size = CASES[name].jacobian
        if side.endswith(" 1") and size > memory:
            yield {"case": name, "side": side,
                   "not tried": f"a Jacobian of {size / 1e9:.0f} GB on a card of {memory / 1e9:.0f} GB"}
        else:
            held = {"pkjax": 0, "torch.func 2": size * CASES[name].examples}.get(side, size)
            running.append(Side(name, side, held > LARGE))
    until = min(time.monotonic() + first, end)
    together = [side for side in running if not side.alone and side.hear(until)]
    for side in together:
        side.tell()
    for side in together:
        side.hear(until)
        if "memory" in side.figures.get("error", "").lower():     # of which the others may hold most
            side.end()
            running[running.index(side)] = Side(side.name, side.side, True)
    for side in sorted(running, key=lambda side: side.alone):
        if time.monotonic() > end:
            side.figures["error"] = "no time left"
        until = min(time.monotonic() + first / 2, end + 5)
        for _ in range(2 if side.alone else 1):
            if side.alone and not side.hear(until):
                break
            side.tell()
        side.hear(until)
        yield side.end()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the cases in waves; return how many of pkjax's own failed."""
    parser = options(__doc__, "kernels", 160)
    parser.add_argument("--cases", nargs="*", choices=[*CASES], default=[*CASES][:-1])
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=SIDES)
    parser.add_argument("--first", type=float, default=60, help="seconds that a first call may take")
    chosen = parser.parse_args(arguments)
    names = [[*CASES][-1]] if chosen.small else chosen.cases
    rows, corners = Rows(chosen.output, type="float32 without TF32"), dict[str, np.ndarray]()
    end = time.monotonic() + chosen.seconds
    for at in range(0, len(names), WAVE):
        for figures in measure(names[at:at + WAVE], chosen.sides, chosen.first, end):
            corner, name = figures.pop("corner", None), figures["case"]
            if corner is not None:
                reference = corners.setdefault(name, corner)     # pkjax's, which comes first
                figures["differs"] = float(np.abs(corner - reference).max() / np.abs(reference).max())
            rows.add(**figures)
    return sum("error" in row and row["side"] == "pkjax" for row in rows.rows)


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
