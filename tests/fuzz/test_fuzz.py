"""Properties of every parser over generated inputs: accepted and the same again, or refused in a clear error.

``make test`` runs a bounded number that is the same each time; ``make fuzz`` runs at least 100,000 and counts them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from fuzz import targets
from gradleak.attacks import ATTACKS
from gradleak.spec import RunSpec

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, 1e308, 1e-320]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["../../x", "\x1b[2J", "\ud800"]))
VALUES = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=5
)

BINARY = (
    "safetensors",
    "weights",
    "backbone",
    "observation",
    "truth",
    "generator",
    "reconstruction",
    "npz",
    "archive",
    "checkpoint",
    "labels",
    "image",
)
JSON_LIKE = ("result", "history")


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A good file after up to four changes of bytes: replaced, removed, inserted, cut, or doubled."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["byte", "number", "remove", "insert", "cut", "double"]))
        if kind == "byte":
            content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "number":
            number = draw(st.sampled_from([0, 1, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
            content[at : at + 8] = number.to_bytes(8, "little")
        elif kind == "remove":
            del content[at : at + draw(st.integers(1, 16))]
        elif kind == "insert":
            content[at:at] = draw(
                st.binary(max_size=8) | st.sampled_from([b"[" * 100, b'"', b"\x00", b"\xff\xfe", b"1e999", b"NaN"])
            )
        elif kind == "cut":
            del content[at:]
        elif len(content) < 10_000:
            content[at:at] = content[at : at + 64]
    return bytes(content)


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """A JSON document after a change somewhere: a value replaced, a key removed, renamed or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.sampled_from(["inside", "inside", "inside", "remove", "rename", "add"]))
        table = dict(value)
        if kind == "inside":
            table[key] = draw(edited(value[key]))
        elif kind == "add":
            table[draw(st.text(max_size=6))] = draw(VALUES)
        else:
            old = table.pop(key)
            if kind == "rename":
                table[draw(st.text(max_size=6))] = old
        return table
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(edited(value[at])), *value[at + 1 :]]
    return draw(VALUES)


@st.composite
def with_header(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A good tensor file whose header, or a JSON document in the header's metadata, was edited."""

    def change(table: dict[str, Any]) -> None:
        inner = [key for key in ("observation", "generator", "names") if key in table.get("__metadata__", {})]
        if inner and draw(st.integers(0, 3)):
            document = draw(edited(json.loads(table["__metadata__"][inner[0]])))
            table["__metadata__"][inner[0]] = json.dumps(document)
        else:
            new = draw(edited(table))
            if isinstance(new, dict):
                table.clear()
                table.update(new)

    return targets.header(draw(st.sampled_from(seeds)), change)


def inputs(name: str) -> st.SearchStrategy[bytes]:
    seeds = targets.seeds()[name]
    kinds = [st.binary(max_size=200), mutated(seeds), mutated(seeds)]
    if seeds[0][8:9] == b"{":
        kinds += [with_header(seeds)] * 2
    if name == "result":
        kinds += [edited(json.loads(seeds[0])).map(lambda value: json.dumps(value).encode())] * 3
    if name == "history":
        rows = [json.loads(line) for line in seeds[0].splitlines()]
        kinds += [edited(rows).map(_lines)] * 2
    if name == "specification":
        kinds += [st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))]
    return st.one_of(kinds)


def _lines(value: Any) -> bytes:
    return "\n".join(json.dumps(row) for row in (value if isinstance(value, list) else [value])).encode()


@pytest.mark.parametrize("name", [*BINARY, *JSON_LIKE, "specification"])
def test_files(name: str, examples: Callable[[str], Any]) -> None:
    @examples(name)
    @given(inputs(name))
    def run(content: bytes) -> None:
        note(name)
        targets.TARGETS[name](content)

    run()


@pytest.mark.parametrize("name", [*BINARY, *JSON_LIKE, "specification"])
def test_mutations(name: str, mutations: Callable[[str], tuple[random.Random, int]]) -> None:
    """Good files with a few bytes changed at random: cheaper than Hypothesis, so that there can be many of them."""
    generator, count = mutations(name)
    seeds = targets.seeds()[name]
    for _ in range(count):
        content = bytearray(generator.choice(seeds))
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(content) + 1)
            kind = generator.randrange(5)
            if kind == 0:
                content[at : at + 1] = generator.randbytes(1)
            elif kind == 1:
                content[at : at + 1] = generator.choice(b'"{}[]:,-.0129eN/\x00\x80\xff').to_bytes(1, "little")
            elif kind == 2:
                del content[at : at + generator.randint(1, 16)]
            elif kind == 3:
                content[at:at] = content[at - generator.randint(0, at) : at][:32]
            else:
                content[at : at + 8] = generator.choice([0, 1, 0xFF, 2**31, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
        try:
            targets.TARGETS[name](bytes(content))
        except Exception as crash:
            raise AssertionError(f"{name}: {bytes(content)!r}") from crash


def keys() -> list[str]:
    """Every key of a specification, and of every attack, as ``--set`` names it."""
    found = []
    for name, field in RunSpec.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        found += [f"{name}.{key}" for key in inner] if inner else [name]
    settings = {key for recipe, _ in ATTACKS.values() for key in vars(recipe)}
    return [*found, "attack.name", *(f"attack.{key}" for key in sorted(settings))]


WORDS = st.sampled_from(
    [*targets.defences.DEFENCES, *ATTACKS, "fedavg", "average", "train", "eval", "known", "idlg", "lenet", "sample"]
)
SETTINGS = st.sampled_from(["sigma", "norm", "fraction", "bits", "clip", "noise", "delta", "layer", "name"])
TEXTS = st.one_of(
    WORDS, st.text(max_size=12), NUMBERS.map(str), st.sampled_from(['"x"', "[1, 2]", "{a = 1}", "1979-05-27", "[" * 99])
)


def test_assignments(examples: Callable[[str], Any]) -> None:
    one = st.builds("{}={}".format, st.sampled_from(keys()) | st.text(max_size=12), TEXTS) | st.text(max_size=20)

    @examples("assignments")
    @given(st.lists(one, max_size=3))
    def run(content: list[str]) -> None:
        targets.assignments(content)

    run()


def test_tables(examples: Callable[[str], Any]) -> None:
    default = RunSpec().model_dump(mode="json")

    @examples("table")
    @given(edited(default) | st.dictionaries(st.sampled_from(list(default)), VALUES, max_size=4))
    def run(content: Any) -> None:
        if isinstance(content, dict):
            targets.table(content)

    run()


def test_defence_tables(examples: Callable[[str], Any]) -> None:
    one = st.fixed_dictionaries(
        {"name": WORDS | st.text(max_size=6)}, optional={"norm": VALUES, "sigma": VALUES, "bits": VALUES}
    )
    more = st.dictionaries(SETTINGS | st.text(max_size=5), VALUES, max_size=3)

    @examples("defence_tables")
    @given(st.lists(one | more | VALUES, max_size=3))
    def run(content: list[Any]) -> None:
        targets.defence_tables(content)

    run()
