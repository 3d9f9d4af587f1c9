"""Several processes: they compute what one does, say it once, and do not wait for each other in vain."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from gradleak import cli, sharded, shared_memory
from gradleak.attacks import attack
from gradleak.checkpoint import Checkpoint
from gradleak.client import FedSGD, simulate
from gradleak.data import load
from gradleak.errors import OutputError, SpecError
from gradleak.invert import Reconstruction, invert
from gradleak.labels import recover
from gradleak.models import build
from gradleak.protocols import FedAvg
from gradleak.shared_memory import SLOT
from gradleak.spec import DataSpec, ModelSpec

WORLD = 2

#: Whether processes of this machine sum through memory that they share.
SHARES_MEMORY = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the processes gives for the tasks below; all in one go, since starting them takes longest."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(join, args=(folder, port), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def join(rank: int, folder: Path, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with sharded.processes():
        found = {
            "batch norm": batch_norms(),
            "sums": sums(),
            "attacks": {case: compared(reconstruct(case)) for case in CASES},
            "resumed": interrupted_and_resumed(folder / "checkpoint.safetensors"),
            "watched": watched(),
            "refused": refused(),
            "first": alone(),
        }
        torch.save(found, folder / f"{rank}.pt")


# shared memory


def sums() -> dict[str, Any]:
    """Of numbers that each process draws by itself, through shared memory and without it."""
    joined = sharded._joined
    assert joined is not None
    generator = torch.Generator().manual_seed(joined.rank)
    drawn = [torch.randn(shape, generator=generator) for shape in ((), (3, 4), (SLOT // 4,), (SLOT // 2 + 7,))]
    drawn += [torch.randint(9, (5,), generator=generator), torch.randn(6, generator=generator, dtype=torch.float64)]
    small = [t for t in drawn if t.numel() < 100]
    ways = {}
    for way in (joined, dataclasses.replace(joined, memory=None)):
        sharded._joined = way
        for _ in range(3):  # the slots are written to in turn
            totals = [t.clone() for t in drawn]
            for total in totals:
                sharded._all_reduce(total)
        ways[str(way.memory is not None)] = [totals, [sharded._all_gather(t, WORLD) for t in small], *divided(joined)]
    sharded._joined = joined
    return {"ways": ways, "drawn": drawn}


def divided(joined: sharded.Processes) -> list[Any]:
    """Which tensors this process works on, and what all of them have after each has put its rank plus one into its own."""
    part, shapes = sharded.Part(joined, batch=5), {"a": (SLOT // 2,), "b": (3, 4), "c": (), "d": (2, SLOT // 8), "e": (5,)}
    like = {name: torch.arange(math.prod(shape), dtype=torch.float32).view(shape) for name, shape in shapes.items()}
    one = {"b": like["b"]}  # fewer than processes
    made = [{name: t[name] + joined.rank + 1 for name in part.own_of(t)} for t in (like, one)]
    return [part.own_of(like), part.collect(made[0], like) | {"one": part.collect(made[1], one)["b"]}]


def test_sums_through_shared_memory_are_the_sums(found: list[dict[str, Any]]) -> None:
    assert set(found[0]["sums"]["ways"]) == ({"True", "False"} if SHARES_MEMORY else {"False"})
    drawn = [process["sums"]["drawn"] for process in found]
    for process in found:
        for totals, gathered, *_ in process["sums"]["ways"].values():
            for total, parts in zip(totals, zip(*drawn, strict=True), strict=True):
                assert torch.equal(total, parts[0] + parts[1])
            small = [parts for parts in zip(*drawn, strict=True) if parts[0].numel() < 100]
            for whole, parts in zip(gathered, small, strict=True):
                assert torch.equal(whole, torch.stack(parts))


def test_what_each_process_made_of_its_tensors_all_have(found: list[dict[str, Any]]) -> None:
    for way in found[0]["sums"]["ways"]:
        owns = [process["sums"]["ways"][way][2] for process in found]
        assert sorted(itertools.chain(*owns)) == ["a", "b", "c", "d", "e"]
        assert owns[0] == ["a"]  # as many numbers as all others together, and more
        for process in found:
            collected = process["sums"]["ways"][way][3]
            assert torch.equal(collected.pop("one").flatten(), torch.arange(12) + 1.0)
            assert list(collected) == ["a", "b", "c", "d", "e"]
            for name, t in collected.items():
                rank = next(r for r, own in enumerate(owns) if name in own)
                assert torch.equal(t.flatten(), torch.arange(t.numel()) + rank + 1.0)


@pytest.mark.skipif(not SHARES_MEMORY, reason="needs memfd_create, and a processor that keeps the order of its writes")
def test_a_process_that_has_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while its parent has not asked for its exit status."""
    monkeypatch.setattr(shared_memory, "LOOK", 0.05)
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        told: dict[str, str] = {"process 1": str(ended.pid)}
        memory = shared_memory.SharedMemory(rank=0, world=2, tell=told.__setitem__, ask=told.__getitem__)
        with pytest.raises(RuntimeError, match="Connection closed: process 1 has ended"):
            memory.sum_(torch.ones(3))
        memory.close()


def test_too_many_processes_have_no_shared_memory() -> None:
    with pytest.raises(OSError, match="no shared memory"):
        shared_memory.SharedMemory(rank=0, world=9, tell=lambda name, text: None, ask=lambda name: "")


# batch norm


def derivatives(norm: Callable[[Tensor, Tensor | None, Tensor | None], Tensor], rows: slice, *, affine: bool) -> list[Tensor]:
    """y, and first and second derivatives of sums over the images in ``rows``."""
    generator = torch.Generator().manual_seed(0)
    x, a, b, r = (torch.randn(5, 3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    weight, bias = (torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    x = (100 + x[rows]).requires_grad_()  # far from zero: statistics must be summed with care
    y = norm(x, weight if affine else None, bias if affine else None)
    inputs = [x, weight, bias] if affine else [x]
    # not linear in y, so that the cotangent depends on x too
    first = torch.autograd.grad((y.sin() * a[rows]).sum(), inputs, retain_graph=True)
    again = torch.autograd.grad((y.sin() * a[rows]).sum(), inputs, create_graph=True)
    weights_of = [r[rows], *(g.detach().cos() for g in (weight, bias))][: len(inputs)]
    second = torch.autograd.grad(sum((g * w).sum() for g, w in zip(again, weights_of, strict=True)), inputs)
    return [y.detach(), *first, *(g.detach() for g in again), *second, b[rows]]


def batch_norms() -> list[list[Tensor]]:
    part = sharded.shard(5, torch.device("cpu"))
    assert isinstance(part, sharded.Part)

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return sharded.batch_norm(x, weight, bias, eps=1e-5, part=part)

    return [derivatives(norm, part.rows, affine=affine) for affine in (True, False)]


def test_batch_norm_and_its_first_and_second_derivatives_are_those_of_the_whole_batch(found: list[dict[str, Any]]) -> None:
    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return nn.functional.batch_norm(x, None, None, weight, bias, training=True)

    for case, affine in enumerate((True, False)):
        whole = derivatives(plain, slice(None), affine=affine)
        parts = [process["batch norm"][case] for process in found]
        assert [len(part[0]) for part in parts] == [3, 2]
        for expected, *of_each in zip(whole, *parts, strict=True):
            # per image as they are; per parameter each process has its term of the sum
            together = torch.cat(of_each) if expected.ndim == 4 else torch.stack(of_each).sum(0)
            torch.testing.assert_close(together, expected, rtol=1e-8, atol=1e-10)


# attacks

CASES: dict[str, dict[str, Any]] = {
    "secant": {"name": "cinet", "engine": "secant", "channels": 4},
    "exact": {"name": "cinet", "engine": "exact", "channels": 4, "normalisation": "spectral"},
    "corrected pixels": {"name": "cinet", "channels": 8, "rounds": 28, "pixel_share": 0.15, "relative_total_variation": 0.0},
    "smooth pixels": {"name": "cinet", "channels": 8, "rounds": 28, "pixel_share": 0.15},
    "auto": {"name": "cinet", "group": 2, "repeat": 2, "rounds": 2, "channels": 4},
    "pixels": {"name": "inverting-gradients", "group": 2},
    "last layers": {"name": "cinet", "engine": "secant", "channels": 4, "matched": 0.9},
    "running statistics": {"name": "cinet", "channels": 4, "mode": "eval"},
    "labels": {"name": "dlg", "rounds": 1},
}


def reconstruct(case: str, *, rounds: int = 3, **more: Any) -> Reconstruction:
    truth = load(DataSpec(source="sample", batch=5, size=16))
    # smooth: a round-off must not become another sign
    spec = ModelSpec(name="resnet18-cifar", width=4, activation="sigmoid")
    settings = {"rounds": rounds, "precision": "float64", **CASES[case]}
    client = FedSGD(build(spec, image_shape=(3, 16, 16)), mode=settings.pop("mode", "train"))
    observation = simulate(client, truth)
    recipe = attack(settings.pop("name"), **settings)
    labels = recover("known", observation, client)
    return invert(observation, recipe, client=client, labels=labels, progress=False, **more)


def compared(found: Reconstruction) -> dict[str, Any]:
    return {
        "images": found.images,
        "snapshots": found.snapshots.float(),
        "loss": torch.tensor([row["loss"] for row in found.history], dtype=torch.float64),
        "labels": found.labels.values,
        "best": [found.matching_loss, found.best_round],
        "corrected": found.notes.get("pixels_corrected", False),
    }


@pytest.mark.parametrize("case", CASES)
def test_an_attack_is_that_of_one_process(case: str, found: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    one = compared(reconstruct(case))
    for process in found:
        several = process["attacks"][case]
        assert several["best"][1] == one["best"][1]
        assert several["corrected"] == one["corrected"] == (case in ("corrected pixels", "smooth pixels"))
        # total variation has a kink where neighbours are equal, as smoothing makes many: there a last digit decides a sign
        error = 1e-3 if case == "smooth pixels" else 1e-5
        for name in ("loss", "images"):
            torch.testing.assert_close(several[name], one[name], rtol=error, atol=error)
        assert (several["snapshots"] - one["snapshots"]).abs().max() <= 1  # of 255: rounding
        torch.testing.assert_close(several["labels"], one["labels"])


def watched() -> dict[str, Any]:
    """Only the first process has a watcher; it sees all images."""
    seen: list[Tensor] = []
    watch = (lambda progress: seen.append(progress.images)) if os.environ["RANK"] == "0" else None
    rebuilt = reconstruct("pixels", watch=watch, rounds=1)
    return {"shapes": [list(images.shape) for images in seen], "images": rebuilt.images}


def test_a_watcher_sees_the_whole_batch(found: list[dict[str, Any]]) -> None:
    assert [process["watched"]["shapes"] for process in found] == [[[5, 3, 16, 16]], []]


def interrupted_and_resumed(path: Path) -> dict[str, Any]:
    """Stopped by a signal that the second process alone got, in round 2."""
    rounds: list[int] = []
    keep = Checkpoint(path, every=1e9)
    rank = int(os.environ["RANK"])

    def stop() -> str:
        rounds.append(1)
        return "SIGTERM" if rank == 1 and len(rounds) == 2 else ""

    partial = reconstruct("secant", checkpoint=keep, stop=stop)
    whole = reconstruct("secant", checkpoint=keep)
    return {"rounds": partial.rounds, "interrupted": partial.interrupted, **compared(whole)}


def test_all_stop_in_the_same_round_and_go_on_from_one_checkpoint(found: list[dict[str, Any]]) -> None:
    for process in found:
        resumed, whole = process["resumed"], process["attacks"]["secant"]
        assert (resumed["rounds"], resumed["interrupted"]) == (2, "SIGTERM")
        assert torch.equal(resumed["images"], whole["images"])
        assert torch.equal(resumed["loss"], whole["loss"])


def refused() -> list[str]:
    """The errors of an attack, a client and a batch that several processes cannot share."""
    texts, model = [], nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    for client, name, batch in (
        (FedSGD(model), "gi-nas", 2),
        (FedAvg(model, learning_rate=0.1), "cinet", 2),
        (FedSGD(model), "cinet", 1),
    ):
        observation = simulate(client, load(DataSpec(source="sample", batch=batch, size=16)))
        labels = recover("known", observation, client)
        with pytest.raises(SpecError) as error:
            invert(observation, attack(name), client=client, labels=labels, progress=False)
        texts.append(str(error.value))
    return texts


def test_what_several_processes_cannot_share_is_refused_in_all_of_them(found: list[dict[str, Any]]) -> None:
    for process in found:
        of_attack, of_client, of_batch = process["refused"]
        assert "attack.name" in of_attack
        assert "FedSGD" in of_client
        assert "--nproc-per-node 1" in of_batch


def alone() -> list[Any]:
    def fails() -> None:
        raise OutputError(f"in process {os.environ['RANK']}")

    with pytest.raises(OutputError) as error:
        sharded.first(fails)
    return [str(error.value), sharded.first(lambda: {"process": os.environ["RANK"], "values": [1.5, None]})]


def test_what_the_first_process_does_alone_all_know(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert process["first"] == ["in process 0", {"process": "0", "values": [1.5, None]}]


# command line


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    return subprocess.run(
        [*launcher, "-m", "gradleak", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_torchrun_leaves_one_run_folder_and_says_it_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = {
        "data.batch": 3,
        "data.size": 16,
        "model.width": 4,
        "attack.channels": 4,
        "attack.rounds": 3,
        "evaluate.lpips": "off",
        "evaluate.controls": "true",
        "device": "cpu",
        "checkpoint_seconds": 0,
    }
    done = torchrun("audit", "--out", str(out), *(f"--set={key}={value}" for key, value in settings.items()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    assert done.stderr.count("round 3/3") == 2  # the attack and its control
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert result["attack"]["processes"] == WORLD
    assert len(result["per_image"]["psnr"]) == 3
    assert result["command"].startswith(f"torchrun --nproc-per-node={WORLD} -m gradleak audit")
    assert not list(out.glob("checkpoint*"))


def test_an_error_is_told_once_and_ends_all_processes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = torchrun("audit", "--attack", "gi-nas", "--set=model.width=4", "--set=device=cpu", "--out", str(out))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gradleak: error:")]
    assert "attack.name" in line
    assert "exitcode  : 2" in done.stderr
    assert not out.exists()


def test_commands_that_take_one_process_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SpecError, match="check: takes one process"):
        cli.app(["check"], standalone_mode=False)
