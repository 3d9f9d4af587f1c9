"""What each defence protects, and what it costs: leak-against-cost curves.

    python benchmarks/defences.py --source cifar10 --resnet20 cifar10_resnet20.safetensors [--only NAME ...]
    python benchmarks/defences.py --plot docs/images

Leak: CI-Net, by an attacker who knows the defence, against one client's gradient of the first four CIFAR-10 training images
(sigmoid ResNet-18 of width 16, random weights, batch norm in train mode, labels known), 200 rounds; scores are one to one.
DP-SGD replaces batch norm by group norm, so its curve has another undefended point, ``dp-sgd 0``.

Cost: (a) the relative distortion of that update; (b) accuracy and loss on 256 held-out images after one round of eight
clients with 32 images each, all defended alike, every draw its own. F is a trained ResNet-20 whose batch norm is folded into
its convolutions (the same function in eval mode, and one for which DP-SGD needs no replacement) and whose last layer is random
again, 0.03 times the usual size: from there one step of the server, on all layers, learns a classifier. The step is chosen
once, for the undefended update, on 128 other images. ResNet-20 was trained on CIFAR-10 by others, these images among them, so
the accuracies are good for comparing only.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import gradleak as gl  # before torch: it sets how threads wait

# isort: split
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from gradleak import data, models
from gradleak.attacks import attack
from gradleak.client import build_client, defence_costs, operator
from gradleak.defences import DPSGD, Defence, parse
from gradleak.federation import accuracy_after_round, best_rate, held_out_score
from gradleak.invert import invert
from gradleak.labels import Labels
from gradleak.observation import Truth
from gradleak.report.figures import leak_against_cost_svg
from gradleak.spec import ClientSpec, DataSpec, DefenceSpec, ModelSpec
from gradleak.tensors import write_tensors
from record import aligned, provenance, rows_of, save_row, scores

SEED, ROUNDS, CHANNELS = 0, 200, 32
#: Images: the attacked client has the first ones, then validation, held out, and the clients of the round.
VALIDATION, HELD_OUT, CLIENTS, IMAGES_EACH = 128, 256, 8, 32
RATES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)

#: Defence -> its strengths, from weak to strong.
LADDERS: dict[str, list[dict[str, Any]]] = {
    "none": [{}],
    "gaussian": [{"sigma": s} for s in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)],
    "laplace": [{"sigma": s} for s in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)],
    "clip": [{"norm": c} for c in (1.0, 0.3, 0.1, 0.03, 0.01)],
    "prune": [{"fraction": f} for f in (0.5, 0.9, 0.99, 0.999, 0.9999)],
    "soteria": [{"fraction": f} for f in (0.2, 0.5, 0.8, 0.95)],
    "sign": [{}],
    "quantise": [{"bits": b} for b in (8, 6, 4, 3, 2)],
    "dp-sgd": [{"clip": 1.0, "noise": z} for z in (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)],
}
#: Not maps of an update: more images in one, or several clients of four images behind secure aggregation.
SIZES: dict[str, list[int]] = {"larger batch": [1, 2, 4, 8, 16], "secure aggregation": [1, 2, 4]}


class Round:
    """One federated round on the folded ResNet-20: its clients, step and scores without a defence."""

    def __init__(self, source: str, weights: Path) -> None:
        self.clients = [_images(source, 512 + IMAGES_EACH * k, IMAGES_EACH) for k in range(CLIENTS)]
        self.held_out = _images(source, 128, HELD_OUT)
        validation = _images(source, 384, VALIDATION)
        self.spec = ClientSpec(mode="eval")
        self.model = folded_resnet20(weights)
        self.rate = best_rate(self.model, self.spec, self.clients, validation, rates=RATES)
        self.before = held_out_score(self.model, self.held_out)
        self.undefended = self.after([])

    def after(self, defences: list[Defence], *, images: int = IMAGES_EACH) -> dict[str, float]:
        """Held-out scores after the round, of clients that have only their first ``images`` images."""
        clients = [Truth(client.images[:images], client.labels[:images]) for client in self.clients]
        score = accuracy_after_round(
            self.model, self.spec, clients, self.held_out, rate=self.rate, defences=defences, seed=SEED
        )
        # JSON has no infinity: noise can drive the loss beyond every number
        return {"accuracy": round(score.accuracy, 4), "loss": round(min(score.loss, 1e6), 4)}


def folded_resnet20(weights: Path) -> nn.Module:
    """The trained ResNet-20 in eval mode without batch norm, the same function, but for a last layer that starts anew."""
    model = models.build(
        ModelSpec(name="resnet20-cifar", weights=weights, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        image_shape=(3, 32, 32),
    ).eval()
    modules = dict(model.named_modules())
    for name in [n for n, m in modules.items() if isinstance(m, nn.Conv2d)]:
        norm = name.replace("conv", "bn")
        model.set_submodule(name, fuse_conv_bn_eval(modules[name], modules[norm]))
        model.set_submodule(norm, nn.Identity())
    last = model.get_submodule("linear")
    assert isinstance(last, nn.Linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        last.reset_parameters()
    for parameter in last.parameters():
        parameter.data *= 0.03
    return model.requires_grad_()


def leak(source: str, *, batch: int, client: ClientSpec, defences: list[Defence], work: Path, name: str) -> dict[str, Any]:
    """What CI-Net makes of one defended update."""
    truth = _images(source, 0, batch)
    model = models.build(ModelSpec(name="resnet18-cifar", width=16, activation="sigmoid"), image_shape=(3, 32, 32))
    observation = gl.simulate(build_client(model, client, batch, defences=defences), truth, seed=SEED)
    known = operator(observation, model)
    assert observation.labels is not None
    recipe = attack("cinet", rounds=ROUNDS, channels=CHANNELS, snapshots=0)
    result = invert(observation, recipe, client=known, labels=Labels(observation.labels, "known"), seed=SEED, progress=False)
    costs = defence_costs(model, client, truth, defences=defences, seed=SEED) if defences else []
    work.mkdir(parents=True, exist_ok=True)
    write_tensors(work / f"{name.replace(' ', '-')}.safetensors", {"images": aligned(result.images, truth)}, {})
    return {
        "batch": batch,
        "rounds": result.rounds,
        "distortion": float(f"{costs[-1].total:.4g}") if costs else 0.0,
        "epsilon": next((c.epsilon for c in costs), None),
        "matching_loss": float(f"{result.matching_loss:.3g}"),
        "engine": result.notes.get("engine_check", {}).get("in_use"),
        "metrics": scores(result.images, truth),
        "seconds": round(result.seconds, 1),
    }


def measure(kind: str, settings: dict[str, Any], *, source: str, server: Round, work: Path) -> dict[str, Any]:
    """The row of one strength of one defence."""
    defences = parse([DefenceSpec.model_validate({"name": kind, **settings})]) if kind != "none" else []
    if kind == "dp-sgd" and settings["noise"] == 0:
        # the undefended point of the model without batch norm: a norm that clips nothing
        defences = [DPSGD(clip=1e6, noise=0.0)]
    name = named(kind, settings)
    return {
        "name": name,
        "defence": kind,
        "settings": settings,
        **leak(source, batch=4, client=ClientSpec(), defences=defences, work=work, name=name),
        "round": {
            "before": dataclasses.asdict(server.before),
            "undefended": server.undefended,
            "defended": server.after(defences),
            "rate": server.rate,
        },
        **provenance(seed=SEED),
    }


def named(kind: str, settings: dict[str, Any]) -> str:
    """The name of a row: the defence and its strength."""
    return " ".join([kind, *(f"{value:g}" for key, value in settings.items() if key != "clip")])


def round_of_size(kind: str, size: int, server: Round) -> dict[str, Any]:
    """The round of clients with batches of one size; secure aggregation gives the server the average that it takes anyway."""
    defended = server.after([], images=size) if kind == "larger batch" else server.undefended
    before = dataclasses.asdict(server.before)
    return {"before": before, "undefended": server.undefended, "defended": defended, "rate": server.rate}


def measure_size(kind: str, size: int, *, source: str, server: Round, work: Path) -> dict[str, Any]:
    """The row of one batch size, or of one number of clients with four images each."""
    name = f"{kind} {size}"
    batch, client = (size, ClientSpec()) if kind == "larger batch" else (4 * size, ClientSpec(protocol="average", clients=size))
    row = leak(source, batch=batch, client=client, defences=[], work=work, name=name)
    return {
        "name": name,
        "defence": kind,
        "settings": {"size": size},
        **row,
        "round": round_of_size(kind, size, server),
        **provenance(seed=SEED),
    }


def plot(folder: Path) -> None:
    """Three figures: leak against distortion, against accuracy, and against the number of images."""
    rows = rows_of("defences")
    kinds = [kind for kind in LADDERS if kind != "none" and any(row["defence"] == kind for row in rows)]

    def curve(kind: str, cost: Any) -> list[tuple[float, float]]:
        return [(cost(row), row["metrics"]["ssim"]["mean"]) for row in rows if row["defence"] == kind]

    start = next(row for row in rows if row["defence"] == "none")
    leak_against_cost_svg(
        folder / "defences-distortion.svg",
        # below a millionth it is the round-off of Opacus' gradients
        {kind: curve(kind, lambda row: row["distortion"] if row["distortion"] > 1e-6 else 0.0) for kind in kinds},
        cost="relative distortion of the update",
        log=True,
    )
    leak_against_cost_svg(
        folder / "defences-accuracy.svg",
        {kind: curve(kind, lambda row: row["round"]["defended"]["accuracy"]) for kind in kinds},
        cost="accuracy on held-out images after one round",
        marks={
            "before the round": start["round"]["before"]["accuracy"],
            "undefended round": start["round"]["undefended"]["accuracy"],
        },
    )
    leak_against_cost_svg(
        folder / "defences-images.svg",
        {kind: curve(kind, lambda row: row["batch"]) for kind in SIZES},
        cost="images in the update",
        log=True,
    )


def _images(source: str, start: int, count: int) -> Truth:
    return data.load(DataSpec(source=source, start=start, batch=count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="cifar10", help="cifar10, or npz:FILE with its first 768 training images")
    parser.add_argument("--resnet20", type=Path, help="safetensors file of the trained ResNet-20")
    parser.add_argument("--only", nargs="+", choices=[*LADDERS, *SIZES], default=[*LADDERS, *SIZES])
    parser.add_argument("--missing", action="store_true", help="leave out what is in the results already")
    parser.add_argument("--rounds-of-sizes", action="store_true", help="measure only the rounds of rows that have none")
    parser.add_argument("--work", type=Path, default=Path("runs/defences"), help="where reconstructions go")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw what has been measured, and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.plot:
        plot(arguments.plot)
        return
    server = Round(arguments.source, arguments.resnet20)
    print(f"rate {server.rate}, before {server.before}, after an undefended round {server.undefended}", flush=True)
    if arguments.rounds_of_sizes:
        for row in rows_of("defences"):
            if "round" not in row:
                row["round"] = {**round_of_size(row["defence"], row["settings"]["size"], server), **provenance(seed=SEED)}
                save_row("defences", row)
                print(row["name"], row["round"]["defended"], flush=True)
        return
    for kind in arguments.only:
        for strength in LADDERS.get(kind, SIZES.get(kind, [])):
            name = named(kind, strength) if isinstance(strength, dict) else f"{kind} {strength}"
            if arguments.missing and name in [row["name"] for row in rows_of("defences")]:
                continue
            if isinstance(strength, dict):
                row = measure(kind, strength, source=arguments.source, server=server, work=arguments.work)
            else:
                row = measure_size(kind, strength, source=arguments.source, server=server, work=arguments.work)
            save_row("defences", row)
            after = row.get("round", {}).get("defended")
            print(row["name"], row["distortion"], row["metrics"]["ssim"], after, row["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
