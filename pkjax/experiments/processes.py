"""The local worker processes of a sweep, as their parent sees them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pkjax.experiments.compiled import as_here
from pkjax.experiments.environment import versions
from pkjax.experiments.records import FAILED, RUNS, write_failure
from pkjax.experiments.settings import Settings
from pkjax.experiments.worker import UNABLE, failure, tail

__all__ = ["run_locally"]

RUNS_A_PROCESS = 64
"""Runs after which a fresh process replaces a worker, to free the memory of what that one compiled."""
PAUSE = 0.02
"""Seconds between two looks for records."""
PATIENCE = 30.0
"""Seconds that an idle worker may take to end."""
TRIES = 2
"""How often runs are begun whose process dies."""
START = f"""
import os, traceback
try:
    import ctypes, json, signal, sys
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    sys.path[:], arguments = json.loads(sys.argv[1])
    from pkjax.experiments.worker import main
    main(*arguments)
except BaseException:
    traceback.print_exc()
    os._exit({UNABLE})
"""
"""What a worker runs: a command line, so that it imports nothing of the user's script.

Ctrl-C reaches the whole group of processes, but it is the parent that ends its workers. Where the parent dies, Linux
kills them (PR_SET_PDEATHSIG), stopped ones too; elsewhere the end of their input ends them.
"""


@dataclass
class _Task:
    """Runs that a worker gets together, and how often their process died."""

    runs: list[Settings]
    deaths: int = 0


class _Worker:
    """A worker process with the runs that it has."""

    def __init__(self, output: Path, slot: int, workers: int, logger: str | None) -> None:
        self.output, self.runs = output, 0
        self.task: _Task | None = None
        self._failures: dict[str, tuple[int, int] | None] = {}
        # A file takes whatever is written and blocks nobody; process and parent share the place in it.
        self.log = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed by `end`)
        arguments = json.dumps([[path for path in sys.path if isinstance(path, str)],
                                [str(output), slot, workers, logger]])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, arguments], stdin=subprocess.PIPE, stdout=self.log, stderr=self.log,
            bufsize=0, env={**os.environ, **as_here(), "PKJAX_WORKERS": str(workers)})

    def give(self, task: _Task) -> bool:
        """Hand runs to the worker; False where it is dead."""
        self.log.seek(0)
        self.log.truncate()
        self._failures = {each.key: _stamp(self._failure(each.key)) for each in task.runs}
        if not self._say(json.dumps([asdict(settings) for settings in task.runs]).encode() + b"\n"):
            return False
        self.task, self.runs = task, self.runs + len(task.runs)
        return True

    def recorded(self) -> Iterator[tuple[Settings, str]]:
        """Take the runs that have a record out of the task; yield each with "done" or "failed"."""
        for settings in list(self.task.runs if self.task else ()):
            now = _stamp(self._failure(settings.key))
            done = (self.output / RUNS / settings.key / "record.json").exists()
            if done or (now is not None and now != self._failures[settings.key]):    # not that of an earlier sweep
                assert self.task
                self.task.runs.remove(settings)
                yield settings, "done" if done else "failed"

    def _failure(self, key: str) -> Path:
        return self.output / FAILED / f"{key}.json"

    def end(self, patience: float = 0.0) -> None:
        """End the process: between two runs where it is given time for that, else at once."""
        try:
            if patience and self._say(b"\n"):
                self.process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.process.kill()
            self.process.wait()
            if self.process.stdin:
                self.process.stdin.close()
            self.log.close()

    def _say(self, line: bytes) -> bool:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
        except OSError:
            return False
        return True


def run_locally(groups: Sequence[Sequence[Settings]], output: Path, workers: int, logger: str | None = None
                ) -> Generator[tuple[Settings, str], None, None]:
    """Run experiments in local processes, which write the records; yield each with "done" or "failed".

    A process gets a group of runs at a time. One that dies costs the runs of its group that have no record, which are
    begun once more. If their process dies again, they are begun one by one; a single run whose process dies twice is
    recorded as failed.

    Raises:
        ChildProcessError: a worker cannot work at all (it cannot start, or cannot write a record).
    """
    waiting = deque(_Task(list(group)) for group in groups)
    crew: dict[int, _Worker] = {}
    try:
        while waiting or any(worker.task for worker in crew.values()):
            for slot in range(min(workers, len(groups))):
                worker = crew.get(slot)
                if worker and worker.task:
                    code = worker.process.poll()        # before the look: it may write last
                    yield from worker.recorded()
                    if worker.task.runs and code is None:
                        continue
                    task, worker.task = worker.task, None
                    if task.runs and code is not None:
                        again = _died(task, code, worker)
                        if not again:
                            yield task.runs[0], "failed"
                        waiting.extendleft(reversed(again))
                    if code is not None or worker.runs >= RUNS_A_PROCESS:
                        crew.pop(slot).end(PATIENCE)
                if waiting:
                    worker = crew.get(slot) or _Worker(output, slot, workers, logger)
                    crew[slot] = worker
                    task = waiting.popleft()
                    if not worker.give(task):
                        waiting.appendleft(task)
                        crew.pop(slot).end()
            time.sleep(PAUSE)
        for worker in crew.values():
            worker.end(PATIENCE)
    finally:
        for worker in crew.values():
            worker.process.kill()
        for worker in crew.values():
            worker.end()


def _died(task: _Task, code: int, worker: _Worker) -> list[_Task]:
    """Say how runs whose process died are begun again; record the failure of one that is not."""
    stderr = tail(worker.log.fileno())
    if code == UNABLE:
        last = stderr.strip().splitlines()[-1:] or ["nothing on its standard error stream"]
        raise ChildProcessError(f"a worker process cannot work: {last[0]}")
    if task.deaths + 1 < TRIES:
        return [_Task(task.runs, task.deaths + 1)]
    if len(task.runs) > 1:
        return [_Task([settings]) for settings in task.runs]
    name = next((f" ({kind.name})" for kind in signal.Signals if kind == -code), "")
    write_failure(worker.output, failure(task.runs[0], f"its process died with exit code {code}{name}, {TRIES} times",
                                         "", versions(), stderr))
    return []


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tell one version of a file from the next; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
