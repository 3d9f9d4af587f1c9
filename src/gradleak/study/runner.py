"""Running the cells of studies on this machine: one after another, or several side by side; safe to kill at any moment."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

import psutil
from tqdm.auto import tqdm

from gradleak import data, run
from gradleak.errors import BusyError, GradleakError, OutputError, SpecError
from gradleak.files import parse_json, read_text, write_atomically
from gradleak.folder import CELL, RESULT, SPEC, UNFINISHED_FILES, lock_folder
from gradleak.invert import Progress, Watcher
from gradleak.results import read_result
from gradleak.spec import RunSpec, dump
from gradleak.study.prepare import prepare
from gradleak.study.spec import Cell, Resources, StudySpec, all_cells, dump_study

#: Folders of an output folder: run folders by their keys, trained files by theirs, and the studies as they were run.
CELLS, PREPARED_FILES, STUDIES = "cells", "prepared", "studies"

#: How often a cell whose process died is begun again from its checkpoint.
RETRIES = 2

#: Seconds to wait for a cell's folder: a process that was killed gives it back at the end of its round.
PATIENCE = 30.0

#: Rounds are timed for this share of the time that an attack has, and for at least so many.
TIMED_SHARE, TIMED_ROUNDS = 0.03, 4

Outcome = Literal["finished", "before", "failed", "interrupted", "busy"]


@dataclass(frozen=True)
class Done:
    """What became of one cell.

    Attributes:
        cell: The cell.
        outcome: ``finished`` now, or ``before``; ``failed``: it cannot be run; ``interrupted`` by a signal; ``busy``: another
            process has it.
        reason: Why it failed, or the signal.
    """

    cell: Cell
    outcome: Outcome
    reason: str = ""


def run_studies(
    studies: list[StudySpec],
    out: Path,
    *,
    processes: int | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
) -> list[Done]:
    """Run what is not finished of some studies.

    Finished cells are kept, whichever study they were run for. A cell that cannot be run does not keep the others from running.

    Args:
        studies: The studies.
        out: Their folder: ``cells/KEY/`` has the run folder of each cell, ``prepared/`` trained files. It can be shared by any
            number of studies and of processes.
        processes: Cells side by side; None: as many as there are cores and memory for.
        resume: Go on with unfinished cells from their checkpoints; the result is that of a run that was never interrupted.
        force: Begin unfinished cells anew.
        progress: Show progress on standard error.

    Returns:
        What became of each different cell, in the order of the studies; up to an interruption.

    Raises:
        OutputError: The folder cannot be used, or has unfinished cells and neither ``resume`` nor ``force`` was asked for.
    """
    queue = pending(studies, out, resume=resume, force=force)
    side_by_side = min(len(queue), processes or _room(queue))
    if side_by_side == 1:
        return _one_by_one(queue, out, progress=progress)
    return _side_by_side(queue, out, processes=side_by_side, progress=progress)


def _room(queue: list[Cell]) -> int:
    """How many of the largest cell this machine can take at a time."""
    cpus = max(cell.resources.cpus * cell.resources.processes for cell in queue)
    memory = max(cell.resources.memory_mb for cell in queue) * 2**20
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // cpus, int(psutil.virtual_memory().available // memory) if memory else cores))


def pending(studies: list[StudySpec], out: Path, *, resume: bool, force: bool) -> list[Cell]:
    """The different cells of some studies, checked and with their trained files in place (:func:`run_studies`)."""
    unfinished = [cell for cell in unique(studies, out) if state(out / CELLS / cell.key) == "partial"]
    if unfinished and not (resume or force):
        names = ", ".join(f"{cell.study}: {cell.label}" for cell in unfinished[:3])
        raise OutputError(
            f"{out}: has {len(unfinished)} unfinished cells ({names}{', ...' if len(unfinished) > 3 else ''}): go on with "
            "--resume, or begin them anew with --force; finished ones are kept either way"
        )
    try:
        for folder in (out, out / CELLS, out / PREPARED_FILES, *(out / STUDIES / study.size for study in studies)):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be used as the output folder: {error.strerror or error}") from None
    if force:
        for cell in unfinished:
            for name in (*UNFINISHED_FILES, RESULT):
                (out / CELLS / cell.key / name).unlink(missing_ok=True)
    for study in studies:
        write_atomically(out / STUDIES / study.size / f"{study.name}.toml", dump_study(study))
        prepare(study.prepare, out / PREPARED_FILES, sources=study.sources)
    return unique(studies, out)


def unique(studies: list[StudySpec], out: Path) -> list[Cell]:
    """The cells of some studies, each run once."""
    return list({cell.key: cell for cell in reversed(list(all_cells(studies, prepared=out / PREPARED_FILES)))}.values())[::-1]


def _check_source(cell: Cell) -> None:
    source = cell.spec.data.source
    kinds = {name.partition(":")[0] for name in data.available()}
    if ":" not in source and source not in kinds:
        raise SpecError(
            f"{source!r} is no data source by itself; say where the images are with --source {source}=folder:PATH or npz:PATH, "
            "or under [sources] of the study"
        )


def state(folder: Path) -> Literal["finished", "partial", "failed", "missing"]:
    """What a cell's folder holds."""
    if (folder / RESULT).is_file():
        try:
            return "partial" if read_result(folder).get("partial") else "finished"
        except GradleakError:
            return "partial"
    if any((folder / name).is_file() for name in UNFINISHED_FILES):
        return "partial"
    return "failed" if read_cell(folder).get("error") else "missing"


def read_cell(folder: Path) -> dict[str, Any]:
    """The content of a cell's ``cell.json``; empty where there is none that can be read."""
    try:
        text = read_text(folder / CELL, most=1_000_000, what="a cell of a study", error=OutputError)
        found = parse_json(text, where=str(folder / CELL), error=OutputError)
    except OutputError:
        return {}
    return found if isinstance(found, dict) else {}


def run_cell(
    cell: Cell, folder: Path, *, progress: bool = True, watch: Watcher | None = None, patience: float | None = None
) -> dict[str, Any]:
    """:func:`gradleak.run.audit` of one cell, which goes on with what is there.

    A cell with a budget of seconds times some rounds first. How many fit is written into ``cell.json`` and holds for good, so
    that a resumed cell is the same run.

    Args:
        cell: The cell.
        folder: Its run folder.
        progress: Show the rounds on standard error.
        watch: As for :func:`gradleak.invert.invert`; not called where several processes share the cell.
        patience: Seconds to wait for a folder that another process has; None: :data:`PATIENCE`.

    Returns:
        The content of ``result.json``; ``partial`` is true in it when a signal ended it early.

    Raises:
        GradleakError: The cell cannot be run; the reason is in ``cell.json`` too.
        BusyError: Another process has it, and does not give it back in that time.
    """
    _wait_for(folder, PATIENCE if patience is None else patience)
    about = read_cell(folder)
    about = {"format": "gradleak-cell", "version": 1, "key": cell.key, "seconds": cell.seconds, **about}
    begun = state(folder) == "partial"
    about |= {"commit": about.get("commit") if begun else commit(), "error": None}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_source(cell)
        spec = cell.spec
        if cell.seconds is not None:
            about["rounds"] = about.get("rounds") or rounds_within(spec, cell.seconds)
            spec = spec.model_copy(update={"attack": {**spec.attack, "rounds": about["rounds"]}})
        write_atomically(folder / CELL, json.dumps(about) + "\n")
        if cell.resources.processes > 1:
            return _shared(spec, folder, cell.resources)
        command = f"gradleak audit {CELLS}/{cell.key}/{SPEC} --out run"
        return run.audit(spec, folder, resume=True, progress=progress, command=command, watch=watch)
    except OutputError:  # the disk is full, or another process has it: no fault of the cell
        raise
    except GradleakError as fault:
        write_atomically(folder / CELL, json.dumps({**about, "error": str(fault)}) + "\n")
        raise


def rounds_within(spec: RunSpec, seconds: float) -> int:
    """How many rounds of an attack take so many seconds of its loop, by the first few of them."""
    recipe, device = run.prepare(spec)
    client = run.simulate_client(spec)
    start, times = time.perf_counter(), []

    def stop() -> str:
        times.append(time.perf_counter())
        enough = len(times) >= TIMED_ROUNDS and times[-1] - start >= TIMED_SHARE * seconds
        return "enough" if enough or times[-1] - start >= seconds else ""

    timed = run.attack_observation(client.observation, client.model, recipe, spec, device, progress=False, stop=stop)
    if len(times) < 3:  # a closed form, or rounds so long that hardly one fits
        return max(1, len(timed.history)) if not times else max(1, int(seconds / (times[-1] - start) * len(times)))
    # the median: the first round also checks the engine, and others may wait for a busy processor
    return max(1, int(seconds / statistics.median(b - a for a, b in itertools.pairwise(times))))


def commit() -> str | None:
    """The commit of the package's source, with ``+`` where it was changed; None outside a checkout."""
    here = Path(__file__).parent
    try:
        if not (here.parents[2] / ".git").exists():  # an installed package inside some other repository is not its program
            return None
        names = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], ["git", "-C", str(here), "status", "-s", "--", ".."]
        head, changed = (subprocess.run(name, capture_output=True, text=True, timeout=20).stdout.strip() for name in names)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}{'+' if changed else ''}" if head else None


def _wait_for(folder: Path, patience: float) -> None:
    """Until nobody holds the folder's lock, for a while: a killed process needs to the end of its round to notice."""
    end = time.monotonic() + patience
    while folder.is_dir():
        try:
            with lock_folder(folder):
                return
        except BusyError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _shared(spec: RunSpec, folder: Path, resources: Resources) -> dict[str, Any]:
    """One attack over several processes, as torchrun starts them."""
    write_atomically(folder / SPEC, dump(spec))
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(resources.processes)]
    program += ["-m", "gradleak", "audit", "--out", str(folder), "--resume", "--quiet"]
    with tempfile.TemporaryFile("w+") as said, run.stopping() as stop:
        with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=said) as own:
            told = False
            while own.poll() is None:
                if stop() and not told:
                    own.send_signal(signal.SIGTERM)
                    told = True
                with contextlib.suppress(subprocess.TimeoutExpired):
                    own.wait(0.2)
        said.seek(0)
        text = said.read()
    faults = [line for line in text.splitlines() if line.startswith("gradleak: error: ")]
    if faults:
        raise GradleakError(faults[0].removeprefix("gradleak: error: "))
    if (folder / RESULT).is_file():
        return read_result(folder)
    raise RuntimeError(f"torchrun ended with code {own.returncode}:\n{text[-2000:]}")


def _one_by_one(queue: list[Cell], out: Path, *, progress: bool) -> list[Done]:
    done: dict[str, Done] = {}
    for patience in (0.0, PATIENCE):  # what another process has is looked at again in the end
        for number, cell in enumerate(queue, 1):
            if cell.key in done and done[cell.key].outcome != "busy":
                continue
            folder = out / CELLS / cell.key
            before = state(folder) == "finished"
            if progress:
                note = " (finished before)" if before else ""
                print(f"cell {number} of {len(queue)}: {named(cell)}{note}", file=sys.stderr, flush=True)
            became = Done(cell, "before") if before else _outcome(cell, folder, patience=patience, progress=progress)
            done[cell.key] = became
            if became.outcome == "failed" and progress:
                print(f"failed: {became.reason}", file=sys.stderr, flush=True)
            if became.outcome == "interrupted":
                return list(done.values())
    return list(done.values())


def named(cell: Cell) -> str:
    """A cell for people: study, settings, seed."""
    return f"{cell.study}, {cell.label}, seed {cell.seed}"


def _outcome(cell: Cell, folder: Path, *, patience: float, progress: bool = False, watch: Watcher | None = None) -> Done:
    try:
        result = run_cell(cell, folder, progress=progress, watch=watch, patience=patience)
    except BusyError as fault:
        return Done(cell, "busy", str(fault))
    except OutputError:
        raise
    except GradleakError as fault:
        return Done(cell, "failed", str(fault))
    return Done(cell, "interrupted", str(result["interrupted"])) if result.get("partial") else Done(cell, "finished")


class _Worker:
    """A process that runs one cell after another, and tells how far it is."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.cell: Cell | None = None

    def begin(self, cell: Cell, folder: Path, patience: float) -> None:
        self.cell = cell
        with contextlib.suppress(OSError):  # it died: receive() tells
            self.connection.send((cell, folder, patience))

    def receive(self) -> tuple[int, int] | Done | OutputError | None:
        """Rounds done and to do; what became of its cell; None if the process has died."""
        try:
            found: tuple[int, int] | Done | OutputError = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return None
        return found

    def end(self) -> None:
        """Let it finish its round and save, if it has a cell."""
        (self.process.kill if self.cell is None else self.process.terminate)()
        self.connection.close()
        self.process.join()


def _work(there: connection.Connection) -> None:
    """What a worker does, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent passes it on, once
    parent, spoke = multiprocessing.parent_process(), 0.0

    def watch(progress: Progress) -> None:
        nonlocal spoke
        if parent is not None and not parent.is_alive():
            os._exit(1)  # the parent was killed: whoever comes next goes on from this cell's checkpoint
        if time.monotonic() - spoke > 0.5:
            spoke = time.monotonic()
            there.send((progress.round, progress.rounds))

    with contextlib.suppress(EOFError, OSError):
        while True:
            cell, folder, patience = there.recv()
            try:
                there.send(_outcome(cell, folder, patience=patience, watch=watch))
            except OutputError as fault:
                there.send(fault)


def _side_by_side(queue: list[Cell], out: Path, *, processes: int, progress: bool) -> list[Done]:
    done = {cell.key: Done(cell, "before") for cell in queue if state(out / CELLS / cell.key) == "finished"}
    left = deque(cell for cell in queue if cell.key not in done)
    lost: Counter[str] = Counter()
    again: set[str] = set()  # another process had them: they are looked at again in the end
    workers = [_Worker() for _ in range(min(processes, len(left)))]
    asked = ""
    try:
        with bars_of(len(queue), len(done), len(workers), show=progress) as bars, run.stopping() as stop:
            while True:
                if stop() and not asked:
                    asked = stop()
                    for worker in workers:
                        worker.process.terminate()
                for worker in workers:
                    if worker.cell is None and left and not asked:
                        cell = left.popleft()
                        worker.begin(cell, out / CELLS / cell.key, PATIENCE if cell.key in again else 0.0)
                busy = {worker.connection: place for place, worker in enumerate(workers) if worker.cell is not None}
                if not busy:
                    break
                for ready in connection.wait(list(busy), timeout=0.2):
                    place = next(place for there, place in busy.items() if there is ready)
                    worker = workers[place]
                    message, current = worker.receive(), worker.cell
                    assert current is not None
                    if isinstance(message, OutputError):  # the next cell would not fare better
                        raise message
                    if isinstance(message, tuple):
                        bars.rounds(place, current, *message)
                        continue
                    if message is None:
                        workers[place] = worker = _Worker() if not asked else worker
                        lost[current.key] += 1
                        if not asked and lost[current.key] <= RETRIES:
                            left.appendleft(current)
                            worker.cell = None
                            continue
                        reason = f"its process died {lost[current.key]} times; was there enough memory?"
                        message = Done(current, "interrupted" if asked else "failed", reason)
                    if asked and message.outcome == "interrupted":  # it was told by SIGTERM, whatever told this process
                        message = Done(current, "interrupted", asked)
                    worker.cell = None
                    if message.outcome == "busy" and current.key not in again:
                        again.add(current.key)
                        left.append(current)
                        continue
                    done[current.key] = message
                    bars.done(message, len(done))
    except KeyboardInterrupt:
        for worker in workers:
            worker.process.kill()
        raise
    finally:
        for worker in workers:
            worker.end()
    return [done[cell.key] for cell in queue if cell.key in done]


@dataclass
class Bars:
    """A bar for the cells and one for each process on a terminal; elsewhere a line for each cell."""

    cells: tqdm[Any] | None
    each: list[tqdm[Any]]
    total: int
    show: bool

    def rounds(self, place: int, cell: Cell, done: int, total: int) -> None:
        if self.each:
            bar = self.each[place]
            bar.total, bar.n = total, done
            bar.set_description_str(f"{cell.study}, {cell.label}"[:50], refresh=False)
            bar.refresh()

    def done(self, what: Done, count: int) -> None:
        if self.cells is not None:
            self.cells.update(count - self.cells.n)
        if self.show and (self.cells is None or what.outcome != "finished"):
            reason = f": {what.reason}" if what.reason else ""
            line = f"cell {count} of {self.total}: {named(what.cell)}: {what.outcome}{reason}"
            tqdm.write(line, file=sys.stderr)


@contextlib.contextmanager
def bars_of(total: int, before: int, workers: int, *, show: bool) -> Iterator[Bars]:
    if not (show and sys.stderr.isatty()):
        yield Bars(None, [], total, show)
        return
    with contextlib.ExitStack() as stack:
        cells = stack.enter_context(tqdm(total=total, initial=before, desc="cells", unit="cell", position=0))
        each = [stack.enter_context(tqdm(unit="round", position=k + 1, leave=False)) for k in range(workers)]
        yield Bars(cells, each, total, show)
