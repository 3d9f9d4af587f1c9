"""The command line: run folders that a person can read, the same numbers again, and one clear line for every bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradleak import cli
from gradleak.observation import Observation, Truth
from gradleak.tensors import read_tensors

#: A run of a second: two photographs of 16 pixels, a narrow ResNet-18 with sigmoid, three rounds.
TINY = {
    "device": "cpu",
    "data.batch": "2",
    "data.size": "16",
    "model.width": "4",
    "attack.rounds": "3",
    "attack.channels": "8",
    "evaluate.lpips": "off",
}
RUN_FILES = {"spec.toml", "result.json", "reconstruction.safetensors", "report.html", "grid.png", "log.jsonl"}


def tiny(**changed: str) -> list[str]:
    """``--set`` options; ``data_batch`` stands for ``data.batch``."""
    table = {**TINY, **{key.replace("_", ".", 1): value for key, value in changed.items()}}
    return [option for key, value in table.items() for option in ("--set", f"{key}={value}")]


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Threads that wait for each other cost more than these small tensors."""
    torch.set_num_threads(1)


def call(*arguments: str | Path) -> int:
    """`gradleak ARGUMENTS` in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gradleak", *map(str, arguments)])
        with pytest.raises(SystemExit) as leave:
            cli.main()
    return int(leave.value.code or 0)


def read(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on when, where and how often it was computed."""
    keys = ("matching_loss", "best_round", "metrics", "per_image", "assignment", "many_to_one", "labels", "quality", "verdict")
    return {key: result[key] for key in keys}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with one ``audit``; one capture, ``update.safetensors`` and ``truth.safetensors``; and its attack, ``run``."""
    folder = tmp_path_factory.mktemp("cli")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert call("audit", *tiny(), "--out", folder / "audit", "--quiet") == 0
    files = ("--out", folder / "update.safetensors", "--truth", folder / "truth.safetensors")
    assert call("capture", *tiny(), *files) == 0
    attack = [option for key in ("device", "attack.rounds", "attack.channels") for option in ("--set", f"{key}={TINY[key]}")]
    assert call("invert", folder / "update.safetensors", *attack, "--out", folder / "run", "--quiet") == 0
    yield folder
    torch.set_num_threads(threads)


def test_audit_leaves_a_folder_for_people(home: Path) -> None:
    """Six files, each what its name says; the folder and the files are the owner's alone."""
    folder = home / "audit"
    assert {file.name for file in folder.iterdir()} == RUN_FILES
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    with Image.open(folder / "grid.png") as image:
        assert min(image.size) > 16
    assert (folder / "report.html").read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert set(rows[0]) == {"round", "loss", "learning_rate", "seconds"}
    tensors, metadata = read_tensors(folder / "reconstruction.safetensors")
    assert metadata["format"] == "gradleak-reconstruction"
    assert tensors["images"].shape == (2, 3, 16, 16)
    assert 0 <= tensors["images"].min() <= tensors["images"].max() <= 1
    assert tensors["labels"].tolist() == Truth.load(home / "truth.safetensors").labels.tolist()
    assert len(tensors["snapshots"]) == len(tensors["snapshot_rounds"]) <= 12


def test_result_has_the_documented_keys(home: Path) -> None:
    result = read(home / "audit")
    for metric in ("psnr", "ssim", "fsim", "lpips"):
        assert set(result["metrics"][metric]) >= {"mean", "median", "worst"}
        assert len(result["per_image"][metric]) == 2
    assert result["metrics"]["psnr"]["worst"] == min(result["per_image"]["psnr"])
    assert result["metrics"]["lpips"]["mean"] is None
    assert "lpips" in result["notes"]
    assert result["matching_loss"] > 0
    assert set(result["cost"]) == {"rounds", "seconds", "seconds_per_round", "peak_memory_mb"}
    assert result["cost"]["rounds"] == 3
    labels = Truth.load(home / "truth.safetensors").labels.tolist()
    shares = ("accuracy", "classes_found", "counts_exact", "existence_accuracy", "number_accuracy")
    assert result["labels"] == {"rule": "known", "values": labels, "shape": [2], "classes": 10, **dict.fromkeys(shares, 1.0)}
    found = result["identification"]
    assert (found["candidates"], found["chance"]) == (32, 1 / 32)  # the batch, and all that follows it in the source
    assert all(1 <= rank <= 32 for rank in found["ranks"]["mse"] + found["ranks"]["ssim"])
    assert result["image_sensitivity"] > 1e-3
    assert {"gradleak", "torch", "python"} <= set(result["versions"])
    assert (result["seed"], result["device"]) == (0, "cpu")
    assert result["command"].startswith("gradleak audit --set device=cpu")
    assert result["attack"]["name"] == "cinet"
    assert result["attack"]["generator_channels"] == 8


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Threat model", "C:"),
        ("Labels", "granted"),
        ("Batch size", "2"),
        ("Mode", "train"),
        ("Activations of F", "Sigmoid"),
        ("Weights", "seed 0"),
        ("Repeated labels", "0 of 2"),
        ("Counting", "B*C*H*W = 1,536"),
    ],
)
def test_assumptions_are_stated(home: Path, name: str, words: str) -> None:
    assumptions = {row["name"]: row["value"] for row in read(home / "audit")["assumptions"]}
    assert words in assumptions[name]


def test_its_own_spec_gives_the_same_numbers(home: Path, tmp_path: Path) -> None:
    """spec.toml of a run folder is that run, with every setting written out."""
    assert call("audit", home / "audit" / "spec.toml", "--out", tmp_path / "again", "--quiet") == 0
    assert numbers(read(tmp_path / "again")) == numbers(read(home / "audit"))
    assert (tmp_path / "again" / "spec.toml").read_text() == (home / "audit" / "spec.toml").read_text()
    first, again = (read_tensors(folder / "reconstruction.safetensors")[0] for folder in (home / "audit", tmp_path / "again"))
    assert torch.equal(first["images"], again["images"])


def test_capture_invert_evaluate_is_audit(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The three steps apart give exactly the numbers of one audit; before the truth comes there is no score."""
    folder = home / "run"
    assert {file.name for file in folder.iterdir()} == RUN_FILES
    blind = read(folder)
    assert "metrics" not in blind
    assert blind["labels"]["accuracy"] is None
    assert "unknown" in blind["verdict"]
    assert call("evaluate", folder, "--truth", home / "truth.safetensors", "--lpips", "off") == 0
    assert "ssim" in capsys.readouterr().out
    assert numbers(read(folder)) == numbers(read(home / "audit"))
    attacked, audited = (read(home / name)["assumptions"] for name in ("run", "audit"))
    assert [row for row in attacked if row["name"] != "Weights"] == [row for row in audited if row["name"] != "Weights"]
    before = numbers(read(folder))
    assert call("evaluate", folder, "--truth", home / "truth.safetensors", "--lpips", "off") == 0  # as often as one likes
    assert numbers(read(folder)) == before


def test_recovered_labels_give_the_same_images(home: Path, tmp_path: Path) -> None:
    """`audit` with labels.rule=auto, and `capture` of the same, which then grants none: the rule is stated."""
    assert call("audit", *tiny(labels_rule="auto"), "--out", tmp_path / "audit", "--quiet") == 0
    result = read(tmp_path / "audit")
    assert result["labels"]["rule"] == "counts"
    assert result["labels"]["accuracy"] == 1.0
    assert result["metrics"] == read(home / "audit")["metrics"]
    assert call("capture", *tiny(labels_rule="auto"), "--out", tmp_path / "u.safetensors") == 0
    assert Observation.load(tmp_path / "u.safetensors").labels is None


def test_controls(tmp_path: Path) -> None:
    """The attack on noise, and the mean image; both with every metric."""
    assert (
        call(
            "audit",
            *tiny(evaluate_controls="true", attack_rounds="1", attack_distance="cosine"),
            "--out",
            tmp_path / "a",
            "--quiet",
        )
        == 0
    )
    controls = read(tmp_path / "a")["controls"]
    assert set(controls) == {"random-noise gradient", "mean image"}
    assert all(set(row) >= {"psnr", "ssim", "fsim", "lpips"} for row in controls.values())
    assert controls["random-noise gradient"]["identification"]["candidates"] == 32
    # one round rebuilds nothing, and the verdict says so
    assert "A random-noise gradient does as well" in read(tmp_path / "a")["verdict"]


def test_decoys_are_as_many_as_are_asked_for_and_there(tmp_path: Path) -> None:
    """A setting; at the end of the source the batch alone is left; decoys that cannot be read cost a warning, no run."""
    candidates = {}
    for start, asked in (("0", "5"), ("0", "1"), ("30", "9")):
        folder = tmp_path / f"{start}-{asked}"
        options = tiny(attack_rounds="1", data_start=start, evaluate_candidates=asked)
        assert call("audit", *options, "--out", folder, "--quiet") == 0
        candidates[start, asked] = read(folder)["identification"]["candidates"]
    assert candidates == {("0", "5"): 5, ("0", "1"): 2, ("30", "9"): 2}
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.full((16, 16, 3), 80 * i, np.uint8)).save(tmp_path / "images" / "a" / f"{i}.png")
    (tmp_path / "images" / "a" / "2.png").write_bytes(b"damaged")
    options = tiny(attack_rounds="1", data_source=f"folder:{tmp_path / 'images'}")
    assert call("audit", *options, "--out", tmp_path / "damaged", "--quiet") == 0
    result = read(tmp_path / "damaged")
    assert result["identification"]["candidates"] == 2
    assert "2.png" in result["warnings"][0]


def test_an_update_that_does_not_depend_on_the_images_is_called_that(own: Path) -> None:
    """In the verdict, first of an audit, then of an attack on the file without a truth."""
    (own / "spec.toml").write_text("[data]\nsize = 16\n")
    options = [option.replace("mine.py:build", "mine.py:dead") for option in own_options(attack_rounds="1")]
    assert call("audit", "spec.toml", *options, "--out", "audit", "--quiet") == 0
    assert "does not depend on the images" in read(own / "audit")["verdict"]
    assert call("capture", "spec.toml", *options, "--out", "u.safetensors") == 0
    few = ["--set", "attack.rounds=1", "--set", "attack.channels=8", "--set", "device=cpu", "--quiet"]
    assert call("invert", "u.safetensors", "--model", "mine.py:dead", *few, "--out", "run") == 0
    assert "does not depend on the images" in read(own / "run")["verdict"]


def test_check_says_what_it_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    """Equations and unknowns, the verdict, the generator, memory, and seconds a round; too few equations are called that."""
    assert call("check", *tiny()) == 0
    out = capsys.readouterr().out
    assert "P(F) = 44,622" in out
    assert "B*C*H*W = 1,536" in out
    assert "enough equations (29.1" in out
    assert "with 8 channels" in out
    assert "MiB" in out
    assert "s a round" in out
    assert "for 3 rounds" in out
    assert "all but the gain of the images" in out  # batch norm after a bias-free convolution
    assert "this attack has none" in out
    assert call("check", *tiny(model_width="1", data_batch="8", data_size="32")) == 0
    assert "too few equations" in capsys.readouterr().out


def test_check_as_json_has_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers that the lines have, and whether this attack's total variation is beyond Proposition 1's limit."""
    few = [
        "data.batch=2",
        "data.size=16",
        "device=cpu",
        "attack.name=inverting-gradients",
        "attack.rounds=3",
        "model.name=lenet",
    ]
    options = [option for text in few for option in ("--set", text)]
    assert call("check", *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["unknowns"], found["rounds"], found["distance"], found["device"]) == (1536, 3, "cosine", "cpu")
    assert found["determined"] == (found["update_size"] >= 1536)
    assert found["images_told"]
    assert found["gain_told"] == (found["gain_sensitivity"] >= 0.02)
    limit, weight = found["total_variation_limit"], found["total_variation"]
    assert weight == 0.01
    assert limit > 0
    for changed, words in ((2 * limit, "is beyond it"), (limit / 2, "is below it")):
        assert call("check", *options, "--set", f"attack.total_variation={changed!r}") == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            [],
            [
                "attacks:",
                "cinet-paper",
                "models:",
                "resnet18-cifar",
                "torchvision/NAME",
                "datasets:",
                "npz:PATH",
                "labels:",
                "defences:",
                "settings:",
            ],
        ),
        (["attacks"], ["cinet", "needs the labels"]),
        (["models"], ["convnet", "torchvision/resnet18"]),
        (["models", "wide_resnet"], ["torchvision/wide_resnet50_2"]),
        (["models", "lenet"], ["Strides 2, 2, 1, 1", "model.activation"]),
        (["attacks", "gias"], ["attack.generator", "5500", "threat.surrogate_data", "Length of an untrained generator"]),
        (["defences", "gaussian"], ["sigma (number >= 0; needed)"]),
        (["settings"], ["client", "matrix"]),
        (["settings", "client"], ["client.local_batch", "integer >= 1", "images in a local step"]),
        (["settings", "run"], ["memory_limit_mb"]),
        (["datasets"], ["sample"]),
        (["labels"], ["idlg"]),
    ],
)
def test_list(capsys: pytest.CaptureFixture[str], what: list[str], words: list[str]) -> None:
    assert call("list", *what) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)


def absent_cuda() -> str:
    return f"cuda:{torch.cuda.device_count()}"


#: name -> options after `audit`, and words that the message must have.
BAD_AUDITS: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (tiny(data_bath="2"), ["data.bath", "did you mean 'batch'?"]),
    "unknown table": (["--set", "modle.name=lenet"], ["modle", "did you mean 'model'?"]),
    "not key=value": (["--set", "data.batch"], ["--set data.batch", "key=value"]),
    "wrong type": (tiny(data_batch="many"), ["data.batch", "integer", "'many'"]),
    "unknown attack": (tiny(attack_name="cinett"), ["attack.name", "'cinett'", "did you mean 'cinet'?"]),
    "unknown setting of the attack": (tiny(attack_round="3"), ["attack.round", "did you mean 'rounds'?"]),
    "wrong setting of the attack": (tiny(attack_rounds="0"), ["attack.rounds", "1"]),
    "no channels": (tiny(attack_channels="0"), ["attack.channels", "0"]),
    "unknown model": (tiny(model_name="resnet19-cifar"), ["'resnet19-cifar'", "did you mean"]),
    "unknown torchvision model": (
        ["--set", "model.name=torchvision/resnet19", "--set", "model.width=4"],
        ["torchvision/resnet19"],
    ),
    "unknown activation": (tiny(model_activation="sigmoidal"), ["model.activation", "'sigmoidal'", "sigmoid"]),
    "unknown source": (tiny(data_source="cifar11"), ["data.source", "'cifar11'", "did you mean 'cifar10'?"]),
    "missing npz": (tiny(data_source="npz:absent.npz"), ["absent.npz", "no such file"]),
    "more images than there are": (tiny(data_batch="5000"), ["sample has", "data.start + data.batch = 5000"]),
    "label out of range": (tiny(model_num_classes="2", data_batch="4"), ["label 2", "2 classes", "model.num_classes"]),
    "images too small for the model": (
        tiny(model_name="torchvision/alexnet", data_size="32"),
        ["torchvision/alexnet", "3x32x32"],
    ),
    "one image with one value a channel": (tiny(data_batch="1", data_size="8"), ["batch norm", "one image", "eval"]),
    "one image for idlg": (tiny(labels_rule="idlg"), ["idlg", "one image", "2"]),
    "missing weights": (tiny(model_weights="absent.safetensors"), ["absent.safetensors", "no such file"]),
    "missing LPIPS weights": (tiny(evaluate_lpips="absent.safetensors"), ["absent.safetensors", "no such file"]),
    "unknown loss": (tiny(client_loss="mae"), ["client.loss", "'mae'", "'mse'"]),
    "loss that does not go with labels": (tiny(client_loss="mse"), ["mse", "(2, 10)", "int64", "client.loss"]),
    "unknown device": (tiny(device="gpu"), ["device", "'gpu'", "available: cpu"]),
    "absent CUDA device": (tiny(device=absent_cuda()), ["device", absent_cuda(), "available: cpu"]),
    "missing spec": (["absent.toml"], ["absent.toml", "no such file", "a TOML specification"]),
}
# these networks have no width
for _name in ("unknown torchvision model", "images too small for the model"):
    _options = BAD_AUDITS[_name][0]
    _at = _options.index("model.width=4")
    del _options[_at - 1 : _at + 1]


def one_line(captured: str) -> str:
    """The message on standard error: a single line, no traceback."""
    lines = [line for line in captured.splitlines() if line]
    assert len(lines) == 1, captured
    assert lines[0].startswith("gradleak: error: ")
    return lines[0]


@pytest.mark.parametrize("name", list(BAD_AUDITS))
def test_bad_input_to_audit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line that names the fault; no report pretends that something ran."""
    options, words = BAD_AUDITS[name]
    spec = [] if options[0] == "absent.toml" else [tmp_path / "default.toml"]
    (tmp_path / "default.toml").write_text('[data]\nsize = 32\n[model]\nname = "resnet18-cifar"\nactivation = "model"\n')
    assert call("audit", *spec, *options, "--out", tmp_path / "out", "--quiet") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = one_line(captured.err)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_typing_error_in_the_model_of_the_default_is_called_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded default sets a width: the message is about the name all the same."""
    assert call("audit", "--set", "model.name=resnet19-cifar", "--out", tmp_path / "out") == 2
    message = one_line(capsys.readouterr().err)
    assert "unknown model 'resnet19-cifar'" in message
    assert "did you mean" in message


@pytest.mark.parametrize("content", ["[data\n", "a = b", "\0"])
def test_broken_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (tmp_path / "spec.toml").write_text(content)
    for command in (["audit", tmp_path / "spec.toml", "--out", tmp_path / "out"], ["check", tmp_path / "spec.toml"]):
        assert call(*command) == 2
        message = one_line(capsys.readouterr().err)
        assert "not valid TOML" in message
        assert "spec.toml" in message


def test_an_output_folder_that_is_not_empty(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused, then overwritten with --force, which removes nothing but an earlier run's files."""
    folder = tmp_path / "out"
    shutil.copytree(home / "audit", folder)
    (folder / "notes.txt").write_text("mine")
    arguments = ("audit", *tiny(attack_rounds="1"), "--out", folder, "--quiet")
    assert call(*arguments) == 2
    message = one_line(capsys.readouterr().err)
    assert "not empty" in message
    assert "--force" in message
    assert read(folder)["cost"]["rounds"] == 3
    assert call(*arguments, "--force") == 0
    assert read(folder)["cost"]["rounds"] == 1
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_bad_specification_does_not_cost_an_earlier_run(home: Path, tmp_path: Path) -> None:
    """--force replaces a run by another one, not by an error message."""
    shutil.copytree(home / "audit", tmp_path / "out")
    for changed in ({"data_batch": "5000"}, {"model_num_classes": "2", "data_batch": "4"}, {"attack_name": "x"}):
        assert call("audit", *tiny(**changed), "--out", tmp_path / "out", "--force", "--quiet") == 2
        assert {file.name for file in (tmp_path / "out").iterdir()} == RUN_FILES


@pytest.mark.parametrize("command", ["audit", "invert"])
def test_an_output_path_that_is_a_file(home: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    start = tiny() if command == "audit" else [home / "update.safetensors"]
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        for force in ([], ["--force"]):
            assert call(command, *start, "--out", out, *force) == 2
            assert str(tmp_path / "file") in one_line(capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"


def test_capture_uses_the_threads_of_the_specification(tmp_path: Path) -> None:
    """As audit does: the number of threads changes the last digits of an update."""
    torch.set_num_threads(2)
    assert call("capture", *tiny(threads="1"), "--out", tmp_path / "update") == 0
    assert torch.get_num_threads() == 1


def test_capture_refuses_to_overwrite(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An existing file, a folder, and one name for both files: the private batch must not land in the update."""
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    for files in (["--out", there], ["--out", tmp_path / "new", "--truth", there], ["--out", tmp_path]):
        assert call("capture", *tiny(), *files) == 2
        assert str(tmp_path) in one_line(capsys.readouterr().err)
    assert there.read_text() == "mine"
    assert call("capture", *tiny(), "--out", tmp_path / "one", "--truth", tmp_path / "one") == 2
    assert "--truth" in one_line(capsys.readouterr().err)
    assert call("capture", *tiny(), "--out", there, "--force") == 0
    assert Observation.load(there).batch == 2


Damage = Callable[[Path], object]


def save_truth(images: int, size: int) -> Damage:
    return lambda path: Truth(torch.rand(images, 3, size, size), torch.zeros(images, dtype=torch.int64)).save(path)


@pytest.mark.parametrize(
    ("damage", "options", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), [], ["update.safetensors", "truncated"]),
        (lambda path: path.write_bytes(b"PK\3\4 a pickle in a zip file"), [], ["update.safetensors", "pickle"]),
        (lambda path: path.unlink(), [], ["update.safetensors", "no such file"]),
        (lambda path: None, ["--model", "lenet"], ["update.safetensors", "lacks", "another architecture"]),
        (lambda path: None, ["--set", "model.width=5"], ["update.safetensors", "shape", "another architecture"]),
        (lambda path: None, ["--model", "resnet19-cifar"], ["unknown model 'resnet19-cifar'", "did you mean"]),
        (lambda path: None, ["--model", "absent.py:build"], ["absent.py", "no such file"]),
        (lambda path: None, ["--set", "attack.name=cinett"], ["did you mean 'cinet'?"]),
        (save_truth(2, 16), [], ["gradleak-truth", "gradleak-observation"]),
    ],
)
def test_bad_input_to_invert(
    home: Path, tmp_path: Path, damage: Damage, options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "update.safetensors"
    shutil.copy(home / "update.safetensors", path)
    damage(path)
    assert call("invert", path, *options, "--set", "device=cpu", "--out", tmp_path / "out", "--quiet") == 2
    message = one_line(capsys.readouterr().err)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: save_truth(3, 16)(folder / "truth.safetensors"), ["(2, 3, 16, 16)", "(3, 3, 16, 16)"]),
        (lambda folder: save_truth(2, 32)(folder / "truth.safetensors"), ["(2, 3, 16, 16)", "(2, 3, 32, 32)"]),
        (lambda folder: (folder / "truth.safetensors").unlink(), ["truth.safetensors", "no such file"]),
        (
            lambda folder: shutil.copy(folder / "update.safetensors", folder / "truth.safetensors"),
            ["truth.safetensors", "images"],
        ),
        (lambda folder: (folder / "run" / "result.json").unlink(), ["run", "result.json", "gradleak invert"]),
        (lambda folder: (folder / "run" / "reconstruction.safetensors").unlink(), ["run", "reconstruction.safetensors"]),
        (lambda folder: (folder / "run" / "result.json").write_text("{"), ["run", "result.json", "damaged"]),
        (lambda folder: (folder / "run" / "result.json").write_text("[]"), ["run", "result.json", "damaged"]),
        (lambda folder: (folder / "run" / "log.jsonl").write_text("{\n"), ["run", "log.jsonl", "damaged"]),
        (lambda folder: shutil.rmtree(folder / "run"), ["run", "result.json"]),
    ],
)
def test_bad_input_to_evaluate(
    home: Path, tmp_path: Path, damage: Callable[[Path], object], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder without a score keeps that state."""
    shutil.copytree(home, tmp_path / "home")
    folder = tmp_path / "home"
    damage(folder)
    assert call("evaluate", folder / "run", "--truth", folder / "truth.safetensors", "--lpips", "off") == 2
    message = one_line(capsys.readouterr().err)
    assert all(word in message for word in words), message


def test_evaluate_on_an_empty_folder(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", tmp_path, "--truth", home / "truth.safetensors") == 2
    assert "result.json" in one_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (["atacks"], "did you mean 'attacks'?"),
        (["attacks", "cinett"], "did you mean 'cinet'?"),
        (["settings", "clint"], "did you mean 'client'?"),
        (["models", "lenett"], "did you mean 'lenet'?"),
    ],
)
def test_list_of_something_unknown(capsys: pytest.CaptureFixture[str], what: list[str], words: str) -> None:
    assert call("list", *what) == 2
    assert words in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["audit", "--help"], ["audit"], ["nothing"], ["audit", "--rounds", "3"]], ids=str
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Help is no error; a wrong usage is one, with code 2 and the usage on standard error."""
    code = call(*arguments)
    captured = capsys.readouterr()
    assert code == (0 if "--help" in arguments else 2)
    assert "Usage: " in (captured.out if "--help" in arguments else captured.err + captured.out)
    assert "Traceback" not in captured.err


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's own model and loss."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def build(image_shape, num_classes=10):\n"
        "    features = image_shape[0] * image_shape[1] * image_shape[2]\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(features, 5))\n"
        "def frozen(image_shape):\n"
        "    return build(image_shape).requires_grad_(False)\n"
        "def dead(image_shape):\n"
        "    model = build(image_shape)\n"
        "    features = model[1].in_features\n"
        "    first = torch.nn.Linear(features, 4)\n"
        "    torch.nn.init.constant_(first.bias, -1e6)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.ReLU(), torch.nn.Linear(4, 5))\n"
        "def loss(output, labels):\n"
        "    return torch.nn.functional.cross_entropy(output, labels, label_smoothing=0.1)\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_options(**changed: str) -> list[str]:
    options = tiny(model_name="mine.py:build", **changed)
    at = options.index("model.width=4")
    return options[: at - 1] + options[at + 1 :]


def test_ones_own_model(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """audit runs it; an update file of it says nothing that would be run: `invert` asks for --model, and then equals audit."""
    (own / "spec.toml").write_text("[data]\nsize = 16\n")
    assert call("audit", "spec.toml", *own_options(), "--out", "audit", "--quiet") == 0
    assert call("capture", "spec.toml", *own_options(), "--out", "u.safetensors", "--truth", "t.safetensors") == 0
    assert "mine" not in json.dumps(read_tensors(own / "u.safetensors")[1])
    options = ["--set", "attack.rounds=3", "--set", "attack.channels=8", "--set", "device=cpu", "--quiet"]
    capsys.readouterr()
    assert call("invert", "u.safetensors", *options, "--out", "run") == 2
    assert "--model" in one_line(capsys.readouterr().err)
    assert call("invert", "u.safetensors", "--model", "mine.py:build", *options, "--out", "run") == 0
    assert call("evaluate", "run", "--truth", "t.safetensors", "--lpips", "off") == 0
    assert numbers(read(own / "run")) == numbers(read(own / "audit"))
    weights = next(row["value"] for row in read(own / "run")["assumptions"] if row["name"] == "Weights")
    assert "random" not in weights  # they came with the update: nothing is known about them


def test_a_model_without_trainable_parameters(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "spec.toml").write_text("[data]\nsize = 16\n")
    options = [option.replace("mine.py:build", "mine.py:frozen") for option in own_options()]
    assert call("audit", "spec.toml", *options, "--out", "audit") == 2
    assert "no trainable parameter" in one_line(capsys.readouterr().err)


def test_ones_own_loss(own: Path) -> None:
    (own / "spec.toml").write_text('[model]\nname = "resnet18-cifar"\n')
    assert call("audit", "spec.toml", *tiny(client_loss="mine.py:loss"), "--out", "audit", "--quiet") == 0
    client = next(row for row in read(own / "audit")["assumptions"] if row["name"] == "Client")
    assert "mine.py:loss" in client["why"]


@pytest.mark.parametrize(("labels", "shared"), [([5, 5, 1, 1], 4), ([7, 7, 7, 0], 3)])
def test_repeated_labels_are_counted_in_images(tmp_path: Path, labels: list[int], shared: int) -> None:
    """How many images share their class with another one."""
    np.savez(tmp_path / "batch.npz", x=np.random.default_rng(0).random((4, 16, 16, 3), np.float32), y=np.array(labels))
    options = tiny(data_source=f"npz:{tmp_path / 'batch.npz'}", data_batch="4", attack_rounds="1")
    assert call("audit", *options, "--out", tmp_path / "out", "--quiet") == 0
    repeated = next(row for row in read(tmp_path / "out")["assumptions"] if row["name"] == "Repeated labels")
    assert repeated["value"].startswith(f"{shared} of 4")


def test_the_real_process(tmp_path: Path) -> None:
    """The installed entry point: a bad input is one line on standard error and code 2, with nothing before it."""
    command = [sys.executable, "-c", "from gradleak.cli import main; main()", "audit", "--set", "data.bath=2", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean 'batch'?" in one_line(done.stderr)
    assert not (tmp_path / "out").exists()
