"""Print a constraints file with the oldest version that pyproject.toml allows of each dependency: ``name==bound``.

Run by ``make oldest``. Reads the dependencies, and those of the extras named as arguments.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?>=(?P<bound>[0-9.]+)(;.*)?")


def lower_bounds(extras: list[str]) -> list[str]:
    """``name==bound`` of every requirement; a requirement without a lower bound is an error."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = []
    for requirement in [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]:
        found = REQUIREMENT.fullmatch(requirement.replace(" ", ""))
        if found is None:
            raise SystemExit(f"pyproject.toml: {requirement!r} has no lower bound of the form name>=version")
        lines.append(f"{found['name']}=={found['bound']}{found[4] or ''}")
    return lines


if __name__ == "__main__":
    print("\n".join(lower_bounds(sys.argv[1:])))
