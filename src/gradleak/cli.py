"""The command line: audits and studies, an audit in steps, run folders, and what comes before a run."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from gradleak.errors import GradleakError, OutputError, SpecError, nearest, printable

if TYPE_CHECKING:
    from gradleak.catalogue import Entry
    from gradleak.invert import Watcher
    from gradleak.sharded import Processes
    from gradleak.study.runner import Done
    from gradleak.study.spec import StudySpec

EXIT_CODES = """\b
Exit codes:
  0    done
  1    a fault of gradleak itself: please report the traceback
  2    bad input: one line says what, where, and how to mend it
  130  interrupted by Ctrl-C; a partial report is written, --resume goes on
  143  the same for SIGTERM"""


def _examples(*lines: str) -> str:
    """An epilog that click leaves as it is; a line that begins with a space goes on with the one before."""
    return "\n".join(
        ["\b", "Examples:", *(f"    {line}" if line.startswith(" ") else f"  $ gradleak {line}" for line in lines)]
    )


class _Command(TyperCommand):
    """Help with the options in groups: typer groups them in rich's boxes only, which logs and simple terminals mangle."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            title = getattr(parameter, "rich_help_panel", None) or "Options"
            if record is not None:
                groups.setdefault("Arguments" if parameter.param_type_name == "argument" else title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class _Commands(TyperGroup):
    """Help with the commands in groups."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                title = getattr(command, "rich_help_panel", None)
                line = command.get_short_help_str(limit=300)
                groups.setdefault(title if isinstance(title, str) else "Commands", []).append((name, line))
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl(rows)


AUDIT, THREE_STEPS, FOLDERS, HELP = "Audit", "The same in steps", "Run folders", "Before a run"

app = typer.Typer(
    name="gradleak",
    cls=_Commands,
    help="How much private training data can be rebuilt from the updates that federated-learning clients share? "
    "Find out by doing it, on your own system.",
    epilog=_examples(
        "audit --out run                          # eight embedded photographs, two minutes",
        "list attacks                             # what there is; list attacks cinet: its settings",
        "audit --attack dlg --set data.batch=1 --out run2",
        "check my.toml                            # can it work, what would it cost",
        "COMMAND --help                           # options and examples of a command",
    )
    + "\n\n"
    + EXIT_CODES
    + "\n\nWith --json a command prints exactly one JSON object on standard output, also for an error "
    '({"error": {"kind": ..., "message": ...}}, exit code 2); progress and warnings are on standard error.',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)


def _complete_set(incomplete: str) -> Iterator[tuple[str, str]]:
    """Keys for ``--set``, and after ``=`` the words that the key may be set to."""
    from gradleak.catalogue import keys

    named, equals, _ = incomplete.partition("=")
    for key, words, meaning in keys():
        if equals and key == named:
            yield from ((f"{key}={word}", meaning) for word in words)
        elif not equals and key.startswith(incomplete):
            yield f"{key}=", meaning


def _complete_kind(incomplete: str) -> list[tuple[str, str]]:
    from gradleak.catalogue import KINDS

    return [(kind, line) for kind, line in KINDS.items() if kind.startswith(incomplete)]


def _version(asked: bool) -> None:
    if asked:
        from gradleak import __version__

        typer.echo(f"gradleak {__version__}")
        raise typer.Exit


RUN, OUTPUT = "What to run", "Output"

SpecFile = Annotated[
    Path | None,
    typer.Argument(metavar="SPEC", help="TOML specification; without one eight embedded photographs are used"),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one key, as often as needed, e.g. attack.rounds=300; `gradleak list settings` has all keys",
        autocompletion=_complete_set,
        rich_help_panel=RUN,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="The attacked model, model.name: built-in, torchvision/NAME, timm/NAME, or file.py:function (runs that code)",
        rich_help_panel=RUN,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Its weights, model.weights: safetensors", rich_help_panel=RUN),
]
Loss = Annotated[
    str | None,
    typer.Option(
        "--loss",
        metavar="NAME",
        help="The client's own loss, file.py:function or module:function (runs that code)",
        rich_help_panel=RUN,
    ),
]
AttackName = Annotated[
    str | None,
    typer.Option("--attack", metavar="NAME", help="The attack, attack.name: see `gradleak list attacks`", rich_help_panel=RUN),
]
MemoryLimit = Annotated[
    float | None,
    typer.Option(
        "--memory-limit",
        metavar="MIB",
        help="Memory that the attack may take, memory_limit_mb  [default: 9/10 of what is free]",
        rich_help_panel=RUN,
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Run folder; must be empty or absent", rich_help_panel=OUTPUT)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what an earlier run left there", rich_help_panel=OUTPUT)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the unfinished run in the output folder", rich_help_panel=OUTPUT)
]
Redact = Annotated[
    bool,
    typer.Option("--redact", help="Keep the figures and no picture: no reconstruction is written", rich_help_panel=OUTPUT),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error", rich_help_panel=OUTPUT)]
TensorBoardFolder = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard",
        metavar="DIR",
        help="Log loss, step and pictures for TensorBoard while the attack runs (needs gradleak[tensorboard])",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON object on standard output in place of lines for people", rich_help_panel=OUTPUT),
]
UpdateFile = Annotated[Path, typer.Argument(metavar="UPDATE", help="update.safetensors, as `capture` writes it")]

#: click's own class, which typer keeps in another place in each version.
_UsageError: Any = typer.BadParameter.__base__

#: What a command gives back: an object for --json, nothing where lines were printed.
Report = dict[str, Any] | None


@app.callback()
def _gradleak(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""
    if _processes() > 1 and ctx.invoked_subcommand not in ("audit", "invert"):
        raise SpecError(f"{ctx.invoked_subcommand}: takes one process, not torchrun; audit and invert take several")


@app.command(
    cls=_Command,
    rich_help_panel=AUDIT,
    epilog=_examples(
        "audit --out run                       # the embedded example",
        "audit my.toml --out run               # your own setting",
        "audit my.toml --model models.py:build --weights trained.safetensors --out run",
        "audit my.toml --attack inverting-gradients --set attack.rounds=2000 --out run",
        "audit my.toml --set labels.rule=auto --set 'defence=[{name=\"clip\", norm=1.0}]' --out run",
        'audit my.toml --set \'matrix.attacks=["cinet", "dlg"]\' --out table',
        "audit my.toml --out run --resume      # after a crash, a kill or Ctrl-C",
    ),
)
def audit(
    spec: SpecFile = None,
    *,
    model: ModelName = None,
    weights: Weights = None,
    attack: AttackName = None,
    set_: Set = None,
    memory_limit: MemoryLimit = None,
    out: Out,
    force: Force = False,
    resume: Resume = False,
    redact: Redact = False,
    tensorboard: TensorBoardFolder = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> Report:
    """Simulate a client, attack its update, evaluate, report; each pair of them with [matrix] in the specification.

    Ctrl-C or SIGTERM finishes the round, saves the state and writes a partial report; `--resume` goes on from there, also
    after a crash. With --resume and neither a specification nor --set, the folder's own spec.toml is used.
    """
    from gradleak import matrix, run
    from gradleak.spec import load

    _only_one(force=force, resume=resume)
    overrides = _overrides(set_, model=model, weights=weights, attack=attack, memory_limit=memory_limit)
    if resume and spec is None and not (set_ or model or weights or attack) and (out / "spec.toml").is_file():
        spec = out / "spec.toml"
    loaded = load(spec, overrides)
    if loaded.matrix.given:
        if _processes() > 1:
            raise SpecError("matrix: several processes share one run, and this specification has many; use one process")
        if tensorboard is not None:
            raise SpecError("--tensorboard: logs one run, and this specification has a [matrix] of them; leave one out")
        found = matrix.audit_matrix(
            loaded, out, force=force, resume=resume, progress=not quiet, command=_command(), redact=redact
        )
        if json_:
            return _of_folder(found, out)
        for line in matrix.lines(found):
            _echo(line)
        _print_report(out, found)
        return None
    with _watching(tensorboard, out, redact=redact) as watch:
        result = run.audit(
            loaded, out, force=force, resume=resume, progress=not quiet, command=_command(), redact=redact, watch=watch
        )
    if json_:
        return _of_folder(result, out)
    _print_result(result, out)
    return None


@app.command(
    cls=_Command,
    rich_help_panel=THREE_STEPS,
    epilog=_examples(
        "capture my.toml --out update.safetensors --truth truth.safetensors",
        "capture --model lenet --set data.batch=2 --set labels.rule=auto --out update.safetensors",
    ),
)
def capture(
    spec: SpecFile = None,
    *,
    model: ModelName = None,
    weights: Weights = None,
    set_: Set = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where the update goes (safetensors)", rich_help_panel=OUTPUT)
    ],
    truth: Annotated[
        Path | None,
        typer.Option(
            "--truth", metavar="FILE", help="Where the private batch goes  [default: nowhere]", rich_help_panel=OUTPUT
        ),
    ] = None,
    force: Force = False,
    json_: Json = False,
) -> Report:
    """Simulate the client only: write what the server would hold, and the private batch apart."""
    from gradleak import run
    from gradleak.spec import load

    loaded = load(spec, _overrides(set_, model=model, weights=weights))
    run.prepare(loaded)
    if truth is not None and truth.resolve() == out.resolve():
        raise OutputError(f"--truth {truth}: is the file of the update; give the private batch a file of its own")
    for path in (out, truth):
        if path is not None:
            run.prepare_file(path, force=force)
    client = run.simulate_client(loaded)
    client.observation.save(out)
    if truth is not None:
        client.truth.save(truth)
    if json_:
        numbers, images = client.operator.parameters, client.observation.batch
        return {"update": str(out), "numbers": numbers, "images": images, "truth": None if truth is None else str(truth)}
    _echo(f"update: {out} ({client.operator.parameters:,} numbers from {client.observation.batch} images)")
    if truth is not None:
        _echo(f"truth: {truth} (private images: keep it to yourself)")
    return None


@app.command(
    cls=_Command,
    rich_help_panel=THREE_STEPS,
    epilog=_examples(
        "invert update.safetensors --out run",
        "invert update.safetensors --model models.py:build --attack gradinversion --set attack.rounds=500 --out run",
        "invert update.safetensors --set labels.rule=counts --out run",
    ),
)
def invert(
    update: UpdateFile,
    *,
    model: ModelName = None,
    weights: Weights = None,
    loss: Loss = None,
    attack: AttackName = None,
    set_: Set = None,
    memory_limit: MemoryLimit = None,
    out: Out,
    force: Force = False,
    resume: Resume = False,
    redact: Redact = False,
    tensorboard: TensorBoardFolder = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> Report:
    """Attack a saved update. There is no truth, so there is no score: see `evaluate`."""
    from gradleak import run
    from gradleak.observation import Observation

    _only_one(force=force, resume=resume)
    if update.suffix == ".toml":
        raise SpecError(f"{update}: is a specification, and `invert` attacks an update file; use `gradleak audit {update}`")
    observation = Observation.load(update, loss=loss)
    overrides = _overrides(set_, weights=weights, attack=attack, memory_limit=memory_limit)
    spec = run.spec_for(observation, model=model, overrides=overrides, where=str(update))
    with _watching(tensorboard, out, redact=redact) as watch:
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
            watch=watch,
        )
    if json_:
        return _of_folder(result, out)
    _print_result(result, out)
    return None


@app.command(
    cls=_Command,
    rich_help_panel=THREE_STEPS,
    epilog=_examples(
        "evaluate run --truth truth.safetensors",
        "evaluate run --truth truth.safetensors --lpips off --json",
    ),
)
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder of `invert` or `audit`")],
    *,
    truth: Annotated[Path, typer.Option("--truth", metavar="FILE", help="The private batch, as `capture` writes it")],
    lpips: Annotated[
        str,
        typer.Option(
            metavar="WHERE",
            help="VGG-16: auto (if it is in torch's cache), off, download, or a safetensors file of its features",
        ),
    ] = "auto",
    redact: Annotated[
        bool,
        typer.Option("--redact", help="Keep the figures, and remove every picture from the folder", rich_help_panel=OUTPUT),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also where the run was scored against other images", rich_help_panel=OUTPUT)
    ] = False,
    json_: Json = False,
) -> Report:
    """Score a reconstruction against the truth, and write its report anew."""
    from gradleak import run
    from gradleak.observation import Truth

    result = run.evaluate_run(folder, Truth.load(truth), lpips=lpips, redact=redact, force=force)
    if json_:
        return _of_folder(result, folder)
    _print_result(result, folder)
    return None


@app.command(cls=_Command, rich_help_panel=FOLDERS, epilog=_examples("purge run", "purge runs --json"))
def purge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder, or a folder with run folders in it")],
    *,
    json_: Json = False,
) -> Report:
    """Remove reconstructions, pictures and checkpoints from run folders; figures, logs and specifications stay.

    Files are unlinked, not overwritten: disks, snapshots and backups may keep copies.
    """
    from gradleak import results

    changed = [("rewritten" if path.exists() else "removed", str(path)) for path in results.purge(folder)]
    if json_:
        kinds = ("rewritten", "removed")
        return {"folder": str(folder), **{kind: [path for k, path in changed if k == kind] for kind in kinds}}
    for what, path in changed:
        _echo(f"{what}: {path}")
    _echo(f"purged: {folder}. Copies on the disk itself, in snapshots and in backups may remain.")
    return None


@app.command(
    cls=_Command,
    rich_help_panel=HELP,
    epilog=_examples("check", "check my.toml --attack dlg", "check my.toml --model timm/resnet18 --json"),
)
def check(
    spec: SpecFile = None,
    *,
    model: ModelName = None,
    weights: Weights = None,
    attack: AttackName = None,
    set_: Set = None,
    json_: Json = False,
) -> Report:
    """Before spending hours: can it work at all, and what would it cost? Runs two rounds."""
    from gradleak.check import check as measure
    from gradleak.spec import load

    found = measure(load(spec, _overrides(set_, model=model, weights=weights, attack=attack)))
    if json_:
        return found.to_dict()
    for line in found.lines():
        _echo(line)
    return None


@app.command(
    cls=_Command,
    rich_help_panel=THREE_STEPS,
    epilog=_examples(
        "convert --model models.py:build --gradient gradient.npz --before weights.safetensors \\",
        "    --batch 8 --image-shape 3x32x32 --labels 3,0,7,1,1,2,5,9 --out update.safetensors",
        "convert --model models.py:build --before sent.pt --after returned.pt --batch 8 --image-shape 1x64x64 \\",
        "    --set client.protocol=fedavg --set client.learning_rate=0.1 --out update.safetensors",
    ),
)
def convert(
    spec: Annotated[
        Path | None, typer.Argument(metavar="SPEC", help="TOML specification of model, client and defences, if there is one")
    ] = None,
    *,
    model: ModelName = None,
    weights: Weights = None,
    set_: Set = None,
    gradient: Annotated[
        Path | None,
        typer.Option(
            "--gradient", metavar="FILE", help="The gradient: .safetensors, .npz, .pt, .pth, .bin, .ckpt", rich_help_panel=RUN
        ),
    ] = None,
    after: Annotated[
        Path | None,
        typer.Option("--after", metavar="FILE", help="In its place, the client's weights after training", rich_help_panel=RUN),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(
            "--before", metavar="FILE", help="The weights that the server sent  [default: the model's]", rich_help_panel=RUN
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="B, number of images", rich_help_panel=RUN)],
    image_shape: Annotated[
        str, typer.Option("--image-shape", metavar="CxHxW", help="For example 3x32x32", rich_help_panel=RUN)
    ],
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="3,0,7|FILE",
            help="Classes, or a .npz or .safetensors file with an array 'labels'  [default: not known]",
            rich_help_panel=RUN,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where the update goes (safetensors)", rich_help_panel=OUTPUT)
    ],
    force: Force = False,
    json_: Json = False,
) -> Report:
    """Make an update file of what other software saved: a gradient, or weights before and after.

    Arrays are by name, or in the order of the model's parameters or state. What the client did (protocol, learning rate,
    mode, loss), the model's mean and std, and the defences are those of the specification and --set.
    """
    from gradleak import run
    from gradleak.spec import override, read_table
    from gradleak.updates import read_labels

    if (gradient is None) == (after is None):
        raise SpecError("convert: give either --gradient FILE, or --after FILE with --before FILE")
    table = {} if spec is None else read_table(spec)
    if model is None and "model" not in table and not any(text.startswith("model.name") for text in set_ or []):
        raise SpecError("convert: name the model that the arrays belong to with --model, for example --model models.py:build")
    run.prepare_file(out, force=force)
    observation = run.convert(
        override(table, _overrides(set_, model=model, weights=weights)),
        gradient=gradient,
        before=before,
        after=after,
        batch=batch,
        image_shape=_image_shape(image_shape),
        labels=None if labels is None else read_labels(labels),
    )
    observation.save(out)
    numbers = sum(t.numel() for t in observation.update.values())
    if json_:
        return {"update": str(out), "numbers": numbers, "images": batch, "sent": list(observation.update)}
    _echo(f"update: {out} ({numbers:,} numbers from {batch} images); see `gradleak validate`, then `gradleak invert`")
    return None


@app.command(
    cls=_Command,
    rich_help_panel=HELP,
    epilog=_examples(
        "validate update.safetensors",
        "validate update.safetensors --model models.py:build --json",
    ),
)
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An update or a truth: safetensors")],
    *,
    model: ModelName = None,
    weights: Weights = None,
    loss: Loss = None,
    set_: Set = None,
    json_: Json = False,
) -> Report:
    """Is an update file whole, what is in it, and does it fit the model? Attacks nothing; exit code 2 if it is not valid."""
    from gradleak.validate import validate as look

    found = look(file, model=model, loss=loss, overrides=_overrides(set_, weights=weights))
    if json_:
        return found.to_dict()
    for line in found.lines():
        _echo(line)
    return None


@app.command(
    "train-generator",
    cls=_Command,
    rich_help_panel=HELP,
    epilog=_examples(
        "train-generator folder:public --images 5000 --out generator.safetensors",
        "audit my.toml --attack gias --set attack.generator=generator.safetensors \\",
        "    --set threat.surrogate_data=true --out run",
    ),
)
def train_generator(
    source: Annotated[str, typer.Argument(metavar="DATA", help="Public images: a data source, e.g. folder:pictures")],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the generator goes (safetensors)")],
    images: Annotated[int, typer.Option(metavar="N", help="How many images to train on")] = 1000,
    start: Annotated[int, typer.Option(metavar="N", help="Index of the first one: these must not be the client's images")] = 0,
    size: Annotated[int, typer.Option(metavar="N", help="Pixels, 8 or more")] = 32,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Training steps")] = 5000,
    width: Annotated[int, typer.Option(min=1, metavar="N", help="Channels of the generator's last hidden layer")] = 64,
    latent: Annotated[int, typer.Option(min=1, metavar="N", help="Length of the latent")] = 100,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of weights, latents and batches")] = 0,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    force: Force = False,
    json_: Json = False,
) -> Report:
    """Train a DCGAN on public images, for `attack.name=gias` with `attack.generator=FILE`."""
    from gradleak import data, dcgan, run
    from gradleak.spec import parse

    run.prepare_file(out, force=force)
    public = data.load(parse({"data": {"source": source, "batch": images, "start": start, "size": size}}).data).images
    trained = dcgan.train(public, rounds=rounds, width=width, latent=latent, seed=seed, device=run.choose_device(device))
    trained.save(out)
    if json_:
        parameters = sum(p.numel() for p in trained.parameters())
        return {"generator": str(out), "images": len(public), "rounds": rounds, "parameters": parameters}
    _echo(f"generator: {out}")
    return None


@app.command(
    "train-model",
    cls=_Command,
    rich_help_panel=HELP,
    epilog=_examples(
        "train-model cifar10 --start 128 --images 5000 --rounds 2000 --set model.activation=relu --out trained.safetensors",
        "audit my.toml --set model.activation=relu --weights trained.safetensors --out run",
    ),
)
def train_model(
    source: Annotated[str, typer.Argument(metavar="DATA", help="Public images: a data source, e.g. folder:pictures")],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the weights go (safetensors)")],
    model: ModelName = None,
    weights: Weights = None,
    set_: Set = None,
    images: Annotated[int, typer.Option(metavar="N", help="How many images to train on")] = 1000,
    start: Annotated[int, typer.Option(metavar="N", help="Index of the first one: beyond the batch that is attacked")] = 0,
    size: Annotated[int, typer.Option(metavar="N", help="Pixels, 8 or more")] = 32,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Training steps")] = 1000,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images in a step")] = 64,
    optimiser: Annotated[str, typer.Option(metavar="NAME", help="adam, or sgd with momentum 0.9")] = "adam",
    learning_rate: Annotated[float, typer.Option(metavar="RATE", help="Of the optimiser, constant")] = 1e-3,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the batches; model.seed is that of the first weights")] = 0,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    force: Force = False,
    json_: Json = False,
) -> Report:
    """Train an attacked model on public images, for `model.weights`; never on those that are attacked."""
    from gradleak import data, models, run
    from gradleak.federation import held_out_score
    from gradleak.spec import override
    from gradleak.tensors import write_tensors
    from gradleak.training import OPTIMISERS
    from gradleak.training import train_model as train

    if optimiser not in OPTIMISERS:
        raise SpecError(f"--optimiser {optimiser}: expected {' or '.join(OPTIMISERS)}")
    run.prepare_file(out, force=force)
    table = {"data": {"source": source, "batch": images, "start": start, "size": size}}
    spec = override(table, _overrides(set_, model=model, weights=weights))
    public = data.load(spec.data)
    channels, height, width = public.images.shape[1:]
    trained = train(
        models.build(spec.model, image_shape=(channels, height, width)),
        public,
        rounds=rounds,
        batch=batch,
        optimiser=optimiser,
        learning_rate=learning_rate,
        seed=seed,
        device=run.choose_device(device),
    )
    write_tensors(out, trained.state_dict(), {})
    accuracy = held_out_score(trained, public).accuracy
    if json_:
        return {"weights": str(out), "images": images, "rounds": rounds, "training_accuracy": accuracy}
    _echo(f"weights: {out} (training accuracy {100 * accuracy:.4g} % in eval mode)")
    return None


@app.command(
    "list",
    cls=_Command,
    rich_help_panel=HELP,
    epilog=_examples(
        "list                        # an overview",
        "list attacks                # what each does and needs",
        "list attacks cinet          # its settings, defaults and meanings",
        "list models vit             # the models with `vit` in their name",
        "list defences gaussian      # a defence's settings",
        "list settings               # every key of a specification",
        "list settings client        # the keys of one table",
    ),
)
def list_(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help="attacks, models, datasets, labels, defences or settings; without one: an overview",
            autocompletion=_complete_kind,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One of them, with all its settings; of models also a part of names")
    ] = None,
    *,
    json_: Json = False,
) -> Report:
    """What can be named in a specification, and every setting with its default and meaning."""
    import dataclasses

    from gradleak import catalogue

    if what is None:
        found = {kind: catalogue.names(kind) for kind in catalogue.KINDS}
        if json_:
            return found
        for kind, line in catalogue.KINDS.items():
            _echo(f"{kind}: {line}")
            _print_names(kind, found[kind])
        _echo("More: gradleak list KIND, gradleak list KIND NAME")
        return None
    known = catalogue.names(what)
    if name is None or (what == "models" and name not in known):
        if name is not None:
            known = {full: line for full, line in known.items() if name.lower() in full.lower()} or known
            if len(known) == len(catalogue.names(what)):
                raise SpecError(f"list models: no name has {name!r} in it{nearest(name, known)}")
        if json_:
            needs = {full: catalogue.needs(full) for full in known} if what == "attacks" else {}
            return {what: {full: {"line": line, **({"needs": needs[full]} if needs else {})} for full, line in known.items()}}
        _print_names(what, known, whole=True)
        return None
    entry = catalogue.entry(what, name)
    if json_:
        return dataclasses.asdict(entry)
    _print_entry(what, entry)
    return None


study_app = typer.Typer(
    name="study",
    cls=_Commands,
    help="Grids of runs: every cell a run folder, resumable, on one machine or a cluster; a report beside published figures.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)
app.add_typer(study_app, rich_help_panel=AUDIT)

StudyFiles = Annotated[
    list[Path] | None,
    typer.Argument(metavar="SPEC...", help="TOML studies, or folders of them  [default: those that were run in --out]"),
]
StudyOut = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", help="Folder of the cells; studies share it", rich_help_panel=OUTPUT),
]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        metavar="NAME=SOURCE",
        help="Where the images that a study calls NAME are, e.g. imagenet=folder:pictures; as often as needed",
        rich_help_panel=RUN,
    ),
]


@study_app.command(
    "run",
    cls=_Command,
    epilog=_examples(
        "study run studies/small --out small                                  # all of them, with torchvision's CIFAR-10",
        "study run studies/small/table-1.toml --source cifar10=npz:images.npz --out small",
        "study run studies/full/table-3-4.toml --out full --resume            # after a crash, a kill or Ctrl-C",
        "study run studies/full --out /shared/full --engine ray --address auto --resume",
    ),
)
def study_run(
    specs: Annotated[list[Path], typer.Argument(metavar="SPEC...", help="TOML studies, or folders of them")],
    *,
    set_: Set = None,
    source: Sources = None,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="local, or ray (needs gradleak[ray])", rich_help_panel=RUN)
    ] = "local",
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="local: cells side by side  [default: as many as fit this machine]", rich_help_panel=RUN
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="ray: the cluster, auto or ray://HOST:PORT  [default: here]", rich_help_panel=RUN),
    ] = None,
    out: Annotated[
        str,
        typer.Option("--out", metavar="DIR", help="Folder of the cells; with ray also an fsspec URL", rich_help_panel=OUTPUT),
    ],
    force: Annotated[bool, typer.Option("--force", help="Begin unfinished cells anew", rich_help_panel=OUTPUT)] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with unfinished cells", rich_help_panel=OUTPUT)] = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> Report:
    """Run what is not finished of a study: each cell of its grid as `audit` would.

    Finished cells are kept, also when the study is edited or another one has the same cell. A cell that cannot be run is
    reported, and the others go on; the exit code is then 2.
    """
    from gradleak.study import cluster, runner, store
    from gradleak.study.spec import load_studies

    _only_one(force=force, resume=resume)
    studies = load_studies(specs, sources=_sources(source), overrides=set_)
    if engine not in ("local", "ray"):
        raise SpecError(f"--engine {engine}: expected local or ray")
    if engine == "local" and address is not None:
        raise SpecError("--address: is of --engine ray")
    if engine == "local" and "://" in out:
        raise SpecError(f"--out {out}: a URL is for --engine ray; the local engine takes a folder")
    if engine == "ray" and processes is not None:
        raise SpecError("--processes: is of --engine local; Ray places cells by [resources] of the study")
    folder = cluster.folder_here(out)
    try:
        if engine == "ray":
            done = cluster.run_studies_on_ray(studies, out, address=address, resume=resume, force=force, progress=not quiet)
        else:
            done = runner.run_studies(studies, folder, processes=processes, resume=resume, force=force, progress=not quiet)
    finally:
        if (folder / runner.CELLS).is_dir():
            store.save(studies, folder)
    return _study_done(done, folder, as_json=json_)


def _study_done(done: list[Done], out: Path, *, as_json: bool) -> Report:
    """What became of the cells; exit code 2 where one could not be run."""
    counts = {outcome: sum(each.outcome == outcome for each in done) for outcome in ("finished", "before", "failed", "busy")}
    failed = [each for each in done if each.outcome == "failed"]
    interrupted = next((each.reason for each in done if each.outcome == "interrupted"), None)
    found = {
        "folder": str(out.resolve()),
        "cells": counts,
        "failed": [{"study": e.cell.study, "cell": e.cell.key, "label": e.cell.label, "reason": e.reason} for e in failed],
        "partial": interrupted is not None,
        "interrupted": interrupted,
        "exit_code": 2 if failed else 0,
    }
    if not as_json:
        _echo(f"finished: {counts['finished']}, finished before: {counts['before']}, failed: {counts['failed']}")
        for reason in dict.fromkeys(each.reason for each in failed):
            same = [each.cell for each in failed if each.reason == reason]
            more = f" and {len(same) - 1} more" if len(same) > 1 else ""
            _echo(f"failed: {same[0].study}, {same[0].label}{more}: {reason}", err=True)
        if counts["busy"]:
            _echo(f"left to other processes that have them: {counts['busy']}")
        _echo(f"rows: {out / 'rows.parquet'}, {out / 'rows.json'}; see `gradleak study report --out {shlex.quote(str(out))}`")
    if as_json:
        return found
    sys.exit(_status(found))


@study_app.command(
    "status",
    cls=_Command,
    epilog=_examples("study status --out small", "study status studies/full --out full --json"),
)
def study_status(
    specs: StudyFiles = None, *, set_: Set = None, source: Sources = None, out: StudyOut, json_: Json = False
) -> Report:
    """How far a study is: finished, unfinished, failed and missing cells."""
    from gradleak.study import store

    studies = _studies(specs, out, set_, source)
    found = store.rows(studies, out)
    if json_:
        return {"folder": str(out.resolve()), "rows": found}
    for line in store.status_lines(found):
        _echo(line)
    return None


@study_app.command(
    "report",
    cls=_Command,
    epilog=_examples(
        "study report --out small                                   # writes small/report.html and report.md",
        "study report studies/small --out small --to reproduction --rows studies/results/rows.json",
    ),
)
def study_report(
    specs: StudyFiles = None,
    *,
    set_: Set = None,
    source: Sources = None,
    out: StudyOut,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Where the report goes  [default: --out]", rich_help_panel=OUTPUT)
    ] = None,
    pictures: Annotated[
        str,
        typer.Option(metavar="WHICH", help="all (128 pixels a side at most), thumbnails (64), or none", rich_help_panel=OUTPUT),
    ] = "all",
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows", metavar="FILE", help="JSON rows that cells with a score are merged into first", rich_help_panel=OUTPUT
        ),
    ] = None,
    json_: Json = False,
) -> Report:
    """Tables, curves and pictures of a study, beside what was published: Markdown and one HTML page."""
    from gradleak.study import report, store

    studies = _studies(specs, out, set_, source)
    if not out.is_dir():
        raise OutputError(f"{out}: no such folder; expected the --out of `gradleak study run`")
    found = store.save(studies, out)
    if rows is not None:
        merged = [row for row in store.merge(store.read_rows(rows), found) if store.measured(row)]
        store.write_rows(rows, merged)
        found = store.merge(found, merged)
    written = report.write_report(studies, found, to or out, cells=out / "cells", pictures=pictures)
    if json_:
        return {"files": [str(path) for path in written], "rows": len(found)}
    for path in written[:2]:
        _echo(f"report: {path}")
    return None


def _studies(specs: list[Path] | None, out: Path, set_: list[str] | None, source: list[str] | None) -> list[StudySpec]:
    """The studies of some files, or those that were run in a folder."""
    from gradleak.study.runner import STUDIES
    from gradleak.study.spec import load_studies

    if not specs:
        specs = sorted(folder for folder in (out / STUDIES).glob("*") if folder.is_dir())
        if not specs:
            raise OutputError(f"{out}: no study was run there; name its specification, or another --out")
    return load_studies(specs, sources=_sources(source), overrides=set_)


def _sources(given: list[str] | None) -> dict[str, str]:
    for text in given or []:
        if not all(text.partition("=")[::2]):
            raise SpecError(f"--source {text}: expected NAME=SOURCE, for example cifar10=npz:images.npz")
    return {name: source for name, _, source in (text.partition("=") for text in given or [])}


def commands() -> dict[str, Any]:
    """Every command by its name as it is typed, ``study run`` among them."""
    group: Any = typer.main.get_command(app)
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        below = getattr(command, "commands", None)
        found |= {name: command} if below is None else {f"{name} {inner}": each for inner, each in below.items()}
    return found


def main() -> NoReturn:
    """Entry point: bad input gives one line on standard error, or with ``--json`` one object, and exit code 2."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    given = sys.argv[1:]
    handler.setLevel(logging.WARNING if "--quiet" in given else logging.INFO)
    as_json = "--json" in given and not {"--help", "-h"} & set(given)
    if _processes() == 1:
        _run(handler, as_json=as_json)
    from gradleak.sharded import processes

    try:
        with processes() as group:
            _run(handler, as_json=as_json, group=group)
    except SpecError as error:
        _echo(f"gradleak: error: {error}", err=True)
        sys.exit(2)


def _run(handler: logging.Handler, *, as_json: bool, group: Processes | None = None) -> NoReturn:
    silent = group is not None and group.rank > 0
    try:
        with ExitStack() as quiet:
            if silent:
                nothing = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(redirect_stdout(nothing))
                quiet.enter_context(redirect_stderr(nothing))
                handler.setLevel(logging.CRITICAL)
            if not as_json:
                app(standalone_mode=True)
            with redirect_stdout(sys.stderr):  # a user's own code may print, and standard output is for the object alone
                found = app(standalone_mode=False)
    except GradleakError as error:
        if group is None or group.says_first(str(error)):
            if as_json:
                _print_json({"error": {"kind": type(error).__name__, "message": str(error)}})
            _echo(f"gradleak: error: {error}", err=True)
        sys.exit(2)
    except RuntimeError as error:
        if group is None or not group.lost(error):
            raise
        if group.says_first("lost"):
            _echo("gradleak: another process of this run has ended, so this one ends too", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        if not silent:
            _echo("gradleak: interrupted", err=True)
        sys.exit(130)
    except _UsageError as error:
        if silent:
            sys.exit(2)
        message = printable(error.format_message())
        _print_json({"error": {"kind": "UsageError", "message": message}})
        _echo(f"gradleak: error: {message}", err=True)
        sys.exit(2)
    if isinstance(found, dict) and not silent:
        _print_json(found)
    sys.exit(_status(found))


def _status(found: Any) -> int:
    """The exit code: as a shell reports a process that a signal ended, where one ended the attack early."""
    if isinstance(found, dict) and found.get("partial"):
        return 128 + signal.Signals[found["interrupted"]]
    return found if isinstance(found, int) else found.get("exit_code", 0) if isinstance(found, dict) else 0


def _print_json(found: dict[str, Any]) -> None:
    typer.echo(json.dumps(found, indent=1, allow_nan=False, default=str))


def _of_folder(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A result as --json shows it: the content of result.json or matrix.json, and where it lies."""
    return {**result, "folder": str(folder.resolve()), "report": str((folder / "report.html").resolve())}


@contextmanager
def _watching(tensorboard: Path | None, out: Path, *, redact: bool) -> Iterator[Watcher | None]:
    """What watches an attack: TensorBoard's log, where one is asked for."""
    if tensorboard is None or (_processes() > 1 and os.environ.get("RANK") != "0"):
        yield None
        return
    from gradleak.live import TensorBoard

    if out.resolve() in (tensorboard.resolve(), *tensorboard.resolve().parents):
        raise OutputError(f"--tensorboard {tensorboard}: is in the run folder {out}; choose a folder of its own")
    with TensorBoard(tensorboard, images=not redact) as watch:
        yield watch


def _only_one(*, force: bool, resume: bool) -> None:
    if force and resume:
        raise OutputError("--force starts anew and --resume goes on: give one of them")


def _overrides(
    given: list[str] | None,
    *,
    model: str | None = None,
    weights: Path | None = None,
    attack: str | None = None,
    memory_limit: float | None = None,
) -> list[str]:
    """``--set`` options, after those that options of their own stand for."""
    named = {"model.name": model, "model.weights": weights and str(weights), "attack.name": attack}
    # a JSON string is one of TOML too
    own = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in named.items() if value is not None]
    return [*own, *(given or []), *([] if memory_limit is None else [f"memory_limit_mb={memory_limit}"])]


def _image_shape(text: str) -> tuple[int, int, int]:
    """(C, H, W) from ``3x32x32``. Raises :class:`~gradleak.errors.SpecError` for anything else."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isascii() and p.isdecimal() and 0 < int(p) < 100_000 for p in parts):
        raise SpecError(f"--image-shape {text}: expected channels x height x width, for example 3x32x32")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _command() -> str:
    several = _processes()
    program = ["torchrun", f"--nproc-per-node={several}", "-m", "gradleak"] if several > 1 else ["gradleak"]
    return shlex.join([*program, *sys.argv[1:]])


def _processes() -> int:
    """How many processes torchrun started; 1 without it."""
    several = os.environ.get("WORLD_SIZE", "1")
    return int(several) if several.isdecimal() else 1


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
        _echo(f"  {name:5}  not computed: {note.partition('. ')[0]}")  # the report has all of it
    cost = result["cost"]
    _echo(f"  {cost['rounds']} rounds in {cost['seconds']:.0f} s; matching loss {result['matching_loss']:.2e}")
    _print_report(folder, result)


def _print_report(folder: Path, result: dict[str, Any]) -> None:
    _echo(f"report: {(folder / 'report.html').resolve()}")
    if not result.get("redacted"):
        _echo("It shows private images: keep the folder to yourself.")
    if result.get("partial"):
        _echo("The attack was interrupted: go on with the same command and --resume.", err=True)
        raise typer.Exit(_status(result))


def _print_names(kind: str, known: dict[str, str], *, whole: bool = False) -> None:
    """Names with their lines; the many models without one in columns, only if they are asked for."""
    from gradleak import catalogue

    lined, bare = {name: line for name, line in known.items() if line}, [name for name, line in known.items() if not line]
    width = max(map(len, lined), default=0)
    for name, line in lined.items():
        _echo_wrapped(f"  {name:{width}}  {line}", indent=width + 4)
        if whole and kind == "attacks":
            _echo_wrapped(f"  {'':{width}}  needs {catalogue.needs(name)}", indent=width + 4)
    if kind != "models":
        return
    for library in ("torchvision", "timm"):
        names = [name for name in bare if name.startswith(f"{library}/")]
        if whole and names:
            _echo(f"  {len(names)} of {library}:")
            _print_columns(names)
        elif names:
            _echo(f"  {library}/NAME: {len(names)} models; gradleak list models {library}")
        elif not whole:
            _echo(f'  {library}/NAME: not installed: pip install "gradleak[{library}]"')
    if not whole or len(bare) > 1000:
        _echo("  file.py:function, module:function: your own; see the documentation, how-to/own-model")


def _print_columns(names: Sequence[str]) -> None:
    width = max(map(len, names)) + 2
    across = max(1, (_columns() - 2) // width)
    down = -(-len(names) // across)
    for row in range(down):
        _echo("  " + "".join(f"{name:{width}}" for name in names[row::down]).rstrip())


def _print_entry(kind: str, entry: Entry) -> None:
    """All about one name: what it is, what it needs, its docstring, and its settings."""
    _echo_wrapped(f"{entry.name}: {entry.line}" if entry.line else entry.name)
    if entry.needs:
        _echo_wrapped(f"needs {entry.needs}")
    for paragraph in entry.text.splitlines():
        _echo_wrapped(f"  {paragraph}", indent=2)
    how = {"attacks": "--set KEY=VALUE", "defences": f"in a table: --set 'defence=[{{name=\"{entry.name}\", KEY=VALUE}}]'"}
    _echo(f"settings ({how.get(kind, '--set KEY=VALUE')}):" if entry.settings else "no settings")
    for setting in entry.settings:
        value = "needed" if setting.needed else "not set" if setting.default is None else json.dumps(setting.default)
        _echo_wrapped(f"  {setting.key} ({setting.type}; {value})", indent=6)
        _echo_wrapped(f"      {setting.meaning}", indent=6)


def _columns() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 120)


def _echo_wrapped(text: str, *, indent: int = 0) -> None:
    for line in textwrap.wrap(text, _columns(), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False):
        _echo(line)


def _echo(text: str, *, err: bool = False) -> None:
    """One line to the terminal: names in it may come from a file, and must not steer the terminal."""
    typer.echo(printable(text).encode(errors="backslashreplace").decode(), err=err)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
