"""Before spending hours: can this inversion work at all, and what would it cost?"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from gradleak import mixed
from gradleak.attacks.recipe import GAIN_BLIND
from gradleak.evaluate import IMAGE_BLIND
from gradleak.invariance import image_sensitivity
from gradleak.run import attack_observation, device_name, prepare, simulate_client
from gradleak.spec import RunSpec
from gradleak.theory import total_variation_limit


@dataclass(frozen=True)
class Check:
    """The counting verdict, what the update cannot tell, Proposition 1's limit, and the measured cost.

    Attributes:
        update_size: P(F), scalars in the update: the equations.
        unknowns: B*C*H*W: the unknowns.
        gain_sensitivity: How much the update depends on the gain of random images (:mod:`gradleak.invariance`).
        image_sensitivity: How much it changes from one batch of random images to another.
        distance: The attack's.
        total_variation_limit: lambda*, beyond which a blank image ranks above this batch at the attack's distance
            (:func:`gradleak.theory.total_variation_limit`); infinity where none does. It knows the batch.
        total_variation: The attack's own weight; None where it has no such prior.
        generator: What the attack says of its image model (its channels and P(G)).
        rounds: T of the specification.
        seconds_per_round: Measured: the second of two rounds (the first one pays for warm-up and the engine's check).
        peak_memory_mb: Highest memory over the two rounds.
        device: Where it was measured.
    """

    update_size: int
    unknowns: int
    gain_sensitivity: float
    image_sensitivity: float
    distance: str
    total_variation_limit: float
    total_variation: float | None
    generator: dict[str, object]
    rounds: int
    seconds_per_round: float
    peak_memory_mb: float
    device: str

    @property
    def determined(self) -> bool:
        """Whether there are at least as many equations as unknowns (necessary for a unique answer, not sufficient)."""
        return self.update_size >= self.unknowns

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it: a limit that is not finite is null."""
        table = dataclasses.asdict(self)
        table["total_variation_limit"] = self.total_variation_limit if math.isfinite(self.total_variation_limit) else None
        return {
            **table,
            "determined": self.determined,
            "gain_told": self.gain_sensitivity >= GAIN_BLIND,
            "images_told": self.image_sensitivity >= IMAGE_BLIND,
            "seconds": self.seconds_per_round * self.rounds,
        }

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
        hopeless = not self.determined or self.image_sensitivity < IMAGE_BLIND
        return [
            f"in short   {'little can come of it: see counting and told' if hopeless else 'nothing here prevents a leak'}; "
            f"the attack takes about {_duration(total)}",
            f"update     P(F) = {self.update_size:,}",
            f"unknowns   B*C*H*W = {self.unknowns:,}",
            f"counting   {verdict}",
            f"told       {self._told()}",
            f"smoothness {self._smoothness()}",
            *([f"generator  P(G) = {size:,} with {channels} channels"] if size is not None else []),
            f"memory     about {self.peak_memory_mb:,.0f} MiB at the peak, measured over two rounds on {self.device}",
            f"time       {self.seconds_per_round:.2f} s a round, about {_duration(total)} for {self.rounds} rounds",
        ]

    def _told(self) -> str:
        """Which changes of the images the update does not see."""
        if self.image_sensitivity < IMAGE_BLIND:
            return f"nothing: the update does not depend on the images (relative change {self.image_sensitivity:.1e})"
        if self.gain_sensitivity < GAIN_BLIND:
            return f"all but the gain of the images (sensitivity {self.gain_sensitivity:.1e}): their brightness must be guessed"
        return f"also the gain of the images (sensitivity {self.gain_sensitivity:.2g}); no invariance was found"

    def _smoothness(self) -> str:
        """Proposition 1 for this batch and this attack."""
        if not math.isfinite(self.total_variation_limit):
            return "no weight of total variation ranks a blank image above this batch (Proposition 1)"
        text = (
            f"beyond a weight of {self.total_variation_limit:.2g} of total variation a blank image ranks above this batch "
            f"({self.distance}, Proposition 1)"
        )
        if self.total_variation is None:
            return f"{text}; this attack has none"
        side = "beyond" if self.total_variation > self.total_variation_limit else "below"
        return f"{text}; this attack's, {self.total_variation:g}, is {side} it"


@mixed.full_float32()
def check(spec: RunSpec) -> Check:
    """Simulate the client, run two rounds of the attack, and say what a whole run would take."""
    recipe, device = prepare(spec)
    client = simulate_client(spec)
    trial = dataclasses.replace(recipe, rounds=2, snapshots=0, repeat=1)
    reconstruction = attack_observation(client.observation, client.model, trial, spec, device, progress=False)
    seconds = [0.0, *(row["seconds"] for row in reconstruction.history)]  # a closed form has one round
    own = client.operator.to(device)
    images = client.truth.images.to(next(iter(own.weights.values())))
    labels = client.truth.labels.to(images.device)
    return Check(
        update_size=client.operator.parameters,
        unknowns=client.truth.images.numel(),
        gain_sensitivity=reconstruction.notes["gain_check"]["sensitivity"],
        image_sensitivity=image_sensitivity(own, labels, client.observation.image_shape),
        distance=recipe.distance,
        total_variation_limit=total_variation_limit(
            own, images, labels, distance="cosine" if recipe.distance == "whitened" else recipe.distance
        ),
        total_variation=getattr(recipe, "total_variation", None),
        generator={key: value for key, value in reconstruction.notes.items() if key.startswith("generator_")},
        rounds=1 if len(seconds) == 2 else recipe.rounds * recipe.repeat,
        seconds_per_round=seconds[-1] - seconds[-2],
        peak_memory_mb=reconstruction.peak_memory_mb,
        device=device_name(device),
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
