"""NVIDIA FLARE: a filter that audits an update before it leaves a site, and an inverter for filters of one's own.

Needs ``pip install "gradleak[nvflare]"``. Settings are texts, numbers, lists and tables, since NVFlare writes them into a job's
configuration: a model and the images are named as ``package.module:function`` or ``path/to/file.py:function``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradleak import models
from gradleak.errors import DataError, ObservationError, SpecError
from gradleak.evaluate import RECOGNISABLE_SSIM
from gradleak.integrations.outgoing import Outgoing
from gradleak.leak import QUICK
from gradleak.models import import_function
from gradleak.observation import Observation, Truth
from gradleak.run import attack_observation, prepare
from gradleak.spec import ClientSpec, parse
from gradleak.updates import from_weights

try:
    from nvflare.apis.dxo import DXO, DataKind, from_shareable
    from nvflare.apis.dxo_filter import DXOFilter
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_component import FLComponent
    from nvflare.apis.fl_constant import FLContextKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_common.app_constant import AppConstants
except ImportError as cause:
    raise ImportError(f'{__name__} needs NVFlare ({cause}); install it with: pip install "gradleak[nvflare]"') from cause

KINDS = [DataKind.WEIGHT_DIFF, DataKind.WEIGHTS]


class _SeesUpdates(FLComponent):
    """What filter and inverter share: they remember the weights that a task came with, and make observations of results."""

    model: str | dict[str, Any]
    client: dict[str, Any] | None
    image_shape: list[int]
    mean: list[float] | None
    std: list[float] | None
    _global: dict[str, Tensor]

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Remember W: NVFlare forgets a task's data before the filters of its result run."""
        if event_type != EventType.BEFORE_TASK_EXECUTION:
            return
        self._global = {}
        try:
            sent = from_shareable(fl_ctx.get_prop(FLContextKey.TASK_DATA))
            if sent.data_kind == DataKind.WEIGHTS:
                # copies: an executor may train in place
                self._global = {name: _tensor(t).clone() for name, t in sent.data.items()}
        except Exception as fault:  # a task without a DXO, or whose arrays are fetched later: a result then has no update
            self.log_debug(fl_ctx, f"no weights in this task: {fault}", fire_event=False)

    def network(self) -> nn.Module:
        """F, as ``model`` names or describes it."""
        table = {"name": self.model} if isinstance(self.model, str) else self.model
        channels, height, width = self.image_shape
        return models.build(parse({"model": table}, where="model").model, image_shape=(channels, height, width))

    def observe(self, dxo: DXO, network: nn.Module, *, batch: int, labels: Tensor | None) -> Observation:
        """What the server will hold of this result.

        Raises:
            ObservationError: No task with weights came before it, or it does not fit the model.
        """
        weights = getattr(self, "_global", None)
        if not weights:
            raise ObservationError(
                "no weights came with the task, so the update is not known: the workflow has to send DXOs of kind WEIGHTS, and "
                "the client to train in process (an external process fetches its arrays by itself)"
            )
        after = {name: _tensor(t) for name, t in dxo.data.items()}
        if dxo.data_kind == DataKind.WEIGHT_DIFF:
            # float64: adding a small change to the weights and taking them off again would round it
            after = {name: weights[name].double() + t.double() for name, t in after.items() if name in weights}
        spec = ClientSpec.model_validate(self.client or {})
        return from_weights(
            weights,
            after,
            network,
            batch=batch,
            image_shape=tuple(self.image_shape),
            client=spec,
            labels=labels,
            mean=self.mean,
            std=self.std,
        )


class LeakFilter(_SeesUpdates, DXOFilter):
    r"""Attack each result of a task before it leaves, score it against the site's own images, and empty what leaks too much.

    The rule is that of NVFlare's own research filter (Hatamizadeh et al. 2022): for each of the site's images the similarity of
    the reconstruction that is most like it; if any is above the threshold, ``dxo.data`` becomes ``{}``. Similarity is SSIM
    (:func:`gradleak.leak.measure_leak`). Put it last among the filters of task results.

    Args:
        model: F by name (``package.module:function``, or a built-in one), or the table ``[model]`` of a specification.
        truth: Function of ``site`` (name) and ``round`` (number) that gives the :class:`~gradleak.observation.Truth` of that
            round: the images in [0, 1] that the site trains on. By its name in a job, else also itself.
        image_shape: C, H, W.
        client: What the site does with its batch: the keys of ``[client]``; None: one step on all images.
        threshold: The largest leak score that is let pass.
        attack: Name and settings of the attack; None: :data:`gradleak.leak.QUICK`.
        block: Whether what exceeds the threshold, or cannot be audited (among others where truth and settings do not
            reproduce the update), is emptied; else a warning is logged.
        grant_labels: Whether the attack is given the labels.
        record: Folder in which observations and leaks are kept; None: none.
        record_truth: Also the images.
        frequency: Audit every so many rounds.
        start_round: The first round that is audited.
        mean, std: What the site subtracts from images in [0, 1] and divides them by, for each channel.

    Raises:
        SpecError: A setting is wrong.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        truth: str | Callable[..., Truth],
        image_shape: Sequence[int],
        client: dict[str, Any] | None = None,
        threshold: float = RECOGNISABLE_SSIM,
        attack: dict[str, Any] | None = None,
        block: bool = True,
        grant_labels: bool = False,
        record: str | None = None,
        record_truth: bool = False,
        frequency: int = 1,
        start_round: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__(supported_data_kinds=list(KINDS), data_kinds_to_filter=list(KINDS))
        # NVFlare reads the settings back from attributes of the same names
        self.model, self.truth, self.image_shape, self.client = model, truth, list(image_shape), client
        self.threshold, self.attack, self.block, self.grant_labels = threshold, attack, block, grant_labels
        self.record, self.record_truth, self.frequency, self.start_round = record, record_truth, frequency, start_round
        self.mean, self.std = mean, std
        if not 0 <= threshold <= 1 or frequency < 1:
            raise SpecError(f"threshold is {threshold} and frequency {frequency}; expected an SSIM in [0, 1] and at least 1")

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """The result, emptied if it must not leave; None where nothing was changed."""
        number = _round(dxo, shareable, fl_ctx)
        if number < self.start_round or number % self.frequency:
            return None
        site, outgoing = fl_ctx.get_identity_name(), None
        name = f"round-{number}-{site}"
        try:
            outgoing = self._outgoing()
            passes = self._passes(outgoing, dxo, site=site, number=number, name=name)
        except Exception as fault:  # whatever it is, it must not cost the round
            if outgoing is not None:
                passes = outgoing.failed(fault, name=name)
            else:
                passes = not self.block
                self.log_warning(fl_ctx, f"gradleak: {name}: could not be recorded or audited: {fault}", fire_event=False)
        if passes:
            return None
        self.log_warning(fl_ctx, f"gradleak: {name}: the update is withheld", fire_event=False)
        dxo.data = {}
        return dxo

    def _outgoing(self) -> Outgoing:
        return Outgoing(
            record=None if self.record is None else Path(self.record),
            record_truth=self.record_truth,
            audit={"attack": self.attack or dict(QUICK), "threshold": self.threshold},
            block=self.block,
        )

    def _passes(self, outgoing: Outgoing, dxo: DXO, *, site: str, number: int, name: str) -> bool:
        function = import_function(self.truth, error=DataError) if isinstance(self.truth, str) else self.truth
        own = function(site=site, round=number)
        if not isinstance(own, Truth):
            raise DataError(f"{self.truth}: returned {type(own).__name__}, expected a gradleak Truth")
        network = self.network()
        observation = self.observe(dxo, network, batch=len(own.images), labels=own.labels if self.grant_labels else None)
        return outgoing.passes(observation, network, own, name=name)


class CINetInverter(_SeesUpdates):
    """Rebuild images from a result: NVFlare's research code calls such a component ``Inverter``, with these arguments.

    Args:
        model: As for :class:`LeakFilter`.
        batch: B, number of images.
        image_shape: C, H, W.
        client: As for :class:`LeakFilter`.
        attack: As for :class:`LeakFilter`.
        seed: Of the attack.
        mean, std: As for :class:`LeakFilter`.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        batch: int,
        image_shape: Sequence[int],
        client: dict[str, Any] | None = None,
        attack: dict[str, Any] | None = None,
        seed: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.batch, self.image_shape, self.client = model, batch, list(image_shape), client
        self.attack, self.seed, self.mean, self.std = attack, seed, mean, std

    def __call__(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> Tensor:
        """B x C x H x W in [0, 1].

        Raises:
            GradleakError: The result does not fit the model, or the attack refuses it.
        """
        network = self.network()
        observation = self.observe(dxo, network, batch=self.batch, labels=None)
        spec = parse({"attack": self.attack or dict(QUICK), "labels": {"rule": "auto"}, "seed": self.seed}, where="attack")
        recipe, device = prepare(spec)
        return attack_observation(observation, network, recipe, spec, device, progress=False).images


def _tensor(array: Any) -> Tensor:
    return array.detach().cpu() if isinstance(array, Tensor) else torch.from_numpy(np.asarray(array))


def _round(dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> int:
    """The round, wherever the workflow says it; 0 where it does not."""
    for found in (
        dxo.get_meta_prop(AppConstants.CURRENT_ROUND),
        shareable.get_header(AppConstants.CURRENT_ROUND),
        fl_ctx.get_prop(AppConstants.CURRENT_ROUND),
    ):
        if found is not None:
            return int(found)
    return 0
