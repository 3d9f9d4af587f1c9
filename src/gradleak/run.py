"""The main job: simulate a client, attack what it sends, evaluate, and leave a run folder that a person can read."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gradleak import data, mixed, models, sharded
from gradleak.attacks import Attack, attack
from gradleak.attacks.recipe import GAIN_BLIND
from gradleak.checkpoint import Checkpoint, digest
from gradleak.client import ClientOperator, Cost, build_client, defence_costs, operator, simulate
from gradleak.defences import DPSGD, visible_mask
from gradleak.defences import parse as defences_of
from gradleak.errors import DataError, DivergedError, ModelError, ObservationError, OutputError, SpecError, printable
from gradleak.evaluate import (
    Evaluation,
    evaluate,
    identify,
    mean_image_control,
    quality_over_rounds,
    remark,
    target_scores,
    verdict,
)
from gradleak.files import write_atomically
from gradleak.folder import CHECKPOINT, CONTROL, LOG, RECONSTRUCTION, RESULT, SPEC, check_folder, lock_folder, open_folder
from gradleak.invariance import random_updates, relative_changes
from gradleak.invert import Reconstruction, Watcher, invert, noise_update
from gradleak.labels import recover
from gradleak.layers import layers
from gradleak.metrics import load_lpips
from gradleak.observation import Observation, Truth
from gradleak.report import ReportData, write_report
from gradleak.results import read_result, read_run, remove_pictures
from gradleak.spec import DefenceSpec, RunSpec, dump, flat, override, read_table
from gradleak.targets import LOSSES, are_classes
from gradleak.tensors import write_tensors
from gradleak.threat import LETTERS, check_granted, letter
from gradleak.updates import from_gradient, from_weights, load_weights, read_arrays

#: A cosine distance above this after an attack on an undefended update: the images do not explain it. Small networks reach
#: 3e-3 to 8e-3 in 300 rounds where all is as said; a wrong normalisation left 4e-2.
UNEXPLAINED = 1e-2

#: Keys of a specification that change neither what is computed nor its last bit on one machine.
INDIFFERENT = {"threads", "device", "checkpoint_seconds", "memory_limit_mb", "evaluate"}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Client:
    """A simulated client: its private batch, F, the operator A, what the server holds, and what its defences cost."""

    truth: Truth
    model: nn.Module
    operator: ClientOperator
    observation: Observation
    costs: list[Cost]


def simulate_client(spec: RunSpec) -> Client:
    """The client that a specification describes, after it sent its update."""
    truth = data.load(spec.data)
    channels, height, width = truth.images.shape[1:]
    model = models.build(spec.model, image_shape=(channels, height, width))
    defences = defences_of(spec.defence)
    client = build_client(model, spec.client, len(truth.images), defences=defences)
    observation = simulate(
        client,
        truth,
        grant_labels=spec.labels.rule == "known",
        grant_batch_statistics=spec.threat.batch_statistics,
        grant_surrogate_data=spec.threat.surrogate_data,
        # a file or module named by a user is not rebuilt from an update file: that would run what the file names
        model=None if ":" in spec.model.name else spec.model,
        seed=spec.client.seed,
    )
    defended = defences or spec.client.transport is not None
    costs = defence_costs(model, spec.client, truth, defences=defences, seed=spec.client.seed) if defended else []
    return Client(truth, model, client, observation, costs)


def audit(
    spec: RunSpec,
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
    progress: bool = True,
    command: str = "",
    redact: bool = False,
    client: Client | None = None,
    watch: Watcher | None = None,
) -> dict[str, Any]:
    """Simulate, attack, evaluate, report.

    Args:
        spec: What to run.
        out: The run folder; must be empty or absent unless ``force`` or ``resume``.
        force: Overwrite an earlier run's files.
        resume: Go on with an unfinished run of the same specification; the result is that of a run that was never
            interrupted. A finished one is left as it is, and an absent one begins.
        progress: Show progress on standard error.
        command: How a reader of the report can repeat the run.
        redact: Keep the figures and no picture. While the run goes on, its checkpoints hold the attack's state.
        client: What :func:`simulate_client` gave for this specification, if it was called already.
        watch: Called after every round of the attack, not of a control (:func:`gradleak.invert.invert`).

    Returns:
        The content of ``result.json``; ``partial`` is true in it when a signal ended the attack early.
    """
    recipe, device = prepare(spec)
    text = dump(resolve(spec, recipe))
    finished = sharded.first(lambda: _finished(out, text, force=force, resume=resume))
    if finished is not None:
        return finished
    client = client or simulate_client(spec)
    decoys, unread = _decoys(spec)
    with _run_folder(out, text, force=force, resume=resume):
        keep = Checkpoint(out / CHECKPOINT, every=spec.checkpoint_seconds)
        with stopping() as stop:
            reconstruction = attack_observation(
                client.observation,
                client.model,
                recipe,
                spec,
                device,
                progress=progress,
                checkpoint=keep,
                stop=stop,
                watch=watch,
            )
            controls: dict[str, Any] = {}
            warnings: list[str] = []
            interrupted = reconstruction.interrupted
            if spec.evaluate.controls and not interrupted:
                control = Checkpoint(out / CONTROL, every=spec.checkpoint_seconds)
                controls, warnings, interrupted = _controls(
                    client, recipe, spec, device, decoys=decoys, progress=progress, checkpoint=control, stop=stop
                )

        def finish() -> dict[str, Any]:
            known = operator(client.observation, client.model)  # what the server knows of the client, as the attack had it
            result = describe(spec, recipe, client.observation, known, reconstruction, device, simulated=True, command=command)
            result |= {"partial": bool(interrupted), "interrupted": interrupted or None}
            result["warnings"] += [_partial(reconstruction, interrupted)] * bool(interrupted) + warnings + unread
            result |= {"controls": controls} if controls else {}
            result |= {"defence_costs": [dataclasses.asdict(cost) for cost in client.costs]} if client.costs else {}
            result["assumptions"] += _cost_row(client.costs)
            result = write_run(
                out,
                result,
                reconstruction,
                spec_text=text,
                truth=client.truth,
                decoys=decoys,
                lpips=spec.evaluate.lpips,
                redact=redact,
            )
            if not interrupted:
                for name in (CHECKPOINT, CONTROL):
                    Checkpoint(out / name).remove()
            return result

        return sharded.first(finish)


def _finished(out: Path, text: str, *, force: bool, resume: bool) -> dict[str, Any] | None:
    """The result of a run that ``--resume`` finds finished; None where the folder can be used."""
    check_folder(out, force=force, resume=resume)
    return check_resumable(out, text) if resume else None


@contextmanager
def _run_folder(out: Path, text: str, *, force: bool, resume: bool) -> Iterator[None]:
    """The run folder with the specification in it; of several processes the first one holds it."""
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(open_folder(out, force=force, resume=resume))
            write_atomically(out / SPEC, text)

        sharded.first(begin)
        yield


def _partial(reconstruction: Reconstruction, signal_name: str) -> str:
    """What a report says of a run that a signal ended."""
    when = reconstruction.stopped if reconstruction.interrupted else f"interrupted by {signal_name} after the attack"
    return f"Partial result: {when}. Go on with --resume."


def check_resumable(out: Path, text: str) -> dict[str, Any] | None:
    """Whether ``--resume`` can go on in this folder.

    Args:
        out: The run folder.
        text: The resolved specification, as TOML.

    Returns:
        The result of a run that is finished already; None where something is left to do.

    Raises:
        SpecError: The run in the folder is another one; names the keys that differ.
    """
    if not (out / SPEC).is_file():
        return None
    before, now = flat(read_table(out / SPEC)), flat(read_table(text))
    different = sorted(
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key) and key.partition(".")[0] not in INDIFFERENT
    )
    if different:
        faults = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in different[:3])
        raise SpecError(
            f"{out}: --resume goes on with the run that is there, and this is another one: {faults}. Use the command that "
            "began it, another --out, or --force to start anew"
        )
    if not (out / RESULT).is_file():
        return None
    result = read_result(out)
    return None if result.get("partial") else result


@contextmanager
def stopping() -> Iterator[Callable[[], str]]:
    """A function that names the signal (``SIGINT``, ``SIGTERM``) that asked for an end; an empty text until one came.

    So a round can be finished and the state be saved. A second SIGINT raises ``KeyboardInterrupt`` at once. Signals are the
    main thread's affair: elsewhere nothing is changed.
    """
    received: list[str] = []

    def note(number: int, _: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        log.warning("%s: finishing the round; then the state is saved and a partial report written", received[0])

    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _decoys(spec: RunSpec) -> tuple[Tensor | None, list[str]]:
    """Further images of the source, which the attack never sees, and a warning where they cannot be read."""
    count = spec.evaluate.candidates - spec.data.batch
    if count <= 0:
        return None, []
    try:
        decoys = data.following(spec.data, count)
    except DataError as fault:
        return None, [f"The true images were looked for among the batch alone, since others cannot be read: {fault}"]
    return (decoys if len(decoys) else None), []


def _controls(
    client: Client,
    recipe: Attack,
    spec: RunSpec,
    device: torch.device,
    *,
    decoys: Tensor | None,
    progress: bool,
    checkpoint: Checkpoint | None = None,
    stop: Callable[[], str] | None = None,
) -> tuple[dict[str, Any], list[str], str]:
    """The scores of the two controls, why one of them is missing, and the signal that interrupted them."""
    controls: dict[str, Any] = {}
    warnings: list[str] = []
    noise = noise_update(client.observation, seed=spec.seed)
    try:
        rebuilt = attack_observation(
            noise, client.model, recipe, spec, device, progress=progress, checkpoint=checkpoint, stop=stop
        )
        if rebuilt.interrupted:
            return {}, [], rebuilt.interrupted
        controls["random-noise gradient"] = sharded.first(
            lambda: {
                **evaluate(rebuilt.images, client.truth, lpips=spec.evaluate.lpips).summary,
                "identification": dataclasses.asdict(identify(rebuilt.images, client.truth, decoys=decoys)),
            }
        )
    except (ObservationError, DivergedError) as refusal:
        warnings.append(f"The attack refused the control, a random-noise gradient: {refusal}")
    controls["mean image"] = sharded.first(lambda: mean_image_control(client.truth, lpips=spec.evaluate.lpips).summary)
    return controls, warnings, ""


def invert_observation(
    observation: Observation,
    spec: RunSpec,
    out: Path,
    *,
    where: str,
    force: bool = False,
    resume: bool = False,
    progress: bool = True,
    command: str = "",
    redact: bool = False,
    watch: Watcher | None = None,
) -> dict[str, Any]:
    """Attack a saved update. There is no truth: the report shows the reconstruction and says that its quality is unknown.

    Args:
        observation: What the server holds.
        spec: ``model``, ``attack``, ``labels``, ``seed`` and ``device`` are used.
        out: The run folder.
        where: What an error message calls the observation, its file name.
        force, resume, redact, watch: As for :func:`audit`.
    """
    recipe, device = prepare(spec)
    surrogate = observation.surrogate_data or spec.threat.surrogate_data
    observation = dataclasses.replace(observation, surrogate_data=surrogate)
    model = models.build(spec.model, image_shape=observation.image_shape)
    client = operator(observation, model, where=where)
    text = f"# gradleak invert {printable(where)}\n"
    text += dump(resolve(spec, recipe), leave_out={"data", "client", "defence", "evaluate"})
    identity = digest("", observation.update)
    finished = sharded.first(lambda: _finished(out, text, force=force, resume=resume))
    if finished is not None:
        if finished.get("update_sha256") != identity:
            raise ObservationError(f"{where}: is not the update of the finished run in {out}; choose another --out")
        return finished
    with _run_folder(out, text, force=force, resume=resume):
        keep = Checkpoint(out / CHECKPOINT, every=spec.checkpoint_seconds)
        with stopping() as stop:
            reconstruction = attack_observation(
                observation,
                model,
                recipe,
                spec,
                device,
                progress=progress,
                where=where,
                checkpoint=keep,
                stop=stop,
                watch=watch,
            )

        def finish() -> dict[str, Any]:
            result = describe(spec, recipe, observation, client, reconstruction, device, simulated=False, command=command)
            result |= {"partial": bool(reconstruction.interrupted), "interrupted": reconstruction.interrupted or None}
            result["update_sha256"] = identity
            if reconstruction.interrupted:
                result["warnings"].append(_partial(reconstruction, reconstruction.interrupted))
            result = write_run(out, result, reconstruction, spec_text=text, redact=redact)
            if not reconstruction.interrupted:
                keep.remove()
            return result

        return sharded.first(finish)


def evaluate_run(
    folder: Path, truth: Truth, *, lpips: str = "auto", redact: bool = False, force: bool = False
) -> dict[str, Any]:
    """Score the reconstruction of a run folder against the truth and write its report anew.

    With ``redact`` the figures stay and the pictures are removed. With ``force`` a run that was scored against other images is
    scored against these.

    Raises:
        OutputError: The folder is not a run folder, or has no pictures any more, or was scored against other images.
        DataError: The truth has another number or shape of images.
    """
    if lpips not in ("auto", "off"):
        load_lpips(lpips)  # a wrong file is an error, not a note
    read_result(folder)  # a folder that is no run's is told before it is locked
    with lock_folder(folder):
        return _evaluate_run(folder, truth, lpips=lpips, redact=redact, force=force)


def _evaluate_run(folder: Path, truth: Truth, *, lpips: str, redact: bool, force: bool) -> dict[str, Any]:
    run = read_run(folder)
    result = _finish(
        folder,
        run.result,
        images=run.images,
        labels=run.labels,
        snapshots=run.snapshots,
        snapshot_rounds=run.snapshot_rounds,
        history=run.history,
        truth=truth,
        lpips=lpips,
        redact=redact,
        other_truth=force,
    )
    if redact:
        remove_pictures(folder)
    return result


@mixed.full_float32()
def attack_observation(
    observation: Observation,
    model: nn.Module,
    recipe: Attack,
    spec: RunSpec,
    device: torch.device,
    *,
    progress: bool,
    where: str = "observation",
    checkpoint: Checkpoint | None = None,
    stop: Callable[[], str] | None = None,
    watch: Watcher | None = None,
) -> Reconstruction:
    """Recover the labels by the specification's rule and run the attack. The truth is not an argument."""
    check_granted(str(spec.attack["name"]), recipe, observation)
    observation = dataclasses.replace(observation, update=sharded.of_first(observation.update))
    client = operator(observation, model, where=where).to(device)
    labels = recover(spec.labels.rule, observation, client)
    return invert(
        observation,
        recipe,
        client=client,
        labels=labels,
        seed=spec.seed,
        progress=progress and sharded.leads(),
        checkpoint=checkpoint,
        stop=stop,
        watch=watch,
        memory_limit_mb=spec.memory_limit_mb,
    )


def prepare(spec: RunSpec) -> tuple[Attack, torch.device]:
    """The recipe and the device of a specification; sets the number of CPU threads."""
    if spec.matrix.given:
        raise SpecError("matrix: several runs in one specification, which `gradleak audit` alone takes; leave it out here")
    settings = {key: value for key, value in spec.attack.items() if key != "name"}
    recipe = attack(str(spec.attack["name"]), **settings)
    for defence in defences_of(spec.defence):
        if isinstance(defence, DPSGD):
            _ = defence.epsilon  # a missing Opacus is named before the attack
    if spec.evaluate.lpips not in ("auto", "off"):
        load_lpips(spec.evaluate.lpips)  # a wrong file is found before the attack, not after it
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    return recipe, choose_device(spec.device)


def choose_device(name: str) -> torch.device:
    """``auto`` (CUDA if there is one, else CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        SpecError: The device is not there; says which are.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    there += ["mps"] if torch.backends.mps.is_available() else []
    # several processes have one each
    wanted = f"cuda:{torch.cuda.current_device()}" if name == "cuda" and "cuda:0" in there else name
    if wanted not in there:
        raise SpecError(f"device: {name!r} is not on this machine; available: {', '.join(there)}")
    return torch.device(wanted)


def device_name(device: torch.device) -> str:
    """What a result says of its device: ``cpu``, or ``cuda:0, NVIDIA ...``."""
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def resolve(spec: RunSpec, recipe: Attack) -> RunSpec:
    """The specification with every setting of the attack written out."""
    defences = [defence.spec for defence in defences_of(spec.defence)]
    written = {"name": spec.attack["name"], **dataclasses.asdict(recipe)}
    return spec.model_copy(update={"attack": written, "defence": defences})


@mixed.full_float32()
def describe(
    spec: RunSpec,
    recipe: Attack,
    observation: Observation,
    client: ClientOperator,
    reconstruction: Reconstruction,
    device: torch.device,
    *,
    simulated: bool,
    command: str = "",
) -> dict[str, Any]:
    """What result.json says of a run without its truth; ``simulated``: whether the client was."""
    there = client.to(device)
    there.in_pieces(reconstruction.notes.get("images_at_a_time"))
    used = reconstruction.labels.values.to(device)
    probes = random_updates(there, used, observation.image_shape)
    rebuilt = there(reconstruction.images.to(next(iter(there.weights.values()))), used)
    return {
        "attack": {"name": spec.attack["name"], **dataclasses.asdict(recipe), **reconstruction.notes},
        "matching_loss": reconstruction.matching_loss,
        "best_round": reconstruction.best_round,
        "stopped": reconstruction.stopped,
        "assumptions": assumptions(spec, observation, client, reconstruction, simulated=simulated),
        "labels": {
            "rule": reconstruction.labels.rule,
            "values": reconstruction.labels.values.tolist() if are_classes(reconstruction.labels.values) else None,
            "shape": list(reconstruction.labels.values.shape),
            "classes": _classes(client, observation),
            "accuracy": None,
        },
        "image_shape": list(observation.image_shape),
        "image_sensitivity": max(relative_changes(*probes).values(), default=0.0),
        "layers": [dataclasses.asdict(layer) for layer in layers(observation.update, rebuilt, probes)],
        "cost": {
            "rounds": reconstruction.rounds,
            "seconds": round(reconstruction.seconds, 3),
            "seconds_per_round": round(reconstruction.history[-1]["seconds"] / reconstruction.rounds, 5),
            "peak_memory_mb": round(reconstruction.peak_memory_mb, 1),
        },
        "advice": advice(observation, client),
        "partial": False,
        "interrupted": None,
        "warnings": list(reconstruction.warnings),
        "seed": spec.seed,
        "device": device_name(device),
        "processes": sharded.count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }


def _classes(client: ClientOperator, observation: Observation) -> int | None:
    """K, the size of dimension 1 of F's output; None where it has none, or the loss is not about classes."""
    if client.loss_name in LOSSES and client.loss_name != "cross-entropy":
        return None
    with torch.no_grad():
        images = torch.zeros(2, *observation.image_shape).to(next(iter(client.weights.values())))
        output = client.outputs(images)
    return output.shape[1] if output.ndim > 1 else None


def named(defence: DefenceSpec) -> str:
    """A defence with its settings, in words."""
    settings = ", ".join(f"{key} {value}" for key, value in defence.settings.items())
    return f"{defence.name} ({settings})" if settings else defence.name


def _cost_row(costs: list[Cost]) -> list[dict[str, str]]:
    """What the defences cost, for the assumptions box."""
    if not costs:
        return []
    epsilons = [f", epsilon {c.epsilon:.2f} at delta {c.delta:.0e}" for c in costs if c.epsilon is not None]
    value = "; ".join(f"{c.name} {c.distortion:.3g}" for c in costs)
    why = f"relative distortion of the update by each; all together {costs[-1].total:.3g}{''.join(epsilons)}"
    return [{"name": "Cost of the defences", "value": value, "why": why}]


def protocol_in_words(observation: Observation) -> str:
    """The client's protocol, sent layers and number format."""
    spec = observation.protocol
    text = {
        "fedsgd": "FedSGD: one gradient of one batch",
        "fedavg": f"FedAvg: {spec.epochs} local epoch{'s' * (spec.epochs != 1)} in batches of "
        f"{spec.local_batch or observation.batch}, rate {spec.learning_rate}, momentum {spec.momentum}, order {spec.order}",
        "average": f"the average of several clients' gradients, {spec.clients}",
    }[spec.protocol]
    if spec.layers:
        more = f" and {len(spec.layers) - 6} more" if len(spec.layers) > 8 else ""
        text += f"; sent layers: {', '.join(spec.layers[: 6 if more else None])}{more}"
    return text + (f"; sent as {spec.transport}" if spec.transport else "")


def _normalisation(client: ClientOperator) -> tuple[str, str]:
    """What is put before F, in words, and what to think of."""
    constants = models.normalisation(client.model)
    if constants is None:
        return "none", "if the client normalises its images outside the model, say so: model.mean and model.std"
    mean, std = (", ".join(f"{v:g}" for v in values) for values in constants)
    return f"mean {mean}; std {std}", "the client subtracts and divides by it before the model"


def _weights(spec: RunSpec, observation: Observation, *, simulated: bool) -> str:
    """Where W comes from, in words."""
    if not simulated and observation.weights:
        return "came with the update"
    if spec.model.weights is not None:
        return "from a file"
    return "the model's own" if ":" in spec.model.name else f"random initialisation, seed {spec.model.seed}"


def assumptions(
    spec: RunSpec, observation: Observation, client: ClientOperator, reconstruction: Reconstruction, *, simulated: bool
) -> list[dict[str, str]]:
    """The assumptions box: what the attacker was granted, and what F and the batch were."""
    surrogate = observation.surrogate_data or bool(reconstruction.notes.get("surrogate_data"))
    key = letter(dataclasses.replace(observation, surrogate_data=surrogate))
    unknowns = observation.batch * observation.image_shape[0] * observation.image_shape[1] * observation.image_shape[2]
    pruned = any(defence.name in ("prune", "soteria") for defence in observation.defences)
    equations = sum(int(m.sum()) for m in visible_mask(observation).values()) if pruned else client.parameters
    used, rule = reconstruction.labels.values, reconstruction.labels.rule
    one_class_each = are_classes(used)
    counts = torch.bincount(used) if one_class_each else torch.zeros(1)
    repeats = int(counts[counts > 1].sum())
    noun = "labels" if one_class_each else "targets"
    kinds = sorted({type(m).__name__ for m in client.model.modules() if type(m).__module__.endswith(".activation")})
    coupled, gain = client.has_batch_statistics, reconstruction.notes["gain_check"]
    rows = [
        ("Threat model", f"{key}: {LETTERS[key]}", "letters of Carletti et al., SoK, USENIX Security 2025"),
        ("Model and weights", "known to the server", "in federated learning the server sent them"),
        (
            noun.capitalize(),
            "granted"
            if rule == "known"
            else "optimised together with the images"
            if rule == "joint"
            else f"recovered from the update, rule {rule!r}",
            "the update does not depend on the order of the images"
            if observation.protocol.protocol == "fedsgd"
            else "in the order of the images, which tells their local step or client"
            if rule == "known"
            else "in no particular order, though the update depends on it: a wrong order costs quality",
        ),
        ("Repeated labels", f"{repeats} of {observation.batch} images share a class with another", "they mix with each other")
        if one_class_each
        else ("Shape of the targets", " x ".join(map(str, used.shape)), "the first is the batch"),
        ("Batch size", str(observation.batch), "known to the server"),
        ("Client", protocol_in_words(observation), f"loss: {observation.protocol.loss}"),
        (
            "Mode",
            observation.protocol.mode,
            "batch norm uses the batch's own statistics, so the images of a batch are coupled"
            if coupled
            else "images are not coupled through batch statistics",
        ),
        (
            "Gain of the images",
            f"not told by the update (sensitivity {gain['sensitivity']:.1e})"
            if gain["sensitivity"] < GAIN_BLIND
            else f"told by the update (sensitivity {gain['sensitivity']:.2g})",
            f"brightest values put at 1: multiplied by {gain['applied']:.3f}, without the truth"
            if gain["applied"] != 1
            else "reconstruction left as it ended",
        ),
        (
            "Activations of F",
            ", ".join(kinds) or "none as modules",
            "deep networks leak far less with ones that are not smooth; shallow ones hardly do",
        ),
        ("Normalisation of the images", *_normalisation(client)),
        ("Weights", _weights(spec, observation, simulated=simulated), "a trained model can leak differently"),
        (
            "Counting",
            f"P(F) = {equations:,} equations for B*C*H*W = {unknowns:,} unknowns",
            "fewer equations than unknowns: inputs cannot be unique"
            if equations < unknowns
            else "enough equations for a unique answer; not a guarantee of one",
        ),
        (
            "Defences",
            "; ".join(named(defence) for defence in observation.defences) or "none",
            "the attacker knows them" if observation.defences else "the update is sent as it is",
        ),
        *(("The audited model", note, "the figures hold for that model") for note in client.notes),
    ]
    if client.has_dropout:
        rows.append(("Dropout", "switched off in the client", "the server could not know its masks"))
    if observation.batch_statistics is not None:
        rows.append(("Batch statistics", "granted", "mean and variance of the client's batch at every batch-norm layer"))
    if surrogate:
        rows.append(("Surrogate data", "held by the attacker", "for example a generator trained on public images"))
    return [{"name": name, "value": value, "why": why} for name, value, why in rows]


def advice(observation: Observation, client: ClientOperator) -> list[dict[str, str]]:
    """What would lower the leak, most effective first."""
    protocol, defended = observation.protocol, {defence.name for defence in observation.defences}
    images = f"{observation.batch} image{'s' if observation.batch > 1 else ''}"
    rows = []
    if protocol.protocol != "average":
        rows.append(
            (
                "Never let the server see one client's update alone",
                "Secure aggregation hides it in the sum of many. Averaging by itself is no protection: the sum is the gradient "
                "of one large batch, and only its size protects.",
            )
        )
    if "dp-sgd" not in defended:
        rows.append(
            (
                "Clip and add noise (DP-SGD)",
                "Per-sample clipping with Gaussian noise bounds what any one image can contribute; state the epsilon, and "
                "audit again with the noise in place.",
            )
        )
    if protocol.protocol != "fedavg":
        rows.append(
            (
                "Send less often, after more local work",
                f"This update is one step on {images}. Larger batches and several local steps give the attacker more unknowns "
                "and a harder problem.",
            )
        )
    if not protocol.layers:
        rows.append(
            (
                "Send fewer layers",
                f"The update has {client.parameters:,} numbers. Frozen or personal layers that are never sent take equations "
                "away.",
            )
        )
    if observation.labels is not None:
        rows.append(
            (
                "Do not count on hidden labels",
                "This run granted them. They can usually be recovered from the last layer's gradient, or optimised with the "
                "images: try labels.rule=auto.",
            )
        )
    return [{"title": title, "text": text} for title, text in rows]


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("gradleak", "torchvision", "piq", "lpips", "scipy", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_run(
    folder: Path,
    result: dict[str, Any],
    reconstruction: Reconstruction,
    *,
    spec_text: str,
    truth: Truth | None = None,
    decoys: Tensor | None = None,
    lpips: str = "auto",
    redact: bool = False,
) -> dict[str, Any]:
    """Write a run folder: spec.toml, log.jsonl, reconstruction.safetensors, then what the evaluation adds."""
    labels = reconstruction.labels.values
    tensors = {"images": reconstruction.images, "labels": labels}
    if reconstruction.snapshot_rounds:
        tensors["snapshots"] = reconstruction.snapshots
        tensors["snapshot_rounds"] = torch.tensor(reconstruction.snapshot_rounds)
    write_atomically(folder / SPEC, spec_text)
    write_atomically(folder / LOG, "".join(json.dumps(row) + "\n" for row in reconstruction.history))
    if not redact:
        write_tensors(folder / RECONSTRUCTION, tensors, {"format": "gradleak-reconstruction", "version": "1"})
    return _finish(
        folder,
        result,
        images=reconstruction.images,
        labels=labels,
        snapshots=reconstruction.snapshots,
        snapshot_rounds=reconstruction.snapshot_rounds,
        history=reconstruction.history,
        truth=truth,
        decoys=decoys,
        lpips=lpips,
        redact=redact,
    )


def _finish(
    folder: Path,
    result: dict[str, Any],
    *,
    images: Tensor,
    labels: Tensor,
    snapshots: Tensor,
    snapshot_rounds: Sequence[float],
    history: list[dict[str, float]],
    truth: Truth | None,
    lpips: str,
    redact: bool,
    decoys: Tensor | None = None,
    other_truth: bool = False,
) -> dict[str, Any]:
    """result.json, report.html and grid.png, with scores where there is a truth, without pictures where they are redacted."""
    if redact:
        result["redacted"] = True
        truth = None if truth is None else dataclasses.replace(truth, names=())  # of files or people
    frames = snapshots.float() / 255 if len(snapshots) else None
    quality: dict[str, list[Any]] = {} if frames is None else {"round": list(snapshot_rounds)}
    if truth is None:
        result["verdict"] = (
            "No truth was given, so how close these images are to the client's is unknown: look at them, or score them with "
            "`gradleak evaluate`."
        )
    else:
        evaluation = evaluate(images, truth, labels=labels, lpips=lpips)
        before, now = (result.get("per_image") or {}).get("mse"), evaluation.per_image["mse"]
        if (
            before
            and not other_truth
            and any(abs((a or 0) - (b or 0)) > 1e-4 * ((a or 0) + (b or 0)) for a, b in zip(before, now, strict=True))
        ):
            raise OutputError(
                f"{folder}: was scored against other images, and that report would be lost; give this run's truth, or --force"
            )
        result |= scores(evaluation)
        result["identification"] = dataclasses.asdict(identify(images, truth, decoys=decoys))
        result["labels"] |= target_scores(
            labels, truth.labels, classes=result["labels"].get("classes"), assignment=evaluation.assignment
        )
        if frames is not None:
            quality |= quality_over_rounds(frames, truth)
            result["quality"] = quality
    result["warnings"] += [text for text in weaknesses(result, truth) if text not in result["warnings"]]
    mean_ssim = ((result.get("metrics") or {}).get("ssim") or {}).get("mean")
    doubt = remark(mean_ssim, result.get("controls"), image_sensitivity=result.get("image_sensitivity"))
    result["verdict"] += f" {doubt}" if doubt else ""
    if result.get("partial"):
        result["verdict"] = f"Partial result, the attack was interrupted. {result['verdict']}"
    shown, frames = (None, None) if redact else (images, frames)
    write_report(
        folder,
        ReportData(result=result, images=shown, truth=truth, snapshots=frames, history=history, quality=quality),
    )
    write_atomically(folder / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def weaknesses(result: dict[str, Any], truth: Truth | None = None) -> list[str]:
    """Why this attack may have rebuilt less than there is to rebuild: sentences for the top of the report.

    Args:
        result: As result.json, with scores where there are some.
        truth: The client's batch.
    """
    found, labels = [], result["labels"]
    said = {row["name"]: row["value"] for row in result["assumptions"]}
    defended = said.get("Defences", "none") != "none" or "; sent as" in said.get("Client", "")
    accuracy, loss = labels.get("accuracy"), result["matching_loss"]
    if labels["rule"] not in ("known", "joint") and accuracy is not None and accuracy < 1:
        found.append(
            f"Only {100 * accuracy:.0f} % of the labels that the attack used are right. With labels.rule=known it would show "
            "what the update gives away once they are."
        )
    away = result["attack"].get("cosine_distance", loss if result["attack"].get("distance") == "cosine" else None)
    if away is not None and away > UNEXPLAINED and not defended and not result.get("partial"):
        found.append(
            f"The cosine distance of the updates is still {away:.1e}: the rebuilt images do not explain the update yet. More "
            "rounds may rebuild more, or the client's loss, mode, steps or normalisation is another than was said."
        )
    if truth is not None and are_classes(truth.labels) and len(truth.labels) > 1 and len(truth.labels.unique()) == 1:
        found.append(
            f"All {len(truth.labels)} images are of one class, which hides them among each other. Batches that a client "
            "shuffles seldom are: data.order=shuffled draws them from a folder so."
        )
    return found


def scores(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as result.json holds it."""
    table = evaluation.to_dict()
    return {
        "verdict": verdict(evaluation),
        "metrics": table["summary"],
        "per_image": table["per_image"],
        "assignment": table["assignment"],
        "many_to_one": table["many_to_one"],
        "notes": table["notes"],
    }


def spec_for(observation: Observation, *, model: str | None, overrides: list[str], where: str) -> RunSpec:
    """The specification of an attack on a saved update: its own model unless another is named, labels known if granted.

    Args:
        observation: What the server holds.
        model: Name of the model, or None for the built-in one that the observation describes.
        overrides: ``key=value``, as for :func:`gradleak.spec.load`.
        where: What an error message calls the observation.

    Raises:
        ModelError: The observation does not say which model it came from, and none was named.
    """
    described = {} if observation.model is None else observation.model.model_dump(exclude_none=True)
    for key, _, value in (text.partition("=") for text in overrides):
        model = value.strip().strip("\"'") if key.strip() == "model.name" else model
    if model is None and observation.model is None:
        raise ModelError(
            f"{where}: it does not say which model it came from; name it with --model, for example --model models.py:build"
        )
    if model is not None:
        declared = {} if observation.normalisation is None else observation.normalisation._asdict()
        described = {**(described if described.get("name") == model else declared), "name": model}
    rule = "known" if observation.labels is not None else "auto"
    return override({"model": described, "labels": {"rule": rule}}, overrides)


def convert(
    spec: RunSpec,
    *,
    gradient: Path | None,
    before: Path | None,
    after: Path | None,
    batch: int,
    image_shape: tuple[int, int, int],
    labels: Tensor | None,
) -> Observation:
    """An observation of arrays in files (:func:`gradleak.updates.read_arrays`): a gradient, or weights before and after.

    Args:
        spec: ``model``, ``client``, ``defence`` and ``threat.surrogate_data`` are used.
        gradient: The gradient; then ``before`` are the weights at which it was taken.
        before: W; None: the model's own.
        after: The client's weights after its training, in place of ``gradient``.
        batch: B.
        image_shape: (C, H, W).
        labels: Classes or targets; None: not known to the server.

    Raises:
        ObservationError: A file is no file of arrays, or does not fit the model.
    """
    model = models.build(spec.model, image_shape=image_shape)
    shared: dict[str, Any] = {"batch": batch, "image_shape": image_shape, "client": spec.client, "labels": labels}
    # the transport's number format has been applied to what is in the file
    shared |= {"mean": spec.model.mean, "std": spec.model.std, "defences": spec.defence}
    try:
        if gradient is not None:
            if before is not None:
                load_weights(model, read_arrays(before), where=str(before))
            observation = from_gradient(read_arrays(gradient), model, **shared)
        else:
            assert after is not None
            old = None if before is None else read_arrays(before)
            observation = from_weights(old, read_arrays(after), model, **shared)
    except ObservationError as error:
        path = str(gradient or after)
        raise ObservationError(str(error) if str(error).startswith(path) else f"{path}: {error}") from None
    described = None if ":" in spec.model.name else spec.model
    return dataclasses.replace(observation, model=described, surrogate_data=spec.threat.surrogate_data)


def prepare_file(path: Path, *, force: bool = False) -> None:
    """Raise :class:`~gradleak.errors.OutputError` unless ``path`` can be written; creates its folder (0700) if needed."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder, expected the name of a file to write")
    if path.exists() and not force:
        raise OutputError(f"{path}: exists; choose another name, or overwrite it with --force")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be created: {error.strerror or error}") from None
