"""Two Flower clients train for a round, their updates are recorded, and one of them is inverted.

    pip install "gradleak[flower]" "flwr[simulation]"
    python examples/flower/run.py

Exit code 0 only if the recorded update gave its images away: a mean SSIM of 0.9 after a one-to-one assignment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# before Flower and Ray are imported: nothing is reported to anybody
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

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
from gradleak.run import evaluate_run, invert_observation, spec_for

IMAGE_SHAPE, BATCH, RATE = (3, 32, 32), 8, 0.5
#: One local step on all of a client's images.
CLIENT = gl.ClientSpec(protocol="fedavg", learning_rate=RATE)
SSIM = 0.9


def build_model() -> nn.Module:
    """Two convolutions and a linear layer with sigmoids: 0.3 million parameters."""
    return gl.build_model(gl.ModelSpec(name="convnet", activation="sigmoid"), image_shape=IMAGE_SHAPE)


def own_batch(message: Message, context: Context) -> gl.Truth:
    """A client's images: eight of the embedded photographs, others for each client."""
    start = BATCH * int(context.node_config["partition-id"])
    return gl.load_data(gl.DataSpec(source="sample", batch=BATCH, start=start, size=IMAGE_SHAPE[1]))


def client_app(folder: Path) -> ClientApp:
    """A client that records what leaves it, and (to score the attack afterwards) its images."""
    app = ClientApp(
        mods=[
            gradleak_mod(build_model, client=CLIENT, image_shape=IMAGE_SHAPE, truth=own_batch, record=folder, record_truth=True)
        ]
    )

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model, batch = build_model(), own_batch(message, context)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        cross_entropy(model(batch.images), batch.labels).backward()
        optimizer.step()
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": BATCH})}
        return Message(RecordDict(content), reply_to=message)

    return app


def server_app(folder: Path) -> ServerApp:
    """A server of FedAvg that keeps each client's update: an honest-but-curious one."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = RecordingStrategy(
            FedAvg(fraction_evaluate=0.0), folder, model=build_model, client=CLIENT, image_shape=IMAGE_SHAPE
        )
        strategy.start(grid=grid, initial_arrays=ArrayRecord(build_model().state_dict()), num_rounds=1)

    return app


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("flower-leak"), help="folder of updates and report")
    parser.add_argument("--rounds", type=int, default=300, help="of the attack")
    parser.add_argument("--json", type=Path, help="file for the figures and how they were measured")
    arguments = parser.parse_args()
    out, start = arguments.out.resolve(), time.monotonic()
    clients, server = out / "clients", out / "server"

    run_simulation(
        server_app(server),
        client_app(clients),
        num_supernodes=2,
        # one process that runs the clients in turn: quicker to start than two
        backend_config={"client_resources": {"num_cpus": 2}, "init_args": {"num_cpus": 2, "include_dashboard": False}},
    )
    print(f"{time.monotonic() - start:.0f} s: updates recorded in {server}", flush=True)

    # the server has no names for its clients but numbers; the first eight photographs are attacked, whoever has them
    first = gl.load_data(gl.DataSpec(source="sample", batch=BATCH, size=IMAGE_SHAPE[1])).images
    truths = {path: gl.Truth.load(path) for path in clients.glob("*.truth.safetensors")}
    update = next(server / path.name.replace(".truth", "") for path, own in truths.items() if torch.equal(own.images, first))
    observation = gl.Observation.load(update)
    spec = spec_for(
        observation,
        model=f"{Path(__file__).resolve()}:build_model",
        overrides=["attack.name=cinet", f"attack.rounds={arguments.rounds}"],
        where=str(update),
    )
    invert_observation(observation, spec, out / "report", where=str(update), force=True)
    # the attack has ended: now it is compared with the images
    truth = gl.Truth.load(clients / f"{update.stem}.truth.safetensors")
    result = evaluate_run(out / "report", truth, lpips="off")
    ssim = result["metrics"]["ssim"]
    print(result["verdict"])
    print(f"SSIM: mean {ssim['mean']:.3f}, worst {ssim['worst']:.3f}; see {out / 'report' / 'report.html'}")
    if arguments.json is not None:
        record(arguments.json, result, seconds=time.monotonic() - start)
    return 0 if ssim["mean"] >= SSIM else 1


def record(path: Path, result: dict[str, Any], *, seconds: float) -> None:
    """What was measured, and how."""
    figures = {
        "name": "Flower: eight images after one local step on a sigmoid convnet",
        "attack": result["attack"]["name"],
        "settings": {"rounds": result["attack"]["rounds"], "rate": RATE, "batch": BATCH},
        "labels": {key: result["labels"][key] for key in ("rule", "accuracy")},
        "metrics": {m: {k: round(row[k], 4) for k in ("mean", "worst")} for m, row in result["metrics"].items() if row["mean"]},
        "seconds": round(seconds, 1),
        "command": f"python {Path('examples/flower/run.py')} {' '.join(sys.argv[1:])}",
        **{key: result[key] for key in ("seed", "device", "threads")},
        "versions": {**result["versions"], **{name: version(name) for name in ("flwr", "ray")}},
    }
    path.write_text(f"[\n{json.dumps(figures)}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
