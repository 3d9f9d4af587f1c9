r"""Defences: what a client sends in place of its update, and what an attacker who knows the defence makes of it.

Most are maps :math:`g \mapsto g'` of the update (:class:`UpdateMap`); :class:`DPSGD` and :class:`Soteria` need the client's
images. They compose in any order that makes sense: ``defend(client, [Clip(norm=1.0), Gaussian(sigma=0.1)])`` is again a
client operator, and is simulated and inverted like any other.

An attacker who knows the defences inverts that same operator, with noise at its mean, and

- through clipping and masks exactly: they have a derivative almost everywhere;
- straight through rounding and signs, whose derivative is zero almost everywhere: the defended update is compared, and the
  cotangent passes unchanged (Bengio et al. 2013);
- with what the update itself shows: entries that were pruned are zero in it, so they are left out of the comparison
  (:func:`visible_mask`).

The cost of a defence is its relative distortion :math:`\|g' - g\| / \|g\|` (:func:`distortion`), and what it does to a
model's accuracy (:mod:`gradleak.federation`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradleak.errors import ModelError, SpecError, nearest
from gradleak.observation import Observation, Update
from gradleak.protocols import RANDOM, Around, Average, ClientOperator, FedSGD, JointTranspose
from gradleak.spec import ClientSpec, DefenceSpec, fault
from gradleak.vjp import Engine, Transpose, exact

_SETTINGS = ConfigDict(extra="forbid")


class Defence:
    """What a client does to protect itself. Settings are keyword-only and validated; ``name`` is its name in a spec."""

    name: ClassVar[str]

    @property
    def spec(self) -> DefenceSpec:
        """The defence as a specification has it."""
        return DefenceSpec.model_validate({"name": self.name, **dataclasses.asdict(self)})  # type: ignore[call-overload]

    def wrap(self, client: ClientOperator) -> ClientOperator:
        """The client that defends itself so."""
        return Defended(client, self)

    def at(self, client: ClientOperator, images: Tensor) -> UpdateMap:
        """The map of the update for these images."""
        raise NotImplementedError

    def given(self, observation: Observation, client: ClientOperator) -> Defence:
        """What an attacker who holds this update puts in the defence's place."""
        return self

    def to(self, device: torch.device | str) -> Defence:
        """The same defence, its tensors on another device."""
        return self


class UpdateMap(Defence):
    """A defence that maps the update alone: a deterministic part, perhaps noise, and the transpose that attackers use."""

    def __call__(self, update: Update, *, seed: int = 0) -> Update:
        """What is sent in place of ``update``; the same for the same seed."""
        return self.sent(update, torch.Generator().manual_seed(seed))

    def expected(self, update: Update) -> Update:
        """What is sent, with noise at its mean."""
        return update

    def sent(self, update: Update, generator: torch.Generator) -> Update:
        """What is sent, with noise from ``generator`` (of the CPU, so that it does not depend on the device)."""
        return self.expected(update)

    def transpose(self, update: Update, cotangent: Update) -> Update:
        """The transpose of the derivative of :meth:`expected` at ``update``; the identity is straight through."""
        return cotangent

    def at(self, client: ClientOperator, images: Tensor) -> UpdateMap:
        return self


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class Gaussian(UpdateMap):
    r""":math:`g' = g + \sigma\, \mathrm{rms}(g)\, n`, :math:`n \sim N(0, I)`, :math:`\mathrm{rms}(g) = \|g\| / \sqrt{P}`.

    So sigma is the expected relative distortion. An attacker does not know n, and ignores it.

    Attributes:
        sigma: Standard deviation of the noise over the root mean square of the update's entries.
    """

    name: ClassVar[str] = "gaussian"
    sigma: float = Field(ge=0)

    def sent(self, update: Update, generator: torch.Generator) -> Update:
        scale = self.sigma * _rms(update)
        return {name: t + scale * _normal(t, generator) for name, t in update.items()}


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class Laplace(UpdateMap):
    r""":math:`g' = g + \sigma\, \mathrm{rms}(g)\, n`, n of a Laplace distribution with variance 1: scale :math:`1/\sqrt2`.

    Attributes:
        sigma: As of :class:`Gaussian`: the two distort equally at the same sigma.
    """

    name: ClassVar[str] = "laplace"
    sigma: float = Field(ge=0)

    def sent(self, update: Update, generator: torch.Generator) -> Update:
        scale = self.sigma * _rms(update) / math.sqrt(2)
        return {name: t + scale * _laplace(t, generator) for name, t in update.items()}


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class Clip(UpdateMap):
    r""":math:`g' = g \min(1, C / \|g\|)`, over all tensors as one vector (Abadi et al. 2016).

    Attributes:
        norm: C, the largest Euclidean norm that is sent.
    """

    name: ClassVar[str] = "clip"
    norm: float = Field(gt=0)

    def expected(self, update: Update) -> Update:
        norm = _norm(update)
        return update if norm <= self.norm else {name: (self.norm / norm) * t for name, t in update.items()}

    def transpose(self, update: Update, cotangent: Update) -> Update:
        norm = _norm(update)
        if norm <= self.norm:
            return cotangent
        along = sum(float((update[name] * c).sum(dtype=torch.float64)) for name, c in cotangent.items()) / norm**2
        return {name: (self.norm / norm) * (c - along * update[name]) for name, c in cotangent.items()}


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class Prune(UpdateMap):
    """Gradient compression: in each tensor the entries of least magnitude are set to zero (Lin et al. 2018, Zhu et al. 2019).

    The zeros show which entries were pruned, so an attacker compares the others only (:class:`Mask`). Where noise hides
    them, or other clients' updates in an average, he prunes his own update in the same way.

    Attributes:
        fraction: Share of each tensor's entries that is set to zero, rounded down; the largest entry always stays.
    """

    name: ClassVar[str] = "prune"
    fraction: float = Field(ge=0, le=1)

    def expected(self, update: Update) -> Update:
        return self._mask(update).expected(update)

    def transpose(self, update: Update, cotangent: Update) -> Update:
        return self._mask(update).transpose(update, cotangent)

    def given(self, observation: Observation, client: ClientOperator) -> Defence:
        mask = visible_mask(observation)
        return self if all(bool(keep.all()) for keep in mask.values()) else Mask(mask)

    def _mask(self, update: Update) -> Mask:
        return Mask({name: _largest(t, t.numel() - math.floor(self.fraction * t.numel())) for name, t in update.items()})


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class Sign(UpdateMap):
    r"""Each tensor's signs, times its mean magnitude: :math:`g' = \frac{\|g\|_1}{n} \mathrm{sign}(g)`.

    signSGD (Bernstein et al. 2018) in the scaled form of Karimireddy et al. (2019). An attacker goes straight through.
    """

    name: ClassVar[str] = "sign"

    def expected(self, update: Update) -> Update:
        return {name: t.abs().mean() * t.sign() for name, t in update.items()}


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class Quantise(UpdateMap):
    r"""Each tensor to k bits: :math:`g' = s\, \mathrm{round}(g / s)`, :math:`s = \max|g| / (2^{k-1} - 1)`.

    Uniform and symmetric, so zero stays zero. An attacker goes straight through.

    Attributes:
        bits: k.
    """

    name: ClassVar[str] = "quantise"
    bits: int = Field(ge=2, le=16)

    def expected(self, update: Update) -> Update:
        return {name: _quantised(t, self.bits) for name, t in update.items()}


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class DPSGD(Defence):
    r"""Differentially private SGD: :math:`g' = \frac1B \big(\sum_i g_i \min(1, C / \|g_i\|) + z C n\big)` (Abadi et al. 2016).

    :math:`g_i` is image i's own gradient, n standard normal. The client's gradients are Opacus' (``GradSampleModule``). An
    attacker averages over B clipped clients of one image each and ignores the noise: B backward passes of one image, and
    memory for B updates.

    Per-sample gradients do not exist with batch statistics, so F must not have batch norm: see :func:`prepare`.

    Attributes:
        clip: C, the largest norm that one image's gradient keeps.
        noise: z, the noise multiplier: the noise in the sum has deviation z C.
        sample_rate: Probability that an image is in a batch, for the accountant.
        steps: Number of steps that the accountant counts.
        delta: Of the (epsilon, delta) that is reported.
    """

    name: ClassVar[str] = "dp-sgd"
    clip: float = Field(gt=0)
    noise: float = Field(ge=0)
    sample_rate: float = Field(default=1.0, gt=0, le=1)
    steps: int = Field(default=1, ge=1)
    delta: float = Field(default=1e-5, gt=0, lt=1)

    @property
    def epsilon(self) -> float | None:
        """epsilon at ``delta`` after ``steps`` steps, by Opacus' accountant of Renyi DP; None without noise (infinite).

        Raises:
            SpecError: Opacus is not installed.
        """
        accountant = _opacus("opacus.accountants").RDPAccountant()
        accountant.history = [(self.noise, self.sample_rate, self.steps)]
        return float(accountant.get_epsilon(delta=self.delta)) if self.noise > 0 else None

    def wrap(self, client: ClientOperator) -> ClientOperator:
        return PerImage(client, self)


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class Soteria(Defence):
    r"""Soteria: zeros in the gradient of the last linear layer, for the features that tell most of the images.

    With r the layer's input, feature f is scored by :math:`s_f = \sum_i \|\partial r_{if} / \partial x_i\| / |r_{if}|`, and the
    columns of the weight's gradient with the smallest scores are set to zero (Sun et al., CVPR 2021: those features
    with the largest :math:`|r_f| \, \|\partial r_f / \partial x\|^{-1}`; a batch is summed over as in the authors' code).
    Features that are zero for every image have nothing to hide and are chosen last; a zero feature of one image adds nothing.

    One backward pass for each feature. The zeros show which columns were pruned, so an attacker compares the others only.

    Attributes:
        fraction: Share of the columns that is set to zero, rounded down.
    """

    name: ClassVar[str] = "soteria"
    fraction: float = Field(ge=0, le=1)

    def at(self, client: ClientOperator, images: Tensor) -> Mask:
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            layer = client.last_linear(leaf)
            if layer is None or layer.parameter("weight") not in client.weights or layer.features.ndim != 2:
                raise ModelError(
                    "soteria defends a last linear layer that is sent; this model's output comes from no such layer"
                )
            name, features = layer.parameter("weight"), layer.features
            slopes = [
                torch.autograd.grad(features[:, f].sum(), leaf, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
                .flatten(1)
                .norm(dim=1)
                for f in range(features.shape[1])
            ]
        size = features.detach().abs()
        score = (torch.stack(slopes, dim=1) / size).where(size > 0, 0).sum(0).where(size.sum(0) > 0, torch.inf)
        count = math.floor(self.fraction * len(score))
        keep = torch.ones_like(score, dtype=torch.bool)
        keep[score.argsort(stable=True)[:count]] = False
        return Mask({name: keep.expand(client.weights[name].shape)})

    def given(self, observation: Observation, client: ClientOperator) -> Defence:
        weight = next(iter(client.weights.values()))
        layer = client.last_linear(torch.zeros(2, *observation.image_shape).to(weight))
        gradient = None if layer is None else observation.update.get(layer.parameter("weight"))
        if layer is None or gradient is None or bool(gradient.any(0).all()):
            return self
        return Mask({layer.parameter("weight"): gradient.any(0).expand(gradient.shape)})


@dataclasses.dataclass(frozen=True)
class Mask(UpdateMap):
    """Entries of the update that are kept; the others are zero. Not a defence: what is seen of one.

    Attributes:
        keep: Name -> bool tensor of that parameter's shape; names that are missing are kept whole.
    """

    keep: Mapping[str, Tensor]

    def expected(self, update: Update) -> Update:
        return {name: t.where(self.keep[name], 0) if name in self.keep else t for name, t in update.items()}

    def transpose(self, update: Update, cotangent: Update) -> Update:
        return self.expected(cotangent)

    def to(self, device: torch.device | str) -> Mask:
        return Mask({name: t.to(device) for name, t in self.keep.items()})


@dataclasses.dataclass(frozen=True)
class Transport(UpdateMap):
    """The number format in which the update travels; an attacker goes straight through the rounding.

    Attributes:
        format: ``float16``, ``bfloat16``, or ``K-bit`` (:class:`Quantise`).
    """

    format: str

    def expected(self, update: Update) -> Update:
        if self.format.endswith("-bit"):
            return Quantise(bits=int(self.format.removesuffix("-bit"))).expected(update)
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[self.format]
        return {name: t.to(dtype).to(t.dtype) for name, t in update.items()}


class Defended(Around):
    """A client followed by a defence.

    Args:
        client: The operator A.
        defence: What becomes of its update.
    """

    def __init__(self, client: ClientOperator, defence: Defence) -> None:
        super().__init__(client)
        self.defence = defence

    @property
    def spec(self) -> ClientSpec:
        spec = self.client.spec
        return spec.model_copy(update={"transport": self.defence.format}) if isinstance(self.defence, Transport) else spec

    @property
    def defences(self) -> tuple[DefenceSpec, ...]:
        own = () if isinstance(self.defence, Transport | Mask) else (self.defence.spec,)
        return (*self.client.defences, *own)

    def __call__(self, images: Tensor, labels: Tensor) -> Update:
        return self.defence.at(self.client, images).expected(self.client(images, labels))

    def sent(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Update:
        return self.defence.at(self.client, images).sent(self.client.sent(images, labels, generator), generator)

    def vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, Transpose]:
        update, transpose = self.client.vjp(images, labels, engine=engine)
        change = self.defence.at(self.client, images)
        return change.expected(update), lambda cotangent: transpose(change.transpose(update, cotangent))

    def joint_vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, JointTranspose]:
        update, transpose = self.client.joint_vjp(images, labels, engine=engine)
        change = self.defence.at(self.client, images)
        return change.expected(update), lambda cotangent: transpose(change.transpose(update, cotangent))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Defended:
        return Defended(self.client.to(device, dtype), self.defence.to(device))


class PerImage(Around):
    """A client of DP-SGD: its gradient is clipped image by image, and noise is added.

    Args:
        client: A FedSGD client without batch norm.
        defence: C, z and the accountant's settings.

    Raises:
        SpecError: The client is not plain FedSGD.
        ModelError: F has batch norm.
    """

    def __init__(self, client: ClientOperator, defence: DPSGD) -> None:
        if not isinstance(client, FedSGD):
            raise SpecError(
                "defence: dp-sgd clips the gradient of every image, so it must be the first defence, and client.protocol "
                '"fedsgd" or "average"'
            )
        if any(isinstance(m, _BatchNorm) for m in client.model.modules()):
            raise ModelError(
                "dp-sgd: F has batch norm, with which an image has no gradient of its own; replace it by group norm "
                "(gradleak.defences.prepare does that)"
            )
        super().__init__(client)
        self.defence = defence

    @property
    def defences(self) -> tuple[DefenceSpec, ...]:
        return (self.defence.spec,)

    @property
    def can_split(self) -> bool:
        return False  # its pieces are single images already

    def held_images(self, batch: int) -> int:
        return batch

    def __call__(self, images: Tensor, labels: Tensor) -> Update:
        return self._clipped(len(images))(images, labels)

    def sent(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Update:
        scale = self.defence.noise * self.defence.clip / len(images)
        return {name: t + scale * _normal(t, generator) for name, t in self._clipped_by_opacus(images, labels).items()}

    def vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, Transpose]:
        return self._clipped(len(images)).vjp(images, labels, engine=engine)

    def joint_vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, JointTranspose]:
        return self._clipped(len(images)).joint_vjp(images, labels, engine=engine)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PerImage:
        return PerImage(self.client.to(device, dtype), self.defence)

    def _clipped(self, count: int) -> Average:
        """The mean of clipped gradients is the average over clients of one image each."""
        return Average(Defended(self.client, Clip(norm=self.defence.clip)), sizes=[1] * count)

    def _clipped_by_opacus(self, images: Tensor, labels: Tensor) -> Update:
        # Opacus records layers in train mode only
        model = copy.deepcopy(self.model).train()
        for module in model.modules():
            if isinstance(module, RANDOM):
                module.eval()
        for name, p in model.named_parameters():
            p.requires_grad_(name in self.weights)
        try:
            private = _opacus("opacus").GradSampleModule(model, loss_reduction="mean")
        except NotImplementedError as fault:
            raise ModelError(f"dp-sgd: Opacus has no per-sample gradients for this model: {fault}") from None
        # hooks that see no input gradient warn
        self.training_loss(private(images.detach().requires_grad_()), labels).backward()
        sent: dict[str, Any] = {name: p for name, p in model.named_parameters() if name in self.weights}
        # None: F does not use the parameter
        samples = {
            name: p.new_zeros(len(images), *p.shape) if p.grad_sample is None else p.grad_sample for name, p in sent.items()
        }
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples.values()]).norm(dim=0)
        factors = (self.defence.clip / norms).clamp(max=1)
        return {name: torch.einsum("b,b...->...", factors, g) / len(images) for name, g in samples.items()}


#: name -> (class, one line about it)
DEFENCES: dict[str, tuple[type[Defence], str]] = {
    "gaussian": (Gaussian, "Gaussian noise, relative to the update's size"),
    "laplace": (Laplace, "Laplace noise, relative to the update's size"),
    "clip": (Clip, "the whole update scaled down to a norm"),
    "dp-sgd": (DPSGD, "per-image clipping and Gaussian noise, with epsilon (needs gradleak[opacus])"),
    "prune": (Prune, "the smallest entries of each tensor set to zero"),
    "sign": (Sign, "signs times mean magnitude, per tensor"),
    "quantise": (Quantise, "k-bit uniform rounding, per tensor"),
    "soteria": (Soteria, "columns of the last linear layer set to zero (Sun et al. 2021)"),
}


def available() -> dict[str, str]:
    """Defence name -> one line about it."""
    return {name: text for name, (_, text) in DEFENCES.items()}


def parse(specs: Sequence[DefenceSpec], *, where: str = "defence") -> list[Defence]:
    """The defences that a specification lists.

    Raises:
        SpecError: Names the entry, its key, what was expected and the nearest known name.
    """
    return [_defence(spec, f"{where}.{number}") for number, spec in enumerate(specs)]


def defend(client: ClientOperator, defences: Sequence[Defence], *, observation: Observation | None = None) -> ClientOperator:
    """The client that applies these defences, the first one first.

    Args:
        client: The operator A.
        defences: What it does.
        observation: For an attacker: the update that shows which entries were pruned.
    """
    for defence in defences:
        client = (defence if observation is None else defence.given(observation, client)).wrap(client)
    return client


def prepare(model: nn.Module, defences: Sequence[Defence]) -> tuple[nn.Module, tuple[str, ...]]:
    """The model that a client with these defences trains, and what a report must say of it.

    For DP-SGD every batch norm becomes a group norm of gcd(32, channels) groups, with the same scale and offset, as by
    Opacus' ``ModuleValidator.fix`` (which resets them). The caller's model stays as it is.
    """
    names = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)]
    if not names or not any(isinstance(d, DPSGD) for d in defences):
        return model, ()
    model = copy.deepcopy(model)
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, _BatchNorm)
        new = nn.GroupNorm(math.gcd(32, old.num_features), old.num_features, eps=old.eps, affine=old.affine)
        for parameter, before in zip(new.parameters(), old.parameters(), strict=True):
            parameter.requires_grad_(before.requires_grad).data = before.data
        model.set_submodule(name, new.train(old.training))
    return model, (
        f"dp-sgd: {len(names)} batch-norm layers were replaced by group norm, as per-sample gradients need; the audited model "
        "is not the one that was named",
    )


def visible_mask(observation: Observation) -> dict[str, Tensor]:
    """Which entries of the observed update are not zero: those that a pruning client did send.

    Returns:
        Name -> bool tensor of the parameter's shape.
    """
    return {name: t != 0 for name, t in observation.update.items()}


def distortion(update: Update, reference: Update) -> float:
    r""":math:`\|g' - g\| / \|g\|` over all tensors as one vector: the cost of a defence. 0 is none; inf for :math:`g = 0`."""
    change, size = _norm({name: update[name] - t for name, t in reference.items()}), _norm(reference)
    return change / size if size > 0 else math.inf


def _defence(spec: DefenceSpec, where: str) -> Defence:
    if spec.name not in DEFENCES:
        raise SpecError(f"{where}.name: unknown defence {spec.name!r}{nearest(spec.name, DEFENCES)}")
    kind = DEFENCES[spec.name][0]
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in spec.settings:
        if key not in known:
            hint = nearest(key, known) if known else "; it has none"
            raise SpecError(f"{where}.{key}: the defence {spec.name!r} has no such setting{hint}")
    try:
        return TypeAdapter(kind).validate_python(spec.settings)
    except ValidationError as error:
        raise SpecError("; ".join(f"{where}.{e['loc'][0]}: {fault(e)}" for e in error.errors())) from None


def _opacus(module: str) -> Any:
    """A module of Opacus, imported when it is needed: it is an optional extra."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise SpecError(f'defence: dp-sgd needs Opacus ({cause}); install it with: pip install "gradleak[opacus]"') from None


def _norm(update: Update) -> float:
    return math.sqrt(sum(float(t.square().sum(dtype=torch.float64)) for t in update.values()))


def _rms(update: Update) -> float:
    return _norm(update) / math.sqrt(sum(t.numel() for t in update.values()))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _laplace(like: Tensor, generator: torch.Generator) -> Tensor:
    """Laplace noise of scale 1: an exponential magnitude with a random sign."""
    magnitude = torch.empty(like.shape).exponential_(generator=generator)
    sign = torch.randint(2, like.shape, generator=generator) * 2 - 1
    return (magnitude * sign).to(like)


def _largest(tensor: Tensor, count: int) -> Tensor:
    """Which ``count`` entries (at least one) have the largest magnitude."""
    keep = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    keep[tensor.flatten().abs().topk(max(1, count)).indices] = True
    return keep.reshape(tensor.shape)


def _quantised(tensor: Tensor, bits: int) -> Tensor:
    step = tensor.abs().max() / (2 ** (bits - 1) - 1)
    return (tensor / step).round() * step if step > 0 else tensor
