"""The command line: `pkjax analyze`, `compare`, `prune`, `train`, `sweep` and `figures`."""

import contextlib
import io
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import pkjax
from pkjax.extras import needed

if TYPE_CHECKING:
    from pkjax.cli.options import Options

__all__ = ["main"]

DESCRIPTION = """Neural networks as sums over paths: path kernels, tangent kernels, pruning.

Start with `pkjax analyze`, which needs no options and no download.

See `pkjax COMMAND --help` for options, `pkjax --version` for the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 for success; 1 for a sweep none of whose runs has a result; 2 for an error, both one line on the standard error
    stream; 130 after an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"pkjax {pkjax.__version__}")
        return 0
    try:
        for module in ("rich", "tyro"):
            needed(module, "cli", f"the command line needs {module}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            failure = _run(_parse(arguments))
        for text in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)
                                  and not issubclass(w.category, DeprecationWarning)):
            print(f"pkjax: note: {_line(text)}", file=sys.stderr)
        return _fail(failure, 1) if failure else 0
    except _UsageError as error:
        return error.args[0] if not error.args[1] else _fail(error.args[1])
    except OSError as error:
        named = error.filename is not None and error.strerror
        return _fail(f"{error.filename}: {error.strerror}" if named else str(error))
    except (ValueError, TypeError, ImportError, FloatingPointError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        kept = ("finished work is saved; run the same command to resume" if arguments[:1] in (["train"], ["sweep"])
                else "nothing was written")
        print(f"pkjax: interrupted, {kept}", file=sys.stderr)
        return 130


class _UsageError(Exception):
    """Holds (exit code, message); the message is empty where the parser has printed everything, as after --help."""


def _line(text: str) -> str:
    return " ".join(text.split())


def _fail(text: str, code: int = 2) -> int:
    print(f"pkjax: error: {_line(text)}", file=sys.stderr)
    return code


def _parse(arguments: list[str]) -> "Options":
    """Parse with tyro, and turn its framed error messages into one line."""
    import tyro

    from pkjax.cli.options import COMMANDS

    command, listed = next(iter(arguments), ""), ", ".join(COMMANDS)
    if command not in (*COMMANDS, "-h", "--help"):
        message = (f"name a command first: {listed}" if not command or command.startswith("-") else
                   f"unknown command {command!r}; choose from {listed}")
        raise _UsageError(2, f"{message} (see pkjax --help)")
    commands: Any = Union[tuple(  # noqa: UP007 (built from a table)
        Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())]
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            options: Options = tyro.cli(commands, args=arguments, prog="pkjax", description=DESCRIPTION,
                                        config=(tyro.conf.PositionalRequiredArgs,))
            return options
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 2
        if not code:
            raise _UsageError(0, "") from None
        raise _UsageError(code, f"{_unframed(box.getvalue())} (see pkjax {command} --help)") from None


def _unframed(box: str) -> str:
    """Extract the message from a framed error: the first part between rules, and the suggested option.

    Where the terminal has no box characters, tyro writes the uninformative title as a part of its own.
    """
    parts: list[list[str]] = [[]]
    for row in box.splitlines():
        text = row.strip("│ ")
        if text[:1] in ("╭", "╰") or set(text) <= {"─", "-"}:
            parts.append([])
        else:
            parts[-1].append(text)
    parts = [part for part in parts if part]
    message, *more = parts if "╭" in box else parts[1:]
    suggested = [word for part in more if part[0].startswith("Perhaps you meant") for word in part[1].split()[:1]]
    return " ".join(message).rstrip(".") + (f"; did you mean {suggested[0]}" if suggested else "")


def _run(options: "Options") -> str:
    """Run a command and print its result; return what is wrong with a result, "" for nothing."""
    from rich.console import Console

    from pkjax.cli import commands, screen
    from pkjax.cli.options import Analyze, Compare, Figures, Prune, Sweep, Train
    from pkjax.experiments.compiled import keep_compiled, users_folder
    from pkjax.experiments.records import FAILED

    keep_compiled(users_folder())
    console = Console(highlight=False, markup=False, emoji=False)      # a path may read z[red].npz
    failure = ""
    with _progress() as progress:
        result: Any = getattr(commands, type(options).__name__.lower())(options, progress)
    if isinstance(options, Analyze):
        screen.print_reports(console, result, commands.settings(options))
        ending = f"report: {options.output / 'report.html'}"
    elif isinstance(options, Compare):
        console.print(str(result), soft_wrap=True)
        ending = "; ".join(f"{kind}: {path}" for kind, path in (("results", options.json), ("picture", options.png))
                           if path is not None)
    elif isinstance(options, Prune):
        console.print(screen.layers_table(result))
        ending = f"masks: {options.output}"
    elif isinstance(options, Train):
        console.print(screen.history_table(result))
        ending = f"record, masks, picture and checkpoint: {options.output}"
    elif isinstance(options, Sweep):
        (run, failed, before), table, failure = result
        ending = f"{run} runs, {failed} of them failed, {before} recorded before; table: {table}" + (
            f"; errors: {table.parent / FAILED}" if failed else "")
    elif isinstance(options, Figures) and not isinstance(result, Path):
        console.print(screen.verdicts_table(result.table))
        ending = result.left_out
    else:
        ending = f"picture: {result}"
    if ending:
        # A name that is not UTF-8 is printed with marks in place of its bytes.
        console.print(ending.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), soft_wrap=True)
    return failure


@contextlib.contextmanager
def _progress(after: float = 1.0) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is running and for how long, after the first second."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console: Console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), TimeElapsedColumn())
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)

        def report(part: str) -> None:
            bar.update(task, description=f"{part:<42.42}", visible=time.monotonic() - began >= after)

        yield report
