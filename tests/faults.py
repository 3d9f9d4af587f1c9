"""Injure real runs, go on with ``--resume``, and compare with a run that nothing happened to.

    python tests/faults.py [--times 10] [--kinds kill write ...] [--seed 0] [--json FILE]

Every run is a process of its own, ``gradleak audit`` with a checkpoint after every round. Lost is a run that does not end
in the undisturbed one's result: the same bytes of ``reconstruction.safetensors``, the same loss of every round and the
same scores. ``full-disk`` mounts a small tmpfs, which needs root on Linux; ``unwritable`` makes a
folder immutable for root; ``clock`` needs libfaketime.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROUNDS = 300
MAIN = "from gradleak.cli import main; main()"
SETTINGS = {
    "data.batch": "2",
    "data.size": "16",
    "model.name": "lenet",
    "model.activation": "sigmoid",
    "attack.rounds": str(ROUNDS),
    "attack.channels": "8",
    "device": "cpu",
    "threads": "1",
    "evaluate.lpips": "off",
    "checkpoint_seconds": "0",
}
CHECKPOINT = "checkpoint.safetensors"
FAKETIME = glob.glob("/usr/lib/*/faketime/libfaketime.so.1")


class Skip(Exception):
    """A fault that cannot be injected here, and why."""


@dataclass
class Outcome:
    """What became of one injured run.

    Attributes:
        injuries: How often it was injured.
        lost: Whether its result differs from the undisturbed one's.
        note: What was seen on the way.
    """

    injuries: int
    lost: bool
    note: str = ""


def start(out: Path, *options: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A run in the background; its standard error is a pipe."""
    settings = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, "audit", *settings, "--out", str(out), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what is left of standard error."""
    assert process.stderr is not None
    text = process.stderr.read()
    return process.wait(timeout=300), text


def wait_for_rounds(process: subprocess.Popen[str]) -> None:
    """Until the loop says its first round."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("round "):
            return
    raise AssertionError(f"the run ended before its first round, with exit code {process.wait()}")


def complete(out: Path, *, most: int = 3) -> None:
    """Go on until the run is finished."""
    for _ in range(most):
        code, text = finish(start(out, "--resume"))
        if code == 0:
            return
    raise AssertionError(f"--resume ends with exit code {code}: {text}")


def result(out: Path) -> dict[str, Any]:
    """What must be the same in a disturbed run."""
    found = json.loads((out / "result.json").read_text())
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "bytes": (out / "reconstruction.safetensors").read_bytes(),
        "losses": losses,
        "metrics": found["metrics"],
        "matching_loss": found["matching_loss"],
        "best_round": found["best_round"],
        "partial": found["partial"],
        "leftovers": sorted(file.name for file in out.iterdir() if "checkpoint" in file.name or file.name.startswith(".")),
    }


def kill(out: Path, reference: dict[str, Any], times: int, dice: random.Random) -> Outcome:
    """kill -9 at random moments between the first round and the last."""
    process = start(out)
    for number in range(times):
        wait_for_rounds(process)
        time.sleep(dice.uniform(0, 0.5))
        process.kill()
        process.wait()
        if (out / "result.json").is_file():
            return Outcome(number, result(out) != reference, "the run was over before all kills")
        process = start(out, "--resume")
    code, text = finish(process)
    return Outcome(times, code != 0 or result(out) != reference, text if code else "")


def write(out: Path, reference: dict[str, Any], times: int, dice: random.Random) -> Outcome:
    """kill -9 while a checkpoint is being written."""
    process, hits = start(out), 0
    for _ in range(times):
        wait_for_rounds(process)
        time.sleep(dice.uniform(0, 0.2))
        while process.poll() is None:
            if any(out.glob(f".{CHECKPOINT}.*.tmp")):
                process.kill()
        process.wait()
        hits += any(out.glob(f".{CHECKPOINT}.*.tmp"))
        if (out / "result.json").is_file():
            break
        process = start(out, "--resume")
    code, text = finish(process)
    return Outcome(times, code != 0 or result(out) != reference, text if code else f"{hits} left a half-written file")


def corrupt(out: Path, reference: dict[str, Any], times: int, dice: random.Random) -> Outcome:
    """The newest checkpoint is damaged after a kill: bits, length, all of it."""
    process = start(out)
    for number in range(times):
        wait_for_rounds(process)
        time.sleep(dice.uniform(0.05, 0.3))
        process.kill()
        process.wait()
        path = out / CHECKPOINT
        content = bytearray(path.read_bytes())
        if number % 3 == 0:
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        elif number % 3 == 1:
            content = content[: dice.randrange(len(content))]
        else:
            content = bytearray(dice.randbytes(len(content)))
        path.write_bytes(content)
        process = start(out, "--resume")
    code, text = finish(process)
    return Outcome(times, code != 0 or result(out) != reference, text if code else "the one before was used")


def _signals(number: signal.Signals) -> Callable[[Path, dict[str, Any], int, random.Random], Outcome]:
    def send(out: Path, reference: dict[str, Any], times: int, dice: random.Random) -> Outcome:
        process, codes = start(out), set()
        for _ in range(times):
            wait_for_rounds(process)
            time.sleep(dice.uniform(0, 0.3))
            process.send_signal(number)
            code, _ = finish(process)
            codes.add(code)
            found = json.loads((out / "result.json").read_text())
            marked = found["partial"] and found["verdict"].startswith("Partial") and (out / "report.html").is_file()
            if code != 128 + number or not marked:
                return Outcome(times, True, f"exit code {code}, marked as partial: {marked}")
            process = start(out, "--resume")
        code, text = finish(process)
        note = f"exit code {codes.pop()}, partial report each time"
        return Outcome(times, code != 0 or result(out) != reference, text if code else note)

    send.__doc__ = f"{number.name}: the round is finished, the state saved, a partial report written."
    return send


@contextmanager
def small_disk(folder: Path, size: str = "8m") -> Iterator[None]:
    """A tmpfs of a given size."""
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Skip("mounting a tmpfs needs root on Linux")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        raise Skip(f"mounting a tmpfs is not allowed: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def full_disk(out: Path, reference: dict[str, Any], times: int, dice: random.Random) -> Outcome:
    """The disk fills up in mid-run: a clear error, exit code 2; with space again the run goes on from its checkpoint."""
    disk = out.with_name(f"{out.name}-disk")
    with small_disk(disk):
        run = disk / "run"
        process = start(run)
        for _ in range(times):
            wait_for_rounds(process)
            time.sleep(dice.uniform(0, 0.3))
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(b"\0" * 1024)
            code, text = finish(process)
            if code != 2 or "No space left on device" not in text:
                return Outcome(times, True, f"exit code {code}: {text[-300:]}")
            (disk / "filler").unlink()
            process = start(run, "--resume")
        code, text = finish(process)
        return Outcome(times, code != 0 or result(run) != reference, text if code else "exit code 2 each time")


def unwritable(out: Path, reference: dict[str, Any], times: int, dice: random.Random) -> Outcome:
    """The folder becomes unwritable in mid-run: a clear error, exit code 2, also for a run that begins there."""
    root = os.geteuid() == 0  # whom permissions do not stop

    def lock(locked: bool) -> None:
        command = ["chattr", "+i" if locked else "-i", out] if root else ["chmod", "500" if locked else "700", out]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            raise Skip("this file system has no immutable folders")

    process = start(out)
    for _ in range(times):
        wait_for_rounds(process)
        time.sleep(dice.uniform(0, 0.2))
        lock(True)
        try:
            code, text = finish(process)
            refused, why = finish(start(out, "--resume"))
        finally:
            lock(False)
        if (code, refused) != (2, 2) or not all("ermi" in message.splitlines()[-1] for message in (text, why)):
            return Outcome(times, True, f"exit codes {code} and {refused}: {text[-200:]} {why[-200:]}")
        process = start(out, "--resume")
    code, text = finish(process)
    return Outcome(times, code != 0 or result(out) != reference, text if code else "exit code 2 each time")


def vanished(out: Path, reference: dict[str, Any], times: int, dice: random.Random) -> Outcome:
    """The folder is deleted in mid-run: a clear error, exit code 2. What it held is gone, so the run begins anew."""
    for _ in range(times):
        process = start(out)
        wait_for_rounds(process)
        time.sleep(dice.uniform(0, 0.2))
        gone = out.with_name(f"{out.name}-gone")
        os.rename(out, gone)
        shutil.rmtree(gone)
        code, text = finish(process)
        if code != 2 or "cannot be written: No such file or directory" not in text or out.exists():
            return Outcome(times, True, f"exit code {code}: {text[-300:]}")
    complete(out)
    return Outcome(times, result(out) != reference, "exit code 2 each time, nothing written elsewhere")


def clock(out: Path, reference: dict[str, Any], times: int, dice: random.Random) -> Outcome:
    """The clock jumps back and forth by days in mid-run."""
    if not FAKETIME:
        raise Skip("libfaketime is not installed")
    offset = out.with_name(f"{out.name}-offset")
    offset.write_text("+0")
    environment = {
        "LD_PRELOAD": FAKETIME[0],
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    process = start(out, environment=environment)
    wait_for_rounds(process)
    for _ in range(times):
        offset.write_text(f"{dice.randint(-3650, 3650):+d}d")
        time.sleep(dice.uniform(0, 0.3))
    code, text = finish(process)
    return Outcome(times, code != 0 or result(out) != reference, text if code else "")


def concurrent(out: Path, reference: dict[str, Any], times: int, dice: random.Random) -> Outcome:
    """Other runs begin in the folder of a running one: each is refused with exit code 2, and the first is not disturbed."""
    process = start(out)
    wait_for_rounds(process)
    refused = 0
    for number in range(times):
        code, text = finish(start(out, ("--force", "--resume")[number % 2]))
        if process.poll() is None or "in use by another gradleak process" in text:
            refused += 1
            if code != 2 or "in use by another gradleak process" not in text:
                return Outcome(times, True, f"exit code {code}: {text[-300:]}")
        else:
            break
    code, text = finish(process)
    return Outcome(refused, code != 0 or result(out) != reference, text if code else "exit code 2 each time")


STUDY = """
size = "small"
seeds = [0, 1]
[base]
device = "cpu"
checkpoint_seconds = 0
data = { source = "sample", batch = 2, size = 16 }
model = { name = "lenet", activation = "sigmoid" }
attack = { channels = 8 }
evaluate = { lpips = "off" }
[grid]
attack = [{ name = "cinet" }, { name = "inverting-gradients" }]
[budget]
rounds = 300
"""


def study(out: Path, reference: dict[str, Any], times: int, dice: random.Random) -> Outcome:
    """kill -9 a study that runs two cells side by side; in the end its rows and pictures are those of an undisturbed one."""
    (specification := out.with_name("killed.toml")).write_text(STUDY)

    def begin(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MAIN, "study", "run", str(specification), "--out", str(folder), "--processes", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )

    def found(folder: Path) -> tuple[Any, dict[str, bytes]]:
        rows = json.loads((folder / "rows.json").read_text())
        pictures = {path.parent.name: path.read_bytes() for path in folder.glob("cells/*/reconstruction.safetensors")}
        return [{key: row[key] for key in row if key not in ("seconds", "date")} for row in rows], pictures

    calm = out.with_name("study-undisturbed")
    code, text = finish(begin(calm))
    assert code == 0, text
    kills = 0
    process = begin(out)
    while kills < times:
        time.sleep(dice.uniform(3, 9))  # some before the first round, most in mid-cell, some between cells
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
        process = begin(out)
    code, text = finish(process)
    return Outcome(kills, code != 0 or found(out) != found(calm), text if code else "")


FAULTS: dict[str, Callable[[Path, dict[str, Any], int, random.Random], Outcome]] = {
    "kill": kill,
    "write": write,
    "corrupt": corrupt,
    "sigint": _signals(signal.SIGINT),
    "sigterm": _signals(signal.SIGTERM),
    "full-disk": full_disk,
    "unwritable": unwritable,
    "vanished": vanished,
    "clock": clock,
    "concurrent": concurrent,
    "study": study,
}


def undisturbed(folder: Path) -> dict[str, Any]:
    """The result of a run that nothing happens to."""
    code, text = finish(start(folder / "undisturbed"))
    assert code == 0, text
    return result(folder / "undisturbed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="injuries of each kind")
    parser.add_argument("--kinds", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        reference = undisturbed(Path(folder))
        for kind in options.kinds:
            row: dict[str, Any] = {"kind": kind, "what": (FAULTS[kind].__doc__ or "").strip()}
            begun = time.monotonic()
            try:
                outcome = FAULTS[kind](Path(folder) / kind, reference, options.times, random.Random(options.seed))
                row |= {"times": outcome.injuries, "lost": int(outcome.lost), "note": outcome.note}
            except Skip as why:
                row |= {"times": 0, "lost": 0, "note": f"not injected: {why}"}
            row["seconds"] = round(time.monotonic() - begun, 1)
            rows.append(row)
            print(f"{kind:10}  times {row['times']:3}  lost {row['lost']}  {row['seconds']:6} s  {row['note']}", flush=True)
    if options.json is not None:
        command = " ".join(["python tests/faults.py", *sys.argv[1:]])
        record = {"command": command, "seed": options.seed, "rounds": ROUNDS, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(any(row["lost"] for row in rows))


if __name__ == "__main__":
    main()
