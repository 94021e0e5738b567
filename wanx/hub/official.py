"""Official checkpoints of Wan2.1 on the hub."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from wanx.config.models import Task


@dataclass(frozen=True, kw_only=True)
class OfficialCheckpoint:
    """A checkpoint that has a short name.

    Attributes:
        name: for the command line.
        repository: on the hub, in the original layout.
        task: of the model.
        gigabytes: about what is downloaded of it: weights, text encoder and VAE.
    """

    name: str
    repository: str
    task: Task
    gigabytes: float


OFFICIAL = (
    OfficialCheckpoint(
        name="t2v-1.3B", repository="Wan-AI/Wan2.1-T2V-1.3B", task="t2v", gigabytes=17.6
    ),
    OfficialCheckpoint(
        name="t2v-14B", repository="Wan-AI/Wan2.1-T2V-14B", task="t2v", gigabytes=69.0
    ),
    OfficialCheckpoint(
        name="i2v-14B-480P", repository="Wan-AI/Wan2.1-I2V-14B-480P", task="i2v", gigabytes=82.3
    ),
    OfficialCheckpoint(
        name="i2v-14B-720P", repository="Wan-AI/Wan2.1-I2V-14B-720P", task="i2v", gigabytes=82.3
    ),
    OfficialCheckpoint(
        name="flf2v-14B-720P", repository="Wan-AI/Wan2.1-FLF2V-14B-720P", task="flf2v",
        gigabytes=82.3,
    ),
    OfficialCheckpoint(
        name="vace-1.3B", repository="Wan-AI/Wan2.1-VACE-1.3B", task="vace", gigabytes=19.0
    ),
    OfficialCheckpoint(
        name="vace-14B", repository="Wan-AI/Wan2.1-VACE-14B", task="vace", gigabytes=81.2
    ),
)  # fmt: skip
_ALIKE = 0.75  # of 1, above which a name is taken for a mistyped one


def official(name: str) -> OfficialCheckpoint | None:
    """Checkpoint of a short name, in upper or lower case; None if it is none."""
    return next((one for one in OFFICIAL if one.name.lower() == name.lower()), None)


def nearest(name: str) -> str | None:
    """Short name or repository that is most like a name; None where nothing is."""
    known = {one.name.lower(): one.name for one in OFFICIAL}
    known |= {
        repository.lower(): repository
        for one in OFFICIAL
        for repository in (one.repository, f"{one.repository}-Diffusers")
    }
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=_ALIKE)
    return known[found[0]] if found else None
