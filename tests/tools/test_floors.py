"""The oldest versions that pyproject.toml allows, as constraints for pip."""

from __future__ import annotations

import tomllib
from typing import Any

import floors
import pytest
from packaging.requirements import Requirement

PROJECT: dict[str, Any] = {
    "name": "wanx",
    "dependencies": ["numpy>=2.0", "ml_dtypes.x>=0.5"],
    "optional-dependencies": {
        "export": ["torch>=2.10"],
        "gpu": ["wanx[export]", "triton>=3.6; sys_platform == 'linux'"],
        "test": ["wanx[gpu,report]", "pytest>=8.3"],
        "report": ["jinja2>=3.1"],
        "loose": ["scipy"],
        "upper": ["scipy<2"],
    },
}


def test_dependencies_and_extras_that_refer_to_others() -> None:
    plain = {"numpy": "2.0", "ml_dtypes.x": "0.5"}
    assert floors.floors(PROJECT, []) == plain
    assert floors.floors(PROJECT, ["gpu"]) == plain | {"torch": "2.10", "triton": "3.6"}
    everything = {"torch": "2.10", "triton": "3.6", "pytest": "8.3", "jinja2": "3.1"}
    assert floors.floors(PROJECT, ["test"]) == plain | everything


@pytest.mark.parametrize(
    ("extra", "words"),
    [("loose", "'scipy' has no lower bound"), ("upper", "'scipy<2'"), ("gpus", "extra 'gpus'")],
)
def test_what_has_no_floor_is_refused(extra: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        floors.floors(PROJECT, [extra])


def test_every_dependency_of_ours_has_one() -> None:
    project = tomllib.loads(floors.PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lowest = floors.floors(project, list(extras))
    for group in (project["dependencies"], *extras.values()):
        for requirement in map(Requirement, group):
            if requirement.name != "wanx":
                assert requirement.specifier.contains(lowest[requirement.name]), requirement
