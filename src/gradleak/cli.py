"""The command line: audit, capture, invert, evaluate, purge, check, train-generator, list."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from gradleak.errors import GradleakError, OutputError, SpecError, nearest, printable

app = typer.Typer(
    name="gradleak",
    help="How much private training data can be rebuilt from the updates that federated-learning clients share? "
    "Find out by doing it, on your own system.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SpecFile = Annotated[Path | None, typer.Argument(help="TOML specification; without one: the embedded default")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. attack.rounds=300")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Run folder; must be empty or absent")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an earlier run in the output folder")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in the output folder")]
MemoryLimit = Annotated[
    float | None, typer.Option("--memory-limit", metavar="MIB", help="Memory that the attack may take (memory_limit_mb)")
]
Redact = Annotated[bool, typer.Option("--redact", help="Keep the figures and no picture: no reconstruction is written")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress")]
UpdateFile = Annotated[Path, typer.Argument(metavar="UPDATE", help="update.safetensors, as `capture` writes it")]


@app.command()
def audit(
    spec: SpecFile = None,
    *,
    set_: Set = None,
    out: Out,
    force: Force = False,
    resume: Resume = False,
    memory_limit: MemoryLimit = None,
    redact: Redact = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a client, attack its update, evaluate, report; each pair of them with [matrix] in the specification.

    Ctrl-C or SIGTERM finishes the round, saves the state and writes a partial report; `--resume` goes on from there, also
    after a crash. With --resume and neither a specification nor --set, the folder's own spec.toml is used.
    """
    from gradleak import matrix, run
    from gradleak.spec import load

    _only_one(force=force, resume=resume)
    if resume and spec is None and not set_ and (out / "spec.toml").is_file():
        spec = out / "spec.toml"
    loaded = load(spec, _limited(set_, memory_limit))
    if loaded.matrix.given:
        found = matrix.audit_matrix(
            loaded, out, force=force, resume=resume, progress=not quiet, command=_command(), redact=redact
        )
        for line in matrix.lines(found):
            _echo(line)
        _print_report(out, found)
        return
    result = run.audit(loaded, out, force=force, resume=resume, progress=not quiet, command=_command(), redact=redact)
    _print_result(result, out)


@app.command()
def capture(
    spec: SpecFile = None,
    *,
    set_: Set = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the update goes (safetensors)")],
    truth: Annotated[Path | None, typer.Option("--truth", metavar="FILE", help="Where the private batch goes")] = None,
    force: Force = False,
) -> None:
    """Simulate the client only: write what the server would hold, and the private batch apart."""
    from gradleak import run
    from gradleak.spec import load

    loaded = load(spec, set_)
    run.prepare(loaded)
    if truth is not None and truth.resolve() == out.resolve():
        raise OutputError(f"--truth {truth}: is the file of the update; give the private batch a file of its own")
    for path in (out, truth):
        if path is not None:
            run.prepare_file(path, force=force)
    client = run.simulate_client(loaded)
    client.observation.save(out)
    _echo(f"update: {out} ({client.operator.parameters:,} numbers from {client.observation.batch} images)")
    if truth is not None:
        client.truth.save(truth)
        _echo(f"truth: {truth} (private images: keep it to yourself)")


@app.command()
def invert(
    update: UpdateFile,
    *,
    model: Annotated[
        str | None, typer.Option("--model", help="Built-in name, file.py:function or module:function (runs that code)")
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help="The client's own loss, file.py:function or module:function (runs that code)")
    ] = None,
    set_: Set = None,
    out: Out,
    force: Force = False,
    resume: Resume = False,
    memory_limit: MemoryLimit = None,
    redact: Redact = False,
    quiet: Quiet = False,
) -> None:
    """Attack a saved update. There is no truth, so there is no score: see `evaluate`."""
    from gradleak import run
    from gradleak.observation import Observation

    _only_one(force=force, resume=resume)
    observation = Observation.load(update, loss=loss)
    spec = run.spec_for(observation, model=model, overrides=_limited(set_, memory_limit), where=str(update))
    result = run.invert_observation(
        observation,
        spec,
        out,
        where=str(update),
        force=force,
        resume=resume,
        progress=not quiet,
        command=_command(),
        redact=redact,
    )
    _print_result(result, out)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder of `invert` or `audit`")],
    *,
    truth: Annotated[Path, typer.Option("--truth", metavar="FILE", help="The private batch, as `capture` writes it")],
    lpips: Annotated[str, typer.Option(help="auto, off, download, or a safetensors file of VGG-16's features")] = "auto",
    redact: Annotated[
        bool, typer.Option("--redact", help="Keep the figures, and remove every picture from the folder")
    ] = False,
) -> None:
    """Score a reconstruction against the truth, and write its report anew."""
    from gradleak import run
    from gradleak.observation import Truth

    _print_result(run.evaluate_run(folder, Truth.load(truth), lpips=lpips, redact=redact), folder)


@app.command()
def purge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder, or a folder with run folders in it")],
) -> None:
    """Remove reconstructions, pictures and checkpoints from run folders; figures, logs and specifications stay.

    Files are unlinked, not overwritten: disks, snapshots and backups may keep copies.
    """
    from gradleak import results

    changed = results.purge(folder)
    for path in changed:
        _echo(f"{'rewritten' if path.exists() else 'removed'}: {path}")
    _echo(f"purged: {folder}. Copies on the disk itself, in snapshots and in backups may remain.")


@app.command()
def check(
    spec: SpecFile = None,
    *,
    set_: Set = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of lines for people")] = False,
) -> None:
    """Before spending hours: can it work at all, and what would it cost? Runs two rounds."""
    import json

    from gradleak.check import check as measure
    from gradleak.spec import load

    found = measure(load(spec, set_))
    if json_:
        typer.echo(json.dumps(found.to_dict(), indent=1, allow_nan=False))
        return
    for line in found.lines():
        _echo(line)


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An update (or truth) file: safetensors")],
    *,
    model: Annotated[
        str | None, typer.Option("--model", help="Built-in name, file.py:function or module:function (runs that code)")
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help="The client's own loss, file.py:function or module:function (runs that code)")
    ] = None,
    set_: Set = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of lines for people")] = False,
) -> None:
    """Is an update file whole, what is in it, and does it fit the model? Attacks nothing. Exit code 2 if not."""
    import json

    from gradleak.validate import validate as look

    found = look(file, model=model, loss=loss, overrides=set_)
    if json_:
        typer.echo(json.dumps(found.to_dict(), indent=1, allow_nan=False))
        return
    for line in found.lines():
        _echo(line)


@app.command()
def convert(
    spec: SpecFile = None,
    *,
    gradient: Annotated[
        Path | None, typer.Option("--gradient", metavar="FILE", help="The gradient: .safetensors, .npz, .pt, .pth")
    ] = None,
    after: Annotated[
        Path | None, typer.Option("--after", metavar="FILE", help="In its place: the client's weights after")
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option("--before", metavar="FILE", help="The weights that the server sent (default: the model's own)"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Built-in name, file.py:function or module:function (runs that code)")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="B, number of images")],
    image_shape: Annotated[str, typer.Option("--image-shape", metavar="CxHxW", help="For example 3x32x32")],
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels", metavar="3,0,7|FILE", help="Classes, or a .npz or .safetensors file with 'labels' (default: unknown)"
        ),
    ] = None,
    set_: Set = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the update goes (safetensors)")],
    force: Force = False,
) -> None:
    """Make an update file of arrays that other software saved: a gradient, or weights before and after.

    Arrays by name, or in the order of the model's parameters or state. What the client did (protocol, learning rate, mode,
    loss), the model's mean and std, and the defences are those of the specification and --set, for example
    --set client.protocol=fedavg --set client.learning_rate=0.1.
    """
    from gradleak import run
    from gradleak.spec import override, read_table
    from gradleak.validate import parse_shape, read_labels

    if (gradient is None) == (after is None):
        raise SpecError("convert: give either --gradient FILE, or --after FILE with --before FILE")
    run.prepare_file(out, force=force)
    observation = run.convert(
        override(read_table(spec) if spec is not None else {}, [*(set_ or []), *([f"model.name={model}"] if model else [])]),
        gradient=gradient,
        before=before,
        after=after,
        batch=batch,
        image_shape=parse_shape(image_shape),
        labels=None if labels is None else read_labels(labels),
    )
    observation.save(out)
    numbers = sum(t.numel() for t in observation.update.values())
    _echo(f"update: {out} ({numbers:,} numbers from {batch} images); see `gradleak validate`, then `gradleak invert`")


@app.command("train-generator")
def train_generator(
    source: Annotated[str, typer.Argument(metavar="DATA", help="Public images: a data source, e.g. folder:pictures")],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the generator goes (safetensors)")],
    images: Annotated[int, typer.Option(help="How many images to train on")] = 1000,
    start: Annotated[int, typer.Option(help="Index of the first one: these must not be the client's images")] = 0,
    size: Annotated[int, typer.Option(help="Pixels, 8 or more")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Training steps")] = 5000,
    width: Annotated[int, typer.Option(min=1, help="Channels of the generator's last hidden layer")] = 64,
    latent: Annotated[int, typer.Option(min=1, help="Length of the latent")] = 100,
    seed: Annotated[int, typer.Option(help="Seed")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    force: Force = False,
) -> None:
    """Train a DCGAN on public images, for `attack.name=gias` with `attack.generator=FILE`."""
    from gradleak import data, dcgan, run
    from gradleak.spec import parse

    run.prepare_file(out, force=force)
    public = data.load(parse({"data": {"source": source, "batch": images, "start": start, "size": size}}).data).images
    trained = dcgan.train(public, rounds=rounds, width=width, latent=latent, seed=seed, device=run.choose_device(device))
    trained.save(out)
    _echo(f"generator: {out}")


@app.command("list")
def list_(
    what: Annotated[str | None, typer.Argument(help="attacks, models, datasets, labels, defences, or nothing for all")] = None,
) -> None:
    """What can be named in a specification."""
    from gradleak import attacks, data, defences, labels, models

    known: dict[str, dict[str, str]] = {
        "attacks": attacks.available(),
        "models": dict.fromkeys(models.available(), ""),
        "datasets": data.available(),
        "labels": labels.RULES,
        "defences": defences.available(),
    }
    if what is not None and what not in known:
        raise SpecError(f"list: unknown {what!r}{nearest(what, known)}")
    for title, entries in known.items():
        if what in (None, title):
            _echo(f"{title}:")
            width = max(len(name) for name in entries)
            for name, text in entries.items():
                _echo(f"  {name:{width}}  {text}".rstrip())


def main() -> NoReturn:
    """Entry point: bad input gives one line on standard error and exit code 2."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    try:
        app(standalone_mode=True)
    except GradleakError as error:
        _echo(f"gradleak: error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _echo("gradleak: interrupted", err=True)
        sys.exit(130)
    sys.exit(0)


def _only_one(*, force: bool, resume: bool) -> None:
    if force and resume:
        raise OutputError("--force starts anew and --resume goes on: give one of them")


def _limited(overrides: list[str] | None, memory_limit: float | None) -> list[str]:
    return [*(overrides or []), *([] if memory_limit is None else [f"memory_limit_mb={memory_limit}"])]


def _command() -> str:
    return shlex.join(["gradleak", *sys.argv[1:]])


def _print_result(result: dict[str, Any], folder: Path) -> None:
    _echo(result["verdict"])
    for name, row in result.get("metrics", {}).items():
        if name != "mse" and row["mean"] is not None:
            _echo(f"  {name:5}  mean {row['mean']:.3f}  median {row['median']:.3f}  worst {row['worst']:.3f}")
    found = result.get("identification")
    if found and found["candidates"] > 1:
        _echo(
            f"  identified: {100 * found['rate']['mse']:.4g} % of the true images are the nearest of "
            f"{found['candidates']} candidates (a guess: {100 * found['chance']:.2g} %)"
        )
    labels = result["labels"]
    if labels["rule"] != "known" and labels.get("mean_absolute_error") is not None:
        _echo(f"  targets by {labels['rule']}: off by {labels['mean_absolute_error']:.3g} in the mean")
    if labels["rule"] != "known" and labels.get("classes_found") is not None:
        _echo(
            f"  labels by {labels['rule']}: {100 * labels['accuracy']:.4g} % right, {100 * labels['classes_found']:.4g} % of "
            f"the classes found, {100 * labels['counts_exact']:.4g} % of the counts exact"
        )
    for name, note in result.get("notes", {}).items():
        _echo(f"  {name:5}  not computed: {note}")
    cost = result["cost"]
    _echo(f"  {cost['rounds']} rounds in {cost['seconds']:.0f} s; matching loss {result['matching_loss']:.2e}")
    _print_report(folder, result)


def _print_report(folder: Path, result: dict[str, Any]) -> None:
    _echo(f"report: {(folder / 'report.html').resolve()}")
    if not result.get("redacted"):
        _echo("It shows private images: keep the folder to yourself.")
    if result.get("partial"):
        _echo("The attack was interrupted: go on with the same command and --resume.", err=True)
        # as a shell reports a process that the signal ended
        raise typer.Exit(128 + signal.Signals[result["interrupted"]])


def _echo(text: str, *, err: bool = False) -> None:
    """One line to the terminal: names in it may come from a file, and must not steer the terminal."""
    typer.echo(printable(text).encode(errors="backslashreplace").decode(), err=err)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
