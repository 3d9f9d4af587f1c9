"""The attacks by name: each a recipe with its authors' settings, any of which can be changed."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gradleak.attacks import analytic, cinet, dlg, gi_nas, gias, gradinversion, inverting_gradients
from gradleak.attacks.cinet import CINetAttack
from gradleak.attacks.recipe import Attack, Problem
from gradleak.errors import SpecError, nearest
from gradleak.spec import fault

__all__ = ["ATTACKS", "REVISIONS", "Attack", "CINetAttack", "Problem", "attack", "available"]

#: name -> (recipe, one line about it)
ATTACKS: dict[str, tuple[Attack, str]] = {
    **analytic.PRESETS,
    **cinet.PRESETS,
    **dlg.PRESETS,
    **gi_nas.PRESETS,
    **gias.PRESETS,
    **gradinversion.PRESETS,
    **inverting_gradients.PRESETS,
}

#: name -> how often its defaults have changed; a study's cell of before is then another one.
REVISIONS = {"cinet": 5}


def attack(name: str, **settings: Any) -> Attack:
    """The recipe ``name`` with some of its settings changed, for example ``attack("cinet", rounds=300)``.

    Raises:
        SpecError: Unknown attack or setting (the nearest known one is named), or a value of the wrong type or range.
    """
    if name not in ATTACKS:
        raise SpecError(f"attack.name: unknown attack {name!r}{nearest(name, ATTACKS)}")
    preset = ATTACKS[name][0]
    known = {field.name for field in dataclasses.fields(preset)}
    for key in settings:
        if key not in known:
            raise SpecError(f"attack.{key}: the attack {name!r} has no such setting{nearest(key, known)}")
    try:
        changed: Attack = TypeAdapter(type(preset)).validate_python({**dataclasses.asdict(preset), **settings})
    except ValidationError as error:
        faults = "; ".join(f"attack.{e['loc'][0]}: {fault(e)}" for e in error.errors())
        raise SpecError(faults) from None
    return changed


def available() -> dict[str, str]:
    """Attack name -> one line about it."""
    return {name: text for name, (_, text) in ATTACKS.items()}
