"""The complete state of a run on disk: written atomically, checked when read, with the one before it kept."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradleak.errors import CheckpointError, OutputError
from gradleak.files import sync_folder
from gradleak.tensors import read_metadata, read_tensors, write_tensors

FORMAT, VERSION = "gradleak-checkpoint", "1"

#: A checkpoint may take at most one part in so many of a run's time.
COST = 20

#: So many checkpoints in a row that cannot be written end a run: what it computes would be lost.
FAILURES = 5

log = logging.getLogger(__name__)


class Checkpoint:
    """Where a run keeps its state: a file, and the one before it.

    A state is dicts, lists, tuples, tensors, numbers, strings, booleans and None, in any nesting; it comes back equal to the
    last bit. The file is safetensors, never a pickle, and holds a digest of its content. Writing goes to a temporary file
    first, then the present file becomes the previous one, then the new one takes its place: at every moment one whole
    checkpoint is on disk.

    Args:
        path: The file; its folder must exist.
        every: Seconds between two checkpoints; 0: after every round. Large states are written less often, so that writing
            takes at most a twentieth of the time.
    """

    def __init__(self, path: Path, *, every: float = 60.0) -> None:
        self.path, self.every = path, every
        self._last, self._took, self._failures = time.monotonic(), 0.0, 0
        self._damaged = False

    @property
    def previous(self) -> Path:
        """The checkpoint before the last."""
        return self.path.with_name(f"{self.path.stem}.previous{self.path.suffix}")

    def due(self) -> bool:
        """Whether it is time for the next one; by a clock that nobody can set."""
        wait = max(self.every, COST * self._took) if self.every > 0 else 0.0
        return time.monotonic() - self._last >= wait

    def save(self, state: Mapping[str, Any], *, run: str, done: str = "") -> None:
        """Write a state.

        Args:
            state: What :meth:`load` gives back.
            run: What tells this run from any other (:func:`digest`).
            done: How far the run is, for people (:meth:`done`).

        Raises:
            OutputError: It cannot be written, for the :data:`FAILURES`-th time in a row. Before that a warning is logged:
                a full disk may have space again at the next one. What was on disk is still there.
        """
        start = time.monotonic()
        tensors, text = _pack(state)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "run": run,
            "state": text,
            "digest": digest(text, tensors),
            "done": done,
        }
        try:
            # a damaged file does not take the place of the whole one before it
            write_tensors(self.path, tensors, metadata, keep=None if self._damaged else self.previous)
        except OutputError as fault:
            self._failures += 1
            if self._failures >= FAILURES:
                raise OutputError(
                    f"{fault} The last checkpoint that could be written is kept; go on from it with --resume"
                ) from None
            log.warning("no checkpoint: %s", fault)
        else:
            self._failures, self._damaged = 0, False
        self._last = time.monotonic()
        self._took = self._last - start

    def load(self, *, run: str) -> dict[str, Any] | None:
        """The newest whole state; the previous one, with a warning, where the last is damaged; None where there is none.

        Raises:
            CheckpointError: Both are damaged, or it is another run's.
        """
        faults = []
        for path in (self.path, self.previous):
            if not os.path.lexists(path):
                continue
            try:
                found, state = _read(path)
            except CheckpointError as fault:
                faults.append(str(fault))
                log.warning("%s", fault)
                continue
            if found != run:
                raise CheckpointError(
                    f"{path}: is the checkpoint of another run: its update, weights, labels, settings or seed differ; "
                    "resume with the command that began it, or start anew with --force"
                )
            if faults:
                log.warning("%s: going on from the checkpoint before", path)
                self._damaged = True
            return state
        if faults:
            raise CheckpointError(f"{'; '.join(faults)}; no whole checkpoint is left: start anew with --force")
        return None

    def done(self) -> str:
        """How far the run is by its last checkpoint, as :meth:`save` was told; empty where there is none."""
        try:
            return read_metadata(self.path, error=CheckpointError).get("done", "")
        except CheckpointError:
            return ""

    def remove(self) -> None:
        """Delete both files: the run's result is on disk."""
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)
        sync_folder(self.path.parent)


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of named tensors: names, types, shapes and bytes."""
    whole = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        whole.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return whole.hexdigest()


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """The run and the state in a file."""
    tensors, metadata = read_tensors(path, error=CheckpointError)
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"{path}: not a checkpoint of version {VERSION}")
    text = metadata.get("state", "")
    if metadata.get("digest") != digest(text, tensors):
        raise CheckpointError(f"{path}: damaged: its content is not what was written")
    try:
        state = _unpack(json.loads(text), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        raise CheckpointError(f"{path}: damaged: {fault!r}") from None
    return metadata["run"], state


def _pack(state: Any) -> tuple[dict[str, Tensor], str]:
    """Tensors by number, and the rest as JSON that refers to them."""
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": repr(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):  # pairs: the keys of an optimiser's state are numbers
            return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [pack(item) for item in value]}
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")

    text = json.dumps(pack(state), separators=(",", ":"), allow_nan=False)
    return tensors, text


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    kinds: dict[str, Callable[[], Any]] = {
        "tensor": lambda: tensors[content],
        "float": lambda: float(content),
        "dict": lambda: {_unpack(key, tensors): _unpack(item, tensors) for key, item in content},
        "list": lambda: [_unpack(item, tensors) for item in content],
        "tuple": lambda: tuple(_unpack(item, tensors) for item in content),
    }
    return kinds[kind]()
