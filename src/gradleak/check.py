"""Before spending hours: can this inversion work at all, and what would it cost?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gradleak.run import attack_observation, prepare, simulate_client
from gradleak.spec import RunSpec


@dataclass(frozen=True)
class Check:
    """The counting verdict and the measured cost.

    Attributes:
        update_size: P(F), scalars in the update: the equations.
        unknowns: B*C*H*W: the unknowns.
        generator: What the attack says of its image model (its channels and P(G)).
        rounds: T of the specification.
        seconds_per_round: Measured: the second of two rounds (the first one pays for warm-up and the engine's check).
        peak_memory_mb: Highest memory over the two rounds.
        device: Where it was measured.
    """

    update_size: int
    unknowns: int
    generator: dict[str, object]
    rounds: int
    seconds_per_round: float
    peak_memory_mb: float
    device: str

    @property
    def determined(self) -> bool:
        """Whether there are at least as many equations as unknowns (necessary for a unique answer, not sufficient)."""
        return self.update_size >= self.unknowns

    def lines(self) -> list[str]:
        """The check for people, a line each."""
        ratio = self.update_size / self.unknowns
        verdict = (
            f"enough equations ({ratio:.1f} for each unknown): a unique answer is possible, not guaranteed"
            if self.determined
            else f"too few equations ({ratio:.2f} for each unknown): the images cannot be unique, only a prior can choose"
        )
        total = self.seconds_per_round * self.rounds
        size = self.generator.get("generator_parameters")
        channels = self.generator.get("generator_channels")
        return [
            f"update     P(F) = {self.update_size:,}",
            f"unknowns   B*C*H*W = {self.unknowns:,}",
            f"counting   {verdict}",
            *([f"generator  P(G) = {size:,} with {channels} channels"] if size is not None else []),
            f"memory     about {self.peak_memory_mb:,.0f} MiB at the peak, measured over two rounds on {self.device}",
            f"time       {self.seconds_per_round:.2f} s a round, about {_duration(total)} for {self.rounds} rounds",
        ]


def check(spec: RunSpec) -> Check:
    """Simulate the client, run two rounds of the attack, and say what a whole run would take."""
    recipe, device = prepare(spec)
    client = simulate_client(spec)
    trial = dataclasses.replace(recipe, rounds=2, snapshots=0, repeat=1)
    reconstruction = attack_observation(client.observation, client.model, trial, spec, device, progress=False)
    seconds = [0.0, *(row["seconds"] for row in reconstruction.history)]  # a closed form has one round
    return Check(
        update_size=client.operator.parameters,
        unknowns=client.truth.images.numel(),
        generator=reconstruction.notes,
        rounds=1 if len(seconds) == 2 else recipe.rounds * recipe.repeat,
        seconds_per_round=seconds[-1] - seconds[-2],
        peak_memory_mb=reconstruction.peak_memory_mb,
        device=str(device),
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
