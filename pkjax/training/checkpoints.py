"""Checkpoints of a training by Orbax: parameters, state, optimizer, masks and history."""

import contextlib
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

__all__ = ["Checkpoints", "digest", "read"]

FORMAT = "pkjax training 1"


class Checkpoints:
    """The last state of one training in a folder; a new state replaces the old one once it is complete."""

    def __init__(self, folder: Path | str, identity: Mapping[str, Any]) -> None:
        """Open or create a folder for the training that `identity` describes in JSON's types."""
        self._folder, self._identity = Path(folder), dict(identity)
        self._manager = _manager(self._folder, create=True)

    def latest(self, like: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], list[dict[str, Any]]] | None:
        """Read the last state and its history; None where there is no checkpoint.

        Raises:
            ValueError: the folder holds another training; the message names what differs.
        """
        epoch = self._manager.latest_step()
        if epoch is None:
            return None
        about = _about(self._manager, epoch)
        mine, other = self._identity, about["identity"]
        differing = [f"{name} {other.get(name)!r}, not {mine.get(name)!r}" for name in sorted({*mine, *other})
                     if mine.get(name) != other.get(name)]
        if differing:
            raise ValueError(f"{self._folder} holds a checkpoint of another training, with {'; '.join(differing)}: "
                             "use the same settings or another folder")
        return _restore(self._manager, epoch, about["empty"], like), about["history"]

    def save(self, epoch: int, now: Mapping[str, PyTree], history: Sequence[Mapping[str, Any]]) -> None:
        """Write the state after an epoch."""
        import orbax.checkpoint as ocp

        full = {name: tree for name, tree in now.items() if jax.tree.leaves(tree)}
        about = {"format": FORMAT, "identity": self._identity, "history": list(history),
                 "empty": sorted(set(now) - set(full))}
        items = {name: ocp.args.StandardSave(tree) for name, tree in full.items()}
        with _quiet():
            self._manager.save(epoch, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **items))
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()


def read(folder: Path | str) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Read a folder's last checkpoint without knowing the network: nested dictionaries, and what describes them.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint has another format.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of checkpoints")
    with contextlib.closing(_manager(Path(folder), create=False)) as manager:
        epoch = manager.latest_step()
        if epoch is None:
            raise FileNotFoundError(f"no checkpoint in {folder}")
        about = _about(manager, epoch)
        return _restore(manager, epoch, about["empty"], dict.fromkeys(("params", "state", "masks"))), about


def _manager(folder: Path, create: bool) -> Any:
    import orbax.checkpoint as ocp

    with _quiet():
        return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(
            max_to_keep=1, create=create, enable_async_checkpointing=False))


def _about(manager: Any, epoch: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    with _quiet():
        about = dict(manager.restore(epoch, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"])
    if about.get("format") != FORMAT:
        raise ValueError(f"the checkpoint has the format {about.get('format')!r}, but this version reads {FORMAT!r}")
    return about


def _restore(manager: Any, epoch: int, empty: Sequence[str], like: Mapping[str, PyTree]) -> dict[str, PyTree]:
    import orbax.checkpoint as ocp

    wanted = {name: ocp.args.StandardRestore(tree) for name, tree in like.items() if name not in empty}
    with _quiet():
        trees = manager.restore(epoch, args=ocp.args.Composite(**wanted))
    return {name: like[name] or {} if name in empty else trees[name] for name in like}


def digest(tree: PyTree) -> str:
    """Fingerprint a tree by its names, shapes and numbers."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
        total.update(np.ascontiguousarray(value).tobytes())
    return total.hexdigest()[:16]


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence Orbax's log of its steps; its errors are raised all the same."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
