"""What the commands do: prune, analyze, and write results whole or not at all."""

import json
import math
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

import pkjax as pk
from pkjax import html, plots
from pkjax.options import Analyze, Common, Network, Prune, check, network, score, steps_of

__all__ = ["analyze", "environment", "prune", "settings"]

Progress = Callable[[str], None]


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
    return pk.prune(score(options, net), net.params, compression=options.compression, steps=steps_of(options))


def analyze(options: Analyze, progress: Progress) -> dict[str, pk.Report]:
    """Analyze the network dense and pruned, and write the folder of results."""
    check(options)
    with _folder(options.output) as folder:
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
        (folder / "report.json").write_text(json.dumps(_finite(content), allow_nan=False, ensure_ascii=False),
                                            encoding="utf-8")
        pk.save_masks(folder / "masks.npz", masks)
    return reports


def _report(options: Analyze, net: Network, masks: PyTree | None, name: str, progress: Progress) -> pk.Report:
    return pk.analyze(net.apply_fn, net.params, net.dataset.images, masks=masks, k=options.k,
                      progress=lambda part: progress(f"{name}: {part}"))


def settings(options: Common) -> dict[str, Any]:
    """Say in plain values what was run."""
    said = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()
            if name != "output" and value is not None}
    if "masks" in said:
        return {name: value for name, value in said.items() if name not in ("pruner", "compression", "steps")}
    return {**said, "steps": steps_of(options)}


def environment() -> dict[str, str]:
    """Name the versions and the device that numbers depend on."""
    device = jax.devices()[0]
    return {"pkjax": pk.__version__, "jax": jax.__version__, "python": platform.python_version(),
            "device": f"{device.platform} ({device.device_kind})",
            "precision": str(jax.dtypes.canonicalize_dtype(float))}


def _finite(value: Any) -> Any:
    """Replace what JSON cannot hold (NaN, infinity) by null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """Fill a folder beside its place and move it there when the block ends well; else leave nothing behind.

    Where the folder is there already, its files of the same names are replaced, one by one and whole.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; --output names the folder to write")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} into")
    part = parent / f".{target.absolute().name}.{secrets.token_hex(8)}.part"
    part.mkdir()
    try:
        yield part
        if target.exists():
            for file in sorted(part.iterdir()):
                os.replace(file, target / file.name)
        else:
            os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
