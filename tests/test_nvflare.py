"""NVIDIA FLARE: what the filter empties and lets pass, with real DXOs and in a job that NVFlare's simulator runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

pytest.importorskip("nvflare", reason='NVFlare is not installed: pip install "gradleak[nvflare]"')

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

import gradleak as gl
from gradleak.errors import ObservationError, SpecError
from gradleak.integrations.nvflare import CINetInverter, LeakFilter
from gradleak.models import import_function
from gradleak.observation import Observation

JOB = Path(__file__).parents[1] / "examples" / "nvflare"
DATA = f"{JOB / 'site_data.py'}"
SHAPE, RATE = [3, 16, 16], 0.5
ATTACK = {"name": "cinet", "rounds": 2, "channels": 8}


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def build() -> nn.Module:
    torch.manual_seed(0)
    network = import_function(f"{DATA}:Net")()
    assert isinstance(network, nn.Module)
    return network


def missing(site: str, round: int) -> object:
    raise FileNotFoundError("the images are gone")


def weights() -> dict[str, Tensor]:
    return {name: t.clone() for name, t in build().state_dict().items()}


def trained() -> dict[str, Tensor]:
    """The weights after one step on the images of ``site-1``."""
    model, own = build(), import_function(f"{DATA}:batch")("site-1", 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    cross_entropy(model(own.images), own.labels).backward()
    optimizer.step()
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def make_filter(**settings: Any) -> LeakFilter:
    given = {"model": f"{DATA}:Net", "truth": f"{DATA}:batch", "image_shape": SHAPE, "attack": ATTACK}
    return LeakFilter(**{**given, "threshold": 0.0, **settings})


def begin(component: Any, state: dict[str, Tensor] | None = None) -> FLContext:
    """The context of a site whose runner has just received the weights of a task, and tells its components."""
    manager = FLContextManager(identity_name="site-1", job_id="1", public_stickers={}, private_stickers={})
    context = manager.new_context()
    task = DXO(DataKind.WEIGHTS, data=weights() if state is None else state).to_shareable()
    context.set_prop(FLContextKey.TASK_DATA, task, private=True, sticky=False)
    component.handle_event(EventType.BEFORE_TASK_EXECUTION, context)
    context.set_prop(FLContextKey.TASK_DATA, None, private=True, sticky=False)
    return context


def result(kind: str = DataKind.WEIGHTS, *, round_number: int = 0) -> Shareable:
    data: dict[str, Any] = trained()
    if kind == DataKind.WEIGHT_DIFF:
        data = {name: t - weights()[name] for name, t in data.items()}
    shareable = DXO(kind, data={name: t.numpy() for name, t in data.items()}).to_shareable()
    shareable.set_header(AppConstants.CURRENT_ROUND, round_number)
    return shareable


@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_what_is_recorded_is_the_change_of_the_weights(kind: str, tmp_path: Path) -> None:
    """W - W', whether a site sends its weights or their difference; W and the running statistics of before."""
    leak = make_filter(record=str(tmp_path), block=False)
    leak.process(result(kind), begin(leak))
    observation = Observation.load(tmp_path / "round-0-site-1.safetensors")
    before, after = weights(), trained()
    assert observation.update.keys() == dict(build().named_parameters()).keys()
    for name, tensor in observation.update.items():
        torch.testing.assert_close(tensor, before[name] - after[name], rtol=1e-5, atol=1e-8)
    assert all(torch.equal(t, before[name]) for name, t in {**observation.weights, **observation.buffers}.items())
    assert observation.labels is None
    assert not list(tmp_path.glob("*.truth.*"))


@pytest.mark.parametrize(("threshold", "block"), [(0.0, True), (0.0, False), (1.0, True)])
def test_a_result_is_emptied_where_its_leak_exceeds_the_threshold(threshold: float, block: bool, tmp_path: Path) -> None:
    leak = make_filter(threshold=threshold, block=block, record=str(tmp_path))
    found = from_shareable(leak.process(result(), begin(leak)))
    figures = json.loads((tmp_path / "round-0-site-1.leak.json").read_text())
    assert figures["exceeded"] == (threshold == 0.0)
    assert bool(found.data) != (figures["exceeded"] and block)


@pytest.mark.parametrize("block", [True, False])
def test_what_cannot_be_audited_leaves_only_where_nothing_is_blocked(block: bool, tmp_path: Path) -> None:
    """Images that are gone, and a normalisation that the site does not do: the truth then does not reproduce the update."""
    leak = make_filter(truth=f"{__file__}:missing", block=block, record=str(tmp_path))
    assert bool(from_shareable(leak.process(result(), begin(leak))).data) != block
    assert json.loads((tmp_path / "round-0-site-1.leak.json").read_text()) == {"error": "the images are gone"}
    wrong = {"mean": [0.9, 0.1, 0.5], "std": [0.1, 0.2, 0.3]}
    leak = make_filter(**wrong, threshold=1.0, block=block, record=str(tmp_path))
    assert bool(from_shareable(leak.process(result(), begin(leak))).data) != block
    assert "do not reproduce this update" in json.loads((tmp_path / "round-0-site-1.leak.json").read_text())["doubt"]


def test_only_some_rounds_are_audited() -> None:
    """From ``start_round`` on, every ``frequency`` rounds."""
    leak = make_filter(frequency=2, start_round=2)
    emptied = [not from_shareable(leak.process(result(round_number=r), begin(leak))).data for r in range(5)]
    assert emptied == [False, False, True, False, True]


def test_results_of_another_kind_pass() -> None:
    leak = make_filter()
    metrics = DXO(DataKind.METRICS, data={"accuracy": 0.5}).to_shareable()
    assert from_shareable(leak.process(metrics, begin(leak))).data == {"accuracy": 0.5}


def test_the_weights_are_those_of_before_even_where_training_is_in_place(tmp_path: Path) -> None:
    leak, state = make_filter(record=str(tmp_path), block=False), weights()
    context = begin(leak, state)
    for tensor in state.values():
        tensor.zero_()
    leak.process(result(), context)
    observation = Observation.load(tmp_path / "round-0-site-1.safetensors")
    assert all(torch.equal(t, weights()[name]) for name, t in observation.weights.items())


def test_an_inverter_gives_the_images_of_the_attack(tmp_path: Path) -> None:
    """The very ones that the filter's audit compares."""
    inverter = CINetInverter(model=f"{DATA}:Net", batch=2, image_shape=SHAPE, attack=ATTACK)
    images = inverter(from_shareable(result()), result(), begin(inverter))
    assert images.shape == (2, *SHAPE)
    leak = make_filter(record=str(tmp_path), block=False)
    leak.process(result(), begin(leak))
    own = import_function(f"{DATA}:batch")("site-1", 0)
    observation = Observation.load(tmp_path / "round-0-site-1.safetensors")
    expected = gl.measure_leak(observation, build(), own, attack=ATTACK)
    assert torch.equal(images, expected.reconstruction.images)


def test_faults_are_named() -> None:
    inverter = CINetInverter(model=f"{DATA}:Net", batch=2, image_shape=SHAPE)
    with pytest.raises(ObservationError, match="no weights came with the task"):
        inverter(from_shareable(result()), result(), FLContext())
    with pytest.raises(SpecError, match="threshold is 60"):
        make_filter(threshold=60)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a real job left: one round of two sites in NVFlare's simulator (``examples/nvflare``)."""
    folder = tmp_path_factory.mktemp("nvflare")
    shutil.copytree(JOB, folder / "job", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(Path(gl.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "job.py", "--workspace", str(folder / "workspace"), "--records", str(folder / "records")]
    # two rounds, so that it takes no time; a threshold that everything exceeds
    command += ["--rounds", "2", "--threshold", "0", "--only-warn", "site-2"]
    ran = subprocess.run(command, cwd=folder / "job", env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    return folder


def test_in_a_job_what_is_blocked_never_reaches_the_server(job: Path) -> None:
    """The global model after the round is W minus the update of the one site that did not block."""
    first, second = (Observation.load(job / "records" / f"round-0-site-{k}.safetensors") for k in (1, 2))
    assert all(torch.equal(t, second.weights[name]) for name, t in first.weights.items())
    (saved,) = job.rglob("FL_global_model.pt")
    after = torch.load(saved, weights_only=True)["model"]
    for name, tensor in second.update.items():
        torch.testing.assert_close(after[name], second.weights[name] - tensor, rtol=1e-4, atol=1e-6)
    mean = second.weights["6.weight"] - (second.update["6.weight"] + first.update["6.weight"]) / 2
    assert not torch.allclose(after["6.weight"], mean, rtol=1e-4, atol=1e-6)


def test_in_a_job_the_record_is_what_the_operator_computes(job: Path) -> None:
    """The operator of the recorded observation explains the update by the images of that site."""
    observation = Observation.load(job / "records" / "round-0-site-2.safetensors")
    own = import_function(f"{DATA}:batch")("site-2", 0)
    update = gl.operator(observation, build())(own.images, own.labels)
    for name, tensor in observation.update.items():
        torch.testing.assert_close(update[name], tensor, rtol=1e-3, atol=1e-6)
