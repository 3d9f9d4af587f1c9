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

from gradleak.errors import OutputError, SpecError, nearest
from gradleak.files import write_atomically
from gradleak.leak import measure_leak
from gradleak.observation import Observation, Truth

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
        block: Whether an update is held back when its leak score exceeds the threshold, or when the audit itself fails.
            Otherwise both are logged, and the update leaves.

    Raises:
        SpecError: Nothing is asked for, settings contradict each other, or ``audit`` has an unknown key.
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
        for key in self.audit or {}:
            if key not in AUDIT_SETTINGS:
                raise SpecError(f"audit: unknown setting {key!r}{nearest(key, AUDIT_SETTINGS)}")
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
        if self.record is not None:
            observation.save(self.record / f"{name}.safetensors")
            if self.record_truth:
                assert truth is not None
                truth.save(self.record / f"{name}.truth.safetensors")
        if self.audit is None:
            return True
        assert truth is not None
        leak = measure_leak(observation, model, truth, **self.audit)
        if self.record is not None:
            write_atomically(self.record / f"{name}.leak.json", json.dumps(leak.to_dict(), indent=1) + "\n")
        log.log(logging.WARNING if leak.exceeded else logging.INFO, "%s: %s", name, leak.verdict)
        return not (leak.exceeded and self.block)


#: What ``audit`` may set.
AUDIT_SETTINGS = tuple(
    name for name, p in inspect.signature(measure_leak).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY
)


def make_folder(folder: Path) -> Path:
    """A private folder (0700), as an absolute path: a framework may change the working folder.

    Raises:
        OutputError: It is a file, or cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made a folder for updates: {error.strerror or error}") from None
    return folder.resolve()
