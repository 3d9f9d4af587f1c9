"""How much memory an attack takes, told before it runs, and how it is made to fit."""

from __future__ import annotations

import copy
import ctypes
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from gradleak.attacks.recipe import Attack, Problem
from gradleak.errors import MemoryLimitError
from gradleak.vjp import exact, secant

#: Share of the free memory that an attack may take when no limit is given.
SHARE = 0.9

#: Updates held at once: g, g*, the cotangent, the moved weights, and two temporaries of the distance.
UPDATES = 6

#: The same of the whitened distance: g* and its factors.
WHITENED_UPDATES = 2

#: Measured peak over saved activations: temporaries of convolutions, and gradients that are alive while others are freed.
OVERHEAD = 1.5

MIB = 2**20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """Bytes that an attack takes beyond what the process has already.

    Attributes:
        per_image: Activations of F that a transpose keeps for one image.
        held: Images whose activations are kept at once.
        updates: Tensors of the update's size.
        image_model: Parameters, optimiser state and activations of the image model.
    """

    per_image: float
    held: int
    updates: float
    image_model: float

    @property
    def total(self) -> float:
        """All of it."""
        return OVERHEAD * self.per_image * self.held + self.updates + self.image_model

    def __str__(self) -> str:
        return (
            f"about {self.total / MIB:,.0f} MiB ({OVERHEAD * self.per_image * self.held / MIB:,.0f} for {self.held} images in "
            f"F, {self.updates / MIB:,.0f} for updates, {self.image_model / MIB:,.0f} for the image model)"
        )


def estimate(problem: Problem, attack: Attack, image_model: nn.Module) -> Estimate:
    """The memory of one round, from what autograd saves: of F for two images, of the image model without computing it.

    The secant keeps the activations of one pass. Double backward keeps those of the pass that it differentiates too, and
    ``auto`` runs it now and then.

    Args:
        problem: Observation and operator.
        attack: The recipe.
        image_model: Its image model, on the device of the run.
    """
    client = problem.client
    weight = next(iter(client.weights.values()))
    count = min(2, problem.batch)
    images = torch.zeros(count, *problem.image_shape, device=weight.device, dtype=weight.dtype)
    labels = problem.labels[:count]
    transpose = secant if attack.engine == "secant" else exact
    kept = _saved(lambda: transpose(lambda w, x: client.loss(w, x, labels), client.weights, images), client.weights.values())
    size = weight.element_size()
    parameters = sum(p.numel() * p.element_size() for p in image_model.parameters())
    return Estimate(
        per_image=kept / count,
        held=client.held_images(problem.batch),
        updates=(UPDATES + (WHITENED_UPDATES if attack.distance == "whitened" else 0)) * client.parameters * size,
        # theta, its gradient, two moments, the state to fall back to, and what the backward pass needs
        image_model=7 * parameters + OVERHEAD * _activations(image_model),
    )


def available(device: torch.device) -> float:
    """Bytes that are free on a device: of the GPU, else of the machine and of this process's control group."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(float(psutil.virtual_memory().available), _control_group())


def fit(problem: Problem, attack: Attack, image_model: nn.Module, *, limit_mb: float | None = None) -> Estimate:
    """Make the attack fit: in pieces of the batch where its images do not depend on each other, else not at all.

    Args:
        problem, attack, image_model: As of :func:`estimate`. The operator's pieces are set (``in_pieces``).
        limit_mb: MiB that the attack may take beyond what the process has; None: nine tenths of what is free.

    Returns:
        The estimate, in the pieces that were chosen.

    Raises:
        MemoryLimitError: It does not fit; says what it takes, and what to change.
    """
    client = problem.client
    weight = next(iter(client.weights.values()))
    limit = SHARE * _share(problem, weight.device) if limit_mb is None else limit_mb * MIB
    whole = found = estimate(problem, attack, image_model)
    while found.total > limit and client.can_split and found.held > 1:
        client.in_pieces(math.ceil(client.held_images(problem.batch) / 2))
        before = found.held
        found = replace(found, held=client.held_images(problem.batch))
        if found.held == before:
            break
    if found.total > limit:
        raise MemoryLimitError(_refusal(found, limit, problem, attack))
    if found.held < whole.held:
        log.info("memory: %s do not fit into %.0f MiB; %d images at a time", whole, limit / MIB, found.held)
    return found


def _share(problem: Problem, device: torch.device) -> float:
    """Free bytes for each process: those of one machine share its memory, and all decide by the least."""
    sharers = 1 if device.type == "cuda" else problem.shard.neighbours
    return problem.shard.least(available(device) / sharers)


def _refusal(found: Estimate, limit: float, problem: Problem, attack: Attack) -> str:
    ways: list[str] = []
    if problem.shard.world > 1:
        ways = ["more processes, each with fewer images"]
    elif not problem.client.can_split:
        ways = ["batch statistics couple the images, so they cannot be processed in pieces"]
    ways += ["fewer images (data.batch) or smaller ones (data.size)"]
    if attack.engine != "secant":
        ways.append('attack.engine="secant", which keeps about half')
    if hasattr(attack, "channels"):
        ways.append("fewer channels (attack.channels)")
    ways.append("a larger limit (memory_limit_mb, --memory-limit)")
    return f"memory: the attack takes {found}, the limit is {limit / MIB:,.0f} MiB. What helps: {'; '.join(ways)}"


def _saved(compute: Callable[[], object], parameters: Iterable[Tensor]) -> float:
    """Bytes of the storages that autograd saves during a computation, each once, those of parameters not at all."""
    seen: dict[int, tuple[Tensor, int]] = {p.untyped_storage()._cdata: (p, 0) for p in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # the tensor is kept until the end: a freed storage's address would be used again
        seen.setdefault(storage._cdata, (tensor, storage.nbytes()))
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = compute()
    del kept
    return float(sum(size for _, size in seen.values()))


def _activations(image_model: nn.Module) -> float:
    """Bytes that the image model's forward pass saves, on the meta device: nothing is allocated or computed."""
    try:
        shadow = copy.deepcopy(image_model).to("meta")
        return _saved(shadow, shadow.parameters())
    except (RuntimeError, NotImplementedError):  # an image model of one's own that has no meta form
        return 0.0


def _control_group() -> float:
    """What this process's control group may still take (version 2 or 1), in bytes; infinite without one."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return float(Path(limit).read_text()) - float(Path(used).read_text())
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return math.inf


def keep_freed_memory() -> None:
    """Have glibc keep what tensors give back for the next ones, up to 32 MiB each: a round frees and takes the same sizes.

    By default it returns memory to the system now and then, and each new page costs a fault: 4 to 13 % of a round
    (docs/performance.md). Settings of one's own in ``MALLOC_*_`` are left as they are.
    """
    if sys.platform != "linux" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(-3, 32 * MIB)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether an error says that memory ran out: torch raises a plain RuntimeError for it on the CPU, oneDNN another."""
    said = ("allocate memory", "could not create a primitive")
    return isinstance(fault, MemoryError | torch.OutOfMemoryError) or (
        isinstance(fault, RuntimeError) and any(text in str(fault) for text in said)
    )
