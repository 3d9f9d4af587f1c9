"""A round of a real Flower simulation, for ``test_flower.py``: three clients of 2, 4 and 2 images, the last of which blocks.

    python tests/flower_round.py FOLDER

Each client writes what it computed, the server what it aggregated; mod and strategy record. A process of its own, since Ray
leaves threads behind.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn
from torch.nn.functional import cross_entropy

import gradleak as gl
from gradleak.integrations.flower import RecordingStrategy, gradleak_mod
from gradleak.tensors import write_tensors

SHAPE, RATE, SIZES = (3, 16, 16), 0.5, (2, 4, 2)


def build() -> nn.Module:
    return gl.build_model(gl.ModelSpec(name="lenet"), image_shape=SHAPE)


def partition(context: Context) -> int:
    return int(context.node_config["partition-id"])


def own_batch(message: Message, context: Context) -> gl.Truth:
    k = partition(context)
    return gl.load_data(gl.DataSpec(source="sample", batch=SIZES[k], start=sum(SIZES[:k]), size=16))


def client_app(out: Path) -> ClientApp:
    settings = {"client": gl.ClientSpec(), "image_shape": SHAPE, "truth": own_batch}
    recording = gradleak_mod(build, record=out / "clients", **settings)
    quick = {"attack": {"name": "cinet", "rounds": 2, "channels": 8}, "threshold": 0.0}
    blocking = gradleak_mod(build, record=out / "blocked", audit=quick, block=True, **settings)

    def mod(message: Message, context: Context, call_next: object) -> Message:
        return (blocking if partition(context) == 2 else recording)(message, context, call_next)

    app = ClientApp(mods=[mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model, batch = build(), own_batch(message, context)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        before = {name: t.detach().clone() for name, t in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        cross_entropy(model(batch.images), batch.labels).backward()
        optimizer.step()
        change = {name: before[name] - t.detach() for name, t in model.state_dict().items()}
        write_tensors(out / f"computed-{context.node_id}.safetensors", change, {})
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(batch.images)}),
        }
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1, "partition": float(partition(context))})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def server_app(out: Path) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        settings = {"model": build, "client": gl.ClientSpec(), "image_shape": SHAPE}
        each = RecordingStrategy(FedAvg(min_available_nodes=3), out / "server", **settings)
        both = RecordingStrategy(each, out / "server", view="aggregate", **settings)
        start = build().state_dict()
        result = both.start(grid=grid, initial_arrays=ArrayRecord(start), num_rounds=1)
        after = result.arrays.to_torch_state_dict()
        write_tensors(out / "aggregated.safetensors", {name: t - after[name] for name, t in start.items()}, {})
        summary = {"fraction_train": both.fraction_train, "evaluate": dict(result.evaluate_metrics_clientapp[1])}
        (out / "summary.json").write_text(json.dumps(summary))

    return app


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run_simulation(
        server_app(folder),
        client_app(folder),
        num_supernodes=len(SIZES),
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1, "include_dashboard": False}},
    )
