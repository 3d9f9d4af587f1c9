"""Training the attacked model F on images that are not the client's: trained and untrained models leak differently."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradleak.errors import DataError, DivergedError
from gradleak.observation import Truth
from gradleak.targets import are_classes, fault

#: Name -> optimiser of parameters and a rate.
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}

log = logging.getLogger(__name__)


def train_model(
    model: nn.Module,
    public: Truth,
    *,
    rounds: int = 1000,
    seed: int = 0,
    batch: int = 64,
    optimiser: str = "adam",
    learning_rate: float = 1e-3,
    device: torch.device | str = "cpu",
) -> nn.Module:
    r"""F after ``rounds`` steps on :math:`\frac1b \sum_i L(F(x_i), y_i)`, the mean cross-entropy of random batches.

    Batch norm is in train mode, so its running statistics move too. The images are taken as they are, without augmentation.
    They must not be those that are attacked: a model remembers what it was trained on.

    Args:
        model: F with its first weights; it stays as it is.
        public: Images and their classes.
        rounds: Number of steps.
        seed: Of the order of the images; a training repeats on one machine with one number of threads.
        batch: b; at most all images are taken. Every image comes once before one comes again.
        optimiser: One of :data:`OPTIMISERS`: ``adam``, or ``sgd`` with momentum 0.9.
        learning_rate: Of the optimiser, constant.
        device: Where to train.

    Returns:
        The trained F, on the CPU and in eval mode.

    Raises:
        DataError: The labels are no classes of F.
        DivergedError: The loss is not finite.
    """
    device = torch.device(device)
    model = copy.deepcopy(model).to(device).train()
    images, labels = public.images.to(next(model.parameters())), public.labels.to(device)
    with torch.no_grad():
        bad = fault("cross-entropy", labels, copy.deepcopy(model).eval()(images[:1]))
    if bad or not are_classes(labels):
        raise DataError(f"training a model: {bad or 'each image needs one class'}; see model.num_classes")
    generator, order, batch = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64), min(batch, len(labels))
    step = OPTIMISERS[optimiser](model.parameters(), lr=learning_rate)
    for t in range(1, rounds + 1):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
        rows, order = order[:batch].to(device), order[batch:]
        outputs = model(images[rows])
        loss = cross_entropy(outputs, labels[rows])
        step.zero_grad()
        loss.backward()
        step.step()
        now = float(loss.detach())
        if not math.isfinite(now):
            raise DivergedError(f"training the model diverged in round {t}; lower its learning rate ({learning_rate})")
        if t % max(1, rounds // 10) == 0:
            right = float((outputs.argmax(1) == labels[rows]).float().mean())
            log.info("round %d/%d: loss %.3f, accuracy on the batch %.3f", t, rounds, now, right)
    return model.cpu().eval()
