"""The local worker processes of a sweep, as their parent sees them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path

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
"""How often a run is begun whose process dies."""
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


class _Worker:
    """A worker process with the run that it has."""

    def __init__(self, output: Path, slot: int, workers: int) -> None:
        self.output, self.runs = output, 0
        self.settings: Settings | None = None
        self._failure: tuple[int, int] | None = None
        # A file takes whatever is written and blocks nobody; process and parent share the place in it.
        self.log = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed by `end`)
        arguments = json.dumps([[path for path in sys.path if isinstance(path, str)], [str(output), slot, workers]])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, arguments], stdin=subprocess.PIPE, stdout=self.log, stderr=self.log,
            bufsize=0, env={**os.environ, "PKJAX_WORKERS": str(workers)})

    def give(self, settings: Settings) -> bool:
        """Hand a run to the worker; False where it is dead."""
        self.log.seek(0)
        self.log.truncate()
        self._failure = _stamp(self.output / FAILED / f"{settings.key}.json")
        if not self._say(json.dumps(asdict(settings)).encode() + b"\n"):
            return False
        self.settings, self.runs = settings, self.runs + 1
        return True

    def recorded(self, key: str) -> str | None:
        """Return how the record says that the run ended, "done" or "failed"; None while there is none."""
        if (self.output / RUNS / key / "record.json").exists():
            return "done"
        now = _stamp(self.output / FAILED / f"{key}.json")
        return "failed" if now is not None and now != self._failure else None     # not the failure of an earlier sweep

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


def run_locally(pending: Sequence[Settings], output: Path, workers: int
                ) -> Generator[tuple[Settings, str], None, None]:
    """Run experiments in local processes, which write the records; yield each with "done" or "failed".

    A process that dies costs the run that it had, which is begun once more; if its process dies again, the run is
    recorded as failed.

    Raises:
        ChildProcessError: a worker cannot work at all (it cannot start, or cannot write a record).
    """
    waiting, begun = deque(pending), Counter[str]()
    crew: dict[int, _Worker] = {}
    try:
        while waiting or any(worker.settings for worker in crew.values()):
            for slot in range(min(workers, len(pending))):
                worker = crew.get(slot)
                if worker and worker.settings:
                    code, settings = worker.process.poll(), worker.settings     # before the look: it may write last
                    status = worker.recorded(settings.key)
                    if status is None and code is not None:
                        status = _died(settings, code, worker, begun[settings.key])
                        if status is None:
                            waiting.appendleft(settings)
                    if status is None and code is None:
                        continue
                    worker.settings = None
                    if code is not None or worker.runs >= RUNS_A_PROCESS:
                        crew.pop(slot).end(PATIENCE)
                    if status is not None:
                        yield settings, status
                if waiting:
                    worker = crew.get(slot) or _Worker(output, slot, workers)
                    crew[slot] = worker
                    settings = waiting.popleft()
                    if worker.give(settings):
                        begun[settings.key] += 1
                    else:
                        waiting.appendleft(settings)
                        crew.pop(slot).end()
            time.sleep(PAUSE)
        for worker in crew.values():
            worker.end(PATIENCE)
    finally:
        for worker in crew.values():
            worker.process.kill()
        for worker in crew.values():
            worker.end()


def _died(settings: Settings, code: int, worker: _Worker, begun: int) -> str | None:
    """Record the failure of a run whose process died, and say so; None where it may be begun once more."""
    stderr = tail(worker.log.fileno())
    if code == UNABLE:
        last = stderr.strip().splitlines()[-1:] or ["nothing on its standard error stream"]
        raise ChildProcessError(f"a worker process cannot work: {last[0]}")
    if begun < TRIES:
        return None
    name = next((f" ({kind.name})" for kind in signal.Signals if kind == -code), "")
    write_failure(worker.output, failure(settings, f"its process died with exit code {code}{name}, {begun} times", "",
                                         versions(), stderr))
    return "failed"


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tell one version of a file from the next; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
