"""Tangent kernels on one card by pkjax, neural-tangents and torch.func: seconds, peak memory, agreement.

    python -m benchmarks.accelerator.kernels [--small] [--cases ...] [--sides ...] [--output FILE]

All sides compute the same Θ (N, N, K, K) of the same float32 weights, without TF32. Implementation 1 contracts
Jacobians, 2 takes products with unit vectors. Each case and side has a process of its own, with its own peak of
allocated memory: pkjax's come first, then those of the others in the order of `SIDES`, small cases first. Two make
their first calls together (`first` is an upper bound), while the next two start, and are then timed one at a time:
`median`, `min` and `max` of `calls`. Where Jacobians are large, one process has the card alone; what is larger than the
card is not tried, and what the time does not reach is unfinished. `differs` is the distance from pkjax's Θ.
"""

import contextlib
import itertools
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk

from benchmarks.accelerator.rows import UNMEASURED, Rows, message, options
from benchmarks.bench_pruning import Network, draw

SIDES = ("pkjax", "neural-tangents 2", "torch.func 1", "neural-tangents 1", "torch.func 2")
"""In the order of importance."""
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
        return 4 * 10 * self.examples * sum(self._sizes)

    def least(self, side: str) -> int:
        """Bytes of one array that a side holds."""
        if side == "torch.func 2":      # a Jacobian of all examples for each example, layer by layer
            return 4 * 10 * self.examples**2 * max(self._sizes)
        return self.jacobian if side.endswith(" 1") else 0

    @cached_property
    def _sizes(self) -> list[int]:
        shapes = jax.eval_shape(self.network.module().init, jax.random.key(0), pk.ones_input(self.network.shape))
        return [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"])]


def _fc(width: int) -> Network:
    return Network(partial(pk.models.fc, width), lambda t: t.fc(width), (28, 28, 1))


RESNET20 = Network(pk.models.resnet20, lambda t: t.resnet20(), (32, 32, 3))
CASES = {
    "FC-100, N = 100": Case(_fc(100), 100),
    "ResNet-20, N = 16": Case(RESNET20, 16),
    "FC-500, N = 100": Case(_fc(500), 100),
    "FC-100, N = 1000": Case(_fc(100), 1000),
    "ResNet-20, N = 128": Case(RESNET20, 128),
    "VGG-16, N = 32": Case(Network(pk.models.vgg16, lambda t: t.vgg16(), (32, 32, 3)), 32),
    "ResNet-18 at 64x64, N = 16": Case(Network(pk.models.resnet18, lambda t: t.resnet18(), (64, 64, 3)), 16),
    "FC-2000, N = 100": Case(_fc(2000), 100),
    "FC-500, N = 1000": Case(_fc(500), 1000),
    "FC-2000, N = 1000": Case(_fc(2000), 1000),
    "tiny, N = 8": Case(_fc(10), 8),
}
"""Small ones first; the last is for a processor."""
PAIR = 2
"""Processes that compile at a time: XLA times candidates on the card (autotuning), of which many at once are slow."""
LEAST = 8.0
"""Seconds under which no process begins."""


Built = tuple[Callable[[], Any], Callable[[], int | None]]
"""One call, and the peak of memory so far."""


def jax_side(case: Case, side: str) -> Built:
    """By JAX; nothing is compiled before the first call."""
    from pkjax.tangent_kernel import neural_tangents

    apply_fn, params = pk.from_linen(case.network.module(), draw(case.network))
    x = jnp.asarray(_inputs(case))
    if side == "pkjax":
        call = partial(pk.ntk, apply_fn, params, x)
    else:
        call = partial(jax.jit(neural_tangents.ntk_fn(apply_fn, implementation=int(side[-1]))), x, None, params)
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
        call, peak = (torch_side if side.startswith("torch") else jax_side)(CASES[name], side)
        connection.send({})
        connection.recv()
        began = time.perf_counter()
        result = call()
        first = time.perf_counter() - began
        connection.send({"first": first})
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
        text = message(error)
        other = side != "pkjax" and re.search("out of memory|resource_exhausted", text, re.IGNORECASE)
        connection.send({"out of memory" if other else "error": text})


class Side:
    """A process for one side of one case."""

    def __init__(self, name: str, side: str) -> None:
        """Start it."""
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.name, self.side, self.figures = name, side, dict[str, Any]()
        self.process = spawn.Process(target=work, args=(theirs, name, side), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self) -> None:
        """Let it go on."""
        with contextlib.suppress(OSError):
            self.connection.send("go on")

    def hear(self, until: float) -> bool:
        """Take what it has to report, until a time; whether it is well."""
        if not UNMEASURED & set(self.figures):
            try:
                ready = self.connection.poll(max(0.0, until - time.monotonic()))
                self.figures |= self.connection.recv() if ready else {"unfinished": "takes too long"}
            except (EOFError, OSError):
                self.figures["error"] = "its process died"
        return not UNMEASURED & set(self.figures)

    def end(self) -> dict[str, Any]:
        """End the process, whose memory is free then; return the figures."""
        self.process.kill()
        self.process.join()
        return {"case": self.name, "side": self.side, **self.figures}


def planned(names: Sequence[str], sides: Sequence[str], memory: float) -> Iterator[list[tuple[str, str]]]:
    """The cases' sides in the order of importance, by two; those with large Jacobians alone."""
    together: list[tuple[str, str]] = []
    for side, name in itertools.product((side for side in SIDES if side in sides), names):
        least = CASES[name].least(side)
        if least > memory:      # written down, and not started
            continue
        held = {"pkjax": 0, "torch.func 2": least}.get(side, CASES[name].jacobian)
        if held > LARGE:
            yield [(name, side)]
            continue
        together.append((name, side))
        if len(together) == PAIR:
            yield together
            together = []
    if together:
        yield together


def measure(names: Sequence[str], sides: Sequence[str], first: float, end: float) -> Iterator[dict[str, Any]]:
    """Figures of every case and side, of which none begins shortly before the time `end` or is waited for beyond it."""
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    groups = list(planned(names, sides, memory))
    running: dict[int, list[Side]] = {}
    try:
        for at, group in enumerate(groups):
            if end - time.monotonic() < LEAST:
                yield from ({"case": name, "side": side, "unfinished": "no time left"} for name, side in group)
                continue
            here = running.pop(at, None) or [Side(*task) for task in group]
            if at + 1 < len(groups):
                running[at + 1] = [Side(*task) for task in groups[at + 1]]
            yield from _timed(here, min(time.monotonic() + first, end))
    finally:
        for side in itertools.chain(*running.values()):
            side.end()
    for side, name in itertools.product(sides, names):
        if (least := CASES[name].least(side)) > memory:
            yield {"case": name, "side": side,
                   "not tried": f"an array of {least / 1e9:.0f} GB on a card of {memory / 1e9:.0f} GB"}


def _timed(sides: Sequence[Side], until: float) -> Iterator[dict[str, Any]]:
    """Let processes make their first calls together, then be timed one by one; yield what each says."""
    try:
        ready = [side for side in sides if side.hear(until)]
        for side in ready:
            side.tell()
        for side in ready:
            if not side.hear(until):      # it may compile on, beside those that are timed
                side.process.kill()
        for side in sides:
            if not UNMEASURED & set(side.figures):
                side.tell()
                side.hear(time.monotonic() + 3 * SECONDS)
            yield side.end()
    finally:
        for side in sides:
            side.end()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the cases; return how many rows failed."""
    parser = options(__doc__, "kernels", 160)
    parser.add_argument("--cases", nargs="*", choices=[*CASES], default=[*CASES][:-1])
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=SIDES)
    parser.add_argument("--first", type=float, default=45, help="seconds that a process and its first call may take")
    chosen = parser.parse_args(arguments)
    names = [[*CASES][-1]] if chosen.small else chosen.cases
    rows, references = Rows(chosen.output, type="float32 without TF32"), dict[str, np.ndarray]()
    for figures in measure(names, chosen.sides, chosen.first, time.monotonic() + chosen.seconds):
        corner, name = figures.pop("corner", None), figures["case"]
        if corner is not None and figures["side"] == "pkjax":
            references[name] = corner
        elif corner is not None and name in references:
            reference = references[name]
            figures["differs"] = float(np.abs(corner - reference).max() / np.abs(reference).max())
        rows.add(**figures)
    return rows.failed


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
