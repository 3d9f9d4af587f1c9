"""Label recovery: the classes of a batch, read from the gradient of F's last linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gradleak.client import FedSGD
from gradleak.errors import ObservationError
from gradleak.observation import Observation

Rule = Literal["auto", "known", "idlg", "counts"]

RULES: dict[str, str] = {
    "known": "granted by the threat model",
    "idlg": "sign of the last layer's gradient, one image (iDLG, Zhao et al. 2020)",
    "counts": "class counts from the last layer's bias (or weight) gradient, any batch, repeats allowed",
    "auto": "idlg for one image, counts for more",
}


@dataclass(frozen=True)
class Labels:
    """The labels an attack uses, sorted, and the rule that gave them."""

    values: Tensor
    rule: str


def recover(rule: Rule, observation: Observation, client: FedSGD) -> Labels:
    """The batch's labels by a rule of :data:`RULES`.

    Raises:
        ObservationError: The rule needs labels that are not granted, one image, or a last linear layer that F lacks.
    """
    if rule == "known":
        if observation.labels is None:
            raise ObservationError(
                "labels: the rule 'known' needs labels, and this observation does not grant them; "
                'use labels.rule="auto" to recover them from the update'
            )
        return Labels(observation.labels, rule)
    if rule == "auto":
        rule = "idlg" if observation.batch == 1 else "counts"
    if rule == "idlg" and observation.batch != 1:
        raise ObservationError(
            f"labels: the rule 'idlg' needs a batch of one image, this one has {observation.batch}; use labels.rule=\"counts\""
        )
    values = idlg(observation, client) if rule == "idlg" else counts(observation, client)
    return Labels(values.to(next(iter(client.weights.values())).device), rule)


def idlg(observation: Observation, client: FedSGD) -> Tensor:
    r"""The label of a single image: the class whose bias gradient :math:`p_k - 1[k = y]` is the only negative one.

    Without a bias, the sign of the weight gradient's row sums serves, for features of one sign (Zhao et al. 2020).

    Returns:
        One label, shape (1,).
    """
    name, _, features = last_linear(client, observation)
    gradient = _bias_gradient(observation, name, features)
    return gradient.argmin().reshape(1)


def counts(observation: Observation, client: FedSGD) -> Tensor:
    r"""Labels with repeats, from the bias gradient of the last layer under mean cross-entropy.

    .. math:: \partial L / \partial b_k = \tfrac1B \textstyle\sum_i p_{ik} - n_k / B
        \quad\Rightarrow\quad n_k = B \, (\bar p_k - \partial L / \partial b_k),

    where the server estimates the mean probability :math:`\bar p_k` by showing F random images. Without a bias,
    :math:`\partial L / \partial b_k` is estimated by the row sums of the weight gradient over the mean feature sum
    (LLG*, Wainakh et al. 2022). Counts are rounded to whole numbers that sum to B, largest remainders first.

    Returns:
        B labels, sorted.
    """
    name, probabilities, features = last_linear(client, observation)
    batch = observation.batch
    expected = batch * (probabilities - _bias_gradient(observation, name, features))
    return whole_counts(expected, batch)


def whole_counts(expected: Tensor, batch: int) -> Tensor:
    """Round real counts to whole ones that sum to ``batch`` (largest remainders first); returned as sorted labels."""
    expected = expected.double().clamp_min(0)
    counted = expected.floor()
    while counted.sum() > batch:
        counted[(expected - counted).where(counted > 0, torch.inf).argmin()] -= 1
    while counted.sum() < batch:
        counted[(expected - counted).argmax()] += 1
    return torch.repeat_interleave(torch.arange(len(counted)), counted.long())


def last_linear(client: FedSGD, observation: Observation) -> tuple[str, Tensor, Tensor]:
    """The linear layer that gives F's output, with the mean probabilities and mean feature sum on random images.

    Returns:
        The layer's name, mean softmax of F's output (classes,), and the mean over images of the sum of its input features.

    Raises:
        ObservationError: F's output does not come from an ``nn.Linear``, or its gradient is not in the update.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, module in client.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    weight = next(iter(client.weights.values()))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(2, min(observation.batch, 64)), *observation.image_shape, generator=generator)
    try:
        with torch.no_grad():
            output = client.outputs(images.to(weight))
    finally:
        for handle in handles:
            handle.remove()
    for name, (features, out) in seen.items():
        if f"{name}.weight" in observation.update and torch.equal(out, output):
            return name, output.softmax(1).mean(0).cpu(), features.sum(1).mean().cpu()
    raise ObservationError(
        "labels: F's output does not come from a linear layer whose gradient is in the update, so labels cannot be "
        'recovered from it; grant them (labels.rule="known")'
    )


def _bias_gradient(observation: Observation, name: str, features: Tensor) -> Tensor:
    bias = observation.update.get(f"{name}.bias")
    if bias is not None:
        return bias.cpu()
    return observation.update[f"{name}.weight"].cpu().sum(1) / features
