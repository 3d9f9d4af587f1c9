"""The code in README.md and docs/: found, and run as a reader would, page by page.

Conventions, each a comment on the line before a block:

- ``python`` is executed unless ``<!-- not executed: why -->``. Blocks of a page share their variables. A block with a
  ``title="file"`` is that file, and so is one of ``toml``.
- ``console`` is parsed: each ``$ gradleak ...`` must name a command, options and settings that exist.
  ``<!-- executed -->`` runs it.
- ``<!-- needs: package -->`` leaves the rest of the page out where the package is not installed.

``python tests/pages.py PAGE ...`` runs pages in temporary folders, with attacks cut to :data:`ROUNDS` rounds, and prints a JSON
object: page -> what failed, or null.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, what the comment before it says, its file name if it is a file, its first line's number."""

    language: str
    mark: str
    title: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page of the repository."""
    found, mark, start = [], "", None
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        fence = re.match(r"\s*```(.*)", line)
        if fence and start is None:
            start, info = number, fence[1].strip()
        elif fence and start is not None:
            title = re.search(r'title="([^"]*)"', info)
            text = "\n".join(lines[start : number - 1]) + "\n"
            found.append(Block(info.partition(" ")[0], mark, title[1] if title else "", text, start + 1))
            mark, start = "", None
        elif start is None and line.strip():
            comment = re.fullmatch(r"<!-- (.*) -->", line.strip())
            mark = comment[1] if comment else ""
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The arguments of each ``$ gradleak`` in a console block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.strip().startswith("$ gradleak"):
            yield shlex.split(line.strip()[2:], comments=True)[1:]


def run(page: str) -> str | None:
    """Run a page in the working folder; what failed, or None."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        missing = block.mark.startswith("needs: ") and find_spec(block.mark.removeprefix("needs: ")) is None
        if missing:
            return None
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                if block.title:
                    Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                    Path(block.title).write_text(block.text, encoding="utf-8")
                if block.language == "python" and not block.mark.startswith("not executed"):
                    code = compile("\n" * (block.line - 1) + block.text, page, "exec")
                    if not block.title:
                        exec(code, namespace)
                elif block.language == "console" and block.mark == "executed":
                    for arguments in commands(block):
                        _command(arguments)
        except BaseException:  # a page's failure must not keep the others from running
            return f"{page}, block at line {block.line}: {traceback.format_exc(limit=-3)}\n{output.getvalue()[-2000:]}"
    return None


def _command(arguments: list[str]) -> None:
    from gradleak import cli

    sys.argv = ["gradleak", *arguments]
    try:
        cli.main()
    except SystemExit as leave:
        if leave.code:
            raise RuntimeError(f"gradleak {shlex.join(arguments)}: exit code {leave.code}") from None


def few_rounds() -> None:
    """Cut every attack of this process: what is tested is that the code runs, not what it rebuilds."""
    import gradleak.api

    whole = gradleak.api.invert

    def cut(observation: Any, recipe: Any, **options: Any) -> Any:
        return whole(observation, dataclasses.replace(recipe, rounds=min(recipe.rounds, ROUNDS)), **options)

    gradleak.__dict__["invert"] = cut
    for name, module in list(sys.modules.items()):
        if name.startswith("gradleak.") and vars(module).get("invert") is whole:
            vars(module)["invert"] = cut


def main() -> None:
    import torch

    torch.set_num_threads(1)  # threads that wait for each other cost more than these small tensors
    few_rounds()
    found: dict[str, str | None] = {}
    for page in sys.argv[1:]:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder) if sys.version_info >= (3, 11) else _chdir(folder),
        ):
            sys.path.insert(0, folder)
            found[page] = run(page)
            sys.path.remove(folder)
            for name, module in list(sys.modules.items()):
                if str(getattr(module, "__file__", None) or "").startswith(folder):
                    del sys.modules[name]
    print(json.dumps(found))


@contextlib.contextmanager
def _chdir(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    main()
