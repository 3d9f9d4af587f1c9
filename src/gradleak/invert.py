"""The loop that every attack shares: from an observation to a reconstruction, without ever seeing the truth."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradleak.attacks import Attack, Problem
from gradleak.client import ClientOperator
from gradleak.distance import DISTANCES
from gradleak.errors import DivergedError
from gradleak.invariance import bright_gain, gain_sensitivity, hold_gain
from gradleak.labels import Labels
from gradleak.observation import Observation
from gradleak.vjp import SelfChecking, engine


@dataclass(frozen=True)
class Reconstruction:
    """What an attack rebuilt, and what it cost.

    Attributes:
        images: B x C x H x W, in [0, 1], of the round with the least matching loss; its gain as ``notes`` says.
        labels: The labels the attack used, and the rule that gave them.
        matching_loss: The least matching loss.
        best_round: Its round, counted from 1.
        rounds: Rounds run, of the restart that is kept.
        seconds: Wall time, all restarts together.
        stopped: Why the loop ended.
        history: One row a round: ``round``, ``loss``, ``learning_rate``, ``seconds``.
        snapshots: S x B x C x H x W, uint8, iterates of ``snapshot_rounds``.
        peak_memory_mb: Highest memory of the process (CPU) or of the device.
        notes: What else a report should say (generator size, engine, warnings).
    """

    images: Tensor
    labels: Labels
    matching_loss: float
    best_round: int
    rounds: int
    seconds: float
    stopped: str
    history: list[dict[str, float]]
    snapshots: Tensor
    snapshot_rounds: list[int]
    peak_memory_mb: float
    notes: dict[str, Any] = field(default_factory=dict)


def invert(
    observation: Observation,
    attack: Attack,
    *,
    client: ClientOperator,
    labels: Labels,
    seed: int = 0,
    progress: bool = True,
) -> Reconstruction:
    r"""Rebuild the client's images: minimise :math:`D(A(G(\theta), y), g^*)` over :math:`\theta`.

    The iterate with the least matching loss is returned; quality is never looked at, and could not be.

    Args:
        observation: What the server holds.
        attack: A recipe from :mod:`gradleak.attacks`.
        client: The operator A, at the observation's weights (:func:`gradleak.client.operator`).
        labels: From :func:`gradleak.labels.recover`.
        seed: Makes a run repeatable on one machine with one number of threads.
        progress: A bar on a terminal and in notebooks, a line now and then elsewhere; False: silence.

    Raises:
        DivergedError: The very first matching loss is not finite.
    """
    dtype = torch.float64 if attack.precision == "float64" else torch.float32
    device = next(iter(client.weights.values())).device
    client, y = client.to(device, dtype), labels.values.to(device)
    probe = torch.rand(observation.batch, *observation.image_shape, generator=torch.Generator().manual_seed(0))
    problem = Problem(
        observation=observation,
        client=client,
        # in the client's order, not the file's: sums over tensors then give the same last bit
        observed={name: observation.update[name].to(device, dtype) for name in client.weights},
        labels=y,
        gain_sensitivity=gain_sensitivity(client, probe.to(device, dtype), y),
    )
    start = time.perf_counter()
    images = attack.closed_form(problem)
    if images is not None:
        return _without_loop(problem, attack, labels, images, seconds=time.perf_counter() - start)
    runs: list[Reconstruction] = []
    for k in range(attack.repeat):
        try:
            runs.append(_run(problem, attack, labels, seed=seed + k, progress=progress))
        except DivergedError:
            if k == attack.repeat - 1 and not runs:
                raise
    best = min(runs, key=lambda run: run.matching_loss)
    return dataclasses.replace(best, seconds=time.perf_counter() - start)


def _without_loop(problem: Problem, attack: Attack, labels: Labels, images: Tensor, *, seconds: float) -> Reconstruction:
    """What a closed form computed, with the matching loss that it reaches."""
    loss, _ = DISTANCES[attack.distance](problem.client(images, problem.labels), problem.observed)
    return Reconstruction(
        images=images.clamp(0, 1).float().cpu(),
        labels=Labels(labels.values.cpu(), labels.rule),
        matching_loss=loss,
        best_round=1,
        rounds=1,
        seconds=seconds,
        stopped="computed in closed form",
        history=[{"round": 1, "loss": loss, "learning_rate": 0.0, "seconds": seconds}],
        snapshots=torch.empty(0),
        snapshot_rounds=[],
        peak_memory_mb=peak_memory_mb(images.device),
        notes={
            **attack.describe(problem, nn.Identity()),
            "gain_check": {"sensitivity": problem.gain_sensitivity, "applied": 1.0},
        },
    )


def soft_labels(image_model: nn.Module) -> Tensor:
    """The labels that an image model with ``joint_labels`` optimises: B x classes, rows summing to 1."""
    labels: Callable[[], Tensor] = image_model.labels  # type: ignore[assignment]
    return labels()


class _NotFinite(Exception):
    """The matching loss of an evaluation is not finite."""


def _run(problem: Problem, attack: Attack, labels: Labels, *, seed: int, progress: bool) -> Reconstruction:
    """One restart of the loop."""
    client, observed, y = problem.client, problem.observed, problem.labels
    weight = next(iter(client.weights.values()))
    device = weight.device
    distance = DISTANCES[attack.distance]
    transpose_engine = engine(attack.engine)
    with _seeded(seed):
        image_model = attack.image_model(problem).to(weight)
    natural = attack.gain == "natural" and problem.gain_blind
    best = _Best()
    images = torch.empty(0)

    def match(member: Tensor) -> tuple[float, Tensor]:
        """The matching loss of one member's images, and its cotangent with respect to them."""
        if attack.joint_labels:
            soft = soft_labels(image_model)
            update, both = client.joint_vjp(member, soft, engine=transpose_engine)
        else:
            update, transpose = client.vjp(member, y, engine=transpose_engine)
        loss, cotangent = distance(update, observed)
        if not math.isfinite(loss):
            raise _NotFinite(loss)
        if not attack.joint_labels:
            best.offer(loss, member, y)
            return loss, transpose(cotangent)
        best.offer(loss, member, soft.argmax(1))
        image_cotangent, label_cotangent = both(cotangent)
        soft.backward(label_cotangent)
        return loss, image_cotangent

    def evaluate(parameters: list[nn.Parameter]) -> float:
        """The matching loss at the present parameters, and the gradient of loss plus prior in their ``grad``."""
        nonlocal images
        for p in image_model.parameters():
            p.grad = None
        images = image_model()
        penalty = attack.prior(images, problem)
        if penalty is not None:
            penalty.backward(retain_graph=True)
        losses, cotangents = [], []
        for member in images.split(problem.batch):
            loss, cotangent = match(member)
            losses.append(loss)
            cotangents.append(hold_gain(member, cotangent) if natural else cotangent)
        images.backward(torch.cat(cotangents))
        if attack.signed:
            for p in parameters:
                if p.grad is not None:
                    p.grad.sign_()
        return min(losses)

    history: list[dict[str, float]] = []
    snapshots: dict[int, Tensor] = {}
    phases = attack.phases(image_model)
    rounds = sum(phase.rounds for phase in phases)
    keep = snapshot_rounds(rounds, attack.snapshots)
    stopped = f"all {rounds} rounds done"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with _progress(rounds, progress) as report:
        for t, phase in enumerate((p for p in phases for _ in range(p.rounds)), start=1):
            parameters = [p for group in phase.optimiser.param_groups for p in group["params"]]
            rate = phase.optimiser.param_groups[0]["lr"]
            try:
                loss = float(phase.optimiser.step(lambda: evaluate(parameters)))  # noqa: B023
            except _NotFinite as fault:
                if math.isinf(best.loss):
                    raise DivergedError(
                        f"the first matching loss is {fault}: F's gradient at the attack's first images is not finite; "
                        'try attack.precision="float64", or another seed'
                    ) from None
                stopped = f"the matching loss became {fault} in round {t}; the best earlier iterate is kept"
                break
            phase.schedule.step()
            attack.project(image_model)
            best.round_done(t)
            history.append({"round": t, "loss": loss, "learning_rate": rate, "seconds": time.perf_counter() - start})
            if t in keep:
                snapshots[t] = images[: problem.batch].detach().half().cpu()
            report(t, loss)
            if attack.patience is not None and t - best.last_gain >= attack.patience:
                stopped = f"plateau: the matching loss fell by less than 1 % in {attack.patience} rounds"
                break
    with torch.no_grad():  # the last step's result has not been looked at yet
        images = image_model()
        y = soft_labels(image_model) if attack.joint_labels else y
    for member in images.split(problem.batch):
        loss, _ = distance(client(member, y), observed)
        if math.isfinite(loss):
            best.offer(loss, member, y.argmax(1) if attack.joint_labels else y)
    best.round_done(len(history) + 1)
    notes = attack.describe(problem, image_model)
    gain = bright_gain(best.images) if natural else 1.0
    if gain != 1 and distance(client(gain * best.images, best.labels), observed)[0] > 1.5 * best.loss:
        gain = 1.0  # the update has the last word
    images = (gain * best.images).clamp(0, 1)
    notes["gain_check"] = {"sensitivity": problem.gain_sensitivity, "applied": gain}
    if isinstance(transpose_engine, SelfChecking):
        notes["engine_check"] = {
            "in_use": "secant" if transpose_engine.trusted else "exact",
            "step": transpose_engine.step,
            "relative_error": transpose_engine.error if math.isfinite(transpose_engine.error) else None,
        }
    return Reconstruction(
        images=images.float().cpu(),
        labels=Labels(best.labels.cpu(), "joint" if attack.joint_labels else labels.rule),
        matching_loss=best.loss,
        best_round=best.round,
        rounds=max(1, len(history)),
        seconds=time.perf_counter() - start,
        stopped=stopped,
        history=history,
        snapshots=torch.stack([_eight_bit(gain * x) for x in snapshots.values()]) if snapshots else torch.empty(0),
        snapshot_rounds=list(snapshots),
        peak_memory_mb=peak_memory_mb(device),
        notes=notes,
    )


class _Best:
    """The iterate with the least matching loss, and when the loss last fell by at least 1 %."""

    def __init__(self) -> None:
        self.loss, self.round, self.images, self.labels = math.inf, 0, torch.empty(0), torch.empty(0)
        self.last_gain, self._goal, self._new = 0, math.inf, False

    def offer(self, loss: float, images: Tensor, labels: Tensor) -> None:
        if loss < self.loss:
            self.loss, self._new = loss, True
            self.images, self.labels = images.detach().clone(), labels.detach().clone()

    def round_done(self, t: int) -> None:
        if self._new:
            self.round, self._new = t, False
        if self.loss < 0.99 * self._goal:
            self.last_gain, self._goal = t, self.loss


def noise_update(observation: Observation, *, seed: int = 0) -> Observation:
    """The control: the same observation with Gaussian noise in place of the update, each tensor of the same norm.

    An attack that still "reconstructs" something from it shows its prior, not the client's images.
    """
    generator = torch.Generator().manual_seed(seed)
    # what the client visibly did not send stays unsent, or the control would be another problem
    noise = {name: torch.randn(t.shape, generator=generator).to(t) * (t != 0) for name, t in observation.update.items()}
    update = {
        name: n * (observation.update[name].norm() / n.norm().clamp_min(torch.finfo(n.dtype).tiny)) for name, n in noise.items()
    }
    return dataclasses.replace(observation, update=update)


def snapshot_rounds(rounds: int, count: int) -> set[int]:
    """At most ``count`` rounds of 1..``rounds``, the last one among them, denser early on where pictures change most."""
    return {max(1, round(rounds * (k / count) ** 1.5)) for k in range(1, count + 1)} if count else set()


def peak_memory_mb(device: torch.device) -> float:
    """Highest memory so far, in MiB: of the device on CUDA, else of this process (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _eight_bit(images: Tensor) -> Tensor:
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A fixed random state inside; the caller's own state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # image models are made on the CPU
        yield


@contextmanager
def _progress(rounds: int, show: bool) -> Iterator[Any]:
    """A callback (round, loss): a bar where one can be drawn, else about twenty lines on standard error."""
    if not show:
        yield lambda t, loss: None
        return
    drawable = sys.stderr.isatty() or "ipykernel" in sys.modules
    if drawable:
        with tqdm(total=rounds, desc="attack", unit="round") as bar:

            def draw(t: int, loss: float) -> None:
                bar.update()
                bar.set_postfix_str(f"loss {loss:.2e}", refresh=False)

            yield draw
        return
    start, every = time.perf_counter(), max(1, rounds // 20)

    def line(t: int, loss: float) -> None:
        if t % every == 0 or t == rounds or t == 1:
            each = (time.perf_counter() - start) / t
            left = each * (rounds - t)
            print(f"round {t}/{rounds}  loss {loss:.2e}  {each:.2f} s/round  {left:.0f} s left", file=sys.stderr, flush=True)

    yield line
