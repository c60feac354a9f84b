"""Checkpoints of a training: parameters, state, optimizer, masks and history, by Orbax."""

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
    """The last state of one training in a folder; a new one replaces the old one when it is written whole."""

    def __init__(self, folder: Path | str, identity: Mapping[str, Any]) -> None:
        """Open a folder, made where it is missing, for the training that ``identity`` describes in JSON's types."""
        self._folder, self._identity = Path(folder), dict(identity)
        self._manager = _manager(self._folder, create=True)

    def latest(self, like: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], list[dict[str, Any]]] | None:
        """Read the last state and the history before it, or None where there is none.

        Raises ValueError where the folder holds another training, naming what differs.
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
                             "train as then, or into another folder")
        return _restore(self._manager, epoch, about["empty"], like), about["history"]

    def save(self, epoch: int, now: Mapping[str, PyTree], history: Sequence[Mapping[str, Any]]) -> None:
        """Write the state after an epoch; it counts from when it is there whole."""
        import orbax.checkpoint as ocp

        full = {name: tree for name, tree in now.items() if jax.tree.leaves(tree)}
        about = {"format": FORMAT, "identity": self._identity, "history": list(history),
                 "empty": sorted(set(now) - set(full))}
        items = {name: ocp.args.StandardSave(tree) for name, tree in full.items()}
        with _quiet():
            self._manager.save(epoch, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **items))
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Let go of the folder."""
        self._manager.close()


def read(folder: Path | str) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Read the last checkpoint of a folder without knowing the network: its trees as nested dictionaries, and about it.

    Raises FileNotFoundError where there is none, ValueError where it is of another format.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder} with checkpoints")
    with contextlib.closing(_manager(Path(folder), create=False)) as manager:
        epoch = manager.latest_step()
        if epoch is None:
            raise FileNotFoundError(f"no checkpoint in {folder}")
        about = _about(manager, epoch)
        return _restore(manager, epoch, about["empty"], dict.fromkeys(("params", "state", "masks"))), about


def _manager(folder: Path, create: bool) -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError("checkpoints need Orbax: pip install orbax-checkpoint") from error
    with _quiet():
        return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(
            max_to_keep=1, create=create, enable_async_checkpointing=False))


def _about(manager: Any, epoch: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    with _quiet():
        about = dict(manager.restore(epoch, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"])
    if about.get("format") != FORMAT:
        raise ValueError(f"a checkpoint of format {about.get('format')!r}, and this version reads {FORMAT!r}")
    return about


def _restore(manager: Any, epoch: int, empty: Sequence[str], like: Mapping[str, PyTree]) -> dict[str, PyTree]:
    import orbax.checkpoint as ocp

    wanted = {name: ocp.args.StandardRestore(tree) for name, tree in like.items() if name not in empty}
    with _quiet():
        found = manager.restore(epoch, args=ocp.args.Composite(**wanted))
    return {name: like[name] or {} if name in empty else found[name] for name in like}


def digest(tree: PyTree) -> str:
    """Fingerprint of a tree's names, shapes and numbers."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
        total.update(np.ascontiguousarray(value).tobytes())
    return total.hexdigest()[:16]


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep Orbax's account of its steps off the screen; its errors are raised."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
