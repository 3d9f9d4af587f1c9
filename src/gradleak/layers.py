r"""Which layers leak: how much each parameter tensor of an update tells of the images, without the truth.

.. math:: s_k = \|A_k(x) - A_k(x')\|^2 \,/\, \textstyle\sum_j \|A_j(x) - A_j(x')\|^2

for two batches x and x' of random images with the same labels: the share of tensor k in the squared distance of two updates
that differ by their images alone. A matching loss tells images apart by that distance, so a tensor with a large share is what
an attack lives on. The shares say where to begin; what an update without some layers still gives away is found by auditing it
(``client.layers``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from gradleak.distance import cosine, norm
from gradleak.invariance import relative_changes
from gradleak.observation import Update

#: A tensor whose norm is at most this share of the update's is float32's round-off: a bias before a batch norm, say.
ROUND_OFF = 1e-7

#: The first sentence names layers until they hold this share of the change, but no more than :data:`MOST_NAMED`.
NAMED_SHARE = 0.5
MOST_NAMED = 3

MOST_MODULES = 20


@dataclass(frozen=True)
class Layer:
    """What one parameter tensor of an update tells.

    Attributes:
        name: Of the parameter.
        module: The module that it is a parameter of; its own name where that is F itself.
        numbers: How many it has.
        norm_share: Of the squared norm of the observed update.
        image_share: s_k, of what the images change in the update; 0 where nothing changes.
        image_sensitivity: :math:`2 \\|A_k(x) - A_k(x')\\| / (\\|A_k(x)\\| + \\|A_k(x')\\|)`, in [0, 2]; None for round-off.
        distance: One minus the cosine of this tensor of the reconstruction's update and of the observed one, in [0, 2]: 0
            where they agree; None for round-off.
    """

    name: str
    module: str
    numbers: int
    norm_share: float
    image_share: float
    image_sensitivity: float | None
    distance: float | None


def layers(observed: Update, rebuilt: Update, probes: tuple[Update, Update]) -> list[Layer]:
    """What each tensor tells, in the order of ``rebuilt``.

    Args:
        observed: g*, name -> tensor.
        rebuilt: A of the reconstruction, of the same names.
        probes: A of two batches of random images with the same labels (:func:`gradleak.invariance.random_updates`).
    """
    first, second = probes
    sizes = _norms(observed[name].to(t) for name, t in rebuilt.items())
    random = _norms(first.values())
    changes = _norms(second[name] - t for name, t in first.items())
    whole, whole_change = (sum(size**2 for size in each) or 1.0 for each in (sizes, changes))
    faint, faint_random = (ROUND_OFF * sum(size**2 for size in each) ** 0.5 for each in (sizes, random))
    relative = relative_changes(first, second)
    return [
        Layer(
            name=name,
            module=name.rpartition(".")[0] or name,
            numbers=tensor.numel(),
            norm_share=size**2 / whole,
            image_share=change**2 / whole_change,
            image_sensitivity=relative.get(name) if probe > faint_random else None,
            distance=cosine({name: tensor}, {name: observed[name].to(tensor)})[0] if size > faint else None,
        )
        for (name, tensor), size, probe, change in zip(rebuilt.items(), sizes, random, changes, strict=True)
    ]


@dataclass(frozen=True)
class Module:
    """The tensors of one module, its submodules included: sums of what :class:`Layer` has of each."""

    name: str
    numbers: int
    norm_share: float
    image_share: float


def modules(found: Sequence[Layer], *, most: int = MOST_MODULES) -> list[Module]:
    """The modules of an update, those that tell most of the images first.

    Args:
        found: From :func:`layers`.
        most: Modules are taken as deep in F as there are no more than this many: single layers of a small network, blocks or
            stages of a deep one.
    """
    paths = [layer.module.split(".") for layer in found]
    depths = range(max(map(len, paths), default=1), 0, -1)
    depth = next((d for d in depths if len({tuple(path[:d]) for path in paths}) <= most), 1)
    together: dict[str, list[Layer]] = {}
    for layer, path in zip(found, paths, strict=True):
        together.setdefault(".".join(path[:depth]), []).append(layer)
    grouped = [
        Module(
            name,
            sum(layer.numbers for layer in own),
            sum(layer.norm_share for layer in own),
            sum(layer.image_share for layer in own),
        )
        for name, own in together.items()
    ]
    return sorted(grouped, key=lambda module: -module.image_share)


def in_words(found: Sequence[Layer]) -> str:
    """What the shares mean and what to do, in two sentences; ``""`` without layers."""
    grouped = modules(found)
    if not grouped:
        return ""
    named: list[Module] = []
    for module in grouped[:MOST_NAMED]:
        if module.image_share > 0 and sum(m.image_share for m in named) < NAMED_SHARE:
            named.append(module)
    if not named:
        return "No layer of this update changes with the images."
    names = " and ".join([", ".join(m.name for m in named[:-1])] * (len(named) > 1) + [named[-1].name])
    share = sum(m.image_share for m in named)
    which = "this layer" if len(named) == 1 else "these layers"
    if len(named) == len(grouped):
        return f"All that the images change in this update is in {names}: an update without {which} is none."
    return (
        f"Of all that the images change in this update, {100 * share:.0f} % is in {names}. To lower the leak by sending fewer "
        f"layers, keep {which} on the client first, and audit again with client.layers, the list of what is sent: what "
        "remains may still be enough."
    )


def _norms(tensors: Iterable[Tensor]) -> list[float]:
    return [norm({"": tensor}) for tensor in tensors]
