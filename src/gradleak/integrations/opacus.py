"""Opacus: what a client of DP-SGD really sends, its noise included, and the epsilon of its accountant beside the leak.

Needs ``pip install "gradleak[opacus]"``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradleak.defences import DPSGD, prepare
from gradleak.errors import ObservationError, SpecError
from gradleak.evaluate import RECOGNISABLE_SSIM
from gradleak.leak import QUICK, Leak, measure_leak
from gradleak.observation import Truth
from gradleak.protocols import training_loss
from gradleak.spec import ClientSpec
from gradleak.updates import observe

try:
    from opacus import GradSampleModule, PrivacyEngine
    from opacus.accountants import IAccountant, create_accountant
    from opacus.optimizers import DPOptimizer
except ImportError as cause:
    raise ImportError(f'{__name__} needs Opacus ({cause}); install it with: pip install "gradleak[opacus]"') from cause


def dp_sgd(optimizer: DPOptimizer, accountant: IAccountant, *, delta: float = 1e-5) -> DPSGD:
    """The defence ``dp-sgd`` as an optimiser of Opacus applies it: its clipping norm and noise, and the steps counted.

    Where noise or sampling rate changed during training, those of the last step stand for all, and only the accountant's own
    epsilon (:func:`spent`) is right.

    Args:
        optimizer: What ``PrivacyEngine.make_private`` returned.
        accountant: ``privacy_engine.accountant``.
        delta: Of the (epsilon, delta) that is reported.

    Raises:
        SpecError: The optimiser clips layer by layer, which the defence does not model.
    """
    if hasattr(optimizer, "max_grad_norms"):
        raise SpecError(
            f"dp-sgd: {type(optimizer).__name__} clips layer by layer, and the defence an image's whole gradient; make the "
            'optimiser with clipping="flat"'
        )
    _, sample_rate, _ = accountant.history[-1] if accountant.history else (0.0, 1.0, 0)
    steps = sum(count for _, _, count in accountant.history)
    return DPSGD(
        clip=float(optimizer.max_grad_norm),
        noise=float(optimizer.noise_multiplier),
        sample_rate=min(1.0, float(sample_rate)),
        steps=max(1, int(steps)),
        delta=delta,
    )


def spent(accountant: IAccountant, *, delta: float = 1e-5) -> float | None:
    """epsilon at ``delta`` by the accountant that trained; None where a step had no noise, and so no bound."""
    if any(noise == 0 for noise, _, _ in accountant.history):
        return None
    return float(accountant.get_epsilon(delta=delta))


class observe_private(observe):
    r"""Look at one step of DP-SGD, and keep what its server would be sent: :class:`gradleak.updates.observe` for Opacus.

    .. code-block:: python

        with observe_private(model, optimizer, privacy_engine, delta=1e-5) as seen:
            criterion(model(images), labels).backward()
            optimizer.step()  # clips, adds the noise, counts the step
        seen.observation, seen.epsilon

    The update is what ``p.grad`` holds after ``optimizer.step()``: clipped, summed, with noise, divided by the expected batch
    size. The observation's defence is :func:`dp_sgd`, so an attacker knows clip and noise multiplier, and not the noise.

    Args:
        model: The ``GradSampleModule`` of ``make_private``.
        optimizer: Its ``DPOptimizer``.
        engine: The ``PrivacyEngine``, whose accountant counts the step.
        delta: Of the (epsilon, delta) that is reported.
        settings: As of :class:`gradleak.updates.observe`: ``labels``, ``client``, ``mean``, ``std``.

    Attributes:
        observation: After the block: what the server holds.
        epsilon: After the block: :func:`spent`, of all steps so far.
        delta: As given.

    Raises:
        ObservationError: As ``observe``; among others where ``optimizer.step()`` is not in the block, or the Poisson sample
            was empty.
        SpecError: As :func:`dp_sgd`.
    """

    epsilon: float | None

    def __init__(
        self, model: nn.Module, optimizer: DPOptimizer, engine: PrivacyEngine, *, delta: float = 1e-5, **settings: Any
    ) -> None:
        super().__init__(model, **settings)
        self.delta = delta
        self._optimizer, self._accountant = optimizer, engine.accountant
        dp_sgd(optimizer, engine.accountant, delta=delta)  # what it cannot be is said before the step

    def __enter__(self) -> observe_private:
        super().__enter__()
        self._steps = sum(count for _, _, count in self._accountant.history)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            taken = sum(count for _, _, count in self._accountant.history) - self._steps
            if taken != 1:
                self._hook.remove()
                raise ObservationError(
                    f"observe_private: {taken} private steps were counted in the block, expected one: call backward() and "
                    "optimizer.step() in it, once"
                )
            self._defences = (dp_sgd(self._optimizer, self._accountant, delta=self.delta).spec,)
            self.epsilon = spent(self._accountant, delta=self.delta)
        super().__exit__(kind, value, trace)


def plain_model(model: GradSampleModule) -> nn.Module:
    """A copy of what Opacus wrapped, without the hooks that record single images' gradients: F, for an attack."""
    duplicate = copy.deepcopy(model)
    for p in duplicate.parameters():
        p.grad_sample = None  # a copy of a parameter has lost it, and Opacus deletes it
    standard: nn.Module = duplicate.to_standard_module()
    return standard


@dataclass(frozen=True)
class PrivateLeak:
    """What a noise multiplier buys: its epsilon, and what an attack still rebuilds from one step.

    Attributes:
        noise: z, the noise multiplier.
        epsilon: Of the whole training at ``delta``; None without noise.
        delta: As given.
        leak: Of one update.
    """

    noise: float
    epsilon: float | None
    delta: float
    leak: Leak


def leak_by_noise(
    model: Callable[[], nn.Module],
    truth: Truth,
    noise: Sequence[float],
    *,
    clip: float,
    sample_rate: float = 1.0,
    steps: int = 1,
    delta: float = 1e-5,
    accountant: str = "rdp",
    client: ClientSpec | None = None,
    attack: Mapping[str, Any] = QUICK,
    threshold: float = RECOGNISABLE_SSIM,
    seed: int = 0,
) -> list[PrivateLeak]:
    """Epsilon and leak side by side, for several noise multipliers.

    For each of them one real step of Opacus on all images of ``truth``, whose update is attacked with the labels known.
    Batch norm is replaced by group norm, as per-sample gradients need (:func:`gradleak.defences.prepare`).

    Args:
        model: Makes F, with the same weights each time.
        truth: The batch of the step.
        noise: The noise multipliers z.
        clip: C, the largest norm of an image's gradient.
        sample_rate: Of the planned training: the probability that an image is in a batch.
        steps: Of the planned training.
        delta: Of the (epsilon, delta).
        accountant: ``rdp``, ``prv`` or ``gdp``.
        client: Loss and mode; FedSGD in train mode unless said otherwise.
        attack, threshold: As of :func:`gradleak.leak.measure_leak`.
        seed: Of noise and attack.

    Raises:
        SpecError: A setting is out of range, or the client is not FedSGD.
        GradleakError: As :func:`gradleak.leak.measure_leak`.
    """
    client = client or ClientSpec()
    if client.protocol != "fedsgd":
        raise SpecError(f"a step of DP-SGD sends a gradient, and the protocol is {client.protocol!r}; use 'fedsgd'")
    criterion, rows = training_loss(client.loss), []
    for z in noise:
        planned = DPSGD(clip=clip, noise=z, sample_rate=sample_rate, steps=steps, delta=delta)
        network, _ = prepare(model(), [planned])
        network.train(client.mode == "train")
        engine = PrivacyEngine(accountant=accountant)
        private, optimizer, loader = engine.make_private(
            module=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(truth.images, truth.labels), batch_size=len(truth.images)),
            noise_multiplier=z,
            max_grad_norm=clip,
            poisson_sampling=False,
            noise_generator=torch.Generator().manual_seed(seed),
        )
        with observe_private(private, optimizer, engine, delta=delta, client=client, labels=truth.labels) as seen:
            for images, labels in loader:
                criterion(private(images), labels).backward()
                optimizer.step()
        counted = create_accountant(accountant)
        counted.history = [(z, sample_rate, steps)]
        leak = measure_leak(
            seen.observation, plain_model(private), truth, attack=attack, labels="known", threshold=threshold, seed=seed
        )
        rows.append(PrivateLeak(noise=z, epsilon=spent(counted, delta=delta), delta=delta, leak=leak))
    return rows
