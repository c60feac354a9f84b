"""What the commands do; results are written whole or not at all."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

import pkjax as pk
from pkjax import experiments, files, plots
from pkjax.cli import html
from pkjax.cli.options import Analyze, Common, Figures, Network, Prune, Sweep, Train, check, network
from pkjax.experiments.environment import environment
from pkjax.experiments.methods import pruned, score, steps_of
from pkjax.experiments.records import export
from pkjax.experiments.settings import Settings, read_grid
from pkjax.experiments.sweeps import Outcome

__all__ = ["analyze", "figures", "prune", "settings", "sweep", "train"]

Progress = Callable[[str], None]
FIGURES = ("1", "2", "3", "predictors", "captured", "claims")


def prune(options: Prune, progress: Progress) -> pk.PruneResult:
    """Prune as the options say and write the masks."""
    check(options)
    if options.output.is_dir():
        raise IsADirectoryError(f"{options.output} is a folder; --output names the file to write")
    if not options.output.parent.is_dir():
        raise FileNotFoundError(f"no folder {options.output.parent} to write {options.output.name} into")
    progress("loading images, initialising")
    net = network(options)
    result = _pruned(options, net, progress)
    pk.save_masks(options.output, result.masks)
    return result


def _pruned(options: Common, net: Network, progress: Progress) -> pk.PruneResult:
    progress(f"pruning by {options.pruner}")
    return pruned(score(options.pruner, net.apply_fn, net.dataset, seed=options.seed), net.params,
                  compression=options.compression, steps=steps_of(options.pruner, options.steps))


def analyze(options: Analyze, progress: Progress) -> dict[str, pk.Report]:
    """Analyze the network dense and pruned, and write the folder of results."""
    check(options)
    with files.folder(options.output) as folder:
        progress("loading images, initialising")
        net = network(options)
        if options.masks is None:
            masks = _pruned(options, net, progress).masks
        else:
            masks = pk.load_masks(options.masks, like=net.params)
        reports = {"dense": _report(options, net, None, "dense", progress),
                   "pruned": _report(options, net, masks, "pruned", progress)}
        progress("drawing and writing")
        title = f"{options.model} on {options.samples} images of {options.data}"
        for name, report in reports.items():
            plots.report(report, f"{title}, {name}").savefig(folder / f"{name}.png")
        said = settings(options)
        (folder / "report.html").write_text(
            html.page(reports, title=title, settings=said, environment=environment()), encoding="utf-8")
        content = {"settings": said, "environment": environment(),
                   **{name: report.to_dict() for name, report in reports.items()}}
        (folder / "report.json").write_text(files.to_json(content), encoding="utf-8")
        pk.save_masks(folder / "masks.npz", masks)
    return reports


def _report(options: Analyze, net: Network, masks: PyTree | None, name: str, progress: Progress) -> pk.Report:
    return pk.analyze(net.apply_fn, net.params, net.dataset.images, masks=masks, k=options.k,
                      progress=lambda part: progress(f"{name}: {part}"))


def train(options: Train, progress: Progress) -> dict[str, Any]:
    """Train as the options say, go on from a checkpoint in the folder, and write record, masks and picture into it."""
    asked = asdict(options)
    output, asked["prune_steps"] = Path(asked.pop("output")), asked.pop("steps")
    if options.pruner == "none" and options.compression:
        raise ValueError(f"--compression {options.compression:g} prunes nothing without --pruner, which is none: "
                         "name a pruner, as in --pruner synflow")
    if options.compression is None:
        asked["compression"] = 1.0
    chosen = Settings(**asked)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; --output names the folder to write")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent} to write {output.name} into")
    record, masks = experiments.run(chosen, checkpoint=output / "checkpoint", progress=progress)
    progress("drawing and writing")
    with files.folder(output) as folder:
        (folder / "record.json").write_text(files.to_json(record), encoding="utf-8")
        plots.training(record["history"], title=f"{chosen.model} on {chosen.data}").savefig(folder / "training.png")
        pk.save_masks(folder / "masks.npz", masks)
    return record


def sweep(options: Sweep, progress: Progress) -> tuple[Outcome, Path]:
    """Run the sweep of a file; return how many runs there were, and the table's file."""
    runs = read_grid(options.config)
    output = options.output or options.config.with_suffix("")
    outcome = experiments.sweep(runs, output, workers=options.workers, ray=options.ray, gpus=options.gpus,
                                retry=options.retry, progress=progress)
    return outcome, export(output)


def figures(options: Figures, progress: Progress) -> tuple[Any, Path | None]:
    """Draw a figure of results and return its file; or the table of claims, and no file."""
    from pkjax.experiments import figures, findings

    if options.figure not in FIGURES:
        raise ValueError(f"no figure {options.figure!r}; there are {', '.join(FIGURES)}")
    progress("reading records")
    table = experiments.table(options.results)
    if options.figure == "claims":
        return findings.claims(table), None
    draw = getattr(figures, f"figure{options.figure}" if options.figure.isdigit() else options.figure)
    folder = options.results.parent if options.results.is_file() else options.results
    output = options.output or folder / f"figure-{options.figure}.png"
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent} to write {output.name} into")
    progress("drawing")
    figure = draw(table)
    with files.replacing(output) as part:
        figure.savefig(part, format=output.suffix[1:] or "png")
    return None, output


def settings(options: Common) -> dict[str, Any]:
    """Say in plain values what was run."""
    said = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()
            if name != "output" and value is not None}
    if "masks" in said:
        return {name: value for name, value in said.items() if name not in ("pruner", "compression", "steps")}
    return {**said, "steps": steps_of(options.pruner, options.steps)}
