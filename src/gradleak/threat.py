"""What an attack requires of the threat model, what an observation grants, and the letter that names it."""

from __future__ import annotations

from gradleak.attacks.recipe import Attack
from gradleak.errors import ObservationError
from gradleak.observation import Observation

GRANTS: dict[str, str] = {
    "labels": "the labels of the batch",
    "batch-size": "the number of images in the batch",
    "mode": "whether the client's layers were in train or eval mode",
    "batch-norm-statistics": "mean and variance of the client's batch at the batch-norm layers; threat.batch_statistics",
    "surrogate-data": "data like the client's, or a generator trained on such data; threat.surrogate_data",
}

#: Letters of Carletti et al., "SoK: Gradient Inversion Attacks in Federated Learning", USENIX Security 2025.
LETTERS: dict[str, str] = {
    "A": "eavesdropper: sees the updates only",
    "B": "informed eavesdropper: also knows the model and its weights",
    "C": "parameter-aware eavesdropper: also knows the training details (batch size, mode, local steps, rate)",
    "D": "data-enhanced eavesdropper: also holds surrogate data, for example a generator trained on public images",
    "E": "statistical-informed eavesdropper: also knows statistics of the client's data",
    "F": "active manipulator: changes the model that it sends out",
    "G": "data-enhanced manipulator: changes the model and holds surrogate data",
    "H": "active client manipulator: also chooses which clients take part",
}


def check_granted(name: str, attack: Attack, observation: Observation) -> None:
    """Raise :class:`~gradleak.errors.ObservationError` naming what ``attack`` requires and the observation lacks."""
    missing = attack.requires - observation.granted
    if missing:
        what = "; ".join(f"{grant} ({GRANTS.get(grant, 'not known')})" for grant in sorted(missing))
        raise ObservationError(f"attack {name!r} requires what this observation does not grant: {what}")


def letter(observation: Observation) -> str:
    """The SoK's threat model: E with statistics of the client's data, else D with surrogate data, else C when training
    details such as batch size and mode are known, else B.
    """
    if "batch-norm-statistics" in observation.granted:
        return "E"
    if "surrogate-data" in observation.granted:
        return "D"
    return "C" if {"batch-size", "mode"} & observation.granted else "B"
