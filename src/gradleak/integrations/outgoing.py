"""What is done with an update that is about to leave a client: it is recorded, audited, and perhaps held back."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gradleak.errors import DataError, OutputError, SpecError, nearest
from gradleak.files import write_atomically
from gradleak.leak import measure_leak, specification
from gradleak.observation import Observation, Truth
from gradleak.run import prepare

log = logging.getLogger(__name__)

#: What a framework is told in place of an update that was held back. It says nothing of the data, and no score.
WITHHELD = "gradleak: the client withheld this update, since its own audit did not let it pass"


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """Settings that the frameworks share.

    Attributes:
        record: Folder of the observations; None: nothing is recorded.
        record_truth: Whether the client's images are recorded beside them. They are personal data: keep the folder there.
        audit: Keywords of :func:`gradleak.leak.measure_leak`; None: no audit.
        block: Whether an update is held back when its leak score exceeds the threshold, when the audit itself fails, or when
            truth and settings do not reproduce the update (:attr:`gradleak.leak.Leak.doubt`). Otherwise all three are logged,
            and the update leaves. One whose audit was inconclusive leaves, with a warning, in any case.

    Raises:
        SpecError: Nothing is asked for, settings contradict each other, or ``audit`` has an unknown key, attack or value.
        OutputError: The folder cannot be made.
    """

    record: Path | None = None
    record_truth: bool = False
    audit: Mapping[str, Any] | None = None
    block: bool = False

    def __post_init__(self) -> None:
        if self.record is None and self.audit is None:
            raise SpecError(
                "nothing to do with an update: give record= a folder, audit= settings ({} for the defaults), or both"
            )
        if self.block and self.audit is None:
            raise SpecError("block=True holds back what an audit finds: give audit= its settings ({} for the defaults)")
        if self.record_truth and self.record is None:
            raise SpecError("record_truth=True writes the images beside the updates: give record= a folder")
        if self.audit is not None:
            _check(self.audit)
        if self.record is not None:
            object.__setattr__(self, "record", make_folder(Path(self.record)))

    @property
    def needs_truth(self) -> bool:
        """Whether the client's images are looked at."""
        return self.audit is not None or self.record_truth

    def passes(self, observation: Observation, model: nn.Module, truth: Truth | None, *, name: str) -> bool:
        """Record and audit one update.

        Args:
            observation: What the server will hold.
            model: F.
            truth: The client's images; needed where :attr:`needs_truth` says so.
            name: Of the files, without suffix: round and client.

        Returns:
            Whether the update may leave.

        Raises:
            GradleakError: As :func:`gradleak.leak.measure_leak`, or a file cannot be written.
        """
        path = None if self.record is None else self.record / f"{name}.safetensors"
        if path is not None:
            observation.save(path)
            if self.record_truth:
                assert truth is not None
                truth.save(path.with_suffix(".truth.safetensors"))
        if self.audit is None:
            log.info("gradleak: %s: recorded in %s", name, path)
            return True
        assert truth is not None
        leak = measure_leak(observation, model, truth, **self.audit)
        written = self._write(name, leak.to_dict())
        worrying = leak.exceeded or leak.inconclusive or bool(leak.doubt)
        log.log(logging.WARNING if worrying else logging.INFO, "gradleak: %s: %s%s", name, leak.verdict, written)
        return not (self.block and (leak.exceeded or leak.doubt))

    def failed(self, fault: Exception, *, name: str) -> bool:
        """Say that an update could not be recorded or audited, and why; where audits are recorded, also in their place.

        Returns:
            Whether the update may leave: what cannot be audited does not pass a block.
        """
        written = ""
        if self.audit is not None:
            try:
                written = self._write(name, {"error": str(fault)})
            except OutputError as full:  # the folder may be what failed
                written = f" ({full})"
        log.warning("gradleak: %s: could not be recorded or audited: %s%s", name, fault, written)
        return not self.block

    def _write(self, name: str, found: Mapping[str, Any]) -> str:
        """Write what an audit found, if records are kept; where, for a log."""
        if self.record is None:
            return ""
        path = self.record / f"{name}.leak.json"
        write_atomically(path, json.dumps(found, indent=1) + "\n")
        return f" [{path}]"


#: What ``audit`` may set.
AUDIT_SETTINGS = tuple(
    name for name, p in inspect.signature(measure_leak).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY
)


def _check(audit: object) -> None:
    """Raise :class:`~gradleak.errors.SpecError` at what :func:`gradleak.leak.measure_leak` would refuse rounds later."""
    if not isinstance(audit, Mapping):
        raise SpecError(f"audit is {audit!r}; expected a mapping of settings, {{}} for the defaults")
    for key in audit:
        if key not in AUDIT_SETTINGS:
            raise SpecError(f"audit: unknown setting {key!r}{nearest(str(key), AUDIT_SETTINGS)}")
    try:
        prepare(specification(**{**audit, "device": "cpu"}))  # the client's device need not be there when its app is built
    except DataError as fault:
        raise SpecError(f"audit: {fault}") from None


def make_folder(folder: Path) -> Path:
    """A private folder (0700), as an absolute path: a framework may change the working folder.

    Raises:
        OutputError: It is a file, or cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made a folder for updates: {error.strerror or error}") from None
    log.info("gradleak: updates are recorded in %s", folder.resolve())
    return folder.resolve()
