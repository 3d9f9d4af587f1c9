"""Flower: record or audit what leaves a client (:func:`gradleak_mod`), and what reaches a server (:class:`RecordingStrategy`).

Needs ``pip install "gradleak[flower]"``. Both work with Flower's Message API (1.21 and later), and the mod also with a
``NumPyClient`` in a ``ClientApp``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gradleak import defences as known_defences
from gradleak.errors import ObservationError, SpecError, nearest
from gradleak.integrations.outgoing import WITHHELD, Outgoing, make_folder
from gradleak.observation import Observation, Truth
from gradleak.spec import ClientSpec, DefenceSpec
from gradleak.updates import from_gradient, from_weights

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Strategy
except ImportError as cause:
    raise ImportError(f'{__name__} needs Flower ({cause}); install it with: pip install "gradleak[flower]"') from cause

ClientFunction = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, ClientFunction], Message]

State = dict[str, np.ndarray] | list[np.ndarray]
"""Arrays by name, or in the order of a model's parameters or state where a client numbers them."""

Contents = dict[str, dict[str, Array]]
"""The arrays of a message: key of each record -> name -> array."""

#: Flower's code for an error that none of its other codes means.
UNKNOWN_ERROR = 0

#: Where a reply says how many images it is from: in the Message API, and in a NumPyClient's.
COUNT_KEYS = ("num-examples", "num_examples")

log = logging.getLogger(__name__)


def gradleak_mod(
    model: Callable[[], nn.Module],
    *,
    client: ClientSpec | Callable[[Message, Context], ClientSpec],
    image_shape: tuple[int, int, int],
    truth: Callable[[Message, Context], Truth] | None = None,
    batch: int | None = None,
    grant_labels: bool = False,
    record: Path | str | None = None,
    record_truth: bool = False,
    audit: Mapping[str, Any] | None = None,
    block: bool = False,
    sends: Literal["weights", "gradient"] = "weights",
    arrays_key: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    defences: Sequence[DefenceSpec] = (),
) -> Mod:
    r"""A client mod: the update of every ``train`` reply is recorded, or attacked before it leaves.

    The update is :math:`W - W'`: W is in the message that came from the server, :math:`W'` in the reply. Other messages
    (``evaluate``, ``query``) and replies that carry an error pass untouched. Put the mod first in ``mods``, so that it sees
    what really leaves: after the mods that clip, add noise or compress. A fault here never loses a round, unless ``block`` was
    asked for: then what cannot be audited does not leave.

    Files in ``record`` are ``round-R-node-N.safetensors`` (:meth:`gradleak.observation.Observation.save`), and beside them
    ``round-R-node-N.leak.json`` of an audit and ``round-R-node-N.truth.safetensors``.

    Args:
        model: Makes F as the client does; its weights do not matter.
        client: What the client does with its batch: ``fedsgd`` for one step on all images (the learning rate is a scale that
            the cosine distance ignores), ``fedavg`` with its learning rate, epochs and local batch for more. A function of
            message and context where they depend on the round.
        image_shape: (C, H, W) of the images.
        truth: The images in [0, 1] and labels that the client trained on in this round. Only the audit and
            ``record_truth`` look at the images.
        batch: B; None: the number of images of ``truth``, else the reply's ``num-examples``.
        grant_labels: Whether the observation has the labels of ``truth``; else an attack recovers them.
        record: Folder of the observations; None: none are written.
        record_truth: Write the truth beside them.
        audit: Keywords of :func:`gradleak.leak.measure_leak`, ``{}`` for its defaults; None: no audit.
        block: Answer with an error in place of an update whose leak score exceeds the threshold, or that cannot be audited:
            among others where truth and settings do not reproduce it.
        sends: ``gradient`` where the client replies with its gradient in place of its weights.
        arrays_key: Key of the ``ArrayRecord``; None: the only one there is.
        mean: Channel means that the client subtracts from images in [0, 1] before it gives them to F.
        std: Channel deviations that it divides by.
        defences: What the client does to protect itself, for the attack to know.

    Raises:
        SpecError: Nothing is asked for, settings contradict each other, or one has another form or an unknown name.
        OutputError: The folder cannot be made.
    """
    _check(model, client=client, image_shape=image_shape, mean=mean, std=std, defences=defences)
    if truth is not None and not callable(truth):
        raise SpecError(f"truth is {type(truth).__name__}; expected a function of message and context that gives a Truth")
    if sends not in ("weights", "gradient"):
        raise SpecError(f"sends is {sends!r}; expected 'weights' or 'gradient'")
    outgoing = Outgoing(record=None if record is None else Path(record), record_truth=record_truth, audit=audit, block=block)
    if truth is None and (outgoing.needs_truth or grant_labels):
        raise SpecError(
            "audit=, record_truth= and grant_labels= need the client's own batch: give truth=, a function of message and "
            "context that returns a gradleak Truth"
        )

    def observed(before: Contents, message: Message, context: Context, reply: Message) -> tuple[Observation, Truth | None]:
        own = None if truth is None else truth(message, context)
        if own is not None and not isinstance(own, Truth):
            raise ObservationError(f"truth= returned {type(own).__name__}, expected a gradleak Truth")
        count = batch or (len(own.images) if own is not None else _count(reply))
        if own is not None and (said := _counted(reply)) not in (None, len(own.images)):
            log.warning(
                "gradleak: the truth has %d images, and the client's reply says that it trained on %d: truth= must return all "
                "images of this round, and only these",
                len(own.images),
                said,
            )
        spec = client if isinstance(client, ClientSpec) else client(message, context)
        if not isinstance(spec, ClientSpec):
            raise ObservationError(f"client= returned {type(spec).__name__}, expected a gradleak ClientSpec")
        settings: dict[str, Any] = {
            "batch": count,
            "image_shape": image_shape,
            "client": spec,
            "labels": own.labels if own is not None and grant_labels else None,
            "mean": mean,
            "std": std,
            "defences": tuple(defences),
        }
        network = model()
        after = _state(_contents(reply), arrays_key, where="the client's reply")
        w = _state(before, arrays_key, where="the server's message")
        if sends == "gradient":
            named = w if isinstance(w, dict) else dict(zip(network.state_dict(), w, strict=False))
            network.load_state_dict({key: torch.from_numpy(array) for key, array in named.items()}, strict=False)
            return from_gradient(after, network, **settings), own
        return from_weights(w, after, network, **settings), own

    def mod(message: Message, context: Context, call_next: ClientFunction) -> Message:
        if message.metadata.message_type.partition(".")[0] != "train":
            return call_next(message, context)
        # the client may take the arrays out of its message; they are immutable, so no copy is needed
        before = _contents(message)
        round_number = _round(message)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        name = f"round-{round_number}-node-{context.node_id}"
        try:
            observation, own = observed(before, message, context, reply)
            passes = outgoing.passes(observation, model(), own, name=name)
        except Exception as fault:  # whatever it is, it must not cost the round
            passes = outgoing.failed(fault, name=name)
        if passes:
            return reply
        log.warning("gradleak: %s: the update is withheld", name)
        return Message(Error(code=UNKNOWN_ERROR, reason=WITHHELD), reply_to=message)

    return mod


class RecordingStrategy(Strategy):
    r"""A strategy around any other: it does what that one does, and records the updates that reach the server.

    Files in ``record`` are ``round-R-node-N.safetensors`` for each client, or ``round-R-aggregate.safetensors``: the mean
    :math:`\sum_k \frac{B_k}{B} (W - W_k)` that secure aggregation shows. A fault while recording is logged and costs no round.

    Args:
        strategy: The strategy that does the work, of ``flwr.serverapp.strategy``.
        record: Folder of the observations.
        model: Makes F; its weights do not matter.
        client: What each client does with its batch, as for :func:`gradleak_mod`.
        image_shape: (C, H, W).
        view: ``clients``: each one's update; ``aggregate``: only their mean.
        batch: Images of each client; None: each reply's ``num-examples``.
        arrays_key, mean, std: As for :func:`gradleak_mod`.
        defences: What each client does to protect itself.

    Raises:
        SpecError: The strategy is of Flower's classic API, a setting has another form, or the mean of clients with several
            local steps is asked for, which no operator computes.
        OutputError: The folder cannot be made.
    """

    def __init__(
        self,
        strategy: Strategy,
        record: Path | str,
        *,
        model: Callable[[], nn.Module],
        client: ClientSpec,
        image_shape: tuple[int, int, int],
        view: Literal["clients", "aggregate"] = "clients",
        batch: int | None = None,
        arrays_key: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        defences: Sequence[DefenceSpec] = (),
    ) -> None:
        if not isinstance(strategy, Strategy):
            given = strategy if isinstance(strategy, type) else type(strategy)
            raise SpecError(
                f"strategy is {given.__module__}.{given.__qualname__}{' (the class itself)' if given is strategy else ''}; "
                "expected an instance of a strategy of flwr.serverapp.strategy. In place of one of flwr.server.strategy use "
                "that of the same name there, in a ServerApp with @app.main(); NumPyClients can stay"
            )
        if not isinstance(client, ClientSpec):
            raise SpecError(f"client is {type(client).__name__}; expected a gradleak ClientSpec")
        _check(model, client=client, image_shape=image_shape, mean=mean, std=std, defences=defences)
        if view not in ("clients", "aggregate"):
            raise SpecError(f"view is {view!r}; expected 'clients' or 'aggregate'")
        if view == "aggregate" and client.protocol != "fedsgd":
            raise SpecError(
                f"view='aggregate' averages clients of one gradient each, and the protocol is {client.protocol!r}: use "
                "ClientSpec(protocol='fedsgd') where each takes one step on all its images, else view='clients'"
            )
        self.strategy, self.folder, self.view = strategy, make_folder(Path(record)), view
        self._model, self._client, self._batch, self._arrays_key = model, client, batch, arrays_key
        self._settings: dict[str, Any] = {"image_shape": image_shape, "mean": mean, "std": std, "defences": tuple(defences)}
        self._sent: dict[int, Contents] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "strategy":  # not there yet: a copy or a pickle in the making
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def summary(self) -> None:
        self.strategy.summary()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """What the other strategy sends, remembered for this round."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._sent = {message.metadata.dst_node_id: _contents(message) for message in messages}
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Record, then let the other strategy aggregate."""
        replies = list(replies)
        try:
            self._record(server_round, [reply for reply in replies if not reply.has_error()])
        except Exception as fault:  # whatever it is, it must not cost the round
            log.warning("gradleak: round %s: could not be recorded: %s", server_round, fault)
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, replies)

    def _record(self, server_round: int, replies: list[Message]) -> None:
        updates: list[Observation] = []
        for reply in replies:
            node = reply.metadata.src_node_id
            observation = from_weights(
                _state(self._sent[node], self._arrays_key, where=f"the message to node {node}"),
                _state(_contents(reply), self._arrays_key, where=f"the reply of node {node}"),
                self._model(),
                batch=self._batch or _count(reply),
                client=self._client,
                **self._settings,
            )
            if self.view == "clients":
                self._save(observation, f"round-{server_round}-node-{node}")
            updates.append(observation)
        if self.view == "aggregate" and updates:
            self._save(average(updates), f"round-{server_round}-aggregate")

    def _save(self, observation: Observation, name: str) -> None:
        path = self.folder / f"{name}.safetensors"
        observation.save(path)
        log.info("gradleak: %s: recorded in %s", name, path)


def average(observations: Sequence[Observation]) -> Observation:
    r"""What secure aggregation shows of several clients at the same W: :math:`\sum_k \frac{B_k}{B} g_k`.

    Raises:
        ObservationError: There are none, they are of different parameters, or not each of one gradient.
    """
    if not observations or any(o.protocol.protocol != "fedsgd" for o in observations):
        raise ObservationError("an average needs the updates of one client at least, each of protocol 'fedsgd'")
    first = observations[0]
    if any(o.update.keys() != first.update.keys() for o in observations):
        raise ObservationError("an average needs updates of the same parameters; did the clients freeze different layers?")
    sizes = [o.batch for o in observations]
    shares = [size / sum(sizes) for size in sizes]
    update: dict[str, Tensor] = {
        name: sum((share * o.update[name] for share, o in zip(shares, observations, strict=True)), 0 * first.update[name])
        for name in first.update
    }
    protocol = ClientSpec(**first.protocol.model_dump(exclude={"protocol", "clients"}), protocol="average", clients=sizes)
    return dataclasses.replace(first, update=update, batch=sum(sizes), protocol=protocol)


def _check(
    model: object,
    *,
    client: object,
    image_shape: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    defences: Sequence[DefenceSpec],
) -> None:
    """Name a setting of another form while the app is built: later every round would fail of it.

    Raises:
        SpecError: What was given, and what was expected.
    """
    if isinstance(model, nn.Module) or not callable(model):
        raise SpecError(f"model is {type(model).__name__}; expected a function without arguments that builds it, not the model")
    if isinstance(client, type) or not (isinstance(client, ClientSpec) or callable(client)):
        raise SpecError(
            f"client is {client!r}; expected a gradleak ClientSpec, as ClientSpec(protocol='fedavg', learning_rate=0.1), or a "
            "function of message and context that gives one"
        )
    sides = list(image_shape) if isinstance(image_shape, Sequence) else []
    if len(sides) != 3 or not all(isinstance(n, int) and n >= 1 for n in sides):
        raise SpecError(f"image_shape is {image_shape!r}; expected three positive whole numbers: channels, height, width")
    for name, values in (("mean", mean), ("std", std)):
        numbers = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []
        if values is not None and (len(numbers) != sides[0] or not all(isinstance(v, int | float) for v in numbers)):
            raise SpecError(f"{name} is {values!r}; expected {sides[0]} numbers, one for each channel of image_shape")
    if std is not None and min(std) <= 0:
        raise SpecError(f"std is {std!r}; expected numbers above 0")
    if not isinstance(defences, Sequence) or not all(isinstance(each, DefenceSpec) for each in defences):
        raise SpecError(f"defences is {defences!r}; expected a list, as [gradleak.DefenceSpec(name='clip', norm=1.0)]")
    known_defences.parse(defences, where="defences")


def _contents(message: Message) -> Contents:
    return {key: dict(record.items()) for key, record in message.content.array_records.items()}


def _state(contents: Contents, key: str | None, *, where: str) -> State:
    """The arrays of one record: by name, or in their order where a client numbers them, as a ``NumPyClient`` does.

    Raises:
        ObservationError: There is no such record, or there are several and none was chosen.
    """
    if key is None and len(contents) != 1:
        raise ObservationError(
            f"{where} has {len(contents)} array records ({', '.join(contents) or 'none'}), expected one; choose it with "
            "arrays_key="
        )
    key = next(iter(contents)) if key is None else key
    if key not in contents:
        raise ObservationError(f"{where} has no array record {key!r}{nearest(key, contents)}")
    arrays = {name: array.numpy() for name, array in contents[key].items()}
    numbered = all(name.isdecimal() for name in arrays)
    return [arrays[name] for name in sorted(arrays, key=int)] if numbered else arrays


def _count(reply: Message) -> int:
    """How many images a reply says it is from.

    Raises:
        ObservationError: It does not say so.
    """
    if (count := _counted(reply)) is None:
        raise ObservationError(f"the client's reply has no metric {COUNT_KEYS[0]!r}: give batch=, the number of its images")
    return count


def _counted(reply: Message) -> int | None:
    """As :func:`_count`; None where a reply does not say so."""
    for record in reply.content.metric_records.values():
        for key in COUNT_KEYS:
            if isinstance(value := record.get(key), int | float) and value >= 1:
                return int(value)
    return None


def _round(message: Message) -> str:
    """The round, as Flower's strategies announce it; else the message's group, else its identity."""
    for record in message.content.config_records.values():
        if "server-round" in record:
            return str(record["server-round"])
    name = message.metadata.group_id or message.metadata.message_id[:8]
    return "".join(c if c.isalnum() else "-" for c in name) or "unknown"
