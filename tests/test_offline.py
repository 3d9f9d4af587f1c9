"""No connection but for data and weights that were asked for, announced first, and none at all with GRADLEAK_OFFLINE."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradleak import network
from gradleak.errors import DataError
from test_cli import call, one_line, tiny

ROOT = Path(__file__).parents[1]

#: Runs commands in a process that ends at the first connection or look-up of a name.
GUARD = """
import json, sys
def guard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        print("CONNECTED", event, arguments, file=sys.stderr)
        import os
        os._exit(77)
sys.addaudithook(guard)
from gradleak.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["gradleak", *command]
    try:
        main()
    except SystemExit as leave:
        if leave.code:
            sys.exit(leave.code)
"""


def guarded(commands: list[list[str]], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCH_HOME": str(tmp_path / "torch"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = str(ROOT / "src")
    for name in (network.OFFLINE, "GRADLEAK_LPIPS_BACKBONE"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", GUARD, json.dumps(commands)], env=environment, capture_output=True, text=True, timeout=300
    )


def test_no_command_connects(tmp_path: Path) -> None:
    """The default run (with LPIPS where it is already there), shortened, and all that follows."""
    short = [o for o in tiny() if o != "evaluate.lpips=off"]
    short = [o for i, o in enumerate(short) if not (o == "--set" and (i + 1 == len(short) or short[i + 1] == "--set"))]
    update, truth, run = (str(tmp_path / name) for name in ("update.safetensors", "truth.safetensors", "run"))
    attack = ["--set", "device=cpu", "--set", "attack.rounds=2", "--set", "attack.channels=4", "--quiet"]
    done = guarded(
        [
            ["audit", *short, "--out", str(tmp_path / "audit"), "--quiet"],
            ["capture", *short, "--out", update, "--truth", truth],
            ["invert", update, *attack, "--out", run],
            ["evaluate", run, "--truth", truth],
            ["check", *short],
            ["list"],
            ["purge", run],
        ],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "CONNECTED" not in done.stderr
    assert "fetching" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["data.source=cifar10", "data.download=true", "data.root={}"],
            "cifar10 (170 MB) from www.cs.toronto.edu",
        ),
        (["evaluate.lpips=download"], "VGG-16 for LPIPS (528 MB) from download.pytorch.org"),
    ],
)
def test_a_download_is_announced_before_it_starts(options: list[str], words: str, tmp_path: Path) -> None:
    """The guard ends the process at the first connection, which the announcement must precede."""
    changed = [o for option in options for o in ("--set", option.format(tmp_path))]
    done = guarded([["audit", *tiny(), *changed, "--out", str(tmp_path / "out"), "--quiet"]], tmp_path)
    assert done.returncode == 77
    said, connected = done.stderr.index(f"gradleak: fetching {words}"), done.stderr.index("CONNECTED")
    assert said < connected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["data.source=cifar10", "data.download=true"],
            ["cifar10", "www.cs.toronto.edu", "cifar-10-python.tar.gz"],
        ),
        (["evaluate.lpips=download"], ["VGG-16", "download.pytorch.org", "vgg16-397923af.pth"]),
    ],
)
def test_offline_forbids_it_and_says_where_to_put_the_file(
    options: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(network.OFFLINE, "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    changed = [o for option in options for o in ("--set", option)]
    assert call("audit", *tiny(), *changed, "--out", tmp_path / "out") == 2
    message = one_line(capsys.readouterr().err)
    assert all(word in message for word in [*words, "GRADLEAK_OFFLINE", "by hand", str(tmp_path)]), message


@pytest.mark.parametrize(("value", "forbidden"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)])
def test_when_it_is_offline(value: str | None, forbidden: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(network.OFFLINE, raising=False)
    if value is not None:
        monkeypatch.setenv(network.OFFLINE, value)
    assert network.offline() is forbidden
    if forbidden:
        with pytest.raises(DataError, match=r"a thing is not fetched from example\.org"):
            network.announce("https://example.org/x", what="a thing", file=tmp_path, error=DataError)


def test_there_is_no_other_door() -> None:
    """Every call that can download stands in a module that announces; nothing else imports a client of the network."""
    clients = {"urllib.request", "requests", "http.client", "httpx", "aiohttp", "socket", "ftplib", "huggingface_hub"}
    for file in (ROOT / "src").rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            # whether a cluster that a person named answers at all; nothing is fetched
            may = {"socket"} if file.name == "cluster.py" else set()
            assert not clients & set(imported) - may, file
            if isinstance(node, ast.keyword) and node.arg == "download" and getattr(node.value, "value", None) is not False:
                assert "announce(" in source, file
            if isinstance(node, ast.Attribute) and node.attr in ("get_state_dict", "load_state_dict_from_url", "download_url"):
                assert "announce(" in source, file


def test_a_checkpoint_that_is_there_is_not_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline says nothing about files that lie on the disk: what is wrong with this one is that it is damaged."""
    from gradleak import metrics

    monkeypatch.setenv(network.OFFLINE, "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    with pytest.raises(metrics.LpipsUnavailable, match="remove a damaged file"):
        metrics.load_lpips("download")
