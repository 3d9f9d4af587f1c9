"""How many inputs, what bounds them, and the count that ``make fuzz`` writes."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from fuzz import targets

#: Inputs of each target in ``make test``; ``make fuzz`` sets the environment variable.
EXAMPLES = int(os.environ.get("GRADLEAK_FUZZ_EXAMPLES", "60"))
NIGHTLY = "GRADLEAK_FUZZ_EXAMPLES" in os.environ
#: Targets that build a model or render a page for each input get fewer.
SHARES = {"backbone": 0.01, "weights": 0.05, "result": 0.2, "observation": 0.3, "reconstruction": 0.3, "safetensors": 0.5}
#: What one input may take: seconds, and bytes of address space beyond what the process had.
SECONDS = 5
MEMORY = 4 << 30


@pytest.fixture(scope="session")
def examples() -> Callable[[str], Any]:
    """Target -> settings: the same inputs each time in ``make test``, new ones each time in ``make fuzz``."""
    return lambda name: settings(
        max_examples=max(5, round(EXAMPLES * SHARES.get(name, 1))),
        deadline=SECONDS * 1000,
        derandomize=not NIGHTLY,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="session")
def mutations(request: pytest.FixtureRequest) -> Callable[[str], tuple[random.Random, int]]:
    """Target -> a source of random numbers, and how many inputs to make with it."""
    seed = request.config.getoption("hypothesis_seed") or "0"
    return lambda name: (random.Random(f"{seed} {name}"), max(5, round(EXAMPLES * SHARES.get(name, 1))))


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    """An input that asks for more than :data:`MEMORY` gets a MemoryError, which is a crash."""
    targets.seeds()
    targets.TARGETS["backbone"](targets.seeds()["backbone"][0])  # torch, torchvision and LPIPS are in memory from here on
    targets.TARGETS["result"](targets.seeds()["result"][0])
    targets.COUNTS.clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    shutil.rmtree(targets.folder(), ignore_errors=True)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_START] = time.monotonic()


_START = pytest.StashKey[float]()


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """How many inputs were really given, and what became of them."""
    if not targets.COUNTS:
        return
    names = sorted({name for name, _ in targets.COUNTS})
    rows = {n: {kind: targets.COUNTS[n, kind] for kind in ("accepted", "refused")} for n in names}
    total = sum(targets.COUNTS.values())
    terminalreporter.write_line(f"fuzz: {total} inputs accepted or refused, {len(names)} parsers")
    if file := os.environ.get("GRADLEAK_FUZZ_REPORT"):
        import gradleak

        report = {
            "inputs": total,
            "crashes": len(terminalreporter.stats.get("failed", [])),
            "seconds": round(time.monotonic() - config.stash.get(_START, time.monotonic())),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "parsers": rows,
            "command": os.environ.get("GRADLEAK_FUZZ_COMMAND", "pytest tests/fuzz"),
            "python": sys.version.split()[0],
            "gradleak": gradleak.__version__,
        }
        Path(file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
