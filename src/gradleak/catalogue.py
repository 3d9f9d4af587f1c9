"""What a specification can name, with every setting, its type, default and meaning: read from the fields and docstrings.

There is no second copy of any of it: a recipe's settings are its fields, their meanings the ``Attributes`` of its docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter

from gradleak.errors import SpecError, nearest
from gradleak.spec import RunSpec

#: What `gradleak list` knows.
KINDS: dict[str, str] = {
    "attacks": "how the images are rebuilt; attack.name",
    "models": "the attacked model F; model.name",
    "datasets": "where the private batch comes from; data.source",
    "labels": "how an attack gets the labels; labels.rule",
    "defences": "how a client protects itself; [[defence]]",
    "settings": "every key of a specification, table by table",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key: what may be given for it, and what it means.

    Attributes:
        key: As ``--set`` has it, dots included.
        type: In words, with the range.
        default: None where there is none, or where it is not set.
        needed: Whether it must be given.
        meaning: One sentence.
    """

    key: str
    type: str
    default: Any
    needed: bool
    meaning: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """All about one name.

    Attributes:
        name: As a specification has it.
        line: What it is, in one line.
        needs: What an attack must have; empty for other kinds.
        text: Its docstring, as plain text.
        settings: What can be set.
    """

    name: str
    line: str
    needs: str
    text: str
    settings: list[Setting]


def names(kind: str) -> dict[str, str]:
    """Name -> one line about it, of a kind of :data:`KINDS`; ``settings`` has the tables of a specification.

    Raises:
        SpecError: Unknown kind.
    """
    from gradleak import attacks, data, defences, labels, models

    if kind not in KINDS:
        raise SpecError(f"list: unknown {kind!r}{nearest(kind, KINDS)}")
    return {
        "attacks": attacks.available,
        "models": models.described,
        "datasets": data.available,
        "labels": lambda: labels.RULES,
        "defences": defences.available,
        "settings": tables,
    }[kind]()


def needs(attack: str) -> str:
    """What an attack must have."""
    from gradleak.attacks import ATTACKS

    return ATTACKS[attack][0].needs


def entry(kind: str, name: str) -> Entry:
    """All about one name of a kind.

    Raises:
        SpecError: Unknown kind or name; says which is nearest.
    """
    from gradleak import labels
    from gradleak.attacks import ATTACKS, Attack
    from gradleak.defences import DEFENCES
    from gradleak.models import NETWORKS

    known = names(kind)
    if name not in known:
        raise SpecError(f"list {kind}: unknown {name!r}{nearest(name, known)}")
    line = known[name]
    if kind == "attacks":
        recipe = ATTACKS[name][0]
        return Entry(name, line, recipe.needs, plain(_opening(type(recipe))), recipe_settings(type(recipe), recipe, "attack."))
    if kind == "defences":
        defence = DEFENCES[name][0]
        return Entry(name, line, "", plain(_opening(defence)), recipe_settings(defence, None, ""))
    if kind == "settings":
        if name == "attack":
            chosen = Setting("attack.name", " | ".join(ATTACKS), "cinet", False, "the recipe")
            return Entry(name, line, "", plain(_opening(Attack)), [chosen, *recipe_settings(Attack, Attack(), "attack.")])
        return Entry(name, line, "", "", table_settings(name))
    source = {"models": NETWORKS.get(name), "labels": vars(labels).get(name.replace("-", "_"))}.get(kind)
    table = {"models": "model", "datasets": "data", "labels": "labels"}[kind]
    return Entry(name, line, "", plain(_opening(source)).removeprefix(line).strip() if source else "", table_settings(table))


def tables() -> dict[str, str]:
    """Table of a specification -> what it is about; ``run`` stands for the keys that are in no table."""
    described = {"run": "keys outside every table"}
    for name, field in RunSpec.model_fields.items():
        kind = field.annotation
        if hasattr(kind, "model_fields"):
            described[name] = re.split(r"(?<=\w)\.(?:\s|$)", plain(inspect.getdoc(kind) or ""))[0]
        elif name in ("attack", "defence"):
            described[name] = f"{field.description}; those of one {name}: gradleak list {name}s NAME"
    return described


def table_settings(table: str) -> list[Setting]:
    """The keys of one table of a specification."""
    schema = RunSpec.model_json_schema()
    within = {
        key: value
        for key, value in schema["properties"].items()
        if ("$ref" in value or key in ("attack", "defence")) == (table != "run")
    }
    if table == "run":
        return [_setting(key, value, schema, prefix="") for key, value in within.items()]
    if table == "defence":
        fields = schema["$defs"]["DefenceSpec"]
        return [_setting(key, value, schema, prefix="", needed=True) for key, value in fields["properties"].items()]
    fields = schema["$defs"][within[table]["$ref"].rpartition("/")[2]]
    return [_setting(key, value, schema, prefix=f"{table}.") for key, value in fields["properties"].items()]


def recipe_settings(kind: type, preset: object, prefix: str) -> list[Setting]:
    """The settings of an attack or a defence, with the defaults of ``preset`` if there is one."""
    schema, said = TypeAdapter(kind).json_schema(), meanings(kind)
    rows = []
    for field in dataclasses.fields(kind):
        value = {**schema["properties"][field.name], "description": said.get(field.name, "")}
        value |= {} if preset is None else {"default": getattr(preset, field.name)}
        rows.append(_setting(field.name, value, schema, prefix=prefix, needed=field.name in schema.get("required", ())))
    return rows


def keys() -> Iterator[tuple[str, list[str], str]]:
    """Every key that ``--set`` takes, the words that it may be set to where they are few, and its meaning; without torch.

    Settings of single attacks are not among them.
    """
    schema = RunSpec.model_json_schema()
    for name, value in schema["properties"].items():
        fields = schema["$defs"][value["$ref"].rpartition("/")[2]]["properties"] if "$ref" in value else {"": value}
        for key, field in fields.items():
            whole = f"{name}.{key}" if key else "attack.name" if name == "attack" else name
            yield whole, _words(field), field.get("description", "")


def meanings(kind: type) -> dict[str, str]:
    """Attribute -> what a class's docstring, or that of a class it is derived from, says of it under ``Attributes``."""
    said: dict[str, str] = {}
    for ancestor in reversed(kind.__mro__):
        section = re.search(r"^Attributes:\n((?:[ ]+.*\n|\n)*)", inspect.cleandoc(ancestor.__doc__ or "") + "\n", re.MULTILINE)
        rows = re.split(r"^[ ]{4}(?=\w)", section[1], flags=re.MULTILINE) if section else []
        for row in rows:
            named, colon, text = row.partition(":")
            for name in named.split(",") if colon else ():
                said[name.strip()] = plain(text)
    return said


def plain(docstring: str) -> str:
    """A docstring for a terminal: paragraphs on one line each, without the marks of its formulas and references."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        items = re.split(r"\n(?=\s*- )", paragraph)
        paragraphs += [" ".join(item.split()) for item in items]
    text = "\n".join(paragraphs)
    text = re.sub(r"(?:\.\. math:: ?)", "", text)
    text = re.sub(r":(?:\w+:)*math:`([^`]*)`", lambda m: _formula(m[1]), text)
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text)
    return "\n".join(_formula(line) if "\\" in line else line for line in text.replace("``", "").splitlines())


def _formula(tex: str) -> str:
    r"""A formula in ASCII: ``\min_x \|A(x) - g^*\|`` is "min_x ||A(x) - g*||"."""
    tex = re.sub(r"\\(?:mathrm|operatorname\*?|text|bar|hat)\s*\{([^}]*)\}", r"\1", tex)
    tex = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1) / (\2)", tex)
    tex = re.sub(r"\\frac\s*(\w)\s*(\w)", r"\1/\2 ", tex)
    for mark, word in {r"\leftarrow": "<-", r"\mapsto": "->", r"\ge": ">=", r"\le": "<=", r"\ne": "!=", r"\sim": "~"}.items():
        tex = re.sub(re.escape(mark) + r"(?![a-z])", word, tex)
    tex = tex.replace(r"\|", "||")
    tex = re.sub(r"\\[,;:! ]|\\big[lr]?|\\Big[lr]?|\\left|\\right|&", " ", tex).replace(r"\\", " ")
    tex = re.sub(r"\\([A-Za-z]+)(?![A-Za-z])\s*(?=[A-Za-z])", r"\1 ", tex)
    tex = re.sub(r"\\([A-Za-z]+)", r"\1", tex)
    tex = tex.replace("^*", "*").replace("{", "").replace("}", "")
    return re.sub(r" +([),.;])", r"\1", re.sub(r" {2,}", " ", tex)).strip()


def _opening(kind: Any) -> str:
    """A docstring up to its sections."""
    return re.split(r"^(?:Args|Attributes|Returns|Raises|Shapes):$", inspect.getdoc(kind) or "", flags=re.MULTILINE)[0]


def _setting(key: str, value: Mapping[str, Any], schema: Mapping[str, Any], *, prefix: str, needed: bool = False) -> Setting:
    return Setting(f"{prefix}{key}", _type(value, schema), value.get("default"), needed, value.get("description", ""))


def _words(value: Mapping[str, Any]) -> list[str]:
    """The words that a key may be set to."""
    if value.get("type") == "boolean":
        return ["true", "false"]
    options = [option for option in (value, *value.get("anyOf", ())) if "enum" in option or "const" in option]
    return [str(word) for option in options for word in option.get("enum", [option.get("const")])]


def _type(value: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in value:
        return _type(schema["$defs"][value["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in value:
        return " or ".join(_type(option, schema) for option in value["anyOf"] if option.get("type") != "null")
    if "enum" in value or "const" in value:
        return " | ".join(_words(value))
    if "prefixItems" in value:
        return f"[{', '.join(_type(item, schema) for item in value['prefixItems'])}]"
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}), schema)}"
    name = {"string": "text", "object": "table", None: "value"}.get(value.get("type"), value.get("type"))
    name = "path" if value.get("format") == "path" else name
    bounds = [
        f"{sign} {_number(value[bound])}"
        for bound, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if bound in value
    ]
    return " ".join([str(name), " and ".join(bounds)]).strip()


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}" if value < 1e6 else f"{value:.0f}"
