"""Time to a given quality: how long each CI-Net takes until the mean SSIM or PSNR of its best iterate reaches a goal.

    python benchmarks/time_to_quality.py [--batch 16] [--seeds 0 1 2] [--seconds LIMIT] [--json FILE]
    python benchmarks/time_to_quality.py --race [--factor 15] [--rounds cinet-reference=20000] [--json FILE]

All programs attack the same update of the same images (the first CIFAR-10 training images), with labels known. A program is
an attack, or one with settings of its own, such as ``cinet:matched=0.4,precision=mixed``. Every ``--every`` rounds the iterate
of the least matching loss is scored, one to one, at the gain that a run would give it. The clock is the wall time of
:func:`gradleak.invert.invert` and stands still while it scores and while a checkpoint is written.
A run ends when all goals are reached, at ``--seconds`` on its clock, or after its rounds. A goal that it did not reach is
censored: its time is at least the run's, and a ratio to it is a bound. Medians over the seeds are intervals where censored
times leave them open. With ``--race`` the baseline gets ``--factor`` times what ``cinet`` took to SSIM .95, and is stopped.

After each run the rounds of all programs and F's forward pass are timed in turns. ``drift`` is the run's seconds a round over
those: far from 1, the machine's speed changed. Peak memory is measured by ``step.py``.

With ``--json``, finished runs are kept and skipped when the command is given again; an unfinished one, or one that a smaller
limit stopped, goes on from its checkpoint in ``--work`` (private images), and so does its clock.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradleak as gl  # before torch: it sets how threads wait

# isort: split
import torch

from gradleak import data
from gradleak.attacks import Attack, attack
from gradleak.attacks.recipe import Problem
from gradleak.checkpoint import Checkpoint
from gradleak.client import operator
from gradleak.evaluate import quality_over_rounds
from gradleak.invariance import bright_gain, gain_sensitivity
from gradleak.invert import Progress, _Loop, distance_to, invert
from gradleak.labels import Labels
from gradleak.spec import DataSpec, set_value
from record import ROOT, provenance, write_rows
from step import FORWARD, interleaved, model_spec
from tables import table

Row = dict[str, Any]
Interval = tuple[float, float]
OURS, BASELINE = "cinet", "cinet-reference"
GOALS = ["ssim=0.9", "ssim=0.95", "ssim=0.99", "psnr=25", "psnr=30"]
#: The goal of a race, and of ``ratio_vs_baseline``.
RACE_GOAL = "ssim=0.95"


@dataclass(frozen=True)
class Setting:
    """What the programs share: F, the truth, and what an attack is given."""

    model: torch.nn.Module
    truth: gl.Truth
    problem: Problem


def setting(model: str, batch: int, source: str) -> Setting:
    """Images ``0 .. batch - 1`` of a source, and the update that a client with a sigmoid F computes of them."""
    spec, pixels = model_spec(model)
    truth = data.load(DataSpec(source=source, batch=batch, size=pixels))
    network = gl.build_model(spec, image_shape=(3, pixels, pixels))
    observation = gl.simulate(gl.FedSGD(network), truth)
    client = operator(observation, network)
    probe = torch.rand(truth.images.shape, generator=torch.Generator().manual_seed(0))  # as the loop does
    sensitivity = gain_sensitivity(client, probe, truth.labels)
    problem = Problem(
        observation=observation,
        client=client,
        observed=observation.update,
        labels=truth.labels,
        gain_sensitivity=sensitivity,
    )
    return Setting(network, truth, problem)


class Stopwatch:
    """Watches one run: its clock, its scores, the goals it has reached, and when it must end.

    Attributes:
        curve: ``round``, ``seconds``, ``ssim``, ``psnr`` of each iterate that was scored.
    """

    def __init__(self, shared: Setting, recipe: Attack, *, goals: list[str], every: int, limit: float) -> None:
        self.shared, self.recipe, self.goals, self.every, self.limit = shared, recipe, goals, every, limit
        self.distance = distance_to(shared.problem, recipe)
        self.curve: list[dict[str, Any]] = []
        self.fault: Exception | None = None
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start, without pauses and the time between two processes."""
        return time.perf_counter() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still inside."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - begin

    def watch(self, progress: Progress) -> None:
        """Score the best iterate, every so many rounds and at the end."""
        now = self.seconds
        if progress.round % self.every and progress.round < progress.rounds and now < self.limit:
            return
        with self.paused():
            try:
                scored = {"round": progress.round, "seconds": round(now, 3), **self.score(progress)}
            except Exception as fault:  # the loop would leave out a watcher that raises, and go on without end
                self.fault = fault
            else:
                self.curve.append(scored)

    def score(self, progress: Progress) -> dict[str, float | None]:
        """Mean ``ssim`` and ``psnr`` of the images as a run would return them."""
        problem, images = self.shared.problem, progress.images
        gain = bright_gain(images) if self.recipe.gain == "natural" and problem.gain_blind else 1.0
        if gain != 1:
            loss, _ = self.distance(problem.client(gain * images, problem.labels), problem.observed)
            gain = 1.0 if loss > 1.5 * progress.best_loss else gain  # as the loop does with its result
        curves = quality_over_rounds((gain * images)[None], self.shared.truth)
        return {name: None if value is None else round(value, 4) for name, (value,) in curves.items()}

    def reached(self) -> dict[str, dict[str, Any]]:
        """Goal -> round and seconds of the first iterate that reached it."""
        found = {}
        for goal in self.goals:
            metric, _, value = goal.partition("=")
            at = next((row for row in self.curve if (row[metric] or 0) >= float(value)), None)
            if at is not None:
                found[goal] = {"round": at["round"], "seconds": at["seconds"]}
        return found

    def stop(self) -> str:
        """Why the run must end; empty: it need not."""
        if self.fault is not None:
            return "a fault of the scoring"
        if len(self.reached()) == len(self.goals):
            return "all goals"
        return "the limit" if self.seconds >= self.limit else ""


class TimedCheckpoint(Checkpoint):
    """A checkpoint that keeps the stopwatch too; writing it costs no time on that."""

    def __init__(self, path: Path, stopwatch: Stopwatch) -> None:
        super().__init__(path)
        self.stopwatch = stopwatch

    def save(self, state: Mapping[str, Any], *, run: str, done: str = "") -> None:
        with self.stopwatch.paused():
            kept = {"seconds": self.stopwatch.seconds, "curve": self.stopwatch.curve}
            super().save({**state, "stopwatch": kept}, run=run, done=done)

    def load(self, *, run: str) -> dict[str, Any] | None:
        state = super().load(run=run)
        if state is not None:
            kept = state.pop("stopwatch")
            # building the loop a second time counts: a fraction of a second against the run
            self.stopwatch._start = time.perf_counter() - kept["seconds"]
            self.stopwatch.curve = kept["curve"]
        return state


def measure(
    shared: Setting, recipes: dict[str, Attack], key: Row, *, goals: list[str], every: int, limit: float, work: Path
) -> Row:
    """The row of one program and seed."""
    program, seed = key["name"], key["seed"]
    work.mkdir(parents=True, exist_ok=True)
    name = "-".join(str(key[part]) for part in ("name", "model", "batch", "data", "rounds", "seed"))
    problem, recipe = shared.problem, recipes[program]
    stopwatch = Stopwatch(shared, recipe, goals=goals, every=every, limit=limit)
    checkpoint = TimedCheckpoint(work / re.sub(r"[^\w.-]", "-", f"{name}.safetensors"), stopwatch)
    result = invert(
        problem.observation,
        recipe,
        client=problem.client,
        labels=Labels(problem.labels, "known"),
        seed=seed,
        progress=True,
        checkpoint=checkpoint,
        stop=stopwatch.stop,
        watch=stopwatch.watch,
    )
    if stopwatch.fault is not None:
        raise stopwatch.fault
    last = stopwatch.curve[-1] if stopwatch.curve else {"seconds": round(stopwatch.seconds, 3), "round": result.rounds}
    if result.interrupted != "the limit":
        checkpoint.remove()
    turns = round_seconds(shared, recipes)
    each = last["seconds"] / last["round"]
    return {
        **key,
        "limit_seconds": limit if math.isfinite(limit) else None,
        "seconds": last["seconds"],
        "rounds_run": last["round"],
        "stopped": result.stopped,
        "reached": stopwatch.reached(),
        "seconds_per_round": float(f"{each:.4g}"),
        "interleaved": turns,
        "drift": round(each / turns[program], 3),
        "units": round(turns[program] / turns[FORWARD], 2),
        "peak_memory_mb": None,
        "curve": stopwatch.curve,
    }


def round_seconds(shared: Setting, recipes: Mapping[str, Attack], *, repeats: int = 5) -> dict[str, float]:
    """Program -> median seconds of a round, and of F's forward pass; they take turns."""
    rounds: dict[str, Any] = {
        program: _Loop(shared.problem, recipe, Labels(shared.problem.labels, "known")).round
        for program, recipe in recipes.items()
    }
    rounds[FORWARD] = lambda: shared.model(shared.truth.images)
    repeats = min([repeats, *(recipe.rounds - 1 for recipe in recipes.values())])
    return {name: float(f"{statistics.median(t):.4g}") for name, t in interleaved(rounds, repeats=repeats).items()}


def interval(row: Row, goal: str) -> Interval:
    """The bounds of the seconds that a run took to a goal, or would have taken had it gone on."""
    at = row["reached"].get(goal)
    return (at["seconds"], at["seconds"]) if at is not None else (row["seconds"], math.inf)


def quotient(baseline: Interval, ours: Interval) -> Interval:
    """The bounds of the baseline's seconds over ours."""
    return baseline[0] / ours[1], baseline[1] / ours[0] if ours[0] > 0 else math.inf


def median(intervals: list[Interval]) -> Interval:
    """The bounds of the median of numbers that lie in intervals."""
    return statistics.median(low for low, _ in intervals), statistics.median(high for _, high in intervals)


def shown(bounds: Interval) -> str:
    """An interval in words: ``12.3``, ``>= 12.3``, ``<= 12.3``, ``12.3 to 20``, or nothing that is known."""
    low, high = bounds
    if low == high:
        return f"{low:.3g}"
    if math.isinf(high):
        return f">= {low:.3g}" if low > 0 else "-"
    return f"<= {high:.3g}" if low == 0 else f"{low:.3g} to {high:.3g}"


def compared(rows: list[Row], goals: list[str]) -> list[Row]:
    """A summary row for each program; ``ratio_vs_baseline`` of every row is filled in: a lower bound where it is censored."""
    by_seed = {row["seed"]: row for row in rows if row["name"] == BASELINE}
    for row in rows:
        against = by_seed.get(row["seed"])
        row["ratio_vs_baseline"] = None
        row["ratios"] = {}
        if against is not None:
            row["ratios"] = {goal: finite(quotient(interval(against, goal), interval(row, goal))) for goal in goals}
            row["ratio_vs_baseline"] = number(row["ratios"], row["name"] == BASELINE)
    programs = list(dict.fromkeys(row["name"] for row in rows))
    turns = {
        name: statistics.median(row["interleaved"][name] for row in rows if name in row["interleaved"])
        for name in [*programs, FORWARD]
    }
    return [summary([row for row in rows if row["name"] == name], by_seed, goals, turns) for name in programs]


def summary(rows: list[Row], baselines: Mapping[int, Row], goals: list[str], turns: Mapping[str, float]) -> Row:
    """Medians and spread over the seeds of one program."""
    first = rows[0]
    times, ratios = {}, {}
    for goal in goals:
        found = [interval(row, goal) for row in rows]
        times[goal] = {
            "seconds": finite(median(found)),
            "spread": finite((min(low for low, _ in found), max(high for _, high in found))),
            "reached": sum(goal in row["reached"] for row in rows),
            "rounds": [row["reached"].get(goal, {}).get("round") for row in rows],
        }
        pairs = [(interval(baselines[row["seed"]], goal), interval(row, goal)) for row in rows if row["seed"] in baselines]
        if pairs:
            ratios[goal] = finite(median([quotient(*pair) for pair in pairs]))
    return {
        **{name: first[name] for name in ("name", "model", "batch", "data", "rounds")},
        "seeds": [row["seed"] for row in rows],
        "seconds_per_round": turns[first["name"]],
        "units": round(turns[first["name"]] / turns[FORWARD], 2),
        "peak_memory_mb": None,
        "ratio_vs_baseline": number(ratios, first["name"] == BASELINE),
        "ratios": ratios,
        "round_ratio_vs_baseline": round(turns[BASELINE] / turns[first["name"]], 3) if BASELINE in turns else None,
        "times": times,
    }


def number(ratios: Mapping[str, list[float | None]], itself: bool) -> float | None:
    """The ratio at :data:`RACE_GOAL`, or its lower bound; None where nothing is known of it."""
    return 1.0 if itself else ratios.get(RACE_GOAL, [0.0])[0] or None


def finite(bounds: Interval) -> list[float | None]:
    """As JSON holds it: None for an open end."""
    return [None if math.isinf(bound) else round(bound, 3) for bound in bounds]


def interval_of(bounds: list[float | None]) -> Interval:
    """The inverse of :func:`finite`."""
    low, high = bounds
    return low or 0.0, math.inf if high is None else high


def text(summaries: list[Row], goals: list[str]) -> str:
    """Two tables: seconds and rounds to each goal, and the baseline's seconds over each program's."""
    lines: list[list[object]] = []
    for row in summaries:
        for goal in goals:
            time_, seeds = row["times"][goal], len(row["seeds"])
            ratio = row["ratios"].get(goal)
            low, high = interval_of(time_["spread"])
            spread = f"{low:.3g} to {'not reached' if math.isinf(high) else f'{high:.3g}'}"
            rounds = ", ".join("-" if t is None else str(t) for t in time_["rounds"])
            cells = [shown(interval_of(time_["seconds"])), spread, rounds, f"{time_['reached']} of {seeds}"]
            ratio_text = "-" if ratio is None else "1" if row["name"] == BASELINE else shown(interval_of(ratio))
            lines.append([f"`{row['name']}`", goal, *cells, ratio_text])
    speed: list[list[object]] = [
        [f"`{r['name']}`", r["seconds_per_round"], r["units"], r["round_ratio_vs_baseline"] or "-"] for r in summaries
    ]
    head = ["program", "goal", "seconds", "spread", "rounds", "seeds that reached it", f"{BASELINE} over it"]
    rounds_head = ["program", "seconds a round, in turns", "units of F's forward", f"{BASELINE} over it"]
    return f"{table(head, lines)}\n\n{table(rounds_head, speed)}"


def outcome(row: Row, goals: list[str]) -> str:
    """One run in one line."""
    missing = [goal for goal in goals if goal not in row["reached"]]
    found = ", ".join(f"{goal} in {at['seconds']:.4g} s ({at['round']} rounds)" for goal, at in row["reached"].items())
    censored = f"not reached in {row['seconds']:.4g} s, {row['rounds_run']} rounds: {', '.join(missing)}" if missing else ""
    return f"{row['name']}, seed {row['seed']}: {'; '.join(filter(None, [found, censored]))}; drift {row['drift']}"


def is_finished(row: Row, *, goals: list[str], limit: float) -> bool:
    """Whether nothing more would come of a run within the limit."""
    if all(goal in row["reached"] for goal in goals):
        return True
    stopped_at = row["limit_seconds"]
    return row["rounds_run"] >= row["rounds"] or row["seconds"] >= limit or stopped_at is None or stopped_at >= limit


def others(earlier: list[Row], rows: list[Row]) -> list[Row]:
    """The runs of an earlier file, not its summaries, that are not among these."""
    keys = ("name", "model", "batch", "data", "seed", "rounds", "every", "threads", "goals")
    known = [[row[key] for key in keys] for row in rows]
    return [row for row in earlier if "curve" in row and [row[key] for key in keys] not in known]


def source(given: str | None) -> str:
    """``data.source`` of what ``--data`` says; CIFAR-10's training images when it says nothing."""
    there = Path(os.environ.get("GRADLEAK_TEST_DATA", ROOT.parent / "shared")) / "data" / "cifar10_train_first1024.npz"
    if given is None:
        return f"npz:{there}" if there.is_file() else "cifar10"
    return f"npz:{given}" if given.endswith(".npz") and not given.startswith("npz:") else given


def recipe(program: str, **settings: Any) -> Attack:
    """The attack NAME[:KEY=VALUE[,KEY=VALUE ...]]."""
    name, _, own = program.partition(":")
    for setting in filter(None, own.split(",")):
        set_value(settings, setting)
    return attack(name, snapshots=0, **settings)


def pair(text: str) -> tuple[str, int]:
    """``NAME=ROUNDS``."""
    name, equals, rounds = text.rpartition("=")
    if not equals or not rounds.isdigit() or int(rounds) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=ROUNDS with two rounds or more, such as {OURS}=400")
    return name, int(rounds)


def goal(text: str) -> str:
    """``ssim=VALUE`` or ``psnr=VALUE``."""
    if not re.fullmatch(r"(ssim|psnr)=\d*\.?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected ssim=VALUE or psnr=VALUE, such as {RACE_GOAL}")
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--programs", nargs="+", default=[OURS, BASELINE, "cinet-paper"], help="NAME[:KEY=VALUE,...] of attacks"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="resnet18-cifar:64", help="NAME[:WIDTH][@PIXELS]")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--data", help="an .npz file or a data source; left out: CIFAR-10's training images")
    parser.add_argument("--rounds", nargs="+", type=pair, default=[], metavar="NAME=ROUNDS")
    parser.add_argument("--goals", nargs="+", type=goal, default=GOALS)
    parser.add_argument("--every", type=int, default=10, help="rounds between two scores")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="LIMIT", help="on the clock of each run")
    parser.add_argument("--race", action="store_true", help=f"stop {BASELINE} at a multiple of {OURS}'s time to {RACE_GOAL}")
    parser.add_argument("--factor", type=float, default=15.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/time_to_quality"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    programs = sorted([OURS, BASELINE] if options.race else options.programs, key=lambda name: name != OURS)
    if unknown := set(dict(options.rounds)) - set(programs):
        parser.error(f"--rounds: no such program in this run: {', '.join(sorted(unknown))}")
    if options.race and RACE_GOAL not in options.goals:
        parser.error(f"--race needs {RACE_GOAL} among --goals")
    recipes = {program: recipe(program) for program in programs}
    recipes |= {program: recipe(program, rounds=rounds) for program, rounds in options.rounds}
    there = source(options.data)
    shared = setting(options.model, options.batch, there)
    common = {"model": options.model, "batch": options.batch, "data": Path(there.partition(":")[2] or there).name}
    rows: list[Row] = []
    earlier = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.is_file() else []
    for seed in options.seeds:
        for name in programs:
            key = {"name": name, **common, "seed": seed, "rounds": recipes[name].rounds, "every": options.every}
            key |= {"threads": options.threads, "goals": options.goals}
            limit = options.seconds
            if options.race and name == BASELINE:
                ours = next(row for row in rows if (row["name"], row["seed"]) == (OURS, seed))
                # a race that we did not finish has no bound of its own
                limit = min(limit, options.factor * interval(ours, RACE_GOAL)[1])
            found = [row for row in earlier if key.items() <= row.items()]
            if found and is_finished(found[0], goals=options.goals, limit=limit):
                row = found[0]
            else:
                row = measure(shared, recipes, key, goals=options.goals, every=options.every, limit=limit, work=options.work)
                row |= provenance(seed=seed)
            rows.append(row)
            print(outcome(row, options.goals), flush=True)
            if options.json:
                write_rows(options.json, [*rows, *others(earlier, rows)])
    summaries = compared(rows, options.goals)
    if options.json:
        origin = provenance(seed=options.seeds[0])
        write_rows(options.json, [*rows, *({**row, **origin} for row in summaries), *others(earlier, rows)])
    print(f"\n{text(summaries, options.goals)}")


if __name__ == "__main__":
    main()
