"""SynFlow pruning by pkjax and by PyTorch's public calls: time, distance from the machine's limit, memory, masks.

    python -m benchmarks.bench_pruning --networks FC-100 ResNet-20 --output pruning.json

Both sides prune the same weights in one process, in turns, in float32, on all cores this process may use. Timed are

- one step: score once and keep half, `pk.prune(score_fn, params, density=0.5, steps=1)`;
- the loop: to a density of 10^−compression in many steps, in seconds a step;
- the score alone, ready for the threshold.

PyTorch's loop on the large networks takes 10 steps to the same density, and its time is divided by those. Masks are
compared after as many steps as both have taken.

The limit of one step is the larger of two times. Memory: with n weights of 4 bytes and masks of 1 byte, a step must

    read weights and masks forwards (5 n) and backwards (5 n), write the scores (4 n), read them to find and apply the
    threshold (4 n), write the masks (1 n): 19 n bytes in all,

over the bandwidth of the memory, measured beside the timings. Arithmetic: the operations of the network's forward and
backward pass as XLA counts them (convolutions done directly, without what meets padding), over the rate of a large
matrix product. A network that fits into the cache can beat the first, and convolutions by transforms the second.
"""

import argparse
import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
from pkjax.trees import leaf_names, select

from benchmarks import common

ONE_STEP_DENSITY = 0.5
BYTES_PER_WEIGHT = {"weights read forwards": 4, "masks read forwards": 1, "weights read backwards": 4,
                    "masks read backwards": 1, "scores written": 4, "scores read": 4, "masks written": 1}
SHORT = 10
"""Steps of PyTorch's loop on large networks, and of the loops of which the memory is measured."""


@dataclass(frozen=True)
class Network:
    """One network on both sides; PyTorch is imported when its side is built."""

    module: Callable[[], Any]
    torch_module: Callable[[Any], Any]  # benchmarks.torch_synflow -> module
    shape: tuple[int, ...]
    large: bool = False


NETWORKS = {
    "tiny": Network(lambda: pk.models.fc(width=10, depth=1), lambda t: t.fc(10, depth=1), (28, 28, 1)),
    "FC-100": Network(lambda: pk.models.fc(width=100), lambda t: t.fc(100), (28, 28, 1)),
    "FC-500": Network(lambda: pk.models.fc(width=500), lambda t: t.fc(500), (28, 28, 1)),
    "FC-2000": Network(lambda: pk.models.fc(width=2000), lambda t: t.fc(2000), (28, 28, 1), large=True),
    "ResNet-20": Network(pk.models.resnet20, lambda t: t.resnet20(), (32, 32, 3)),
    "VGG-16-BN": Network(pk.models.vgg16, lambda t: t.vgg16(), (32, 32, 3), large=True),
}
COMPARED = ("FC-100", "FC-2000", "ResNet-20", "VGG-16-BN")
"""By default."""


def draw(network: Network, seed: int = 0) -> dict[str, Any]:
    """Variables of a fresh network: kernels N(0, 2 / fan_in), BatchNorm's scales and variances 1, the rest 0."""
    rng = np.random.default_rng(seed)
    empty = jax.eval_shape(network.module().init, jax.random.key(0), pk.ones_input(network.shape))

    def fill(path: Any, leaf: Any) -> jax.Array:
        if path[-1].key == "kernel":
            values = rng.standard_normal(leaf.shape, np.float32) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            values = np.full(leaf.shape, path[-1].key in ("scale", "var"))
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, empty)


class JaxSide:
    """pkjax: the network, its score and its pruning."""

    def __init__(self, name: str, variables: dict[str, Any]):
        network = NETWORKS[name]
        apply_fn, self.params = pk.from_linen(network.module(), variables)
        x = pk.ones_input(network.shape)
        self.score_fn = lambda p: pk.synflow(apply_fn, p, x, pool="max")
        self.kernels = jax.tree.leaves(select(pk.kernels, self.params))
        self.gradient = jax.jit(jax.grad(lambda p: apply_fn(p, x).sum()))

    def prune(self, density: float, steps: int) -> dict[str, jax.Array]:
        """Masks by kernel."""
        result = pk.prune(self.score_fn, self.params, density=density, steps=steps)
        masks = zip(leaf_names(result.masks), jax.tree.leaves(result.masks), self.kernels, strict=True)
        return {name: mask for name, mask, chosen in masks if chosen}

    def compiled_score(self) -> Any:
        """The score as an executable."""
        return jax.jit(self.score_fn).lower(self.params).compile()

    def operations(self) -> int:
        """Floating-point operations of the network's forward and backward pass."""
        return int(self.gradient.lower(self.params).cost_analysis()["flops"])


class TorchSide:
    """PyTorch: the same network with the same weights."""

    def __init__(self, name: str, variables: dict[str, Any], device: str = "cpu"):
        import torch

        from benchmarks import torch_synflow

        torch.set_num_threads(common.cores())
        self.torch, self.synflow = torch, torch_synflow
        self.network = torch_synflow.load(NETWORKS[name].torch_module(torch_synflow), variables).to(device)
        *image, channels = NETWORKS[name].shape
        size = (np.prod(image) * channels,) if channels == 1 else (channels, *image)
        self.x = torch.ones(1, *size, device=device)
        self.weights = sum(p.numel() for p in self.network.parameters() if p.ndim > 1)

    def prune(self, density: float, steps: int) -> dict[str, Any]:
        """Masks by kernel, to the same counts."""
        counts = [round(pk.exponential(step, steps, density) * self.weights) for step in range(1, steps + 1)]
        return self.synflow.prune(self.network, self.x, counts)

    @contextlib.contextmanager
    def score(self) -> Iterator[Callable[[], None]]:
        """The score as a function, while the network is linearised."""
        with self.synflow.linearised(self.network) as named:
            kernels = list(named.values())
            out = self.synflow.split(self.torch.empty(self.weights), kernels)
            yield partial(self.synflow.score, self.network, self.x, kernels, out)

    def differing(self, masks: dict[str, jax.Array], own: dict[str, Any]) -> int:
        """Entries in which the masks of the two sides differ."""
        return sum(int((np.asarray(masks[name]) != (self.synflow.from_torch(mask) > 0)).sum())
                   for name, mask in own.items())


SIDES = {"pkjax": JaxSide, "pytorch": TorchSide}


def loop_memory(side: str, name: str, density: float, steps: int) -> int | None:
    """Peak memory of a loop, above that of the loaded network, in bytes."""
    warnings.simplefilter("ignore", pk.EmptiedLayerWarning)
    pruner = SIDES[side](name, draw(NETWORKS[name]))
    return common.peak_memory(lambda: pruner.prune(density, steps))


def measure(name: str, *, compression: float, steps: int, repeats: int, fresh: bool = True) -> dict[str, Any]:
    """Figures of one network that do not depend on the machine's limits; memory in `fresh` processes."""
    network, density = NETWORKS[name], 10.0**-compression
    variables = draw(network)
    ours, theirs = JaxSide(name, variables), TorchSide(name, variables)
    short = min(steps, SHORT)
    torch_steps = short if network.large else steps
    parameters = jax.tree.leaves(ours.params)

    one, _ = common.alternate({"pkjax": lambda: ours.prune(ONE_STEP_DENSITY, 1),
                               "pytorch": lambda: theirs.prune(ONE_STEP_DENSITY, 1)}, repeats)
    loop, masks = common.alternate({"pkjax": lambda: ours.prune(density, steps),
                                    "pytorch": lambda: theirs.prune(density, torch_steps)}, repeats)
    compared = masks["pkjax"] if torch_steps == steps else ours.prune(density, torch_steps)
    compiled = ours.compiled_score()
    with theirs.score() as torch_score:
        score, _ = common.alternate({"pkjax": lambda: compiled(ours.params), "pytorch": torch_score}, repeats)
    buffers = compiled.memory_analysis()
    taken = {"pkjax": steps, "pytorch": torch_steps}
    run = common.in_fresh_process if fresh else lambda function, *inputs: function(*inputs)
    return {
        "weights": theirs.weights,
        "parameter_bytes": sum(leaf.nbytes for leaf in parameters),
        "seconds": {
            "one step": {side: timing.summary() for side, timing in one.items()},
            "loop, per step": {side: timing.summary(taken[side]) for side, timing in loop.items()},
            "score alone": {side: timing.summary() for side, timing in score.items()},
        },
        "loop_steps": taken,
        "masks": {"steps": torch_steps, "differing": theirs.differing(compared, masks["pytorch"]),
                  "kept": {"pkjax": sum(int(mask.sum()) for mask in compared.values()),
                           "pytorch": sum(int(mask.sum()) for mask in masks["pytorch"].values())}},
        "peak_bytes": {side: run(loop_memory, side, name, density, short) for side in SIDES},
        "peak_steps": short,
        "score_buffer_bytes": buffers.temp_size_in_bytes + buffers.output_size_in_bytes,
        "operations": ours.operations(),
        "load": common.load(),
    }


def with_limit(figures: dict[str, Any], bandwidth: float, arithmetic: float) -> dict[str, Any]:
    """Add the least time of one step, and how far each side is from it."""
    moved = sum(BYTES_PER_WEIGHT.values()) * figures["weights"]
    seconds = {"memory": moved / bandwidth, "arithmetic": figures["operations"] / arithmetic}
    binding = max(seconds, key=lambda name: seconds[name])
    distance = {side: figures["seconds"]["loop, per step"][side]["median"] / seconds[binding] for side in SIDES}
    return {**figures, "limit": {"bytes": moved, "seconds": seconds, "binding": binding, "distance": distance}}


def table(name: str, figures: dict[str, Any]) -> str:
    """Format the figures for a terminal of 80 columns."""
    size, limit = figures["parameter_bytes"], figures["limit"]
    bound = limit["seconds"][limit["binding"]]
    lines = [f"{name}: {figures['weights']:,} weights, parameters of {size / 1e6:.1f} MB",
             f"  {'ms: median (min..max)':22}{'pkjax':>24}{'PyTorch':>24}{'ratio':>8}"]
    for what, sides in figures["seconds"].items():
        cells = [f"{1e3 * s['median']:.4g} ({1e3 * s['min']:.4g}..{1e3 * s['max']:.4g})"
                 for s in (sides[side] for side in SIDES)]
        ratio = sides["pkjax"]["median"] / sides["pytorch"]["median"]
        lines.append(f"  {what:22}{cells[0]:>24}{cells[1]:>24}{ratio:8.2f}")
        if sides["pkjax"]["compiling"]:
            lines.append(f"    {'of which compiling':20}{1e3 * sides['pkjax']['compiling']:24.4g}")
    rows: list[tuple[str, Sequence[str]]] = [
        ("steps of the loop", [f"{figures['loop_steps'][side]}" for side in SIDES]),
        (f"loop / limit of {1e3 * bound:.3g} ms", [f"{limit['distance'][side]:.1f}" for side in SIDES]),
    ]
    peaks = [figures["peak_bytes"][side] for side in SIDES]
    if None not in peaks:
        rows.append((f"peak memory ({figures['peak_steps']} steps)",
                     [f"{peak / 1e6:.1f} MB, {peak / size:.1f} x" for peak in peaks]))
    lines += [f"  {what:22}{cells[0]:>24}{cells[1]:>24}" for what, cells in rows]
    masks, seconds = figures["masks"], limit["seconds"]
    lines += [
        f"  limit: {limit['binding']} ({limit['bytes'] / 1e6:.1f} MB in {1e3 * seconds['memory']:.3g} ms, "
        f"{figures['operations'] / 1e6:.3g} M operations in {1e3 * seconds['arithmetic']:.3g} ms)",
        f"  masks after {masks['steps']} steps differ in {masks['differing']:,} of {figures['weights']:,} entries",
        f"  XLA's buffers for the score: {figures['score_buffer_bytes'] / size:.1f} x the parameters; "
        f"load {figures['load'][0]}",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--compression", type=float, default=2.0, help="the loop ends at a density of 10^-compression")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, help="calls timed after the first (default 7, of large networks 3)")
    parser.add_argument("--quick", action="store_true", help="a tiny network and few steps, to try the benchmark")
    parser.add_argument("--output", metavar="FILE.json")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "cpu":
        parser.error(f"JAX runs on {jax.default_backend()}, PyTorch here on the CPU: set JAX_PLATFORMS=cpu")
    if importlib.util.find_spec("torch") is None:
        parser.error("the comparison needs PyTorch: pip install torch")
    if options.repeats is not None and options.repeats < 1:
        parser.error("--repeats must be at least 1")
    names = options.networks or (["tiny"] if options.quick else [*COMPARED])
    steps = min(options.steps, 3) if options.quick else options.steps

    environment = common.environment(("jax", "jaxlib", "numpy", "torch"))
    environment["threads"] = {"pkjax": common.cores(), "pytorch": common.cores()}
    print(", ".join(f"{key} {environment[key]}" for key in ("pkjax", "jax", "torch", "python", "cpu", "date")))
    print(f"commit {environment['commit']}{' and changes' if environment['uncommitted'] else ''}")
    print(f"{common.cores()} threads on each side, load {environment['load']}, to a density of "
          f"10^-{options.compression:g} in {steps} steps")
    if environment["load"][0] > common.cores() / 2:
        print("this machine is in use: times are too long, most of all where threads wait for each other")

    def machine() -> dict[str, float]:
        small = {"mebibytes": 4, "repeats": 2} if options.quick else {}
        return {**common.bandwidth(**small), "arithmetic": common.arithmetic(256 if options.quick else 2048)}

    rates, measured, report = [machine()], {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pk.EmptiedLayerWarning)
        for name in names:
            repeats = options.repeats or (1 if options.quick else 3 if NETWORKS[name].large else 7)
            measured[name] = measure(name, compression=options.compression, steps=steps, repeats=repeats,
                                     fresh=not options.quick)
            rates.append(machine())
            # Other load only lowers a rate: the best of all rates is the machine's own.
            best = {kernel: max(rate[kernel] for rate in rates) for kernel in rates[0]}
            arithmetic = best.pop("arithmetic")
            bandwidth = max(best.values())
            report = {
                "environment": {**environment, "load_after": common.load()},
                "settings": {"steps": steps, "compression": options.compression, "quick": options.quick,
                             "one_step_density": ONE_STEP_DENSITY, "dtype": "float32"},
                "machine": {"bandwidth": bandwidth, "bandwidths": best, "arithmetic": arithmetic,
                            "bytes_per_weight": BYTES_PER_WEIGHT},
                "networks": {each: with_limit(measured[each], bandwidth, arithmetic) for each in measured},
            }
            if options.output:
                common.write_json(options.output, report)
            print(f"  {name} measured, load {common.load()}", flush=True)
    print(f"memory {bandwidth / 1e9:.1f} GB/s, arithmetic {arithmetic / 1e9:.0f} G operations/s")
    for name, figures in report["networks"].items():
        print("\n" + table(name, figures))
    return report


if __name__ == "__main__":
    main()
