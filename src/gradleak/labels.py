r"""Label recovery: the classes of a batch, read from the gradient of F's last linear layer.

With features :math:`h_i` (the layer's input), probabilities :math:`p_i = \mathrm{softmax}(W h_i + b)` and mean cross-entropy,

.. math:: \frac{\partial L}{\partial W_k} = \frac1B \sum_i (p_{ik} - 1[y_i = k])\, h_i, \qquad
          \frac{\partial L}{\partial b_k} = \frac1B \sum_i (p_{ik} - 1[y_i = k]).

All rules read these two. An update of FedAvg is taken as the gradient times
:meth:`~gradleak.protocols.ClientOperator.gradient_scale`; on updates of several steps or with defences the rules are
approximations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linprog
from torch import Tensor

from gradleak.errors import ObservationError
from gradleak.observation import Observation
from gradleak.protocols import ClientOperator
from gradleak.targets import LOSSES

Rule = Literal["auto", "known", "joint", "idlg", "counts", "column-minima", "rlg", "ilrg"]

RULES: dict[str, str] = {
    "known": "granted by the threat model",
    "joint": "optimised together with the images, for any loss (DLG, Zhu et al. 2019)",
    "idlg": "sign of the last layer's gradient, one image (iDLG, Zhao et al. 2020)",
    "counts": "class counts from the last layer's bias (or weight) gradient, any batch, repeats allowed",
    "column-minima": "the B classes with the least weight gradients, no repeats (GradInversion, Yin et al. 2021)",
    "rlg": "classes that a hyperplane separates in the gradient's singular vectors, B < classes (RLG, Dang et al. 2021)",
    "ilrg": "class counts from probabilities of recovered class features, needs a bias (iLRG, Ma et al. 2023)",
    "auto": "idlg for one image, counts for more; joint where the loss is not cross-entropy",
}

#: Singular values below this share of the largest one are round-off in float32.
RANK_TOLERANCE = 1e-5

#: Distance of a class's singular vector from the separating hyperplane, over the vector's length, that is no round-off.
SEPARATED = 1e-2


@dataclass(frozen=True)
class Labels:
    """The labels or targets an attack uses, and the rule that gave them."""

    values: Tensor
    rule: str


def recover(rule: Rule, observation: Observation, client: ClientOperator) -> Labels:
    """The batch's labels by a rule of :data:`RULES`.

    Raises:
        ObservationError: The rule needs what is not there: granted labels, one image, no repeats, fewer images than
            classes, a last linear layer whose gradient is sent, or its bias.
    """
    if rule == "known":
        if observation.labels is None:
            raise ObservationError(
                "labels: the rule 'known' needs labels, and this observation does not grant them; "
                'use labels.rule="auto" to recover them from the update'
            )
        return Labels(observation.labels, rule)
    other_loss = client.loss_name in LOSSES and client.loss_name != "cross-entropy"
    if rule == "auto":
        rule = "joint" if other_loss else "idlg" if observation.batch == 1 else "counts"
    if other_loss and rule != "joint":
        raise ObservationError(
            f"labels: the rule {rule!r} reads classes from the gradient of cross-entropy, and the client's loss is "
            f'{client.loss_name}; use labels.rule="joint", or grant the targets (labels.rule="known")'
        )
    values = _RECOVER[rule](observation, client)
    return Labels(values.to(next(iter(client.weights.values())).device), rule)


def joint(observation: Observation, client: ClientOperator) -> Tensor:
    """Targets to begin with where an attack optimises them: what F says of random images, as targets of the client's loss."""
    weight = next(iter(client.weights.values()))
    images = torch.rand(max(2, observation.batch), *observation.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = client.outputs(images.to(weight))[: observation.batch]
    if client.loss_name == "cross-entropy":
        return output.argmax(1)
    client.check_loss(images[: observation.batch], output)  # a loss of one's own may take classes only
    return output.sigmoid() if client.loss_name == "bce-with-logits" else output


def idlg(observation: Observation, client: ClientOperator) -> Tensor:
    r"""The label of a single image: the class whose bias gradient :math:`p_k - 1[k = y]` is the only negative one.

    Without a bias, the sign of the weight gradient's row sums serves, for features of one sign (Zhao et al. 2020).

    Returns:
        One label, shape (1,).
    """
    if observation.batch != 1:
        raise ObservationError(
            f"labels: the rule 'idlg' needs a batch of one image, this one has {observation.batch}; use labels.rule=\"counts\""
        )
    return _bias_gradient(_last_layer(observation, client)).argmin().reshape(1)


def counts(observation: Observation, client: ClientOperator) -> Tensor:
    r"""Labels with repeats, from the bias gradient of the last layer.

    .. math:: n_k = B \, (\bar p_k - \partial L / \partial b_k),

    where the server estimates the mean probability :math:`\bar p_k` by showing F random images. Without a bias,
    :math:`\partial L / \partial b_k` is estimated by the row sums of the weight gradient over the mean feature sum
    (LLG*, Wainakh et al. 2022). Counts are rounded to whole numbers that sum to B, largest remainders first.

    Returns:
        B labels, sorted.
    """
    return whole_counts(_expected_counts(_last_layer(observation, client), observation.batch), observation.batch)


def column_minima(observation: Observation, client: ClientOperator) -> Tensor:
    r"""The B classes with the least minimum over features of the weight gradient, for a batch without repeats.

    .. math:: \hat y = \operatorname{arg\,sort}_k \big( \min_d \, \partial L / \partial W_{kd} \big)[:B]

    (Yin et al. 2021, section 3.2). Features must not be negative, as after a ReLU or a sigmoid: then only a class that is
    in the batch can have a large negative entry.

    Returns:
        B different labels, sorted.
    """
    layer = _last_layer(observation, client)
    if observation.batch > len(layer.weight):
        raise ObservationError(
            f"labels: the rule 'column-minima' gives each class once, and {observation.batch} images are more than the "
            f'{len(layer.weight)} classes; use labels.rule="counts"'
        )
    return layer.weight.amin(1).argsort()[: observation.batch].sort().values


def rlg(observation: Observation, client: ClientOperator) -> Tensor:
    r"""The classes in a batch of fewer images than classes, by singular vectors and linear programs.

    The weight gradient :math:`\sum_i h_i (p_i - e_{y_i})^\top / B = P \Sigma Q` has rank S <= B, and every row
    :math:`p_i - e_{y_i}` lies in the row space of Q, with its only negative entry at :math:`y_i`. So class c is
    in the batch if some vector r separates column c of Q from all others,

    .. math:: r^\top q_c < 0, \qquad r^\top q_k \ge 0 \quad (k \ne c),

    which is a linear program for each class (Dang et al. 2021). Absent classes become separable too as B nears the number of
    classes. That gives the classes, not how often each occurs: where
    fewer than B are found, the rest is filled up among them by :func:`counts` (our choice); of more, the B best separated ones
    are kept.

    Returns:
        B labels, sorted.
    """
    layer, batch = _last_layer(observation, client), observation.batch
    classes = len(layer.weight)
    if batch >= classes:
        raise ObservationError(
            f"labels: the rule 'rlg' needs fewer images than classes, and this batch has {batch} images for {classes} "
            'classes; use labels.rule="counts" or "ilrg"'
        )
    _, singular, q = torch.linalg.svd(layer.weight.T, full_matrices=False)
    rank = min(batch, int((singular > RANK_TOLERANCE * singular[0]).sum()))
    columns = q[:rank].T.numpy()
    separation = torch.zeros(classes, dtype=torch.float64)
    for c in range(classes):
        others = [k for k in range(classes) if k != c]
        # the scale of r is free, so a box bounds it
        solved = linprog(columns[c], A_ub=-columns[others], b_ub=[0.0] * len(others), bounds=(-1, 1), method="highs")
        size = float(q[:rank, c].norm())
        separation[c] = -solved.fun / size if solved.status == 0 and size > 0 else 0.0
    found = [int(c) for c in separation.argsort(descending=True, stable=True) if separation[c] > SEPARATED][:batch]
    if not found:
        raise ObservationError(
            "labels: the rule 'rlg' found no class that is separated from the others in the last layer's gradient; "
            'use labels.rule="counts"'
        )
    expected = torch.zeros(classes, dtype=torch.float64)
    expected[found] = (_expected_counts(layer, batch)[found] - 1).clamp_min(0)
    rest = whole_counts(expected, batch - len(found), among=found)
    return torch.cat([torch.tensor(found), rest]).sort().values


def ilrg(observation: Observation, client: ClientOperator) -> Tensor:
    r"""Labels with repeats, from the probabilities that F gives to recovered features of each class.

    .. math:: \bar h_k = \frac{\partial L / \partial W_k}{\partial L / \partial b_k}, \qquad
              \bar p_k = \mathrm{softmax}(W \bar h_k + b), \qquad
              \sum_j n_j \, \bar p_{jk} - n_k = B \, \partial L / \partial b_k \;\; \forall k, \quad \sum_k n_k = B,

    solved for the counts n by the pseudo-inverse (Ma et al. 2023). Where :func:`counts` takes one mean probability for
    all images, this one has one for each class. Weak where F is confident: :math:`\bar p_k \approx e_k` leaves no equation
    for :math:`n_k`. Counts are rounded as by :func:`counts`.

    Returns:
        B labels, sorted.
    """
    layer, batch = _last_layer(observation, client), observation.batch
    if layer.bias is None:
        raise ObservationError(
            "labels: the rule 'ilrg' needs the bias gradient of F's last linear layer, and the update has none; "
            'use labels.rule="counts"'
        )
    known = {name: t.double().cpu() for name, t in {**client.weights, **client.frozen}.items()}
    weight, bias = known[layer.names[0]], known[layer.names[1]]
    # a class that no image is near has both gradients near zero: its feature is of no weight
    quotient = (layer.weight / layer.bias[:, None]).nan_to_num(0.0, 0.0, 0.0)
    probabilities = (quotient @ weight.T + bias).softmax(1)
    classes = len(layer.bias)
    system = torch.cat([torch.ones(1, classes, dtype=torch.float64), probabilities.T - torch.eye(classes, dtype=torch.float64)])
    right = torch.cat([torch.tensor([float(batch)], dtype=torch.float64), batch * layer.bias])
    return whole_counts(torch.linalg.pinv(system) @ right, batch)


def whole_counts(expected: Tensor, batch: int, *, among: list[int] | None = None) -> Tensor:
    """Round real counts to whole ones that sum to ``batch`` (largest remainders first); returned as sorted labels.

    Args:
        expected: One count for each class; negative ones are taken as zero, and all are scaled where their sum is far off.
        batch: B.
        among: Classes that may have a count; None: all.

    Raises:
        ObservationError: A count is not finite.
    """
    if not bool(expected.isfinite().all()):
        raise ObservationError(
            "labels: the counts of the labels are not finite (features of the last layer that sum to zero?); grant the "
            'labels (labels.rule="known")'
        )
    allowed = torch.ones(len(expected), dtype=torch.bool)
    if among is not None:
        allowed = torch.zeros_like(allowed).index_fill(0, torch.tensor(among), True)
    expected = expected.double().clamp_min(0).where(allowed, 0)
    total = float(expected.sum())
    if abs(total - batch) > len(expected):
        expected = (expected / total if total > 0 else allowed.double() / allowed.sum()) * batch
    counted = expected.floor()
    while counted.sum() > batch:
        counted[(expected - counted).where(counted > 0, torch.inf).argmin()] -= 1
    while counted.sum() < batch:
        counted[(expected - counted).where(allowed, -torch.inf).argmax()] += 1
    return torch.repeat_interleave(torch.arange(len(counted)), counted.long())


@dataclass(frozen=True)
class LastLayer:
    """What the server knows of F's last linear layer, in float64 on the CPU.

    Attributes:
        names: Of its weight and its bias in F.
        weight: Gradient of the mean loss by its weight, classes x features.
        bias: By its bias, (classes,); None where it has none or does not send it.
        probabilities: Mean softmax of F's output on random images, (classes,).
        features: Mean over random images of the sum of the layer's input.
    """

    names: tuple[str, str]
    weight: Tensor
    bias: Tensor | None
    probabilities: Tensor
    features: Tensor


def _last_layer(observation: Observation, client: ClientOperator) -> LastLayer:
    """The linear layer that gives F's output, and its gradient.

    Raises:
        ObservationError: F's output does not come from an ``nn.Linear``, or its gradient is not in the update.
    """
    weight = next(iter(client.weights.values()))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(2, min(observation.batch, 64)), *observation.image_shape, generator=generator)
    with torch.no_grad():
        last = client.last_linear(images.to(weight))
    if last is None or last.parameter("weight") not in observation.update:
        raise ObservationError(
            "labels: F's output does not come from a linear layer whose gradient is in the update, so labels cannot be "
            'recovered from it; grant them (labels.rule="known")'
        )
    names = (last.parameter("weight"), last.parameter("bias"))
    scale = client.gradient_scale(observation.batch)
    gradient = [observation.update[name].cpu().double() / scale if name in observation.update else None for name in names]
    assert gradient[0] is not None
    return LastLayer(
        names=names,
        weight=gradient[0],
        bias=gradient[1],
        probabilities=last.output.softmax(1).mean(0).cpu().double(),
        features=last.features.sum(1).mean().cpu().double(),
    )


def _bias_gradient(layer: LastLayer) -> Tensor:
    return layer.bias if layer.bias is not None else layer.weight.sum(1) / layer.features


def _expected_counts(layer: LastLayer, batch: int) -> Tensor:
    return batch * (layer.probabilities - _bias_gradient(layer))


_RECOVER: dict[str, Callable[[Observation, ClientOperator], Tensor]] = {
    "joint": joint,
    "idlg": idlg,
    "counts": counts,
    "column-minima": column_minima,
    "rlg": rlg,
    "ilrg": ilrg,
}
