"""The oldest versions that pyproject.toml allows, as constraints for pip.

    python tools/floors.py [EXTRA,…] > floors.txt

Prints ``name==version`` for each lower bound of the dependencies and of the extras, with those that
these refer to. Needs nothing but Python, since it is run before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,-]+)\])?(?:>=([\w.]+))?\s*(?:;.*)?")


def floors(project: dict[str, Any], extras: list[str]) -> dict[str, str]:
    """Map the name of each dependency to its lower bound.

    Args:
        project: the table ``project`` of a pyproject.toml.
        extras: names of its optional dependencies.

    Raises:
        ValueError: there is no such extra, or a requirement that is not ``name>=version``.
    """
    return dict(_floors(project, project["dependencies"], set(extras)))


def _floors(
    project: dict[str, Any], requirements: list[str], extras: set[str]
) -> Iterator[tuple[str, str]]:
    for requirement in requirements:
        match = _REQUIREMENT.fullmatch(requirement)
        if match is None or not (match[2] or match[3]):
            raise ValueError(f"{requirement!r} has no lower bound; write name>=version")
        name, referred, version = match.groups()
        if name == project["name"]:
            extras = extras | set(referred.split(","))
        else:
            yield name, version
    groups = project.get("optional-dependencies", {})
    for extra in sorted(extras):
        if extra not in groups:
            raise ValueError(f"there is no extra {extra!r}; choose from {', '.join(groups)}")
        yield from _floors(project, groups[extra], set())


if __name__ == "__main__":
    table = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = [extra for extra in ",".join(sys.argv[1:]).split(",") if extra]
    try:
        lines = [f"{name}=={version}" for name, version in floors(table, extras).items()]
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines))
