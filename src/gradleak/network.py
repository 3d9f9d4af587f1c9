"""The one door to the network: what is fetched was asked for, is announced before it starts, and can be forbidden."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from gradleak.errors import GradleakError

#: Environment variable that forbids every download; ``0`` or nothing allows them.
OFFLINE = "GRADLEAK_OFFLINE"


def offline() -> bool:
    """Whether downloads are forbidden."""
    return os.environ.get(OFFLINE, "") not in ("", "0")


def announce(url: str, *, what: str, file: Path, error: type[GradleakError]) -> None:
    """Say on standard error what is about to be fetched from which host. Called before every download, and nowhere else.

    Args:
        url: Where it comes from.
        what: What it is, with its size.
        file: Where it goes; where a person can put it by hand.
        error: Class of the error.

    Raises:
        GradleakError: Of class ``error``: :data:`OFFLINE` forbids it; says where to put the file by hand.
    """
    if offline():
        raise error(f"{OFFLINE} is set, so {what} is not fetched from {urlsplit(url).hostname}: put {url} at {file} by hand")
    print(f"gradleak: fetching {what} from {urlsplit(url).hostname} into {file}", file=sys.stderr, flush=True)
