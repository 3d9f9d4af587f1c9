"""The reports in a real Chromium: pictures, sorting, slider, large view, colours, paper, and nothing that should not happen."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from PIL import Image

from gradleak.layers import Layer
from gradleak.report import MatrixData, ReportData, render, render_matrix
from gradleak.run import audit
from gradleak.spec import parse
from test_report import HOSTILE, photographs, report_data, shown_order, without_truth

api = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "google-chrome", "chromium-browser")) if p), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, google-chrome or chromium-browser on the path")

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

#: Text that would do harm, or be lost, wherever a page took it for markup.
HARMFUL = HOSTILE + "\"'&</script>{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


class Visit:
    """A page that was opened, and all that happened on it which should not.

    Attributes:
        page: Playwright's page.
        faults: Errors of scripts, lines of the console, dialogs, and requests of anything but local files and data.
    """

    def __init__(self, page: Any, path: Path) -> None:
        self.page, self.faults = page, list[str]()
        page.on("console", lambda line: self.faults.append(f"console: {line.text}"))
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", self._request)
        page.on("requestfailed", lambda request: self.faults.append(f"blocked: {request.failure} {request.url}"))
        page.goto(path.as_uri())

    def _request(self, request: Any) -> None:
        if urlparse(request.url).scheme not in ("file", "data"):
            self.faults.append(f"request: {request.url}")

    def unloaded(self) -> list[str]:
        """Alternative texts of pictures that did not load, folded ones included."""
        script = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.alt)"
        return list(self.page.evaluate(script))

    def luminance(self, selector: str) -> float:
        """0 is black, 1 is white: of the background of an element, or of what is behind it."""
        return float(
            self.page.evaluate(
                """selector => {
                  let at = document.querySelector(selector);
                  const colour = () => getComputedStyle(at).backgroundColor.match(/[\\d.]+/g).map(Number);
                  while (colour()[3] === 0 && at.parentElement) at = at.parentElement;
                  const [r, g, b, a] = colour();
                  return a === 0 ? 1 : (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
                }""",
                selector,
            )
        )


def layers() -> list[dict[str, Any]]:
    names = [f"stage{i}.{j}.conv.weight" for i in range(5) for j in range(5)] + [f"{HARMFUL}.weight"]
    shares = np.linspace(2, 1, len(names)) / 39
    return [
        vars(Layer(name, name.rpartition(".")[0], 100 * i, 0.1, float(shares[i]), 1.0, None)) for i, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def data() -> ReportData:
    """Forty-two pairs, a name that is markup, layers, defences: what a report can have."""
    data = report_data(42)
    assert data.truth is not None
    more = {
        "layers": layers(),
        "defence_costs": [{"name": "gaussian", "distortion": 0.1, "total": 0.1, "epsilon": None, "delta": None}],
        "identification": {"candidates": 64, "chance": 1 / 64, "rate": {"mse": 0.5}, "ranks": {"mse": list(range(1, 43))}},
        "threads": 2,
    }
    data.result.update(more)
    return replace(data, truth=replace(data.truth, names=(HARMFUL, *data.truth.names[1:])))


@pytest.fixture(scope="module")
def report(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(data), encoding="utf-8")
    return path


def test_the_report_of_a_real_run(browser: Any, tmp_path: Path) -> None:
    """With what a run can write into it: a defence, a control, layers, intermediate pictures."""
    spec = parse(
        {
            "device": "cpu",
            "threads": 1,
            "data": {"source": "sample", "batch": 3, "size": 16},
            "model": {"name": "lenet", "width": 2, "num_classes": 8},
            "defence": [{"name": "gaussian", "sigma": 0.1}],
            "attack": {"name": "cinet", "rounds": 3, "channels": 4},
            "evaluate": {"lpips": "off", "candidates": 6, "controls": True},
        }
    )
    audit(spec, tmp_path / "run", progress=False, command="gradleak audit spec.toml --out run")
    page = browser.new_page()
    visit = Visit(page, tmp_path / "run" / "report.html")
    assert visit.unloaded() == []
    assert page.locator(".card").count() == 3
    links = page.locator("nav a")
    names = ["Pictures", "Every image", "Rounds", "Layers", "Defences", "Assumptions", "Controls", "What to change"]
    assert links.all_inner_texts() == [*names, "How to repeat"]
    for i in range(links.count()):
        assert page.locator(str(links.nth(i).get_attribute("href"))).is_visible()
    assert "recognisable to a stranger under these assumptions (SSIM ≥ 0.60)" in page.locator(".verdict").inner_text()
    assert "labels granted" in page.locator(".given").inner_text()
    assert page.locator("pre#command").inner_text().startswith("gradleak audit spec.toml --out run\n# seed 0")
    assert visit.faults == []
    page.close()


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two attacks against four defences: pictures, an error, and two costs to draw."""
    attacks, kinds = ["cinet", HARMFUL], ["none", "dp-sgd", "dp-sgd", "prune"]
    rows = []
    for i, attack in enumerate(attacks):
        for j, kind in enumerate(kinds):
            defence = kind if kind == "none" else f"{kind} {j} {HARMFUL}"
            failed = i == 1 and j == 3
            ssim = None if failed else 0.9 - 0.2 * j - 0.1 * i
            rows.append(
                {
                    "attack": attack,
                    "defence": defence,
                    "kind": kind,
                    "folder": f"cell-{i}-{j}",
                    "distortion": None if failed else 0.1 * j,
                    "epsilon": 10.0 / j if kind == "dp-sgd" else None,
                    "ssim_mean": ssim,
                    "ssim_worst": ssim,
                    "psnr_mean": None if failed else 20.0 - j,
                    "recognisable": None if failed else 2,
                    "images": 4,
                    "identification": None if failed else 0.5,
                    "candidates": 8,
                    "rounds": None if failed else 100,
                    "seconds": None if failed else 3.0,
                    "error": HARMFUL if failed else None,
                }
            )
    table = {
        "attacks": attacks,
        "defences": list(dict.fromkeys(row["defence"] for row in rows)),
        "images": 4,
        "image_shape": [3, 16, 16],
        "rows": rows,
        "command": f"gradleak audit {HARMFUL}",
        "date": "today",
        "device": "cpu",
        "threads": 1,
        "seed": 0,
        "versions": {"torch": "2"},
    }
    images = photographs(4, 16, 16)
    thumbnails = {row["folder"]: images for row in rows if row["error"] is None}
    path = tmp_path_factory.mktemp("matrix") / "report.html"
    path.write_text(render_matrix(MatrixData(table, images, thumbnails)), encoding="utf-8")
    return path


@pytest.fixture
def visit(browser: Any, report: Path) -> Iterator[Visit]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    visit = Visit(page, report)
    yield visit
    assert visit.faults == []
    page.close()


def test_pictures_load_and_foreign_text_is_text(visit: Visit, data: ReportData) -> None:
    assert visit.unloaded() == []
    assert visit.page.locator("img").count() == 2 * 42 + 4 * 9
    assert visit.page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    assert visit.page.locator(".card .name", has_text=HARMFUL).count() == 1
    assert visit.page.locator(".bars code", has_text=HOSTILE).count() == 1
    assert visit.page.locator(".tensors code", has_text=HOSTILE).count() == 1
    assert visit.page.locator("[onerror]").count() == 0
    assert visit.page.locator("script").count() == 1
    crisp = "getComputedStyle(document.querySelector('.card img')).imageRendering"
    assert visit.page.evaluate(crisp) == "pixelated"


def column(visit: Visit, number: int) -> list[str]:
    return list(
        visit.page.evaluate(
            "n => [...document.querySelectorAll('#table ~ .scroll tbody tr')].map(row => row.cells[n].dataset.value)", number
        )
    )


def test_a_table_is_sorted_by_mouse_and_by_keyboard(visit: Visit, data: ReportData) -> None:
    heads = visit.page.locator("#table ~ .scroll thead th")
    assert heads.nth(1).get_attribute("aria-sort") == "descending"
    psnr = sorted(data.result["per_image"]["psnr"], reverse=True)
    heads.nth(2).locator("button").click()
    assert (heads.nth(2).get_attribute("aria-sort"), heads.nth(1).get_attribute("aria-sort")) == ("descending", None)
    assert [float(v) for v in column(visit, 2)] == psnr
    visit.page.keyboard.press("Enter")  # the heading still has the focus
    assert heads.nth(2).get_attribute("aria-sort") == "ascending"
    assert [float(v) for v in column(visit, 2)] == psnr[::-1]
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Space")
    assert heads.nth(3).get_attribute("aria-sort") == "descending"
    heads.nth(0).locator("button").click()
    assert heads.nth(0).get_attribute("aria-sort") == "ascending"
    assert data.truth is not None
    assert set(column(visit, 0)) == set(data.truth.names)
    heads.nth(5).locator("button").click()
    assert [int(v) for v in column(visit, 5)] == list(range(1, 43))


def test_the_tensors_of_the_update_unfold_and_sort(visit: Visit) -> None:
    visit.page.locator("#layers ~ details summary").click()
    table = visit.page.locator("table.tensors")
    assert table.is_visible()
    table.locator("thead button").nth(1).click()
    assert table.locator("tbody tr").first.locator("td").first.inner_text() == "2,500"
    assert visit.page.locator(".bars tbody tr").count() == 6  # five stages and the one that is named like markup


def cut(visit: Visit, card: int = 0) -> float:
    pair = visit.page.locator(".card.pair").nth(card)
    clip = pair.locator("img").nth(1).evaluate("image => getComputedStyle(image).clipPath")
    assert clip.startswith("inset(0px 0px 0px ")
    return float(clip.split()[-1].rstrip("%)"))


def test_the_slider_moves_by_keyboard_and_by_dragging(visit: Visit) -> None:
    page = visit.page
    assert not page.locator(".card input[type=range]").first.is_visible()
    assert page.locator("input[value=side]").is_checked()
    page.locator("input[value=side]").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("input[value=slider]").is_checked()
    slider = page.locator(".card input[type=range]").first
    assert slider.is_visible()
    assert cut(visit) == 50
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert cut(visit) == 60
    assert slider.get_attribute("aria-valuetext") == "60 % original, 40 % reconstruction"
    page.keyboard.press("Home")
    assert cut(visit) == 0

    box = page.locator(".card .over").nth(1).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 25, steps=5)
    page.mouse.up()
    assert cut(visit, 1) == pytest.approx(25, abs=1)
    assert cut(visit) == 0
    assert not page.locator("#viewer").is_visible()  # a drag is no press
    page.locator(".card .over").nth(1).click()
    assert page.locator("#viewer").is_visible()
    assert page.locator("#stage .pair input[type=range]").is_visible()


def test_the_divider_shows_the_original_on_its_left(visit: Visit, data: ReportData) -> None:
    """The pixels themselves: left of the divider the true image, right of it the reconstruction."""
    first = shown_order(render(data))[1]
    assert data.truth is not None
    pair = (data.truth.images[first], data.images[data.result["assignment"][first]])  # type: ignore[index]
    visit.page.check("input[value=slider]")
    shot = visit.page.locator(".card .over").nth(1).screenshot()
    with Image.open(io.BytesIO(shot)) as shown:
        seen = torch.from_numpy(np.asarray(shown.convert("RGB").resize((32, 32), Image.Resampling.BOX)).copy())
    left, right = (seen.permute(2, 0, 1).float() / 255)[:, 2:-2].split([16, 16], dim=2)
    original, rebuilt = (image.clamp(0, 1)[:, 2:-2] for image in pair)
    assert (left[..., :14] - original[..., :14]).abs().mean() < 0.03
    assert (right[..., 2:-2] - rebuilt[..., 18:-2]).abs().mean() < 0.03
    assert (right[..., 2:-2] - original[..., 18:-2]).abs().mean() > 0.03 or torch.allclose(original, rebuilt, atol=0.1)


def test_the_large_view_opens_turns_and_closes_by_keyboard(visit: Visit, data: ReportData) -> None:
    page, names = visit.page, []
    page.locator("button.zoom").first.focus()
    page.keyboard.press("Enter")
    viewer, caption = page.locator("#viewer"), page.locator("#viewer-caption")
    assert viewer.is_visible()
    assert page.locator("#stage img").count() == 2
    assert visit.unloaded() == []
    box = page.locator("#stage img").first.bounding_box()
    assert box["width"] > 300
    for key in ("ArrowRight", "ArrowLeft", "ArrowLeft"):
        names.append(caption.inner_text().split(" · ")[0])
        page.keyboard.press(key)
    names.append(caption.inner_text().split(" · ")[0])
    assert data.truth is not None
    order = [f"{data.truth.names[i]} #{i}" for i in shown_order(render(data))]
    assert names == [order[0], order[1], order[0], order[-1]]
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    assert page.evaluate("document.activeElement.classList.contains('zoom')")  # the focus is back where it was

    page.locator("button.zoom").first.click()
    page.locator("#wipe").click()
    slider = page.locator("#stage input[type=range]")
    slider.focus()
    before = caption.inner_text()
    page.keyboard.press("ArrowRight")
    assert slider.input_value() == "51"  # an arrow on the slider moves the slider, not the pair
    assert caption.inner_text() == before
    page.locator("#close").click()
    assert not viewer.is_visible()


def test_every_control_is_reached_by_keyboard_and_has_a_name(visit: Visit) -> None:
    """In the order of the page, with a visible focus."""
    page, seen = visit.page, []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                """() => { const e = document.activeElement, r = e.getBoundingClientRect();
                return [e.tagName, e.ariaLabel || e.textContent.trim() || e.labels?.[0]?.textContent.trim()
                  || e.querySelector?.('img')?.alt || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent
                  || '', r.top + scrollY, getComputedStyle(e).outlineStyle]; }"""
            )
        )
    assert all(name for _, name, _, _ in seen)
    assert all(outline != "none" for *_, outline in seen)
    assert {"A", "INPUT", "BUTTON"} <= {tag for tag, *_ in seen}
    tops = [top for _, _, top, _ in seen]
    assert all(later >= earlier - 400 for earlier, later in pairwise(tops))


def test_the_command_is_copied_whole(visit: Visit, data: ReportData) -> None:
    visit.page.locator("button.copy").click()
    visit.page.wait_for_function("document.querySelector('button.copy').textContent !== 'Copy'")
    copied = visit.page.evaluate("getSelection().toString()").strip().split("\n")
    assert copied[0] == data.result["command"]
    assert copied[1] == "# seed 0, device cpu, threads 2"
    assert "torch 2.9.0" in copied[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(visit: Visit, scheme: str) -> None:
    """Page and cards are dark in the dark and light in the light, and text stands out of them by at least 4.5 : 1."""
    visit.page.emulate_media(color_scheme=scheme)
    for selector in ("body", ".card", ".tiles div", ".facts", ".curve", "pre"):
        luminance = visit.luminance(selector)
        assert luminance < 0.15 if scheme == "dark" else luminance > 0.85, selector
    ratios = visit.page.evaluate(
        """() => {
          const parse = (text) => text.match(/[\\d.]+/g).map(Number);
          const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
          const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
          const behind = (e) => { const c = parse(getComputedStyle(e).backgroundColor);
            return c[3] === 0 && e.parentElement ? behind(e.parentElement) : c; };
          const texts = [...document.body.querySelectorAll("*")].filter((e) => e.checkVisibility() &&
            [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
          return texts.map((e) => {
            const style = getComputedStyle(e);
            const [a, b] = [light(parse(e.closest("svg") ? style.fill : style.color)), light(behind(e))];
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + "." + e.className + ": " + e.textContent];
          });
        }"""
    )
    assert len(ratios) > 200
    assert [text for ratio, text in ratios if ratio < 4.5] == []


def test_on_paper_everything_is_open_and_light(visit: Visit) -> None:
    """Also when the screen was dark and showed sliders: pairs side by side, no control, folded parts unfolded."""
    page = visit.page
    page.check("input[value=slider]")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert visit.luminance("body") > 0.95
    assert visit.luminance(".card") > 0.95
    assert page.locator(".card:visible").count() == 42
    assert page.locator("table.tensors").is_visible()
    for control in ("nav", ".view", ".card input", "button.copy"):
        assert not page.locator(control).first.is_visible(), control
    left, right = (page.locator(".card img").nth(i).bounding_box() for i in (0, 1))
    assert right["x"] >= left["x"] + left["width"]
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        assert np.asarray(shot.convert("L")).mean() > 180


def test_a_phone_needs_no_sideways_scrolling(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 390, "height": 844})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    visit.page.locator("button.zoom").first.click()
    box = visit.page.locator("#viewer").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    assert box["height"] <= 844


def test_without_scripts_the_page_is_whole(browser: Any, report: Path) -> None:
    """Pairs stand side by side, tables are there, folded parts unfold; no control is shown that would do nothing."""
    page = browser.new_page(java_script_enabled=False)
    page.goto(report.as_uri())
    assert page.locator(".card img").first.is_visible()
    assert page.locator("#table ~ .scroll tbody tr").count() == 42
    assert not page.locator(".view").is_visible()
    assert not page.locator("button.copy").is_visible()
    assert not page.get_by_text("Press a heading").first.is_visible()
    page.locator("details summary").first.click()
    assert page.locator(".card").last.is_visible()
    page.close()


@pytest.mark.parametrize("kind", ["without-truth", "redacted"])
def test_a_page_with_less_to_show_is_whole(kind: str, browser: Any, data: ReportData, tmp_path: Path) -> None:
    labels = {"rule": "known", "values": [0] * 42}
    result = {**data.result, "labels": labels, "redacted": True}
    less = (
        without_truth(data)
        if kind == "without-truth"
        else replace(data, result=result, images=None, truth=None, snapshots=None)
    )
    (tmp_path / "report.html").write_text(render(less), encoding="utf-8")
    page = browser.new_page()
    visit = Visit(page, tmp_path / "report.html")
    assert visit.unloaded() == []
    assert page.locator(".card").count() == (42 if kind == "without-truth" else 0)
    assert page.locator("img").count() == (42 + 4 * 8 if kind == "without-truth" else 0)
    assert page.locator("#layers").is_visible()
    assert not page.locator("input[value=slider]").count()
    if kind == "without-truth":
        page.locator("button.zoom").first.click()
        assert page.locator("#stage img").count() == 1
        assert not page.locator("#wipe").is_visible()
    else:
        page.locator("#table ~ .scroll thead button").first.click()
    assert visit.faults == []
    page.close()


def test_a_matrix_works_in_a_browser(browser: Any, matrix: Path) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    visit = Visit(page, matrix)
    assert visit.unloaded() == []
    assert page.locator("svg").count() == 2  # over the distortion, and over epsilon
    assert page.locator(".error", has_text=HARMFUL).count() == 2
    page.locator("button.zoom").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.locator("#stage img").count() == 8
    originals = [page.locator("#stage figcaption").nth(i).inner_text() for i in (0, 7)]
    assert originals == ["original", "reconstruction"]
    page.keyboard.press("ArrowRight")
    assert "dp-sgd 2" in page.locator("#viewer-caption").inner_text()
    page.keyboard.press("Escape")
    heads = page.locator("table.rows thead button")
    ssim = "[...document.querySelectorAll('table.rows tbody tr')].map(row => row.cells[4]?.dataset.value ?? '')"
    heads.nth(4).click()
    values = page.evaluate(ssim)
    assert values[-1] == ""  # the row with an error stays last
    assert [float(v) for v in values[:-1]] == sorted((float(v) for v in values[:-1]), reverse=True)
    page.emulate_media(color_scheme="dark")
    assert visit.luminance("body") < 0.15
    assert visit.luminance(".matrix tbody th") < 0.15
    assert page.evaluate("document.documentElement.scrollWidth") <= 1400
    assert visit.faults == []
    page.close()


def test_the_policy_stops_what_the_escaping_would_miss(browser: Any, report: Path, tmp_path: Path) -> None:
    """A script or a request that got into the page all the same is not run, and not sent."""
    text = report.read_text("utf-8")
    smuggled = "<script>document.title = 'run'</script><img src='https://example.org/x.png' onerror='document.title = 1'>"
    (tmp_path / "page.html").write_text(text.replace("<main>", f"<main>{smuggled}", 1), encoding="utf-8")
    page = browser.new_page()
    visit = Visit(page, tmp_path / "page.html")
    assert page.title() == "gradleak report: cinet"
    assert sum("Content Security Policy" in fault for fault in visit.faults) >= 2
    # Chromium announces the request before it asks the policy
    assert [fault for fault in visit.faults if fault.startswith("blocked")] == ["blocked: csp https://example.org/x.png"]
    assert page.locator("button.zoom").count() > 0
    page.close()
