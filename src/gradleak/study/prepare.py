"""Files that a study trains before its first cell: weights of F, and generators."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

#: Before the name of a trained file, in a study's ``model.weights`` and ``attack.generator``.
PREPARED = "prepared:"


class Prepare(BaseModel):
    """One file; ``key`` is a hash of what it is trained from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str

    @property
    def key(self) -> str:
        return self.name


def prepare(entries: object, folder: object, *, sources: object) -> None:
    """Nothing yet."""
