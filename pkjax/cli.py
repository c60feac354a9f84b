"""The command line: `pkjax analyze`, `prune`, `train`, `sweep` and `figures`."""

import contextlib
import io
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Union

import pkjax
from pkjax.options import Analyze, Figures, Prune, Sweep, Train

__all__ = ["main"]

Options = Analyze | Prune | Train | Sweep | Figures
DESCRIPTION = "Neural networks as sums over paths: path kernels, tangent kernels, pruning."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 for options or files that do not fit, in one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"pkjax {pkjax.__version__}")
        return 0
    try:
        import rich  # noqa: F401
        import tyro  # noqa: F401
    except ImportError as error:
        return _fail(f"the command line needs {error.name}: pip install 'pkjax[cli]'")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            _run(_parse(arguments))
        for text in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
            print(f"pkjax: note: {_line(text)}", file=sys.stderr)
        return 0
    except _UsageError as error:
        return error.args[0] if not error.args[1] else _fail(error.args[1])
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        kept = ("what was complete is kept, the same command goes on" if arguments[:1] in (["train"], ["sweep"])
                else "nothing written")
        print(f"pkjax: interrupted, {kept}", file=sys.stderr)
        return 130


class _UsageError(Exception):
    """Holds (exit code, message); no message where the parser has said everything, as after --help."""


def _line(text: str) -> str:
    return " ".join(text.split())


def _fail(text: str) -> int:
    print(f"pkjax: error: {_line(text)}", file=sys.stderr)
    return 2


def _parse(arguments: list[str]) -> Options:
    """Parse with tyro, whose framed error messages become one line."""
    import tyro

    commands: Any = Union[tuple(  # noqa: UP007 (made from a list)
        Annotated[kind, tyro.conf.subcommand(kind.__name__.lower())] for kind in Options.__args__)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(commands, args=arguments, prog="pkjax", description=DESCRIPTION,
                            config=(tyro.conf.PositionalRequiredArgs,))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 2
        raise _UsageError(code, _unframed(said.getvalue()) if code else "") from None


def _unframed(box: str) -> str:
    """Take the message out of a framed error: the lines between the top border and the first rule."""
    kept: list[str] = []
    for row in box.splitlines():
        text = row.strip("│ ")
        if text.startswith("╭"):
            continue
        if text.startswith(("─", "╰")):
            break
        kept.append(text)
    return f"{' '.join(kept).rstrip('.')} (pkjax --help shows the options)"


def _run(options: Options) -> None:
    from rich.console import Console

    from pkjax import commands, screen

    console = Console(highlight=False)
    with _progress() as progress:
        result: Any = getattr(commands, type(options).__name__.lower())(options, progress)
    if isinstance(options, Analyze):
        screen.show(console, result, commands.settings(options))
        said = f"report: {options.output / 'report.html'}"
    elif isinstance(options, Prune):
        console.print(screen.layers(result))
        said = f"masks: {options.output}"
    elif isinstance(options, Train):
        console.print(screen.training(result))
        said = f"record, masks, picture and checkpoint: {options.output}"
    elif isinstance(options, Sweep):
        (run, failed, before), table = result
        said = f"{run} runs, {failed} of them failed, {before} recorded before; table: {table}"
    else:
        found, picture = result
        if found is not None:
            console.print(screen.claims(found))
        said = "" if picture is None else f"picture: {picture}"
    if said:
        console.print(said, soft_wrap=True)


@contextlib.contextmanager
def _progress(after: float = 1.0) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is being done and for how long, once the first second is over."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console: Console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)

        def report(part: str) -> None:
            bar.update(task, description=f"{part:<42.42}", visible=time.monotonic() - began >= after)

        yield report
