"""The cells of studies as tasks of Ray: on this machine or on many, in a shared folder or behind a URL.

A cell is one task. Where its machine or process is lost, Ray begins it again elsewhere, and it goes on from its checkpoint.

On a path that all machines share, workers write into the run folders themselves; a folder's lock is the operating system's, so
only one of them can be in it. Behind a URL there are no locks. There a worker has a private folder of its own and sends what is
new: every file arrives whole, and a worker whose cell was begun again elsewhere stops sending (:class:`Remote`).

Ray passes Python objects between its processes as pickles. Only processes of one's own cluster may reach its ports.
"""

from __future__ import annotations

import _thread
import contextlib
import importlib
import logging
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from gradleak import run
from gradleak.checkpoint import COST
from gradleak.errors import BusyError, GradleakError, OutputError, SpecError
from gradleak.files import parse_json
from gradleak.folder import RESULT
from gradleak.study.runner import CELLS, PREPARED_FILES, Done, _bars, pending, run_cell, state
from gradleak.study.spec import Cell, Resources, StudySpec

#: How often a cell whose machine or process was lost is begun again from its checkpoint.
RETRIES = 3

#: Seconds to wait for a run folder that a worker holds whom Ray holds for lost: such a worker notices it within a minute or so.
PATIENCE = 600.0

#: Seconds that cells have to finish their round and save, when a signal ends the study.
GRACE = 60.0

#: Seconds between two looks for files to send.
SEND_SECONDS = 2.0

#: Cells that are handed to Ray beyond twice as many as there are cores, so that no core waits for the next.
AHEAD = 100

#: Bytes of Ray's object store where it is started here: only specifications and outcomes pass through it.
OBJECT_STORE = 80 * 2**20

#: Run folders that are downloaded at a time.
DOWNLOADS = 16

KEY = re.compile(r"[0-9a-f]{16}")
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
FOLDER = re.compile(r"gradleak-cell-(\d+)-\w+")

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A worker was told to end in the middle of its cell, and not by the study: its machine is taken away."""


def run_studies_on_ray(
    studies: list[StudySpec],
    out: str,
    *,
    address: str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
) -> list[Done]:
    """:func:`gradleak.study.runner.run_studies` on Ray.

    Args:
        studies: The studies.
        out: Their folder, which all machines share, or a URL. Behind a URL unfinished cells always go on, and the run folders
            are brought to :func:`folder_here` before and after.
        address, progress: As for :func:`run_on_ray`.
        resume, force: As for :func:`gradleak.study.runner.run_studies`.

    Returns:
        What became of each cell.

    Raises:
        SpecError: As :func:`run_on_ray`.
        OutputError: As :func:`run_on_ray`; with ``force``, ``out`` is a URL.
    """
    folder = folder_here(out)
    if not is_url(out):
        queue = pending(studies, folder, resume=resume, force=force)
        return run_on_ray(queue, str(folder), address=address, progress=progress)
    if force:
        raise OutputError(f"{out}: --force is for a folder; behind a URL remove the cells that are to begin anew")
    download(out, folder)
    queue = pending(studies, folder, resume=True, force=False)
    try:
        return run_on_ray(queue, out, address=address, prepared=folder / PREPARED_FILES, progress=progress)
    finally:
        download(out, folder)


def folder_here(out: str) -> Path:
    """The folder of a study on this machine: ``out``, or where the run folders behind a URL go: called as its last part.

    Raises:
        SpecError: The URL has no such part.
    """
    if not is_url(out):
        return Path(out).absolute()  # workers may have another working folder
    name = out.partition("://")[2].rstrip("/").rpartition("/")[2]
    if not NAME.fullmatch(name):
        raise SpecError(f"{out}: expected a URL whose last part can name a folder here, such as s3://bucket/study")
    return Path(name).absolute()


def run_on_ray(
    cells: list[Cell],
    out: str,
    *,
    address: str | None = None,
    prepared: Path | None = None,
    retries: int = RETRIES,
    progress: bool = True,
) -> list[Done]:
    """Run cells as Ray tasks; each goes on with what is in its folder.

    Args:
        cells: The cells. Their resources say where Ray may place them.
        out: A path that all machines share, or a URL that fsspec knows (``s3://bucket/study``); ``cells/KEY`` in it are the run
            folders.
        address: A running cluster: ``auto``, ``HOST:PORT``, or ``ray://HOST:PORT``. None: ``RAY_ADDRESS``, else Ray is started
            on this machine for the time being.
        prepared: The folder of trained files on this machine; behind a URL they are sent along.
        retries: How often a cell whose machine or process was lost is begun again.
        progress: Show progress on standard error.

    Returns:
        What became of each cell, in their order. After SIGINT or SIGTERM: of those that had begun; the others are left out.

    Raises:
        SpecError: Ray or what the URL needs is not installed; there is no cluster at the address, or no machine in it is large
            enough for a cell.
        OutputError: ``out`` cannot be used.
    """
    ray = _ray()
    if is_url(out):
        _send_prepared(out, prepared)
    else:
        out = str(Path(out).absolute())
    own = not ray.is_initialized()
    # Ray prints, from threads of its own too; it keeps the same and more in its logs
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        if own:
            _connect(ray, address)
        try:
            _check_resources(ray, cells, alone=own and _is_local(address))
            return _drive(ray, cells, out, prepared, retries=retries, progress=progress)
        finally:
            if own:
                ray.shutdown()


def run_at(cell: Cell, out: str, *, prepared: Path | None = None) -> Done:
    """Run one cell in this process, in ``out`` (:func:`run_on_ray`), and go on with what is there.

    Raises:
        OutputError: ``out`` cannot be used, or another worker has begun the cell again.
    """
    if not is_url(out):
        return _run_in(cell, Path(out) / CELLS / cell.key)
    remote = Remote(out, f"{CELLS}/{cell.key}")
    if remote.finished():
        return Done(cell, "before")
    with _private_folder() as private:
        folder = private / "run"
        folder.mkdir(mode=0o700)
        _fetch_prepared(cell, out, prepared)
        remote.take()
        remote.pull(folder)
        try:
            with _sending(remote, folder):
                done = _run_in(cell, folder)
        finally:
            remote.push(folder)
        if done.outcome == "finished":
            remote.tidy(folder)
        return done


def download(url: str, to: Path) -> None:
    """Bring the run folders behind a URL to ``to/cells``; what is there and finished is not fetched again.

    Raises:
        SpecError: What the URL needs is not installed.
        OutputError: It cannot be read, or ``to`` cannot be written.
    """

    def fetch(key: str) -> None:
        folder = to / CELLS / key
        if state(folder) != "finished":
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            Remote(url, f"{CELLS}/{key}").pull(folder)

    keys = [key for key in Remote(url, CELLS).names() if KEY.fullmatch(key)]
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        for _ in pool.map(fetch, keys):
            pass


def is_url(out: str) -> bool:
    """Whether ``out`` is a URL rather than a path."""
    return "://" in out


# a worker


def _work(cell: Cell, out: str, prepared: Path | None, folder: str, settings: dict[str, str]) -> Done:
    """A task: one cell in a worker of Ray. Its working folder is the driver's, where there is such a one."""
    os.umask(0o077)  # whoever writes for us, fsspec say: what a cell writes is private
    os.environ.update(settings)
    with contextlib.suppress(OSError):
        os.chdir(folder)
    try:
        done = run_at(cell, out, prepared=prepared)
    except GradleakError as fault:
        return Done(cell, "busy" if isinstance(fault, BusyError) else "failed", str(fault))
    if done.outcome == "interrupted" and done.reason != "SIGINT":  # Ray's own way to cancel a task is SIGINT
        raise Stopped(done.reason)
    return done


def _run_in(cell: Cell, folder: Path) -> Done:
    """Run a cell in a folder of this machine."""
    end = time.monotonic() + PATIENCE
    while True:
        if state(folder) == "finished":
            return Done(cell, "before")
        try:
            result = run_cell(cell, folder, progress=False)
        except BusyError:
            if time.monotonic() > end:
                raise
            continue
        return Done(cell, "interrupted", str(result["interrupted"])) if result.get("partial") else Done(cell, "finished")


# the driver


def _drive(ray: Any, cells: list[Cell], out: str, prepared: Path | None, *, retries: int, progress: bool) -> list[Done]:
    """Hand the cells to Ray, some ahead of the cores, until all are done or a signal asks for an end."""
    work = ray.remote(_work)
    settings = {name: value for name, value in os.environ.items() if name.startswith("GRADLEAK_")}
    done = {} if is_url(out) else _finished(cells, Path(out))
    waiting, running = (cell for cell in cells if cell.key not in done), dict[Any, Cell]()
    asked, end = "", 0.0
    with _bars(len(cells), len(done), 0, show=progress) as bars, run.stopping() as stop:
        while True:
            if stop() and not asked:
                asked, end = stop(), time.monotonic() + GRACE
                for task in running:
                    ray.cancel(task)
            if asked and time.monotonic() > end:
                for task in running:  # their checkpoints are as old as the last one that was saved
                    ray.cancel(task, force=True)
                end += GRACE
            if not asked:
                most = 2 * int(ray.cluster_resources().get("CPU", 0)) + AHEAD
                for cell in islice(waiting, max(0, most - len(running))):
                    options = {"max_retries": retries, "retry_exceptions": [Stopped], "name": f"gradleak {cell.label}"}
                    task = work.options(**options, **_options(cell.resources))
                    running[task.remote(cell, out, prepared, os.getcwd(), settings)] = cell
            if not running:
                break
            ready, _ = ray.wait(list(running), timeout=1.0)
            for task in ready:
                cell = running.pop(task)
                became = _outcome(ray, task, cell, asked)
                if became is not None:
                    done[cell.key] = became
                    bars.done(became, len(done))
    return [done[cell.key] for cell in cells if cell.key in done]


def _finished(cells: list[Cell], out: Path) -> dict[str, Done]:
    return {cell.key: Done(cell, "before") for cell in cells if state(out / CELLS / cell.key) == "finished"}


def _outcome(ray: Any, task: Any, cell: Cell, asked: str) -> Done | None:
    """What became of a task that has ended; None if a signal kept it from beginning."""
    try:
        done: Done = ray.get(task)
    except ray.exceptions.RayError as fault:
        if asked:
            began = not isinstance(fault, ray.exceptions.TaskCancelledError)
            return Done(cell, "interrupted", asked) if began else None
        log.error("cell %s: %s", cell.key, fault)
        if isinstance(fault, ray.exceptions.RayTaskError):
            return Done(cell, "failed", f"{fault.cause!r}")
        return Done(cell, "failed", f"its worker was lost too often ({type(fault).__name__}); was there enough memory?")
    return Done(cell, "interrupted", asked) if done.outcome == "interrupted" else done


def _ray() -> Any:
    try:
        importlib.import_module("fsspec")
        return importlib.import_module("ray")
    except ImportError as cause:
        raise SpecError(f'the engine ray needs Ray ({cause}); install it with: pip install "gradleak[ray]"') from None


def _is_local(address: str | None) -> bool:
    return address in (None, "local") and not os.environ.get("RAY_ADDRESS")


def _connect(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start one here: without its dashboard, its reports to its makers and its words on our output."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    local = _is_local(address)
    options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if local else {}
    if "://" not in (address or ""):
        options |= {"log_to_driver": False, "logging_level": logging.WARNING}
    where = address or os.environ.get("RAY_ADDRESS", "")
    host, _, port = where.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
        except OSError as fault:
            raise SpecError(f"--address {where}: no Ray cluster answers there: {fault.strerror or fault}") from None
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address="local" if local else address, **options)
    except (RuntimeError, ValueError, OSError, ImportError) as fault:  # ConnectionError is an OSError
        raise SpecError(f"{'Ray does not start here' if local else f'--address {where}: no Ray cluster'}: {fault}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # ray.init puts its own there


def _needs(resources: Resources) -> dict[str, float]:
    """What Ray must find on one machine, by its names."""
    needs = {
        "CPU": float(resources.cpus * resources.processes),
        "GPU": resources.gpus * resources.processes,
        "memory": resources.memory_mb * 2**20,
    }
    return {name: amount for name, amount in needs.items() if amount}


def _options(resources: Resources) -> dict[str, float]:
    needs = _needs(resources)
    return {"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0), "memory": int(needs.get("memory", 0))}


def _check_resources(ray: Any, cells: list[Cell], *, alone: bool) -> None:
    """Whether some machine is large enough for each cell. A cluster may grow, so there it is only said.

    Raises:
        SpecError: This machine is the only one, and it is not.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resources in {cell.resources for cell in cells}:
        if resources.gpus > 1 and not resources.gpus.is_integer():
            raise SpecError(f"resources.gpus: {resources.gpus:g}: a cell takes a part of one GPU, or whole ones")
        needs = _needs(resources)
        if any(all(machine.get(name, 0) >= amount for name, amount in needs.items()) for machine in machines):
            continue
        largest = {name: max((machine.get(name, 0) for machine in machines), default=0) for name in needs}
        words = [f"{_amount(name, needs[name])} (most on a machine: {_amount(name, largest[name])})" for name in needs]
        text = f"no machine is large enough for a cell, which takes {', '.join(words)}"
        if alone:
            raise SpecError(f"resources: {text}; lower them, or use a cluster with --address")
        log.warning("%s; such cells wait until one joins the cluster", text)


def _amount(name: str, amount: float) -> str:
    return f"{amount / 2**20:.0f} MiB of memory" if name == "memory" else f"{amount:g} {name}s"


# behind a URL


class Remote:
    """A folder behind a URL, and what of it this process has sent.

    A file is sent under a name of this attempt's own and then moved to its place, so that nobody takes a part of one for the
    whole. Who begins a cell writes its token there (:meth:`take`); who finds another's token has been held for lost, and sends
    nothing more.

    Args:
        url: What fsspec knows.
        folder: Below it, with slashes.

    Raises:
        SpecError: What the URL needs is not installed.
        OutputError: The storage cannot be reached.
    """

    OWNER = ".owner"

    def __init__(self, url: str, folder: str) -> None:
        import fsspec

        self.url, self.token = f"{url.rstrip('/')}/{folder}", uuid.uuid4().hex
        self._sent: dict[str, tuple[int, int]] = {}
        with self._reaching():
            try:
                self.fs, path = fsspec.core.url_to_fs(url)
            except (ImportError, ValueError) as fault:
                raise SpecError(f"{url}: {fault}") from None
        self.path = f"{path.rstrip('/')}/{folder}"

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except GradleakError:
            raise
        except Exception as fault:  # each storage has errors of its own
            raise OutputError(f"{self.url}: cannot be used: {fault!r}") from None

    def names(self, *, hidden: bool = False) -> list[str]:
        """Names of what is there; hidden: of what no reader is meant to see."""
        with self._reaching():
            self.fs.invalidate_cache()
            try:
                paths = self.fs.ls(self.path, detail=False)
            except FileNotFoundError:
                return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in paths)
        return [name for name in names if (name.startswith(".") if hidden else NAME.fullmatch(name))]

    def finished(self) -> bool:
        """Whether there is a result that is not a partial one."""
        with self._reaching():
            try:
                text = self.fs.cat_file(f"{self.path}/{RESULT}")
            except FileNotFoundError:
                return False
        try:
            return not parse_json(text, where=self.url, error=OutputError).get("partial")
        except (OutputError, AttributeError):
            return False  # it is written anew

    def take(self) -> None:
        """From now on this process works here."""
        with self._reaching():
            self.fs.makedirs(self.path, exist_ok=True)
            self.fs.pipe_file(f"{self.path}/{self.OWNER}", self.token.encode())

    def check(self) -> None:
        """Whether it still does.

        Raises:
            BusyError: Another one has begun it again.
        """
        with self._reaching():
            try:
                owner = self.fs.cat_file(f"{self.path}/{self.OWNER}").decode()
            except FileNotFoundError:
                owner = ""  # it is finished
        if owner != self.token:
            raise BusyError(f"{self.url}: another worker has begun this cell again, so this one leaves it")

    def get(self, name: str, to: Path) -> bool:
        """Bring one file to a path, whole and private; False if it is not there (any more)."""
        temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
        with self._reaching():
            try:
                self.fs.get_file(f"{self.path}/{name}", str(temporary))
            except FileNotFoundError:
                return False
            temporary.chmod(0o600)
            os.replace(temporary, to)
        return True

    def put(self, path: Path, name: str) -> None:
        """Send one file, which nobody sees before it is there as a whole."""
        part = f"{self.path}/.{name}.{self.token}"
        self.check()
        with self._reaching():
            self.fs.put_file(str(path), part)
        self.check()
        with self._reaching():
            self.fs.mv(part, f"{self.path}/{name}")

    def pull(self, folder: Path) -> None:
        """Bring what is there into a folder, which then has no other files; the result comes last."""
        names = sorted(self.names(), key=lambda name: name == RESULT)
        for path in folder.iterdir():
            if path.name not in names and path.is_file():
                path.unlink()
        for name in names:
            if self.get(name, folder / name):
                self._sent[name] = _version(folder / name)

    def push(self, folder: Path, *, result: bool = True) -> None:
        """Send what is new in a folder; the result last, or not at all.

        Raises:
            BusyError: As :meth:`check`.
            OutputError: It cannot be sent.
        """
        paths = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and ".previous." not in path.name]
        for path in sorted(paths, key=lambda path: path.name == RESULT):
            if path.name == RESULT and not result:
                continue
            still = folder.with_name(f"{path.name}.sending")
            with contextlib.suppress(FileNotFoundError):  # what is replaced just now comes with the next call
                if self._sent.get(path.name) != _version(path):
                    os.link(path, still)  # what is sent stays one file, whatever takes its place
                    try:
                        self.put(still, path.name)
                        self._sent[path.name] = _version(still)
                    finally:
                        still.unlink()

    def tidy(self, folder: Path) -> None:
        """Remove what the folder has no longer, and what attempts that were lost left half sent."""
        gone = [name for name in self.names() if not (folder / name).is_file()] + self.names(hidden=True)
        for name in gone:
            with self._reaching(), contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(f"{self.path}/{name}")


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@contextlib.contextmanager
def _sending(remote: Remote, folder: Path) -> Iterator[None]:
    """Send new checkpoints while a cell runs, in a thread; sending takes at most a twentieth of the time."""
    over = threading.Event()

    def send() -> None:
        wait = SEND_SECONDS
        while not over.wait(wait):
            start = time.monotonic()
            try:
                remote.push(folder, result=False)
            except BusyError as fault:
                log.warning("%s", fault)
                _thread.interrupt_main()  # as a signal would: finish the round
                return
            except OutputError as fault:  # the next one may arrive
                log.warning("%s", fault)
            wait = max(SEND_SECONDS, COST * (time.monotonic() - start))

    thread = threading.Thread(target=send, name="sending", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A temporary folder of this process alone; those of processes that died are removed too: they hold private images."""
    for path in Path(tempfile.gettempdir()).glob("gradleak-cell-*"):
        found = FOLDER.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if found and not path.is_symlink() and path.stat().st_uid == os.getuid() and not psutil.pid_exists(int(found[1])):
                shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"gradleak-cell-{os.getpid()}-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _send_prepared(out: str, prepared: Path | None) -> None:
    """Put trained files behind the URL, once each; a wrong URL is told here."""
    remote = Remote(out, PREPARED_FILES)
    there = remote.names()
    files = [] if prepared is None else [file for file in sorted(prepared.glob("*.safetensors")) if file.name not in there]
    if files:
        remote.take()
    for file in files:
        remote.put(file, file.name)


def _fetch_prepared(cell: Cell, out: str, prepared: Path | None) -> None:
    """Put the trained files that a cell names where they are on the driver's machine, so that it is the same run everywhere."""
    for named in (cell.spec.model.weights, cell.spec.attack.get("generator")):
        path = Path(named) if named else None
        if path is not None and path.parent == prepared and not path.exists():
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as fault:
                raise OutputError(f"{path.parent}: cannot be made on this worker: {fault.strerror or fault}") from None
            if not Remote(out, PREPARED_FILES).get(path.name, path):
                raise OutputError(f"{out}: {PREPARED_FILES}/{path.name} is not there; start the study again")
