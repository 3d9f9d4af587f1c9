"""A matrix of attacks and defences: a run folder for each pair, an error in its cell, and one page about all."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradleak import data, matrix
from gradleak.errors import GradleakError, OutputError, SpecError
from gradleak.report import MatrixData, render_matrix
from gradleak.report.figures import MARKERS, Line, lines_svg
from gradleak.results import purge
from gradleak.spec import RunSpec, dump, load, override, parse
from gradleak.tensors import read_tensors
from test_cli import call

#: Two attacks that run and one that the model does not suit; no defence, one, and two that the protocol does not allow.
TABLE: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "data": {"source": "sample", "batch": 2, "size": 16},
    "model": {"name": "lenet", "width": 2, "num_classes": 8},
    "attack": {"rounds": 2, "channels": 4},
    "evaluate": {"lpips": "off", "candidates": 4},
    "matrix": {
        "attacks": ["analytic", "cinet", {"name": "inverting-gradients", "rounds": 3}],
        "defences": [
            [],
            {"name": "gaussian", "sigma": 0.5},
            [{"name": "clip", "norm": 1.0}, {"name": "soteria", "fraction": 0.5}],
        ],
    },
}
HOSTILE = "<img src=x onerror=alert(1)>"
RUN_FILES = {"spec.toml", "result.json", "reconstruction.safetensors", "report.html", "grid.png", "log.jsonl"}


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def spec(*overrides: str) -> RunSpec:
    return override(json.loads(json.dumps(TABLE)), list(overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command line, from a file."""
    home = tmp_path_factory.mktemp("matrix")
    (home / "m.toml").write_text(dump(spec()))
    assert call("audit", home / "m.toml", "--out", home / "out", "--quiet") == 0
    return home / "out"


def rows(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    table = json.loads((folder / "matrix.json").read_text())
    return {(row["attack"], row["defence"]): row for row in table["rows"]}


ATTACKS = ["analytic", "cinet", "inverting-gradients (rounds 3)"]
DEFENCES = ["none", "gaussian (sigma 0.5)", "clip (norm 1.0) + soteria (fraction 0.5)"]


def test_a_run_folder_for_each_pair_and_an_error_where_there_is_none(folder: Path) -> None:
    """Files and folders are the owner's alone; a cell that fails does not keep the others from running."""
    table = json.loads((folder / "matrix.json").read_text())
    assert (table["attacks"], table["defences"]) == (ATTACKS, DEFENCES)
    found = rows(folder)
    assert list(found) == [(attack, defence) for attack in ATTACKS for defence in DEFENCES]
    for (attack, _), row in found.items():
        if attack == "analytic":
            assert "first layer" in row["error"]
            assert row["ssim_mean"] is None
            assert not (folder / row["folder"]).exists()
        else:
            assert row["error"] is None
            assert {file.name for file in (folder / row["folder"]).iterdir()} == RUN_FILES
    finished = [row["folder"] for row in found.values() if row["error"] is None]
    assert len(set(finished)) == 6
    assert {path.name for path in folder.iterdir()} == {"matrix.json", "report.html", "spec.toml", *finished}
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir()) if path.is_dir()} == {0o700}


def test_a_row_is_what_its_run_says(folder: Path) -> None:
    for row in rows(folder).values():
        if row["error"] is None:
            result = json.loads((folder / row["folder"] / "result.json").read_text())
            assert (row["ssim_mean"], row["ssim_worst"]) == tuple(result["metrics"]["ssim"][key] for key in ("mean", "worst"))
            assert row["psnr_mean"] == result["metrics"]["psnr"]["mean"]
            assert row["recognisable"] == sum(score >= 0.6 for score in result["per_image"]["ssim"])
            assert (row["identification"], row["candidates"]) == (result["identification"]["rate"]["mse"], 4)
            assert (row["rounds"], row["seconds"]) == (result["cost"]["rounds"], result["cost"]["seconds"])
            assert row["distortion"] == (result["defence_costs"][-1]["total"] if row["defence"] != "none" else 0)
    table = rows(folder)
    assert table["cinet", "none"]["rounds"] == 2
    assert table["inverting-gradients (rounds 3)", "none"]["rounds"] == 3
    assert table["cinet", "gaussian (sigma 0.5)"]["distortion"] == pytest.approx(0.5, rel=0.1)


def test_a_cell_is_that_run_alone(folder: Path, tmp_path: Path) -> None:
    """Its spec.toml, run by itself, gives the same images: attackers share the client and nothing else."""
    cell = folder / rows(folder)["cinet", "gaussian (sigma 0.5)"]["folder"]
    assert call("audit", cell / "spec.toml", "--out", tmp_path / "alone", "--quiet") == 0
    one, other = (read_tensors(path / "reconstruction.safetensors")[0] for path in (cell, tmp_path / "alone"))
    assert torch.equal(one["images"], other["images"])
    assert (cell / "spec.toml").read_text() == (tmp_path / "alone" / "spec.toml").read_text()


def test_the_terminal_shows_the_table(folder: Path) -> None:
    text = matrix.lines(json.loads((folder / "matrix.json").read_text()))
    assert text[0].startswith("6 of 9 runs finished. The closest reconstructions are those of")
    assert len(text) == 2 + 9
    assert sum("error: " in line for line in text) == 3
    assert all(len(line) < 150 for line in text[1:] if "error: " not in line)


def test_the_page_is_complete_and_loads_nothing(folder: Path) -> None:
    """Pictures inside, links to the reports that are there, a curve for each attack and defence that was run."""
    html = (folder / "report.html").read_text()
    assert html.count("<script") == 1
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)(?![\w.-]+/report\.html["'])""", html)
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html)
    links = re.findall(r'href="([\w.-]+/report\.html)"', html)
    assert len(links) == 6
    assert all((folder / link).is_file() for link in links)
    assert html.count('src="data:image/png') == 2 * (1 + 6)
    assert all(name in unescape(html) for name in (*ATTACKS, *DEFENCES))
    assert html.count("first layer") == 2 * 3
    assert 'aria-label="Mean SSIM over relative distortion of the update"' in html


def test_foreign_text_shows_literally(folder: Path) -> None:
    table = json.loads((folder / "matrix.json").read_text().replace("cinet", HOSTILE.replace('"', "")))
    html = render_matrix(MatrixData(matrix=table, originals=data.load(spec().data).images, thumbnails={}))
    assert HOSTILE not in html
    assert HOSTILE in unescape(html)
    assert "data:image/png" not in html  # no cell has pictures, so the originals are not shown either


def test_resume_repeats_what_is_not_finished_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    """A finished cell keeps its very file; the new table is the old one but for times; another attack may join."""
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    before = rows(out)
    gone = before["cinet", "gaussian (sigma 0.5)"]["folder"]
    shutil.rmtree(out / gone)
    (out / "matrix.json").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    matrix.audit_matrix(spec(), out, resume=True, progress=False)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (out / gone / "result.json").is_file()
    timeless = [{pair: {**row, "seconds": 0} for pair, row in table.items()} for table in (before, rows(out))]
    assert timeless[0] == timeless[1]
    more = [*TABLE["matrix"]["attacks"], {"name": "cinet", "rounds": 1}]
    grown = matrix.audit_matrix(
        parse({**TABLE, "matrix": {**TABLE["matrix"], "attacks": more}}), out, resume=True, progress=False
    )
    assert len(grown["rows"]) == 12
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_resume_refuses_what_is_not_its_own(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    with pytest.raises(SpecError, match=r"cinet--undefended.*seed was 0 and is 1"):
        matrix.audit_matrix(spec("seed=1"), out, resume=True, progress=False)
    damaged = out / "cinet--undefended" / "result.json"
    damaged.write_text("{}")
    with pytest.raises(OutputError, match=r"result.json.*damaged"):
        matrix.audit_matrix(spec(), out, resume=True, progress=False)
    with pytest.raises(OutputError, match="single run"):
        matrix.audit_matrix(spec(), folder / "cinet--undefended", resume=True, progress=False)
    with pytest.raises(OutputError, match="not empty"):
        matrix.audit_matrix(spec(), folder, progress=False)


def test_force_overwrites_a_matrix_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    (out / "notes.txt").write_text("mine")
    one = spec('matrix.attacks=["cinet"]', "matrix.defences=[[]]")
    found = matrix.audit_matrix(one, out, force=True, progress=False)
    assert len(found["rows"]) == 1
    assert (out / "notes.txt").read_text() == "mine"
    assert load(out / "spec.toml") == one


def test_where_no_cell_runs_the_reason_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = spec('attack={name="analytic"}', 'matrix.attacks=["analytic"]', "matrix.defences=[[]]")
    (tmp_path / "m.toml").write_text(dump(alone))
    assert call("audit", tmp_path / "m.toml", "--out", tmp_path / "out", "--quiet") == 2
    assert "first layer" in capsys.readouterr().err
    assert "first layer" in rows(tmp_path / "out")["analytic", "none"]["error"]


def test_a_defence_that_does_not_go_with_the_protocol_fails_its_cells_alone(tmp_path: Path) -> None:
    """One attack or one defence for all is enough to make a matrix."""
    table = {
        **TABLE,
        "attack": {"name": "cinet", "rounds": 1, "channels": 4},
        "client": {"protocol": "fedavg", "learning_rate": 0.1},
    }
    table["matrix"] = {"defences": ["sign", [{"name": "dp-sgd", "clip": 1.0, "noise": 0.0}]]}
    found = matrix.audit_matrix(parse(table), tmp_path / "out", progress=False)
    assert [row["error"] is None for row in found["rows"]] == [True, False]
    assert "dp-sgd" in found["rows"][1]["error"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (['matrix.attacks=["cinett"]'], ["matrix.attacks", "did you mean 'cinet'?"]),
        (['matrix.attacks=[{name="dlg", round=3}]'], ["matrix.attacks", "did you mean 'rounds'?"]),
        (["matrix.attacks=[{rounds=3}]"], ["matrix.attacks", "a name"]),
        (["matrix.attacks=[]"], ["matrix.attacks", "at least 1"]),
        (['matrix.attacks=["cinet", "cinet"]'], ["matrix.attacks", "'cinet'", "twice"]),
        (["matrix.defences=[[], []]"], ["matrix.defences", "twice"]),
        (['matrix.defences=[[{name="gausian", sigma=1}]]'], ["matrix.defences.0", "did you mean 'gaussian'?"]),
        (['matrix.defences=[[], [{name="clip", nrm=1}]]'], ["matrix.defences.1", "did you mean 'norm'?"]),
        (['defence=[{name="sign"}]'], ["matrix.defences", "[[defence]]"]),
        (["attack.channel=4"], ["attack.channel", "did you mean 'channels'?"]),
        (['matrix.attack=["cinet"]'], ["matrix.attack", "did you mean 'attacks'?"]),
    ],
)
def test_a_wrong_matrix_is_named_before_anything_runs(changed: list[str], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SpecError) as fault:
        matrix.audit_matrix(spec(*changed), tmp_path / "out", progress=False)
    assert all(word in str(fault.value) for word in words), fault.value
    assert not (tmp_path / "out").exists()


def test_shared_settings_reach_the_attacks_that_have_them() -> None:
    """[attack] is the default of all; an entry's own settings win; what no attack has is an error (above)."""
    table = {(cell.attack, cell.defence): cell.spec for cell in matrix.cells(spec())}
    assert table["cinet", "none"].attack == {"name": "cinet", "rounds": 2, "channels": 4}
    assert table["inverting-gradients (rounds 3)", "none"].attack == {"name": "inverting-gradients", "rounds": 3}
    assert all(not alone.matrix.given for alone in table.values())
    assert [len(alone.defence) for alone in table.values()] == [0] * 3 + [1] * 3 + [2] * 3


@given(paths=st.lists(st.text(min_size=1, max_size=90), min_size=1, max_size=5, unique=True))
@settings(max_examples=60, deadline=None)
def test_folders_are_plain_names_and_differ(paths: list[str]) -> None:
    """Whatever text a setting holds, a path for example: nothing leads out of the matrix's folder."""
    attacks = [{"name": "gias", "generator": path} for path in ["../../etc/x", "..", *paths]]
    attacks = [entry for i, entry in enumerate(attacks) if entry not in attacks[:i]]
    found = [cell.folder for cell in matrix.cells(parse({"matrix": {"attacks": attacks, "defences": [[], "sign"]}}))]
    assert len(set(found)) == len(found) == 2 * len(attacks)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,140}", name) for name in found)


@pytest.mark.parametrize("command", ["capture", "check"])
def test_only_audit_takes_a_matrix(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.toml").write_text(dump(spec()))
    out = ["--out", tmp_path / "u.safetensors"] if command == "capture" else []
    assert call(command, tmp_path / "m.toml", *out) == 2
    assert "matrix" in capsys.readouterr().err


def test_a_specification_without_a_matrix_has_none_in_its_file() -> None:
    assert "matrix" not in dump(load())
    assert load().matrix.given is False


def test_curves_show_every_point_in_the_pages_colours() -> None:
    """Markers tell curves apart beside colours; from 0 to far apart positions; the same text for the same numbers."""
    lines = [Line([(0.0, 0.9), (0.01, 0.5), (10.0, -0.1)], "var(--a)"), Line([(0.0, 0.4)], "var(--b)", 1)]
    svg = lines_svg(lines, label="Leak", right="cost")
    assert svg == lines_svg(lines, label="Leak", right="cost")
    assert "var(--a)" in svg
    assert "var(--b)" in svg
    assert not re.search(r"#05\d{4}", svg)
    assert 'aria-label="Leak over cost"' in svg
    assert lines_svg([], label="Leak", right="cost") == ""
    assert len(set(MARKERS)) == len(MARKERS)


def test_a_purged_matrix_keeps_its_rows_and_shows_no_picture(folder: Path, tmp_path: Path) -> None:
    """Its page is written anew, its cells lose their reconstructions, matrix.json stays byte by byte."""
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    assert "data:image/png" in (out / "report.html").read_text()
    rows_before = (out / "matrix.json").read_bytes()
    purge(out)
    assert (out / "matrix.json").read_bytes() == rows_before
    assert not list(out.rglob("*.safetensors")) + list(out.rglob("grid.png"))
    for page in out.rglob("report.html"):
        assert "data:image/png" not in page.read_text()
    assert "cinet" in (out / "report.html").read_text()
    (out / "matrix.json").write_text('{"rows": 3}')
    purge(out)
    assert not (out / "report.html").exists()


def test_a_redacted_matrix_has_no_picture(tmp_path: Path) -> None:
    one = spec('matrix.attacks=["cinet"]', "matrix.defences=[[]]")
    found = matrix.audit_matrix(one, tmp_path / "out", redact=True, progress=False)
    assert found["rows"][0]["ssim_mean"] is not None
    assert not list((tmp_path / "out").rglob("*.safetensors")) + list((tmp_path / "out").rglob("*.png"))
    assert "data:image/png" not in (tmp_path / "out" / "report.html").read_text()


def test_an_unfinished_matrix_is_reported_as_far_as_it_got(folder: Path) -> None:
    table = json.loads((folder / "matrix.json").read_text())
    some = {**table, "rows": table["rows"][:4]}
    html = render_matrix(MatrixData(matrix=some, originals=None, thumbnails={}))
    assert html.count("not run yet") == 5
    assert "of 9 runs finished" in html


def test_errors_are_of_the_kind_that_people_can_mend(tmp_path: Path) -> None:
    with pytest.raises(GradleakError, match="no such file"):
        matrix.audit_matrix(spec("data.source=npz:absent.npz"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
