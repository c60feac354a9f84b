"""What the commands do. Results are written whole or not at all."""

import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

import pkjax as pk
from pkjax import experiments, files, plots
from pkjax.cli import html
from pkjax.cli.options import (
    FIGURES,
    Analyze,
    Common,
    Compare,
    Figures,
    Network,
    Prune,
    Sweep,
    Train,
    check,
    images,
    initialised,
    network,
)
from pkjax.experiments.environment import environment
from pkjax.experiments.gates import check_gates, warn_of_left_out
from pkjax.experiments.loggers import read_logger
from pkjax.experiments.methods import compiled, pruned, pruner_of, score, steps_of
from pkjax.experiments.records import export, read_records, recorded
from pkjax.experiments.settings import Settings, read_grid
from pkjax.experiments.sweeps import Outcome
from pkjax.experiments.user_code import import_beside, import_from, is_own
from pkjax.plots.panels import new_figure
from pkjax.tables import Progress, listed, reporter

__all__ = ["Swept", "Verdicts", "analyze", "compare", "figures", "prune", "settings", "sweep", "train"]


def _import_own(options: Common | Compare | Train) -> None:
    """Let Python import functions of the user's own from the current folder, where the options name some."""
    pruners = options.pruners if isinstance(options, Compare) else (options.pruner,)
    if any(map(is_own, (options.model, options.data, *pruners))):
        import_from(Path.cwd())


def _check_target(file: Path, option: str) -> None:
    """Refuse a file that cannot be written, before anything is computed."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; give --{option} the file to write")
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent} for {file.name}")


def _check_picture(file: Path, option: str) -> None:
    _check_target(file, option)
    known = sorted(new_figure(1.0, 1.0).canvas.get_supported_filetypes())
    if file.suffix and file.suffix[1:].lower() not in known:
        raise ValueError(f"--{option} {file.name} does not end as a picture: choose from {', '.join(known)}")


def prune(options: Prune, progress: Progress = False) -> pk.PruneResult:
    """Prune as the options say, and write the masks."""
    tell = reporter(progress)
    _import_own(options)
    check(options)
    _check_target(options.output, "output")
    tell("loading images, initialising")
    net = network(options, paths=pruner_of(options.pruner).paths)
    result = _pruned(options, net, tell)
    with files.replacing(options.output) as part:
        pk.save_masks(part, result.masks)
    return result


def _pruned(options: Common, net: Network, tell: Callable[[str], None]) -> pk.PruneResult:
    tell(f"pruning by {options.pruner}")
    return pruned(score(options.pruner, net.apply_fn, net.dataset, seed=options.seed, **net.frozen), net.params,
                  compression=options.compression, steps=steps_of(options.pruner, options.steps),
                  prunable=net.prunable)


def analyze(options: Analyze, progress: Progress = False) -> dict[str, pk.Report]:
    """Analyze the network dense and pruned, and write the folder of results."""
    tell = reporter(progress)
    _import_own(options)
    check(options)
    with files.folder(options.output) as folder:
        tell("loading images, initialising")
        net = network(options, paths=True)
        if options.masks is None:
            masks = _pruned(options, net, tell).masks
        else:
            masks = pk.load_masks(options.masks, like=net.params)
        reports = {"dense": _analyzed(options, net, None, "dense", tell),
                   "pruned": _analyzed(options, net, masks, "pruned", tell)}
        tell("drawing and writing")
        title = f"{options.model} on {options.samples} images of {options.data}"
        for name, result in reports.items():
            plots.report(result, f"{title}, {name}").savefig(folder / f"{name}.png")
        used = settings(options)
        (folder / "report.html").write_text(
            html.page(reports, title=title, settings=used, environment=environment()), encoding="utf-8")
        content = {"settings": used, "environment": environment(),
                   **{name: result.to_dict() for name, result in reports.items()}}
        (folder / "report.json").write_text(files.to_json(content), encoding="utf-8")
        pk.save_masks(folder / "masks.npz", masks)
    return reports


def _analyzed(options: Analyze, net: Network, masks: PyTree | None, name: str, tell: Callable[[str], None]
              ) -> pk.Report:
    return pk.analyze(net.apply_fn, net.params, net.dataset.images, masks=masks, k=options.k,
                      progress=lambda part: tell(f"{name}: {part}"), **net.frozen)


def compare(options: Compare, progress: Progress = False) -> pk.Comparison:
    """Compare traces with spectra over pruners, compressions and seeds, and write the files that are asked for."""
    tell = reporter(progress)
    _import_own(options)
    check(options)
    if options.json is not None:
        _check_target(options.json, "json")
    if options.png is not None:
        _check_picture(options.png, "png")
    tell("loading images, initialising")
    dataset = images(options.data, options.samples, 0)
    networks = {seed: initialised(options, dataset, seed, paths=True) for seed in options.seeds}
    masks: dict[tuple[str, float, int], PyTree] = {("dense", 0.0, seed): None for seed in networks}
    emptied: dict[str, int] = {}
    for seed, net in networks.items():
        for pruner in options.pruners:
            score_fn = compiled(score(pruner, net.apply_fn, dataset, seed=seed, **net.frozen), net.params)
            for compression in options.compressions:
                tell(f"pruning by {pruner} to {compression:g}, seed {seed}")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", pk.EmptiedLayerWarning)     # the table counts what is disconnected
                    result = pruned(score_fn, net.params, compression=compression,
                                    steps=steps_of(pruner, options.steps), jit=False, prunable=net.prunable)
                masks[pruner, compression, seed] = result.masks
                if result.emptied:
                    emptied[f"{pruner} to {compression:g}"] = len(result.emptied)
    if emptied and options.gates is not None:       # a block beside a shortcut goes without disconnecting anything
        told = [f"{count} by {name}" for name, count in emptied.items()]
        warnings.warn(f"some layers have lost all weights: {listed(told)}", pk.EmptiedLayerWarning, stacklevel=2)
    first = networks[options.seeds[0]]
    comparison = pk.compare(first.apply_fn, first.params, dataset.images, masks=masks, k=options.k, progress=tell,
                            seeds={seed: net.params for seed, net in networks.items()}, **first.frozen)
    if options.json is not None:
        content = {"settings": settings(options), "environment": environment(), **comparison.to_dict()}
        with files.replacing(options.json) as part:
            part.write_text(files.to_json(content), encoding="utf-8")
    if options.png is not None:
        tell("drawing")
        title = f"{options.model} on {options.samples} images of {options.data}"
        with files.replacing(options.png) as part:
            plots.compare(comparison, title).savefig(part, format=options.png.suffix[1:] or "png")
    return comparison


def train(options: Train, progress: Progress = False) -> dict[str, Any]:
    """Train as the options say, resume from a checkpoint in the folder, and write record, masks and picture there."""
    _import_own(options)
    check_gates(options.gates, options.reference, "--")
    asked = asdict(options)
    output, asked["prune_steps"] = Path(asked.pop("output")), asked.pop("steps")
    if options.pruner == "none" and options.compression:
        raise ValueError(f"--compression {options.compression:g} has no effect with --pruner none: name a pruner, "
                         "such as --pruner synflow")
    if options.compression is None:
        asked["compression"] = 1.0
    chosen = Settings(**asked)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; give --output the folder to write to")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} for {output.name}")
    tell = reporter(progress)
    record, masks = experiments.run(chosen, checkpoint=output / "checkpoint", progress=tell)
    warn_of_left_out(record["pruning"].get("left_out", []))
    tell("drawing and writing")
    with files.folder(output) as folder:
        (folder / "record.json").write_text(files.to_json(record), encoding="utf-8")
        plots.training(record["history"], title=f"{options.model} on {options.data}").savefig(folder / "training.png")
        pk.save_masks(folder / "masks.npz", masks)
    return record


class Swept(NamedTuple):
    """What a sweep came to."""

    outcome: Outcome
    table: Path
    """The file with the table of all runs of the folder."""
    error: str
    """What is wrong where no run of the sweep has a result; "" elsewhere."""


def sweep(options: Sweep, progress: Progress = False) -> Swept:
    """Run the sweep of a file; return how many runs there were, and the file with their table."""
    if options.logger is not None:      # beside the file first, as what it names
        import_from(Path.cwd())
        import_beside(options.config)
    runs = read_grid(options.config)
    logger = options.logger or read_logger(options.config)
    outcome = experiments.sweep(runs, output := _results(options), workers=options.workers, together=options.together,
                                ray=options.ray, gpus=options.gpus, retry=options.retry, progress=progress,
                                logger=logger)
    return Swept(outcome, export(output), _without_result(output, {chosen.key for chosen in runs}))


def _results(options: Sweep) -> Path:
    """Return the folder to write to; it never has the name of the configuration itself."""
    if options.output is not None:
        return options.output
    name = options.config.name
    stem = name[:-len(".toml")] if name.lower().endswith(".toml") else ""
    return options.config.with_name(stem or f"{name}-results")


def _without_result(output: Path, keys: set[str]) -> str:
    """Say that every run of a sweep failed, now or earlier, and how the first of them did."""
    failed = recorded(output)[1] & keys
    if not keys or failed != keys:
        return ""
    first = next(record for record in read_records(output) if record["key"] in failed)
    count = f"all {len(keys)} runs of the sweep" if len(keys) > 1 else "the run of the sweep"
    return f"{count} failed ({first['error']}); --retry repeats them"


class Verdicts(NamedTuple):
    """The paper's claims and whether they held."""

    table: Any
    left_out: str
    """How many runs tell nothing, as a sentence; "" for none."""


def figures(options: Figures, progress: Progress = False) -> Path | Verdicts:
    """Draw a figure of results and return its file; for "claims", return the verdicts."""
    from pkjax.experiments import figures, paper_claims
    from pkjax.experiments.figures.styles import left_out
    from pkjax.experiments.run_tables import finished

    tell = reporter(progress)
    if options.figure not in FIGURES:
        raise ValueError(f"unknown figure {options.figure!r}; choose from {', '.join(FIGURES)}")
    tell("reading records")
    table = experiments.table(options.results)
    if options.figure == "claims":
        return Verdicts(paper_claims.judge_claims(table), "; ".join(left_out(finished(table))))
    draw = getattr(figures, f"figure{options.figure}" if options.figure.isdigit() else options.figure)
    folder = options.results.parent if options.results.is_file() else options.results
    output = options.output or folder / f"figure-{options.figure}.png"
    _check_picture(output, "output")
    tell("drawing")
    figure = draw(table)
    with files.replacing(output) as part:
        figure.savefig(part, format=output.suffix[1:] or "png")
    return output


def settings(options: Common | Compare) -> dict[str, Any]:
    """Return the options that were used, as plain values."""
    used = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()
            if name not in ("output", "json", "png") and value is not None}
    if isinstance(options, Compare):
        return used
    if "masks" in used:
        return {name: value for name, value in used.items() if name not in ("pruner", "compression", "steps")}
    return {**used, "steps": steps_of(options.pruner, options.steps)}
