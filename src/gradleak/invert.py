"""The loop that every attack shares: from an observation to a reconstruction, without ever seeing the truth."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gradleak.attacks import Attack
from gradleak.client import FedSGD
from gradleak.distance import DISTANCES
from gradleak.errors import DivergedError
from gradleak.labels import Labels
from gradleak.observation import Observation
from gradleak.vjp import SelfChecking, engine


@dataclass(frozen=True)
class Reconstruction:
    """What an attack rebuilt, and what it cost.

    Attributes:
        images: B x C x H x W, in [0, 1], of the round with the least matching loss.
        labels: The labels the attack used, and the rule that gave them.
        matching_loss: The least matching loss.
        best_round: Its round, counted from 1.
        rounds: Rounds run.
        seconds: Wall time of the loop.
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
    client: FedSGD,
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
    client = client.to(device, dtype)
    observed = {name: t.to(device, dtype) for name, t in observation.update.items()}
    y = labels.values.to(device)
    distance = DISTANCES[attack.distance]
    transpose_engine = engine(attack.engine)
    with _seeded(seed, device):
        image_model = attack.image_model(observation, client.parameters).to(device, dtype)
    parameters = [p for p in image_model.parameters() if p.requires_grad]
    optimiser, schedule = attack.stepper(image_model)

    best_loss, best_round, best_images, since_gain = math.inf, 0, torch.empty(0), 0
    history: list[dict[str, float]] = []
    snapshots: dict[int, Tensor] = {}
    keep = snapshot_rounds(attack.rounds, attack.snapshots)
    stopped = f"all {attack.rounds} rounds done"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with _progress(attack.rounds, progress) as report:
        for t in range(1, attack.rounds + 1):
            optimiser.zero_grad(set_to_none=True)
            images = image_model()
            update, transpose = client.vjp(images, y, engine=transpose_engine)
            loss, cotangent = distance(update, observed)
            if not math.isfinite(loss):
                stopped = f"the matching loss became {loss} in round {t}; the best earlier iterate is kept"
                break
            since_gain = 0 if loss < 0.99 * best_loss else since_gain + 1
            if loss < best_loss:
                best_loss, best_round, best_images = loss, t, images.detach().clone()
            images.backward(transpose(cotangent))
            if attack.signed:
                for p in parameters:
                    if p.grad is not None:
                        p.grad.sign_()
            rate = optimiser.param_groups[0]["lr"]
            optimiser.step()
            schedule.step()
            seconds = time.perf_counter() - start
            history.append({"round": t, "loss": loss, "learning_rate": rate, "seconds": seconds})
            if t in keep:
                snapshots[t] = _eight_bit(images)
            report(t, loss)
            if attack.patience is not None and since_gain >= attack.patience:
                stopped = f"plateau: the matching loss fell by less than 1 % in {attack.patience} rounds"
                break
    if not history:
        raise DivergedError(
            f"the first matching loss is {loss}: F's gradient at the generator's first images is not finite; "
            'try attack.precision="float64", or another seed'
        )
    with torch.no_grad():
        images = image_model()
    loss, _ = distance(client(images, y), observed)  # the last step's result has not been looked at yet
    if loss < best_loss:
        best_loss, best_round, best_images = loss, len(history) + 1, images
    seconds = time.perf_counter() - start
    notes = attack.describe(observation, client.parameters)
    if isinstance(transpose_engine, SelfChecking):
        notes["engine"] = {
            "in_use": "secant" if transpose_engine.trusted else "exact",
            "step": transpose_engine.step,
            "relative_error": transpose_engine.error,
        }
    return Reconstruction(
        images=best_images.clamp(0, 1).float().cpu(),
        labels=Labels(labels.values.cpu(), labels.rule),
        matching_loss=best_loss,
        best_round=best_round,
        rounds=len(history),
        seconds=seconds,
        stopped=stopped,
        history=history,
        snapshots=torch.stack(list(snapshots.values())) if snapshots else torch.empty(0),
        snapshot_rounds=list(snapshots),
        peak_memory_mb=peak_memory_mb(device),
        notes=notes,
    )


def noise_update(observation: Observation, *, seed: int = 0) -> Observation:
    """The control: the same observation with Gaussian noise in place of the update, each tensor of the same norm.

    An attack that still "reconstructs" something from it shows its prior, not the client's images (SPEC section 7).
    """
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(t.shape, generator=generator).to(t) for name, t in observation.update.items()}
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
    return images.detach().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A fixed random state inside; the caller's own state is untouched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
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
