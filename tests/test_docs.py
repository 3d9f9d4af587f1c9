"""The documentation is true: its code runs, its commands and settings exist, its site builds without a broken link."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pages
from gradleak import cli, spec
from gradleak.attacks import attack
from gradleak.defences import parse
from gradleak.study.spec import load_study

COMMANDS = cli.commands()
WITH_CODE = [page for page in pages.PAGES if any(b.language == "python" and not b.title for b in pages.blocks(page))]
WITH_COMMANDS = [
    page for page in pages.PAGES if any(list(pages.commands(b)) for b in pages.blocks(page) if b.language == "console")
]
EXECUTED = sorted({*WITH_CODE, *(page for page in pages.PAGES if any(b.mark == "executed" for b in pages.blocks(page)))})

#: What makes a browser ask another host.
FETCHED = r"""(?:src|srcset)=["']?(?:https?:)?//|<link[^>]*rel=["']?(?:stylesheet|preconnect)[^>]*//"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """All pages in one process, so that torch is loaded once; each in a temporary folder of its own."""
    done = subprocess.run(
        [sys.executable, pages.__file__, *EXECUTED],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GRADLEAK_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("page", EXECUTED)
def test_the_code_of_a_page_runs(page: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[page] is None, outcomes[page]


def check_command(arguments: list[str]) -> None:
    """The command, its options and its settings exist, and a value has the right type."""
    inner = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:inner]), arguments[inner:]
    if name.startswith("--") or name == "COMMAND":
        return
    given: dict[str, Any] = {} if "--help" in rest else COMMANDS[name].make_context(name, list(rest)).params
    overrides = [*(given.get("set_") or ()), *([f"attack.name={given['attack']}"] if given.get("attack") else [])]
    overrides = [text for text in overrides if "$" not in text and "PRESET" not in text]
    known = spec.load(None, overrides)
    parse(known.defence)
    if not known.matrix.given:
        attack(str(known.attack["name"]), **{key: value for key, value in known.attack.items() if key != "name"})


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_of_a_page_exist(page: str) -> None:
    """Every ``$ gradleak ...``, down to the keys after ``--set``."""
    for block in pages.blocks(page):
        if block.language == "console":
            for arguments in pages.commands(block):
                try:
                    check_command(arguments)
                except Exception as fault:
                    pytest.fail(f"{page}, block at line {block.line}: gradleak {' '.join(arguments)}: {fault!r}")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_examples_of_the_help_exist(name: str) -> None:
    for arguments in pages.commands(pages.Block("console", "", "", COMMANDS[name].epilog, 0)):
        check_command(arguments)


@pytest.mark.parametrize("page", [page for page in pages.PAGES if any(b.language == "toml" for b in pages.blocks(page))])
def test_the_specifications_of_a_page_are_valid(page: str, tmp_path: Path) -> None:
    for block in pages.blocks(page):
        if block.language == "toml":
            table = spec.read_table(block.text)
            if {"grid", "base"} & table.keys():
                (path := tmp_path / "study.toml").write_text(block.text)
                load_study(path)
                continue
            written = spec.parse(table, where=f"{page}, line {block.line}")
            attack(str(written.attack["name"]), **{key: v for key, v in written.attack.items() if key != "name"})
            parse(written.defence)


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    """Strict: no page without a place, no link without a target, no anchor that is not there; and nothing from elsewhere."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=pages.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    method = (tmp_path / "site" / "method.html").read_text(encoding="utf-8")
    assert "<math" in method
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        # what a browser would fetch; a link is followed by a person
        assert not re.search(FETCHED, text), page
        assert not re.search(r"<m[a-z]+[^>]*>[^<]*\\[^<]*<", text), f"{page}: a command that latex2mathml does not know"
        assert page.parent.name != "reference" or not re.search(r":(?:math|class|func|mod):`", text), page
