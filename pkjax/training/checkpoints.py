"""Checkpoints of a training by Orbax: parameters, state, optimizer, masks and history.

Two checksums protect them. A manifest beside the checkpoint lists its files, so that a damaged one is found before
Orbax reads any; the checkpoint itself says what its arrays were, also in the moment before the manifest is written.
"""

import contextlib
import errno
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from pkjax.files import replacing
from pkjax.training.identity import Identity, differences, digest
from pkjax.trees import leaf_keys

__all__ = ["CheckpointError", "Checkpoints", "check_folder", "read"]

FORMAT = "pkjax training 2"
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that this training cannot continue: damaged, of another format, or of another training."""


class Checkpoints:
    """The last state of one training in a folder; a new state replaces the old one once it is complete."""

    def __init__(self, folder: Path | str, identity: Identity) -> None:
        """Open or create a folder for a training.

        Raises:
            ValueError: there is a file of that name, or what is in the folder cannot be read.
        """
        self._folder = Path(folder).absolute()
        self._identity = Identity(**json.loads(json.dumps(identity._asdict(), default=float)))
        self._manager = _manager(self._folder, create=True)

    def latest(self, like: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], list[dict[str, Any]]] | None:
        """Read the last state and its history; None where there is no checkpoint.

        Raises:
            CheckpointError: the folder holds another training, which the message tells from this one, or is damaged.
            ValueError: two leaves have names that a checkpoint does not tell apart.
        """
        for name, tree in like.items():
            _check_names(tree, name)
        with _sound(self._folder):
            epoch = self._manager.latest_step()
        if epoch is None:
            return None
        about = _about(self._folder, self._manager, epoch)
        differing = differences(self._identity, Identity(**about["identity"]))
        if differing:
            raise CheckpointError(f"{self._folder} holds a checkpoint of another training, with "
                                  f"{'; '.join(differing)}: use the same settings or another folder")
        return _restore(self._folder, self._manager, epoch, about, like), about["history"]

    def save(self, epoch: int, now: Mapping[str, PyTree], history: Sequence[Mapping[str, Any]]) -> None:
        """Write the state after an epoch.

        Raises:
            OSError: it cannot be written, as on a full disk; the earlier state stays.
        """
        import orbax.checkpoint as ocp

        full = {name: tree for name, tree in now.items() if jax.tree.leaves(tree)}
        about = {"format": FORMAT, "identity": self._identity._asdict(), "history": list(history),
                 "empty": sorted(set(now) - set(full)), "digests": {name: digest(tree) for name, tree in now.items()}}
        about["checksum"] = _checksum(about)
        items = {name: ocp.args.StandardSave(tree) for name, tree in full.items()}
        try:
            with _quiet():
                self._manager.save(epoch, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **items))
                self._manager.wait_until_finished()
        except MemoryError:
            raise
        except Exception as error:  # of a full disk Orbax and TensorStore make ValueErrors
            raise OSError(errno.EIO, f"the checkpoint of epoch {epoch} cannot be written ({_reason(error)})",
                          str(self._folder)) from error
        manifest: dict[str, Any] = {"epoch": epoch, "files": _files(self._folder / str(epoch))}
        with replacing(self._folder / MANIFEST) as part:
            part.write_text(json.dumps({**manifest, "checksum": _checksum(manifest)}))

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()


def read(folder: Path | str) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Read a folder's last checkpoint without knowing the network: nested dictionaries, and what describes them.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged, or has another format.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder} of checkpoints")
    with contextlib.closing(_manager(folder, create=False)) as manager:
        with _sound(folder):
            epoch = manager.latest_step()
        if epoch is None:
            raise FileNotFoundError(f"no checkpoint in {folder}")
        about = _about(folder, manager, epoch)
        like = dict.fromkeys(("params", "state", "masks"))
        return _restore(folder, manager, epoch, about, like), about


class _DamageError(ValueError):
    """What was read is not what was written."""


@contextlib.contextmanager
def _sound(folder: Path) -> Iterator[None]:
    """Turn whatever a damaged checkpoint raises into one CheckpointError that says what to do."""
    try:
        with _quiet():
            yield
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file Orbax, TensorStore and JSON raise nearly anything
        raise CheckpointError(f"the checkpoint in {folder} is damaged ({_reason(error)}): delete the folder to start "
                              "this training again") from error


def _reason(error: Exception) -> str:
    reason = str(error) if isinstance(error, _DamageError) else f"{type(error).__name__}: {error}"
    return reason.strip().split("\n")[0][:300]


def check_folder(folder: Path) -> None:
    """Refuse a name that Orbax cannot write to.

    Raises:
        ValueError: the name is not UTF-8.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {str(folder)!r} is not UTF-8, which checkpoints need: name another folder"
                         ) from error


def _manager(folder: Path, create: bool) -> Any:
    import orbax.checkpoint as ocp

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, where a folder of checkpoints is expected: name another folder")
    check_folder(folder)
    with _sound(folder):
        _check_files(folder)
        return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(
            max_to_keep=1, create=create, enable_async_checkpointing=False))


def _about(folder: Path, manager: Any, epoch: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    with _sound(folder):
        about = dict(manager.restore(epoch, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"])
        kind = about.get("format")
        if kind == FORMAT and about.pop("checksum", None) != _checksum(about):
            raise _DamageError(f"the description of epoch {epoch} is not what was written")
    if kind != FORMAT:
        raise CheckpointError(f"the checkpoint in {folder} has the format {kind!r}, but this version reads {FORMAT!r}: "
                              "delete the folder to start this training again")
    return about


def _restore(folder: Path, manager: Any, epoch: int, about: Mapping[str, Any], like: Mapping[str, PyTree]
             ) -> dict[str, PyTree]:
    import orbax.checkpoint as ocp

    wanted = {name: ocp.args.StandardRestore(tree) for name, tree in like.items() if name not in about["empty"]}
    with _sound(folder):
        trees = manager.restore(epoch, args=ocp.args.Composite(**wanted)) if wanted else {}
        trees = {name: like[name] or {} if name in about["empty"] else trees[name] for name in like}
        for name, tree in trees.items():
            if digest(tree) != about["digests"][name]:
                raise _DamageError(f"the {name} of epoch {epoch} are not those that were written")
    return trees


def _files(step: Path) -> dict[str, str]:
    """Digests of the files of a checkpoint."""
    digests = {}
    for path in sorted(step.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digests[path.relative_to(step).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _check_files(folder: Path) -> None:
    """Raise _DamageError where the files of a checkpoint are not those that its manifest lists."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:       # nothing was saved yet, or the process ended before it was written
        return
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != _checksum(manifest):
        raise _DamageError(f"{MANIFEST} is not what was written")
    epoch = manifest["epoch"]
    step = folder / str(epoch)
    if any(later.name.isdecimal() and int(later.name) > epoch for later in folder.iterdir()):
        return      # the process ended once a later one was complete, in the middle of deleting this one perhaps
    if not step.is_dir():
        raise _DamageError(f"the folder of epoch {epoch} is missing")
    have = _files(step)
    for name, content in manifest["files"].items():
        if name not in have:
            raise _DamageError(f"the file {epoch}/{name} is missing")
        if have[name] != content:
            raise _DamageError(f"the file {epoch}/{name} is not what was written")


def _checksum(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(json.loads(json.dumps(about)), sort_keys=True).encode()).hexdigest()


def _check_names(tree: PyTree, what: str) -> None:
    """Raise ValueError where two leaves have one name in a checkpoint, which joins the parts of a key path by dots."""
    alike = Counter(".".join(key) for key in leaf_keys(tree, what))
    twice = [name for name, count in alike.items() if count > 1]
    if twice:
        raise ValueError(f"{what} has two leaves that a checkpoint calls {twice[0]!r}: give them different names to "
                         "save this training")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax's log of its steps; its errors are raised all the same."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
