"""Flower: what the mod records, blocks and leaves alone, and what the strategy records, in real messages and a real round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

pytest.importorskip("flwr", reason='Flower is not installed: pip install "gradleak[flower]"')
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import gradleak as gl
from gradleak.errors import ObservationError, OutputError, SpecError
from gradleak.integrations.flower import RecordingStrategy, average, gradleak_mod
from gradleak.integrations.outgoing import WITHHELD
from gradleak.observation import Observation, Truth
from gradleak.tensors import read_tensors

SHAPE, RATE, NODE = (3, 16, 16), 0.5, 7
FEDSGD = gl.ClientSpec()
#: Two rounds: an audit that takes no time.
AUDIT: dict[str, Any] = {"attack": {"name": "cinet", "rounds": 2, "channels": 8}}


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


class Net(nn.Module):
    """Batch norm, whose running statistics travel too, and a layer that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 4, 3, stride=2, padding=1).requires_grad_(False)
        self.norm, self.activation = nn.BatchNorm2d(4), nn.Sigmoid()
        self.head = nn.Linear(4 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.norm(self.frozen(x))).flatten(1))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def own_batch(message: Message, context: Context) -> Truth:
    return gl.load_data(gl.DataSpec(source="sample", batch=4, size=16))


def train(message: Message, context: Context) -> Message:
    """One step of a client that takes the arrays out of its message, as one short of memory does."""
    model, batch = build(), own_batch(message, context)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(keep_input=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    cross_entropy(model(batch.images), batch.labels).backward()
    optimizer.step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": 4})}
    return Message(RecordDict(content), reply_to=message)


def instruct(kind: str = "train", *, state: dict[str, Tensor] | None = None) -> tuple[Message, Context]:
    """What a server sends, and the context of the client that gets it."""
    arrays = ArrayRecord({name: t.clone() for name, t in (state or build().state_dict()).items()})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 3})})
    context = Context(run_id=1, node_id=NODE, node_config={}, state=RecordDict(), run_config={})
    return address(content, kind), context


def address(content: RecordDict, kind: str) -> Message:
    """A message as it comes out of Flower's network: only within a run does a server make one by itself."""
    metadata = Metadata(
        run_id=1,
        message_id="a",
        src_node_id=1,
        dst_node_id=NODE,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=3600,
        message_type=kind,
    )
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload]


def client(mod: Callable[..., Message], function: Callable[..., Message] = train) -> ClientApp:
    """A real client app: messages pass the mod on their way to the function and back."""
    app = ClientApp()
    app.train(mods=[mod])(function)
    app.evaluate(mods=[mod])(function)
    app.query(mods=[mod])(function)
    return app


def make_mod(**settings: Any) -> Callable[..., Message]:
    return gradleak_mod(build, **{"client": FEDSGD, "image_shape": SHAPE, **settings})


def test_the_recorded_update_is_the_change_of_the_weights(tmp_path: Path) -> None:
    """W - W' of what is trained; W and the buffers of before; nothing of the frozen layer; no labels, no image."""
    before = build().state_dict()
    reply = client(make_mod(record=tmp_path))(*instruct())
    after = reply.content["arrays"].to_torch_state_dict()
    observation = Observation.load(tmp_path / f"round-3-node-{NODE}.safetensors")
    trained = {name for name, p in build().named_parameters() if p.requires_grad}
    assert observation.update.keys() == trained
    for name in trained:
        torch.testing.assert_close(observation.update[name], before[name] - after[name], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(t, before[name]) for name, t in {**observation.weights, **observation.buffers}.items())
    assert not torch.equal(after["norm.running_mean"], before["norm.running_mean"])
    assert (observation.batch, observation.image_shape, observation.labels) == (4, SHAPE, None)
    assert [file.name for file in tmp_path.iterdir()] == [f"round-3-node-{NODE}.safetensors"]


def test_the_recorded_update_is_one_that_the_operator_explains(tmp_path: Path) -> None:
    """The operator that an attack builds from the file computes, of the client's images, what the client sent."""
    settings = {"client": gl.ClientSpec(protocol="fedavg", learning_rate=RATE), "truth": own_batch, "grant_labels": True}
    client(make_mod(record=tmp_path, record_truth=True, **settings))(*instruct())
    path = tmp_path / f"round-3-node-{NODE}.safetensors"
    observation, truth = Observation.load(path), Truth.load(path.with_suffix(".truth.safetensors"))
    assert observation.labels is not None
    update = gl.operator(observation, build())(truth.images, observation.labels)
    for name, tensor in observation.update.items():
        torch.testing.assert_close(update[name], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["evaluate", "query", "train.own"])
def test_only_training_is_recorded(kind: str, tmp_path: Path) -> None:
    """Other messages get the very reply of the client; a train function under a name of its own is recorded."""
    replies = []

    def answer(message: Message, context: Context) -> Message:
        replies.append(Message(message.content, reply_to=message))
        return replies[-1]

    app = ClientApp()
    mod = make_mod(record=tmp_path, audit=AUDIT, truth=own_batch, block=True)
    app.train("own", mods=[mod])(train)
    app.evaluate(mods=[mod])(answer)
    app.query(mods=[mod])(answer)
    reply = app(*instruct(kind))
    assert bool(list(tmp_path.iterdir())) == (kind == "train.own")
    assert kind == "train.own" or reply is replies[0]


def test_an_error_of_the_client_passes(tmp_path: Path) -> None:
    def fail(message: Message, context: Context) -> Message:
        return Message(Error(code=2, reason="no data"), reply_to=message)

    reply = client(make_mod(record=tmp_path), fail)(*instruct())
    assert reply.error.reason == "no data"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("block", [True, False])
def test_what_exceeds_the_threshold_is_blocked_or_warned_of(
    block: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server is told that there is no update, and nothing of the data; the client keeps the figures."""
    mod = make_mod(record=tmp_path, audit={**AUDIT, "threshold": 0.0}, truth=own_batch, block=block)
    reply = client(mod)(*instruct())
    leak = json.loads((tmp_path / f"round-3-node-{NODE}.leak.json").read_text())
    assert leak["exceeded"]
    assert leak["verdict"] in caplog.text
    assert reply.has_error() == block
    assert reply.error.reason == WITHHELD if block else "arrays" in reply.content


def test_what_stays_below_the_threshold_leaves() -> None:
    reply = client(make_mod(audit={**AUDIT, "threshold": 1.0}, truth=own_batch, block=True))(*instruct())
    assert "arrays" in reply.content


@pytest.mark.parametrize("block", [True, False])
def test_a_fault_of_the_audit_costs_the_round_only_where_blocking_was_asked_for(
    block: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and written where the audit's figures would be."""

    def missing(message: Message, context: Context) -> Truth:
        raise FileNotFoundError("images are gone")

    reply = client(make_mod(audit=AUDIT, truth=missing, block=block, record=tmp_path))(*instruct())
    assert reply.has_error() == block
    assert f"gradleak: round-3-node-{NODE}: could not be recorded or audited: images are gone" in caplog.text
    assert json.loads((tmp_path / f"round-3-node-{NODE}.leak.json").read_text()) == {"error": "images are gone"}


def other_batch(message: Message, context: Context) -> Truth:
    return gl.load_data(gl.DataSpec(source="sample", batch=4, start=4, size=16))


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize(
    "wrong",
    [{"truth": other_batch}, {"mean": [0.9, 0.1, 0.5], "std": [0.1, 0.2, 0.3]}, {"client": gl.ClientSpec(mode="eval")}],
    ids=["images", "normalisation", "mode"],
)
def test_an_update_that_truth_and_settings_do_not_reproduce_is_no_pass(
    wrong: dict[str, Any], block: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However low its score: with other images than the client's every score is low."""
    settings = {"truth": own_batch, **wrong}
    reply = client(make_mod(audit={**AUDIT, "threshold": 1.0}, block=block, record=tmp_path, **settings))(*instruct())
    leak = json.loads((tmp_path / f"round-3-node-{NODE}.leak.json").read_text())
    assert not leak["exceeded"]
    assert leak["truth_distance"] > 1e-4
    assert "do not reproduce this update" in leak["doubt"]
    assert leak["doubt"] in caplog.text
    assert reply.has_error() == block


def test_an_inconclusive_audit_leaves_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    reply = client(make_mod(audit={**AUDIT, "threshold": 1.0}, truth=own_batch, block=True))(*instruct())
    assert reply.has_content()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name.endswith("outgoing")]
    assert f"gradleak: round-3-node-{NODE}: Inconclusive: the attack did not fit" in warning


def test_folders_and_files_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line for the folder, as an absolute path, and one for each update; each says whose it is."""
    caplog.set_level("INFO")
    client(make_mod(record=tmp_path / "own"))(*instruct())
    assert [message for message in caplog.messages if message.startswith("gradleak:")] == [
        f"gradleak: updates are recorded in {tmp_path / 'own'}",
        f"gradleak: round-3-node-{NODE}: recorded in {tmp_path / 'own' / f'round-3-node-{NODE}.safetensors'}",
    ]


def test_a_truth_of_another_number_of_images_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def part(message: Message, context: Context) -> Truth:
        return gl.load_data(gl.DataSpec(source="sample", batch=2, size=16))

    client(make_mod(record=tmp_path, truth=part))(*instruct())
    assert "the truth has 2 images, and the client's reply says that it trained on 4" in caplog.text


@pytest.mark.parametrize("given", ["classic", "class", "function"])
def test_a_strategy_of_another_kind_is_refused(given: str, tmp_path: Path) -> None:
    """Flower's classic strategies have other methods: nothing would be recorded, or the first round would fail."""
    if given == "classic":
        strategy: Any = pytest.importorskip("flwr.server.strategy").FedAvg()
    else:
        strategy = FedAvg if given == "class" else (lambda: FedAvg())
    with pytest.raises(SpecError, match=r"expected an instance of a strategy of flwr.serverapp.strategy") as refused:
        RecordingStrategy(strategy, tmp_path / "never", model=build, client=FEDSGD, image_shape=SHAPE)
    assert type(strategy).__module__ in str(refused.value) or FedAvg.__module__ in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_fault_of_recording_never_costs_the_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another model than the client's, and a count that is missing: one line names it, and the reply leaves."""

    def uncounted(message: Message, context: Context) -> Message:
        reply = train(message, context)
        del reply.content["metrics"]
        return reply

    assert client(make_mod(record=tmp_path), uncounted)(*instruct()).has_content()
    assert "no metric 'num-examples': give batch=" in caplog.text
    wrong = gradleak_mod(lambda: nn.Linear(2, 2), client=FEDSGD, image_shape=SHAPE, record=tmp_path)
    assert client(wrong)(*instruct()).has_content()
    assert "none of its names is a parameter of the model" in caplog.text
    assert not list(tmp_path.iterdir())


def test_arrays_by_number_are_those_of_the_state_in_order(tmp_path: Path) -> None:
    """A NumPyClient numbers its arrays; more than ten of them, so that 10 must not come before 2."""
    numbered = {str(i): t for i, t in enumerate(build().state_dict().values())}

    def train_numbered(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"].to_torch_state_dict()
        message.content["arrays"] = ArrayRecord(dict(zip(build().state_dict(), arrays.values(), strict=True)))
        reply = train(message, context)
        reply.content["arrays"] = ArrayRecord(reply.content["arrays"].to_numpy_ndarrays())
        return reply

    client(make_mod(record=tmp_path / "numbers"), train_numbered)(*instruct(state=numbered))
    client(make_mod(record=tmp_path / "names"))(*instruct())
    found, expected = (Observation.load(tmp_path / k / f"round-3-node-{NODE}.safetensors") for k in ("numbers", "names"))
    assert all(torch.equal(found.update[name], t) for name, t in expected.update.items())


def test_a_numpy_client_is_recorded(tmp_path: Path) -> None:
    """Flower's older client API, in a ClientApp: arrays in order, ``num_examples`` in the reply."""
    flwr_client = pytest.importorskip("flwr.client")

    class Client(flwr_client.NumPyClient):  # type: ignore[misc,name-defined]
        def fit(self, parameters: Any, config: Any) -> Any:
            return [array - 0.25 for array in parameters], 4, {}

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    arrays = ArrayRecord([p.detach().numpy() for p in model.parameters()])
    content = RecordDict({"fitins.parameters": arrays, "fitins.config": ConfigRecord()})
    _, context = instruct()
    mod = gradleak_mod(lambda: model, client=FEDSGD, image_shape=SHAPE, record=tmp_path)
    reply = ClientApp(lambda context: Client().to_client(), mods=[mod])(address(content, "train"), context)
    assert reply.has_content()
    (file,) = tmp_path.iterdir()
    observation = Observation.load(file)
    assert observation.batch == 4
    assert all(torch.allclose(t, torch.full_like(t, 0.25)) for t in observation.update.values())


def test_a_gradient_is_recorded_as_it_is_sent(tmp_path: Path) -> None:
    gradient = {name: torch.randn(p.shape) for name, p in build().named_parameters() if p.requires_grad}

    def send(message: Message, context: Context) -> Message:
        content = {"arrays": ArrayRecord(gradient), "metrics": MetricRecord({"num-examples": 4})}
        return Message(RecordDict(content), reply_to=message)

    client(make_mod(record=tmp_path, sends="gradient"), send)(*instruct())
    observation = Observation.load(tmp_path / f"round-3-node-{NODE}.safetensors")
    assert observation.update.keys() == gradient.keys()
    assert all(torch.equal(observation.update[name], t) for name, t in gradient.items())
    assert torch.equal(observation.weights["frozen.weight"], build().state_dict()["frozen.weight"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "give record="),
        ({"audit": {}}, "give truth="),
        ({"record": "x", "block": True}, "give audit="),
        ({"audit": {}, "truth": own_batch, "record_truth": True}, "give record="),
        ({"record": "x", "grant_labels": True}, "give truth="),
        ({"audit": {"treshold": 0.5}, "truth": own_batch}, "did you mean 'threshold'"),
        ({"audit": True, "truth": own_batch}, "audit is True; expected a mapping"),
        ({"audit": {"attack": "cinet"}, "truth": own_batch}, "attack is 'cinet'; expected its name and settings"),
        ({"audit": {"attack": {"name": "cinett"}}, "truth": own_batch}, "did you mean 'cinet'"),
        ({"audit": {"attack": {"name": "cinet", "round": 3}}, "truth": own_batch}, "did you mean 'rounds'"),
        ({"audit": {"threshold": 60}, "truth": own_batch}, "threshold is 60; expected an SSIM"),
        ({"audit": {}, "truth": "batch"}, "truth is str; expected a function"),
        ({"record": "x", "image_shape": (16, 16)}, "expected three positive whole numbers"),
        ({"record": "x", "client": "fedavg"}, "client is 'fedavg'; expected a gradleak ClientSpec"),
        ({"record": "x", "mean": [0.5]}, "mean is .*; expected 3 numbers"),
        ({"record": "x", "std": [1.0, 0.0, 1.0]}, "expected numbers above 0"),
        ({"record": "x", "defences": ["clip"]}, "defences is .*; expected a list"),
        ({"record": "x", "defences": [gl.DefenceSpec(name="clap")]}, "did you mean 'clip'"),
        ({"record": "x", "sends": "gradients"}, "expected 'weights' or 'gradient'"),
    ],
    ids=[
        *("nothing", "audit", "block", "truth", "labels", "misspelt", "audit form", "attack form", "attack", "attack setting"),
        *("threshold", "truth form", "shape", "client", "mean", "std", "defences", "defence", "sends"),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=words):
        make_mod(**settings)


def test_a_model_in_place_of_the_function_that_makes_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="model is Net; expected a function"):
        gradleak_mod(build(), client=FEDSGD, image_shape=SHAPE, record=tmp_path)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_made_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        make_mod(record=tmp_path / "file")


def test_an_average_of_several_local_steps_is_refused(tmp_path: Path) -> None:
    spec = gl.ClientSpec(protocol="fedavg", learning_rate=0.1, epochs=2)
    with pytest.raises(SpecError, match="view='clients'"):
        RecordingStrategy(FedAvg(), tmp_path, model=build, client=spec, image_shape=SHAPE, view="aggregate")
    with pytest.raises(ObservationError, match="one client at least"):
        average([])


@pytest.fixture(scope="module")
def round_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a real round of Flower's simulation left (``flower_round.py``)."""
    pytest.importorskip("ray", reason='Flower\'s simulation needs Ray: pip install "flwr[simulation]"')
    folder = tmp_path_factory.mktemp("round")
    script = Path(__file__).with_name("flower_round.py")
    source = str(Path(gl.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "FLWR_HOME": str(folder / "flwr")}
    ran = subprocess.run(
        [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (folder / "summary.json").is_file(), ran.stderr[-3000:]
    return folder


def updates(folder: Path) -> dict[str, Observation]:
    return {path.stem: Observation.load(path) for path in folder.glob("*-node-*.safetensors")}


def test_in_a_round_both_sides_record_what_the_clients_computed(round_folder: Path) -> None:
    server, clients = updates(round_folder / "server"), updates(round_folder / "clients")
    assert len(server) == 2
    assert server.keys() == clients.keys()
    for name, observation in server.items():
        computed, _ = read_tensors(round_folder / f"computed-{name.partition('-node-')[2]}.safetensors")
        for key, tensor in observation.update.items():
            assert torch.equal(tensor, clients[name].update[key])
            torch.testing.assert_close(tensor, computed[key], rtol=1e-5, atol=1e-8)
    assert sorted(o.batch for o in server.values()) == [2, 4]


def test_in_a_round_the_aggregate_is_the_weighted_mean(round_folder: Path) -> None:
    """Of the recorded updates, and of what FedAvg made of the clients' weights."""
    server = list(updates(round_folder / "server").values())
    aggregate = Observation.load(round_folder / "server" / "round-1-aggregate.safetensors")
    averaged, _ = read_tensors(round_folder / "aggregated.safetensors")
    for name, tensor in aggregate.update.items():
        expected = sum(o.batch / 6 * o.update[name] for o in server)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(tensor, averaged[name], rtol=1e-3, atol=1e-6)
    assert (aggregate.protocol.protocol, aggregate.batch) == ("average", 6)
    assert sorted(aggregate.protocol.sizes(6)) == [2, 4]


def test_in_a_round_a_blocked_update_never_reaches_the_server(round_folder: Path) -> None:
    (blocked,) = updates(round_folder / "blocked")
    assert (round_folder / "blocked" / f"{blocked}.leak.json").is_file()
    assert blocked not in updates(round_folder / "server")


def test_in_a_round_evaluation_is_untouched_and_everything_else_is_delegated(round_folder: Path) -> None:
    """All three clients evaluate, also the one that blocks its update; the wrapped strategy's attributes are there."""
    summary = json.loads((round_folder / "summary.json").read_text())
    assert summary["evaluate"]["partition"] == pytest.approx(1.0)
    assert summary["fraction_train"] == 1.0


@pytest.mark.slow
def test_the_example_inverts_a_recorded_update(tmp_path: Path) -> None:
    """Exit code 0 where the update gives its images away, 1 where an attack of too few rounds does not get there."""
    pytest.importorskip("ray")
    script = Path(__file__).parents[1] / "examples" / "flower" / "run.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(gl.__file__).parents[1])}
    for rounds, code in ((300, 0), (10, 1)):
        command = [sys.executable, str(script), "--out", str(tmp_path / str(rounds)), "--rounds", str(rounds)]
        assert subprocess.run(command, env=environment, capture_output=True, timeout=600, check=False).returncode == code
        assert (tmp_path / str(rounds) / "report" / "grid.png").is_file()
