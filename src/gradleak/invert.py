"""The loop that every attack shares: from an observation to a reconstruction, without ever seeing the truth."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from gradleak import mixed
from gradleak.attacks import Attack, Problem
from gradleak.attacks.recipe import Phase, schedule_factor
from gradleak.checkpoint import Checkpoint, digest
from gradleak.client import ClientOperator
from gradleak.distance import DISTANCES, Distance, cosine
from gradleak.errors import CheckpointError, DivergedError, MemoryLimitError, SpecError
from gradleak.invariance import bright_gain, gain_sensitivity, hold_gain
from gradleak.labels import Labels
from gradleak.memory import fit, is_out_of_memory, keep_freed_memory
from gradleak.observation import Observation
from gradleak.prior import coarse, total_variation
from gradleak.sharded import shard
from gradleak.targets import FreeTargets
from gradleak.vjp import SIGNED_TOLERANCE, TOLERANCE, Engine, SelfChecking, engine
from gradleak.whitening import Whitened, whitened

#: A state to fall back to is taken at most once in so many rounds: copying a large generator costs time.
RETREAT_EVERY = 10

#: After a fall back the step is so much of what it was.
SMALLER_STEP = 0.1

#: Step of Adam on targets that are optimised beside an attack's images (rule ``joint``).
TARGET_RATE = 0.05

#: All of F is in bfloat16 (:func:`gradleak.mixed.whole`) where the update has so many numbers: with fewer the rounding averages
#: out less, and costs more rounds than it saves time (docs/performance.md).
WHOLE_FROM = 2**20

#: It stays so while the cotangent of the images is so near to that of float32, as a fraction of its norm; looked at every so
#: many rounds.
WHOLE_TOLERANCE, WHOLE_EVERY = 0.3, 100

#: Where an attack compares the last layers only, this share of its first phase's rounds, the last ones, compares all of the
#: update: without them two images of one class may stay mixed (docs/experiments.md).
COMPARE_ALL = 0.25

#: A best loss that is older than this share of the rounds run is reported as a plateau.
PLATEAU = 0.25

log = logging.getLogger(__name__)


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
        notes: What else a report should say (generator size, engine).
        warnings: What a reader must know: a fall back to an earlier state, a plateau, memory that ran out.
        interrupted: The signal that ended the loop before its last round, as ``stop`` named it; empty: none did.
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
    warnings: list[str] = field(default_factory=list)
    interrupted: str = ""


@dataclass(frozen=True)
class Progress:
    """What a watcher is shown after a round; copies, so that nothing it does reaches the attack.

    Attributes:
        round: t, from 1; of this restart.
        rounds: T.
        restart: From 0.
        loss: The matching loss of this round (the least of a group's).
        best_loss: The least one of this restart so far.
        learning_rate: The optimiser's, in this round.
        images: B x C x H x W, the iterate of ``best_loss``; about in [0, 1], not clamped.
    """

    round: int
    rounds: int
    restart: int
    loss: float
    best_loss: float
    learning_rate: float
    images: Tensor


#: Called after each round (:mod:`gradleak.live` has two).
Watcher = Callable[[Progress], None]


@mixed.full_float32()
def invert(
    observation: Observation,
    attack: Attack,
    *,
    client: ClientOperator,
    labels: Labels,
    seed: int = 0,
    progress: bool = True,
    checkpoint: Checkpoint | None = None,
    stop: Callable[[], str] | None = None,
    watch: Watcher | None = None,
    memory_limit_mb: float | None = None,
) -> Reconstruction:
    r"""Rebuild the client's images: minimise :math:`D(A(G(\theta), y), g^*)` over :math:`\theta`.

    The iterate with the least matching loss is returned, of those since CI-Net's rounds on pixels last began from smoothed
    images, where they begin more than once; quality is never looked at, and could not be. Inside
    :func:`gradleak.sharded.processes` each process computes with its images; all return the same, and the first one writes
    checkpoints.

    Args:
        observation: What the server holds.
        attack: A recipe from :mod:`gradleak.attacks`.
        client: The operator A, at the observation's weights (:func:`gradleak.client.operator`).
        labels: From :func:`gradleak.labels.recover`.
        seed: Makes a run repeatable on one machine with one number of threads.
        progress: A bar on a terminal and in notebooks, a line now and then elsewhere; False: silence.
        checkpoint: Where the state is kept now and then. If it holds this run's state, the run goes on from there, and ends
            in the same numbers as one that was never interrupted.
        stop: Asked after every round; a text that is not empty ends the loop, with a checkpoint.
        watch: Called after every round. It changes no number of the result, and if it raises, it is left out from then on.
        memory_limit_mb: MiB that the attack may take; None: what is free (:func:`gradleak.memory.fit`).

    Raises:
        DivergedError: The very first matching loss is not finite.
        MemoryLimitError: The attack does not fit into memory.
        CheckpointError: The checkpoint is another run's, or no whole one is left.
        OutputError: Checkpoints cannot be written, several times in a row.
        SpecError: Several processes cannot share this attack, client or batch.
    """
    dtype = torch.float64 if attack.precision == "float64" else torch.float32
    device = next(iter(client.weights.values())).device
    if device.type == "cpu":
        keep_freed_memory()
    own = shard(observation.batch, device)
    if own.world > 1 and not attack.shards:
        raise SpecError("attack.name: this attack runs in one process; cinet, inverting-gradients, dlg and idlg in several")
    client, y = own.client(client.to(device, dtype)), labels.values.to(device)
    if y.is_floating_point():
        y = y.to(dtype)
    generator = torch.Generator().manual_seed(0)
    probe = torch.rand(observation.batch, *observation.image_shape, generator=generator).to(device, dtype)
    observed = {name: observation.update[name].to(device, dtype) for name in client.weights}
    run = _fingerprint(client, observed, attack, labels, seed) if checkpoint is not None else ""
    problem = Problem(
        observation=observation,
        client=client,
        # in the client's order, not the file's: sums over tensors then give the same last bit
        observed=observed,
        labels=y,
        gain_sensitivity=gain_sensitivity(client, probe, y),
        shard=own,
    )
    watching = own.any(watch is not None)
    watched = _Watched(watch, device)
    start = time.perf_counter()
    images = attack.closed_form(problem)
    if images is not None:
        computed = _without_loop(problem, attack, labels, images, seconds=time.perf_counter() - start)
        watched.show(computed.history[-1], computed.images, rounds=1, best_loss=computed.matching_loss)
        return computed
    state = checkpoint.load(run=run) if checkpoint is not None else None
    done, kept, seconds, current = 0, None, 0.0, None
    if state is not None:
        done, seconds, current = state["done"], state["seconds"], state["loop"]
        kept = None if state["kept"] is None else _reconstruction(state["kept"])
        client.in_pieces(state["piece"])  # not chosen anew: pieces change the last bits of sums

    def save(loop: _Loop | None) -> None:
        if checkpoint is not None:
            whole = {
                "done": done,
                "seconds": seconds,
                "piece": client.piece,
                "kept": None if kept is None else dataclasses.asdict(kept),
                "loop": None if loop is None else loop.state_dict(),
            }
            if own.rank == 0:
                checkpoint.save(whole, run=run, done="" if loop is None else f"{loop.t} of {loop.rounds} rounds")

    for k in range(done, attack.repeat):
        with _seeded(seed + k, device):
            try:
                loop = _Loop(problem, attack, labels)
                if state is None:
                    fit(problem, attack, loop.image_model, limit_mb=memory_limit_mb)
                    state = {}
                if current is not None:
                    loop.load_state_dict(current)
                    current = None
                with _progress(loop.rounds, progress, done=loop.t) as report:
                    while not loop.stopped:
                        before = loop.t
                        loop.round()
                        if watching and loop.t > before:
                            row, best = loop.history[-1], loop.best
                            watched.show(row, own.gather(best.images), rounds=loop.rounds, best_loss=best.loss, restart=k)
                        report(loop.t, loop.best.loss if not loop.history else loop.history[-1]["loss"])
                        interrupted, due = own.agree(
                            stop=stop() if stop is not None else "", due=checkpoint is not None and checkpoint.due()
                        )
                        if interrupted or due:
                            save(loop)
                        if interrupted:
                            loop.interrupt(interrupted)
                found = loop.result()
            except DivergedError:
                if k == attack.repeat - 1 and kept is None:
                    raise
                found = None
        seconds += 0.0 if found is None else found.seconds
        if found is not None and (kept is None or found.matching_loss < kept.matching_loss):
            kept = found
        if found is not None and found.interrupted:
            assert kept is not None
            return dataclasses.replace(kept, seconds=seconds, interrupted=found.interrupted, stopped=found.stopped)
        done = k + 1
        save(None)
    assert kept is not None
    return dataclasses.replace(kept, seconds=seconds)


def distance_to(problem: Problem, attack: Attack) -> Distance:
    """The attack's distance to the observed update: in place of a whitened one the cosine, where a defence or rounding adds
    what the covariance does not have, or where no update of random images varies.
    """
    if attack.distance != "whitened":
        return DISTANCES[attack.distance]
    if problem.observation.defences or problem.observation.protocol.transport is not None:
        return cosine
    found = whitened(problem.client, problem.labels, problem.observed, problem.image_shape, shard=problem.shard)
    return found if 0 < found.size < math.inf else cosine


def _fingerprint(client: ClientOperator, observed: dict[str, Tensor], attack: Attack, labels: Labels, seed: int) -> str:
    """What tells this run from any other: update, weights, labels, settings, protocol, seed."""
    settings = {
        "attack": [type(attack).__name__, dataclasses.asdict(attack)],
        "client": client.spec.model_dump(mode="json"),
        "defences": [defence.model_dump(mode="json") for defence in client.defences],
        "rule": labels.rule,
        "seed": seed,
    }
    tensors = {f"update/{name}": t for name, t in observed.items()} | {"labels": labels.values}
    tensors |= {f"weights/{name}": t for name, t in {**client.weights, **client.frozen}.items()}
    tensors |= {f"buffers/{name}": t for name, t in client.buffers.items()}
    return digest(json.dumps(settings, sort_keys=True), tensors)


def _without_loop(problem: Problem, attack: Attack, labels: Labels, images: Tensor, *, seconds: float) -> Reconstruction:
    """What a closed form computed, with the matching loss that it reaches."""
    loss, _ = distance_to(problem, attack)(problem.client(images, problem.labels), problem.observed)
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


class _Watched:
    """A watcher that can do no harm: torch's random state is given back after it, and its first fault is its last."""

    def __init__(self, watch: Watcher | None, device: torch.device) -> None:
        self.watch, self.device = watch, device

    def show(self, row: dict[str, float], images: Tensor, *, rounds: int, best_loss: float, restart: int = 0) -> None:
        if self.watch is None:
            return
        t = int(row["round"])
        progress = Progress(t, rounds, restart, row["loss"], best_loss, row["learning_rate"], images.detach().clone())
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                self.watch(progress)
        except Exception as fault:  # whatever it is, hours of computing must not be lost to a picture
            log.warning("the watcher failed in round %d, and the attack goes on without it: %r", t, fault)
            self.watch = None


class _NotFinite(Exception):
    """The matching loss of an evaluation is not finite."""


class _Loop:
    """One restart: its state, and the round that changes it.

    Attributes:
        t: Rounds done.
        rounds: T.
        stopped: Why no further round follows; empty while some do.
        best: The iterate with the least matching loss.
        problem: What is compared now: the last layers' share of the update (``attack.matched``), or everything.
        everything: All of it, which the first phase's last rounds compare, and all phases after it.
        last_only: How many rounds come before those.
    """

    def __init__(self, problem: Problem, attack: Attack, labels: Labels) -> None:
        self.everything, self._last = problem, problem.last(attack.matched)
        self.problem, self.attack, self.labels, self.shard = self._last, attack, labels, problem.shard
        self.device = next(iter(problem.client.weights.values())).device
        self.engine = engine(attack.engine)
        if isinstance(self.engine, SelfChecking):
            self.engine.size = self.shard.norm
        image_model = attack.image_model(problem).to(next(iter(problem.client.weights.values())))
        self.image_model = self.shard.own(image_model)
        # the batch norm over several processes is written for one precision; a GPU's faster one has no secant
        self.mixed = attack.precision == "mixed" and mixed.supported(self.device.type) and self.shard.world == 1
        self.mixed &= self.device.type == "cpu" or attack.engine != "secant"
        self.natural = attack.gain == "natural" and problem.gain_blind
        self.targets = self._free_targets()
        self.whole = self.mixed and isinstance(self.engine, SelfChecking) and mixed.whole_pays(self.device.type)
        self.whole &= self.targets is None and problem.client.parameters >= WHOLE_FROM
        self.whole_error, self.whole_rounds = math.nan, 0
        # DLG's optimiser steps both; with the rule ``joint`` the targets have one of their own
        together = self.targets if attack.joint_labels else None
        self.phases = attack.phases(self.image_model if together is None else nn.ModuleList([self.image_model, together]))
        # a phase that builds on settled images would build on targets that still move
        self.left_out = [k for k, phase in enumerate(self.phases) if phase.begin is not None and self.targets is not None]
        self.plan = self._plan()
        self.t, self.rounds = 0, len(self.plan)
        self.last_only = self.phases[0].rounds - math.ceil(COMPARE_ALL * self.phases[0].rounds)
        self.target_phase = None
        if self.targets is not None and together is None:
            adam = torch.optim.Adam(self.targets.parameters(), lr=TARGET_RATE)
            self.target_phase = Phase(self.rounds, adam, LambdaLR(adam, schedule_factor(attack.schedule, self.rounds)))
        self.stopped, self.interrupted = "", ""
        self.losses: list[float] = []  # of this round's evaluations
        self.best, self.images = _Best(), torch.empty(0)
        self.history: list[dict[str, float]] = []
        self.snapshots: dict[int, Tensor] = {}
        self.warnings: list[str] = []
        self.fell_back = self.smaller_pieces = False
        self.retreat = self._state_to_fall_back_to()
        self._snapshot_rounds = snapshot_rounds(self.rounds, attack.snapshots)
        self._start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def seconds(self) -> float:
        """Since the start, without the time between an interruption and its resumption."""
        return time.perf_counter() - self._start

    def round(self) -> None:
        """One step of the optimiser. A loss that is not finite, or memory that runs out, is mended once."""
        phase = self._begun(self.plan[self.t])
        if self.t == self.last_only:
            self._compare_all()
        if isinstance(self.engine, SelfChecking):
            self.engine.tolerate(SIGNED_TOLERANCE if phase.signed else TOLERANCE)
        rate = phase.optimiser.param_groups[0]["lr"]
        try:
            with mixed.rounds(self.mixed and not phase.precise, self.device, whole=self.whole):
                self.losses.clear()
                phase.optimiser.step(lambda: self._evaluate(phase))
        except _NotFinite as fault:
            return self._fall_back(fault)
        except (MemoryError, RuntimeError) as fault:
            if not is_out_of_memory(fault):
                raise
            return self._use_smaller_pieces()
        self.whole_rounds += self.whole and not phase.precise
        phase.schedule.step()
        if self.target_phase is not None:
            self.target_phase.optimiser.step()
            self.target_phase.schedule.step()
        self.attack.project(self.image_model)
        self.t += 1
        self.best.round_done(self.t)
        self.history.append({"round": self.t, "loss": self.losses[0], "learning_rate": rate, "seconds": self.seconds})
        if self.t in self._snapshot_rounds:
            member = self.images.chunk(self.attack.group)[0]
            self.snapshots[self.t] = self.shard.gather(member).half().cpu()
        if self.best.round == self.t and self.t >= self.retreat["round"] + RETREAT_EVERY:
            self.retreat = self._state_to_fall_back_to()
        patience = self.attack.patience
        if patience is not None and self.t - self.best.last_gain >= patience:
            self.stopped = f"plateau: the matching loss fell by less than 1 % in {patience} rounds"
        elif self.t == self.rounds:
            self.stopped = f"all {self.rounds} rounds done"

    def _begun(self, phase: Phase) -> Phase:
        """The phase of this round, which begins here if it is time for that; or the one before, where it does not begin."""
        if phase.begin is None:
            return phase
        first = self.plan.index(phase)
        again = phase.again and (self.t - first) % phase.again == 0 and self.rounds - self.t >= phase.again
        if self.t > first and not again:
            return phase
        left = self.best.loss / max(self.history[0]["loss"], sys.float_info.min)
        if phase.begin(self.shard.gather(self.best.images), left, isinstance(self.distance, Whitened)):
            self.retreat = self._state_to_fall_back_to()
            if self.t > first:
                self.best.begin_anew(self.t)
            return phase
        self.left_out.append(self.phases.index(phase))
        self.plan = self._plan()
        return self.plan[self.t]

    def _compare_all(self) -> None:
        """From now on compare all of the update, if it was not (``attack.matched``): the losses are others then."""
        if self.problem is self.everything:
            return
        if self.smaller_pieces:
            self.everything.client.in_pieces(self.problem.client.piece)
        self.problem = self.everything
        self.best.begin_anew(self.t)
        if isinstance(self.engine, SelfChecking):
            self.engine.check_next()

    def _plan(self) -> list[Phase]:
        """The phase of each round; rounds of a phase that is left out are those of the one before."""
        plan: list[Phase] = []
        for k, phase in enumerate(self.phases):
            plan += [plan[-1] if k in self.left_out else phase] * phase.rounds
        return plan

    def interrupt(self, why: str) -> None:
        """No further round, unless all are done."""
        if not self.stopped:
            self.interrupted, self.stopped = why, f"interrupted by {why} after round {self.t} of {self.rounds}"

    def result(self) -> Reconstruction:
        """What was found, with the last step's iterate among the candidates."""
        attack, client = self.attack, self.problem.client
        y = self.problem.labels
        with torch.no_grad(), self.shard.synchronised():  # the last step's result has not been looked at yet
            images = self.image_model()
            y = y if self.targets is None else self.targets()
        for member in images.chunk(attack.group):
            self.best.offer(self._loss(member, y), member, y if self.targets is None else self.targets.settled(y))
        self.best.round_done(len(self.history) + 1)
        best, images = self.best, self.shard.gather(self.best.images)
        notes = attack.describe(self.problem, self.image_model)
        gain = bright_gain(images) if self.natural else 1.0
        if gain != 1 and self._loss(gain * images, best.labels) > 1.5 * best.loss:
            gain = 1.0  # the update has the last word
        notes["gain_check"] = {"sensitivity": self.problem.gain_sensitivity, "applied": gain}
        if isinstance(self.engine, SelfChecking):
            notes["engine_check"] = {
                "in_use": "secant" if self.engine.trusted else "exact",
                "step": self.engine.step,
                "relative_error": self.engine.error if math.isfinite(self.engine.error) else None,
            }
        if attack.precision == "mixed":
            notes["tf32" if self.device.type == "cuda" else "bfloat16"] = self.mixed
        if self.whole_rounds:
            error = self.whole_error if math.isfinite(self.whole_error) else None
            notes["whole_model_in_bfloat16"] = {"rounds": self.whole_rounds, "relative_error": error}
        if attack.distance == "whitened":
            notes["whitened"] = isinstance(self.distance, Whitened)
            away = best.loss if self.distance is cosine else self._loss(best.images, best.labels, distance=cosine)
            notes["cosine_distance"] = away if math.isfinite(away) else None
        if client.piece is not None:
            notes["images_at_a_time"] = client.piece
        if self.shard.world > 1:
            notes["processes"] = self.shard.world
        # each by its own gain: it was held in some rounds and drifted in others
        frames = [_eight_bit(x if gain == 1 else bright_gain(x) * x) for x in self.snapshots.values()]
        return Reconstruction(
            images=(gain * images).clamp(0, 1).float().cpu(),
            labels=Labels(best.labels.cpu(), self.labels.rule if self.targets is None else "joint"),
            matching_loss=best.loss,
            best_round=best.round,
            rounds=max(1, len(self.history)),
            seconds=self.seconds,
            stopped=self.stopped,
            history=self.history,
            snapshots=torch.stack(frames) if frames else torch.empty(0),
            snapshot_rounds=list(self.snapshots),
            peak_memory_mb=peak_memory_mb(self.device),
            notes=notes,
            warnings=[*self.warnings, *self._plateau()],
            interrupted=self.interrupted,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on as if nothing had happened."""
        columns = ("round", "loss", "learning_rate", "seconds")
        return {
            "t": self.t,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "image_model": self.image_model.state_dict(),
            "phases": [[phase.optimiser.state_dict(), phase.schedule.state_dict()] for phase in self.phases],
            "targets": None if self.targets is None else self.targets.state_dict(),
            "target_phase": None
            if self.target_phase is None
            else [self.target_phase.optimiser.state_dict(), self.target_phase.schedule.state_dict()],
            "engine": self.engine.state_dict() if isinstance(self.engine, SelfChecking) else None,
            "best": {**vars(self.best), "images": self.shard.gather(self.best.images)},
            "history": torch.tensor([[row[c] for c in columns] for row in self.history], dtype=torch.float64),
            "snapshots": self.snapshots,
            "warnings": self.warnings,
            "fell_back": self.fell_back,
            "left_out": self.left_out,
            "whole": [self.whole, self.whole_error, self.whole_rounds],
            "smaller_pieces": self.smaller_pieces,
            "retreat": self.retreat,
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            CheckpointError: It does not fit the image model.
        """
        try:
            self.image_model.load_state_dict(state["image_model"])
            for phase, (optimiser, schedule) in zip(self.phases, state["phases"], strict=True):
                phase.optimiser.load_state_dict(optimiser)
                phase.schedule.load_state_dict(schedule)
            if self.targets is not None:
                self.targets.load_state_dict(state["targets"])
            if self.target_phase is not None:
                optimiser, schedule = state["target_phase"]
                self.target_phase.optimiser.load_state_dict(optimiser)
                self.target_phase.schedule.load_state_dict(schedule)
        except (RuntimeError, ValueError, KeyError) as fault:
            raise CheckpointError(
                f"the checkpoint does not fit this attack's image model ({fault}); was it written by another version? "
                "Start anew with --force"
            ) from None
        if isinstance(self.engine, SelfChecking):
            self.engine.load_state_dict(state["engine"])
        vars(self.best).update(state["best"])
        self.best.images = self.best.images[self.shard.rows].to(self.device)
        self.best.labels = self.best.labels.to(self.device)
        self.t, self.stopped = state["t"], state["stopped"]
        self.history = [
            {"round": int(t), "loss": loss, "learning_rate": rate, "seconds": seconds}
            for t, loss, rate, seconds in state["history"].reshape(-1, 4).tolist()
        ]
        self.snapshots, self.warnings, self.retreat = state["snapshots"], state["warnings"], state["retreat"]
        self.fell_back, self.smaller_pieces = state["fell_back"], state["smaller_pieces"]
        self.left_out = state["left_out"]
        self.whole, self.whole_error, self.whole_rounds = state["whole"]
        self.plan = self._plan()
        self.problem = self.everything if self.t > self.last_only else self._last
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["device_random"] is not None:
            torch.cuda.set_rng_state(state["device_random"], self.device)
        self._start = time.perf_counter() - state["seconds"]

    def _evaluate(self, phase: Phase) -> float:
        """The matching loss at the present parameters, and the gradient of loss plus prior in the ``grad`` of the phase's."""
        everything = [*self.image_model.parameters(), *([] if self.targets is None else self.targets.parameters())]
        for p in everything:
            p.grad = None
        _ = self.distance  # made before this round's tensors take memory
        with self.shard.synchronised(), mixed.image_model(self.device):
            images = self.image_model()
        images = images.to(next(iter(self.problem.observed.values())))
        # copied where it is kept: free pixels are changed in place by the step
        self.images = images.detach().clone() if self.t + 1 in self._snapshot_rounds else images
        penalty = self.attack.prior(images, self.problem)
        if penalty is not None:
            (self.shard.share * penalty).backward(retain_graph=True)
        tau = phase.relative_total_variation
        losses, cotangents = [], []
        for member in images.chunk(self.attack.group):
            loss, cotangent = self._match(member)
            losses.append(loss)
            if tau and loss > 0:
                cotangent = cotangent / loss  # that of log D
            hold = self.natural and phase.drifting
            cotangents.append(hold_gain(member, cotangent, shard=self.shard) if hold else cotangent)
        value = min(losses)
        self.losses.append(value)
        if tau:
            value = math.log(max(value, sys.float_info.min)) + self._smooth(images, tau)
        images.backward(torch.cat(cotangents))
        self.shard.sum_([p.grad for p in everything if p.grad is not None])
        if phase.signed:
            for p in (p for group in phase.optimiser.param_groups for p in group["params"]):
                if p.grad is not None:
                    p.grad.sign_()
        return value

    def _smooth(self, images: Tensor, tau: float) -> float:
        """The prior of :attr:`Phase.relative_total_variation`, over all processes; its gradient is added to the parameters'."""
        own = self.shard.share * torch.stack([total_variation(images), total_variation(coarse(images))])
        whole = own.detach().clone()
        self.shard.sum_([whole])
        if not float(whole.min()) > 0:
            return 0.0
        weights = whole.new_tensor([tau, -tau / 2])
        (weights * own / whole).sum().backward(retain_graph=True)
        return float(weights @ whole.log())

    def _loss(self, images: Tensor, labels: Tensor, *, distance: Distance | None = None) -> float:
        """The matching loss, or another distance; infinity where it is not finite, or memory does not suffice."""
        try:
            loss, _ = (distance or self.distance)(self.problem.client(images, labels), self.problem.observed)
        except (MemoryError, RuntimeError) as fault:
            if not is_out_of_memory(fault) or self.shard.world > 1:
                raise
            return math.inf
        loss = self.shard.same(loss)
        return loss if math.isfinite(loss) else math.inf

    def _match(self, member: Tensor) -> tuple[float, Tensor]:
        """The matching loss of one member's images, and its cotangent with respect to them."""
        if self.targets is None:
            changed = self.t == self.last_only and self._last is not self.everything
            due = mixed.whole() and (changed or self.t % WHOLE_EVERY == 0)
            return self._checked(member) if due else self._fixed(member, self.engine)
        y = self.targets()
        update, both = self.problem.client.joint_vjp(member, y, engine=self.engine)
        loss, cotangent = self.distance(update, self.problem.observed)
        del update  # as large as the model
        self._offer(loss, member, self.targets.settled(y))
        image_cotangent, target_cotangent = both(cotangent)
        y.backward(target_cotangent)
        return loss, image_cotangent

    def _fixed(self, member: Tensor, engine: Engine) -> tuple[float, Tensor]:
        """:meth:`_match` with fixed targets."""
        update, transpose = self.problem.client.vjp(member, self.problem.labels, engine=engine)
        loss, cotangent = self.distance(update, self.problem.observed)
        del update  # as large as the model
        loss = self._offer(loss, member, self.problem.labels)
        held = [cotangent]
        del cotangent  # the secant needs no more of it than where the weights move to
        return loss, transpose(held.pop())

    def _offer(self, loss: float, member: Tensor, targets: Tensor) -> float:
        loss = self.shard.same(loss)
        if not math.isfinite(loss):
            raise _NotFinite(loss)
        self.best.offer(loss, member, targets)
        return loss

    def _checked(self, member: Tensor) -> tuple[float, Tensor]:
        """:meth:`_fixed` in float32, and whether bfloat16 is near enough to it to go on with."""
        assert isinstance(self.engine, SelfChecking)
        self.engine.check_next()
        with mixed.rounds(False, self.device):
            loss, wanted = self._fixed(member, self.engine)
        try:
            _, found = self._fixed(member, self.engine)
            self.whole_error = float((found - wanted).norm() / wanted.norm())
            why = f"its error is {self.whole_error:.2f}"
        except (RuntimeError, NotImplementedError, _NotFinite) as fault:  # an F may mix formats that torch does not
            self.whole_error, why = math.inf, f"it fails ({fault})"
        if not self.whole_error <= WHOLE_TOLERANCE:
            self.whole = False
            log.info("F in bfloat16 in round %d: %s; float32 from here", self.t + 1, why)
        return loss, wanted

    @cached_property
    def _distance_of_all(self) -> Distance:
        """The attack's distance, made in the first round: a whitened one computes updates, and may need smaller pieces."""
        if self.targets is not None and self.attack.distance == "whitened":
            return cosine  # a covariance is that of fixed targets
        return distance_to(self.everything, self.attack)

    @cached_property
    def _distance_of_last(self) -> Distance:
        """The same for the last layers, in the same metric."""
        if self.shard.world > 1:  # which have other tensors to work on
            return distance_to(self._last, self.attack)
        found = self._distance_of_all
        return found.only(self._last.observed) if isinstance(found, Whitened) else found

    @property
    def distance(self) -> Distance:
        """The attack's distance, for what is compared in this round."""
        return self._distance_of_all if self.problem is self.everything else self._distance_of_last

    def _free_targets(self) -> FreeTargets | None:
        """Targets to be optimised with the images, where the attack is made so or the rule is ``joint``."""
        if not self.attack.joint_labels and self.labels.rule != "joint":
            return None
        client, weight = self.problem.client, next(iter(self.problem.client.weights.values()))
        with torch.no_grad():  # two images: batch norm in train mode refuses one value per channel
            output = client.outputs(torch.zeros(2, *self.problem.image_shape).to(weight))
        return FreeTargets(client.loss_name, (self.problem.batch, *output.shape[1:])).to(weight)

    def _state_to_fall_back_to(self) -> dict[str, Any]:
        """Parameters and the optimiser's state, copied."""
        phase = self.plan[min(self.t, self.rounds - 1)]
        return {
            "round": self.t,
            "phase": self.phases.index(phase),
            "image_model": copy.deepcopy(self.image_model.state_dict()),
            "targets": None if self.targets is None else copy.deepcopy(self.targets.state_dict()),
            # pixels begin anew after a fall back: L-BFGS's history is large, and holds what led there
            "optimiser": None if phase.begin is not None else copy.deepcopy(phase.optimiser.state_dict()),
        }

    def _fall_back(self, fault: _NotFinite) -> None:
        """To the last good state with a smaller step, the first time; the second time the run ends."""
        if math.isinf(self.best.loss):
            raise DivergedError(
                f"the first matching loss is {fault}: F's gradient at the attack's first images is not finite; "
                'try attack.precision="float64", or another seed'
            ) from None
        if self.fell_back:
            self.stopped = f"the matching loss became {fault} in round {self.t + 1}; the best earlier iterate is kept"
            return
        self.fell_back = True
        phase = self.plan[self.t]
        rate = phase.optimiser.param_groups[0]["lr"]
        self.image_model.load_state_dict(self.retreat["image_model"])
        if self.targets is not None:
            self.targets.load_state_dict(self.retreat["targets"])
        if self.phases.index(phase) == self.retreat["phase"] and self.retreat["optimiser"] is not None:
            phase.optimiser.load_state_dict(self.retreat["optimiser"])
        else:
            phase.optimiser.state.clear()
        phase.schedule.base_lrs = [SMALLER_STEP * eta for eta in phase.schedule.base_lrs]
        for group in phase.optimiser.param_groups:
            group["lr"] = SMALLER_STEP * rate
        self._warn(
            f"The matching loss became {fault} in round {self.t + 1}: the attack went back to its state of round "
            f"{self.retreat['round']}, with a tenth of the step."
        )

    def _use_smaller_pieces(self) -> None:
        """Memory ran out: half as many images at a time, once; else the run ends with what it has."""
        client, batch = self.problem.client, self.problem.batch
        size = client.piece or batch
        if client.can_split and size > 1 and not self.smaller_pieces:
            self.smaller_pieces = True
            client.in_pieces(math.ceil(size / 2))
            self._warn(f"Memory ran out in round {self.t + 1}: the attack went on with {client.piece} images at a time.")
            return
        if math.isinf(self.best.loss) or self.shard.world > 1:  # other processes wait for this one's images
            when = f"round {self.t + 1}" if self.t else "the first round"
            size = client.held_images(batch)
            raise MemoryLimitError(
                f"memory ran out in {when}, with {size} images of {self.problem.image_shape} at a time; use fewer or smaller "
                'images, attack.engine="secant", or a machine with more memory'
            )
        self.stopped = f"memory ran out in round {self.t + 1}; the best earlier iterate is kept"

    def _plateau(self) -> list[str]:
        """A warning if the loss stood still for long before the end."""
        still = self.t - self.best.last_gain
        if self.t < 2 * RETREAT_EVERY or still < PLATEAU * self.t:
            return []
        return [
            f"Plateau: the matching loss has not fallen by 1 % since round {self.best.last_gain} of {self.t}. The last rounds "
            "brought nothing; another seed, step or image model may."
        ]

    def _warn(self, text: str) -> None:
        log.warning("%s", text)
        self.warnings.append(text)


def _reconstruction(state: dict[str, Any]) -> Reconstruction:
    """From ``dataclasses.asdict``, as a checkpoint holds it."""
    return Reconstruction(**{**state, "labels": Labels(**state["labels"])})


class _Best:
    """The iterate with the least matching loss since the last beginning, and when the loss last fell by at least 1 %."""

    def __init__(self) -> None:
        self.loss, self.round, self.images, self.labels = math.inf, 0, torch.empty(0), torch.empty(0)
        self.last_gain, self._goal, self._new, self._anew = 0, math.inf, False, False

    def begin_anew(self, t: int) -> None:
        """The next iterate is the best one whatever its loss; until then the old one is at hand."""
        self.last_gain, self._goal, self._anew = t, math.inf, True

    def offer(self, loss: float, images: Tensor, labels: Tensor) -> None:
        if loss < self.loss or self._anew:
            self.loss, self._new, self._anew = loss, True, False
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
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A fixed random state inside, of the CPU (where image models are made) and the device; the caller's is untouched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _progress(rounds: int, show: bool, *, done: int = 0) -> Iterator[Any]:
    """A callback (round, loss): a bar where one can be drawn, else about twenty lines on standard error."""
    if not show:
        yield lambda t, loss: None
        return
    drawable = sys.stderr.isatty() or "ipykernel" in sys.modules
    if drawable:
        with tqdm(total=rounds, initial=done, desc="attack", unit="round") as bar:

            def draw(t: int, loss: float) -> None:
                bar.update(t - bar.n)
                bar.set_postfix_str(f"loss {loss:.2e}", refresh=False)

            yield draw
        return
    start, every = time.perf_counter(), max(1, rounds // 20)

    def line(t: int, loss: float) -> None:
        if t % every == 0 or t == rounds or t == done + 1:
            each = (time.perf_counter() - start) / max(1, t - done)
            left = each * (rounds - t)
            print(f"round {t}/{rounds}  loss {loss:.2e}  {each:.2f} s/round  {left:.0f} s left", file=sys.stderr, flush=True)

    yield line
