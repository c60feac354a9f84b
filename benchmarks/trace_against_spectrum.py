"""How much of the tangent kernel's spectrum does Tr Π predict: pruners × compressions × seeds of three networks.

    python -m benchmarks.trace_against_spectrum fc-100 resnet20 vgg11 --minutes 8

MNIST and CIFAR-10 come from $TFDS_DATA_DIR. The images are the same for all seeds, which choose initialisations and
random scores; data-dependent scores take 100 images, the first of which are those of Θ. Each network's result is a
JSON file, written anew after every entry: the same command goes on where it was ended, by its minutes or by hand, and
draws a picture.
"""

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import pkjax as pk
from pkjax import files
from pkjax.experiments.methods import compiled, model, pruned, score, steps_of

from benchmarks import common

RESULTS = common.ROOT / "benchmarks" / "results"
EIGHT = ("random", "magnitude", "snip", "grasp", "synflow", "synflow-l2", "synflow-dist", "synflow-l2-dist")
LABELLED = 100
"""Images of the scores that look at data, and of the mean of -dist."""

FIRST = {"resnet20": 4}
"""Model → π found of its first network where the others' are not."""


@dataclass(frozen=True)
class Plan:
    """What is compared of one network."""

    model: str
    data: str
    samples: int
    """Images of Θ."""
    k: int | None
    """π found; None takes all that Σ ν_i π_i needs, 0 leaves it out but for the first network."""
    compressions: tuple[float, ...]
    seeds: int = 3
    pruners: tuple[str, ...] = EIGHT
    steps: int = 100
    """Pruning steps at most."""


PLANS = {
    "fc-100": Plan("fc-100", "mnist", 32, None, (0.5, 1.0, 1.5, 2.0)),
    "resnet20": Plan("resnet20", "cifar10", 8, 0, (0.5, 1.0, 1.5)),
    "vgg11": Plan("vgg11", "cifar10", 4, 0, (0.5, 1.0, 1.5), seeds=2, pruners=EIGHT[:6], steps=20),
}


class Bench:
    """Networks at initialisation and their masks."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.labelled = pk.data.load(plan.data, samples=LABELLED, seed=0)
        self.images = self.labelled.images[:plan.samples]
        self.module = model(plan.model, self.labelled.classes, self.labelled.pixels.shape[1:])
        self.initialise = jax.jit(self.module.init)

    @lru_cache(maxsize=1)  # noqa: B019 (there is one bench at a time)
    def network(self, seed: int) -> tuple[Any, Any]:
        """The network of a seed."""
        return pk.from_linen(self.module, self.initialise(jax.random.key(seed), self.images[:1]))

    def masks(self, pruner: str, compression: float, seed: int) -> Any:
        """The masks of an entry; None for the dense network."""
        if pruner == "dense":
            return None
        apply_fn, params = self.network(seed)
        fn = compiled(score(pruner, apply_fn, self.labelled, seed=seed), params)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)      # layers that are emptied: rows say what is disconnected
            steps = min(self.plan.steps, steps_of(pruner, None))
            return pruned(fn, params, compression=compression, steps=steps, jit=False).masks

    def entries(self) -> Iterator[tuple[str, float, int]]:
        """Seed by seed, so that what is unfinished has whole groups."""
        for seed in range(self.plan.seeds):
            yield "dense", 0.0, seed
            for compression in self.plan.compressions:
                for pruner in self.plan.pruners:
                    yield pruner, compression, seed

    def compare(self, key: tuple[str, float, int]) -> pk.Comparison:
        """Compare one entry: all pass through the same programs."""
        apply_fn, params = self.network(key[2])
        first = self.plan.k == 0 and key == ("dense", 0.0, 0)
        return pk.compare(apply_fn, params, self.images, masks={key: self.masks(*key)},
                          k=FIRST.get(self.plan.model, 0) if first else self.plan.k)


def joined(parts: Sequence[pk.Comparison]) -> pk.Comparison:
    """Put comparisons on one batch together."""
    return replace(parts[0], rows=tuple(row for part in parts for row in part.rows),
                   spectra={key: lam for part in parts for key, lam in part.spectra.items()})


def run(plan: Plan, path: Path, minutes: float) -> pk.Comparison:
    """Go on with a network's comparison for so many minutes at most, and return what there is."""
    settings = json.loads(json.dumps(asdict(plan)))
    before = json.loads(path.read_text()) if path.exists() else {"settings": settings, "seconds": 0.0}
    if before["settings"] != settings:
        raise ValueError(f"{path} was written for other settings, {before['settings']}; delete it to begin anew")
    parts = [pk.Comparison.from_dict(before["comparison"])] if "comparison" in before else []
    bench, began = Bench(plan), time.perf_counter()
    done = set(parts[0].spectra) if parts else set()
    for key in bench.entries():
        if key in done:
            continue
        if time.perf_counter() - began > 60 * minutes:
            break
        parts = [joined([*parts, bench.compare(key)])]
        content = parts[0].to_dict()
        content["spectra"] = [[float(f"{v:.4g}") for v in lam] for lam in content["spectra"]]
        for row in content["rows"]:
            row |= {name: float(f"{v:.7g}") for name, v in row.items() if isinstance(v, float)}
        seconds = before["seconds"] + time.perf_counter() - began
        with files.replacing(path) as part:
            part.write_text(json.dumps({"settings": settings, "environment": common.environment(),
                                        "seconds": round(seconds, 1), "comparison": content}) + "\n")
        print(f"{plan.model}: {len(parts[0].rows)} entries, {seconds:.0f} s, {' '.join(map(str, key))}", flush=True)
    return parts[0]


def main(argv: Sequence[str] | None = None) -> dict[str, pk.Comparison]:
    """Run the plans that are named, print their tables and draw their pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*", default=list(PLANS), help=f"of {', '.join(PLANS)}")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for each network")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of results and pictures")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.plans if name not in PLANS]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(PLANS)}")
    comparisons = {}
    for name in options.plans:
        plan = PLANS[name]
        path = options.output / f"trace_against_spectrum_{name}.json"
        comparison = comparisons[name] = run(plan, path, options.minutes)
        print(comparison)
        title = f"{plan.model} on {plan.samples} images of {plan.data}"
        pk.plots.compare(comparison, title=title).savefig(path.with_suffix(".png"))
    return comparisons


if __name__ == "__main__":
    main()
