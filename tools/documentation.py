r"""What MkDocs does not do by itself for docs/: formulas, pages from the root and from the program, docstrings' marks.

- ``$...$``, ``$$...$$`` become MathML, which browsers draw by themselves: no script, no font, no request.
- ``CHANGELOG.md``, ``CONTRIBUTING.md`` and ``SECURITY.md`` become pages, and links between them and docs/ hold.
- ``reference/command-line.md`` and ``reference/settings.md`` are written from the command line itself and from the fields and
  docstrings of attacks, defences and specifications.
- reStructuredText's ``:math:`` and ``:class:`` in docstrings become formulas and links.
"""

from __future__ import annotations

import json
import re
import sys
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import griffe
import latex2mathml.converter
import typer.main
from markdown import Extension, Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.inlinepatterns import InlineProcessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

#: Files of the root that are pages of the site.
FROM_THE_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}


def mathml(tex: str, *, display: bool) -> str:
    """A formula as MathML."""
    # what latex2mathml does not know
    tex = re.sub(r"\\operatorname\*?\s*\{([^}]*)\}", lambda m: rf"\mathrm{{{m[1]}}}".replace(r"\,", ""), tex)
    tex = re.sub(r"\\arg\b", r"\\mathrm{arg}\\,", tex)
    converted = latex2mathml.converter.convert(tex.strip(), display="block" if display else "inline")
    return f'<div class="formula">{converted}</div>' if display else converted


class _Inline(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # type: ignore[override]
        return self.md.htmlStash.store(mathml(m[1], display=False)), m.start(0), m.end(0)


class _Display(BlockProcessor):
    def test(self, parent: Any, block: str) -> bool:
        return block.lstrip().startswith("$$")

    def run(self, parent: Any, blocks: list[str]) -> None:
        block = blocks.pop(0)
        while block.count("$$") < 2 and blocks:
            block += "\n\n" + blocks.pop(0)
        formula, _, after = block.lstrip()[2:].partition("$$")
        paragraph = ElementTree.SubElement(parent, "p")
        paragraph.text = self.parser.md.htmlStash.store(mathml(formula, display=True))
        if after.strip():
            blocks.insert(0, after.strip())


class Formulas(Extension):
    """``$...$`` and ``$$...$$`` in Markdown."""

    def extendMarkdown(self, md: Markdown) -> None:
        # below code in backticks, above emphasis and escapes
        md.inlinePatterns.register(_Inline(r"\$(?!\s)((?:[^$\\]|\\.)+?)(?<!\s)\$(?!\d)", md), "formula", 185)
        md.parser.blockprocessors.register(_Display(md.parser), "formula", 175)


class Marks(griffe.Extension):
    """``:math:`x```, ``.. math::`` and ``:class:`name``` of docstrings in Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """A docstring's reStructuredText marks as Markdown."""

    def display(m: re.Match[str]) -> str:
        return f"\n\n{m[1]}$$ {' '.join(m[2].split())} $$\n"

    text = re.sub(r"\n*([ ]*)\.\. math::[ ]*((?:.+\n?)(?:\1[ ]{3,}\S.*\n?)*)", display, docstring)
    text = re.sub(r"[ ]*\.\. code-block:: python\n", "", text)
    # one line for each of several arguments that are described together
    text = re.sub(
        r"^([ ]{4})(\w+(?:, \w+)+): (.*(?:\n[ ]{8}.*)*)",
        lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")),
        text,
        flags=re.MULTILINE,
    )
    text = re.sub(r":math:`([^`]*)`", lambda m: f"${' '.join(m[1].split())}$", text)
    return re.sub(r":(?:class|func|meth|mod|data|attr):`~?([^`]*)`", _link, text)


def _link(m: re.Match[str]) -> str:
    name = escape(" ".join(m[1].split()))
    shown = name.rpartition(".")[2].replace("_", "&#95;")  # not emphasis
    return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """MkDocs' hook."""
    sys.path.insert(0, str(ROOT / "src"))  # the pages are those of this source tree
    config.markdown_extensions.append(Formulas())  # type: ignore[arg-type]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs' hook: pages that are no files of docs/."""
    generated = {"reference/command-line.md": command_line(), "reference/settings.md": settings()}
    for name, page in FROM_THE_ROOT.items():
        generated[page] = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for page, text in generated.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """MkDocs' hook: links to the root's files lead to their pages."""
    up = "../" * page.file.src_uri.count("/")
    for name, target in FROM_THE_ROOT.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(name)}(#[^)]*)?\)", lambda m: f"]({up}{target}{m[1] or ''})", markdown)  # noqa: B023
    return markdown


def command_line() -> str:
    """The page about the command line, from the command line."""
    from gradleak import cli

    group: Any = typer.main.get_command(cli.app)
    commands = cli.commands()
    context = group.make_context("gradleak", ["list"], resilient_parsing=True)
    lines = ["# Command line", "", f"{group.help}", "", "Written from the program itself: `gradleak --help` says the same.", ""]
    lines += ["| command | what it does |", "| --- | --- |"]
    lines += [
        f"| [`{name}`](#{name.replace(' ', '-')}) | {command.get_short_help_str(limit=300)} |"
        for name, command in commands.items()
    ]
    lines += ["", "`python -m gradleak` is `gradleak`. `gradleak --version` prints the version.", ""]
    lines += [*EXIT_CODES, *JSON_OUTPUT, *COMPLETION]
    for name, command in commands.items():
        within = command.make_context(name, [], parent=context, resilient_parsing=True)
        pieces = " ".join(command.collect_usage_pieces(within))
        lines += ["", f"## {name}", "", "```text", f"gradleak {name} {pieces}", "```", "", *_paragraphs(command.help), ""]
        lines += ["| argument or option | default | meaning |", "| --- | --- | --- |"]
        for parameter in command.params:
            shown = " ".join(p for p in (parameter.opts[-1], parameter.metavar or "") if p)
            shown = shown if parameter.param_type_name == "option" else parameter.metavar
            meaning, _, said = (parameter.help or "").partition("  [default: ")
            default = "needed" if parameter.required else f"{said.rstrip(']')}" if said else _default(parameter)
            lines.append(f"| `{_cell(shown)}` | {_cell(default)} | {_cell(meaning)} |")
        lines += ["", "```console", *(line.strip() for line in (command.epilog or "").splitlines()[2:]), "```"]
    return "\n".join(lines) + "\n"


EXIT_CODES = """
## Exit codes

| code | meaning |
| --- | --- |
| 0 | done |
| 1 | a fault of gradleak itself, with a traceback: please report it |
| 2 | bad input or wrong usage: one line on standard error says what, where, and how to mend it |
| 130 | interrupted by Ctrl-C; where an attack ran, a partial report is written, and `--resume` goes on |
| 143 | the same for SIGTERM, which a cluster's scheduler sends before it kills |
""".splitlines()

JSON_OUTPUT = """
## One JSON object: `--json`

Every command has `--json`. Standard output is then exactly one JSON object; progress and warnings go to standard error, and so
does what your own model prints.

| command | the object |
| --- | --- |
| `audit`, `invert`, `evaluate` | the content of [`result.json`](../architecture.md#resultjson), with `folder` and `report` |
| `audit` with `[matrix]` | that of [`matrix.json`](../architecture.md#matrix-folder-audit-with-matrix), likewise |
| `study run` | `folder`, how many `cells` were finished, finished before, failed and busy, and why some `failed` |
| `study status` | `folder`, and `rows`: one for each cell |
| `study report` | the `files` written, and the number of `rows` |
| `capture` | `update`, `truth` (paths), `numbers` in the update, `images` |
| `convert` | `update` (path), `numbers` in it, `images`, and the names of the parameters that were `sent` |
| `validate`, `check` | what the lines for people say, by name |
| `purge` | `folder`, and the paths that were `removed` and `rewritten` |
| `train-generator` | `generator` (path), `images`, `rounds`, `parameters` |
| `train-model` | `weights` (path), `images`, `rounds`, `training_accuracy` |
| `list` | names and lines by kind; with a name its `settings` |

An error is one object too, with exit code 2: `{"error": {"kind": "SpecError", "message": "..."}}`. `kind` is the class of the
error, `UsageError` for a wrong option. The line for people is on standard error as ever. After Ctrl-C the object has `partial:
true`, and the exit code is 130; a second Ctrl-C leaves nothing on standard output.
""".splitlines()

COMPLETION = """
## Completion in the shell

```console
$ gradleak --install-completion    # bash, zsh, fish or PowerShell: whichever runs
```

Then the Tab key completes commands, options, keys after `--set`, and the words that a key may be set to.
""".splitlines()


def settings() -> str:
    """The page about attacks and defences, from their fields and docstrings."""
    from gradleak import catalogue

    lines = ["# Attacks and defences", "", "Written from the program itself: `gradleak list attacks NAME` says the same."]
    lines += ["What each method does is in [Method](../method.md).", ""]
    for kind, title in (("attacks", "Attacks"), ("defences", "Defences")):
        lines += ["", f"## {title}", "", *(_names(catalogue.names(kind)))]
        for name in catalogue.names(kind):
            entry = catalogue.entry(kind, name)
            lines += ["", f"### {name}", "", f"{entry.line[:1].upper()}{entry.line[1:]}.", ""]
            lines += [f"Needs {entry.needs}.", ""] if entry.needs else []
            lines += _rows(entry.settings) if entry.settings else ["No settings."]
    return "\n".join(lines) + "\n"


def _names(names: dict[str, str]) -> list[str]:
    return [
        "| name | what it is |",
        "| --- | --- |",
        *(f"| [`{name}`](#{name}) | {_cell(line)} |" for name, line in names.items()),
    ]


def _rows(settings: Any) -> list[str]:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for setting in settings:
        default = "needed" if setting.needed else "not set" if setting.default is None else f"`{json.dumps(setting.default)}`"
        rows.append(f"| `{setting.key}` | {_cell(setting.type)} | {default} | {_cell(setting.meaning)} |")
    return rows


def _default(parameter: Any) -> str:
    value = parameter.default
    return "" if value in (None, False, (), []) else f"`{value}`"


def _paragraphs(help_: str) -> list[str]:
    return [line.strip() for line in (help_ or "").replace("\b", "").splitlines()]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("\n", " ")
