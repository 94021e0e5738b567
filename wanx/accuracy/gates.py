"""Agreement of a network's outputs with a reference, and the gates that it must pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from wanx.accuracy.metrics import MAX_DB, cosine, sqnr_db
from wanx.runtime.sampling.guidance import Branch

_OUTPUTS = {
    "dit": "velocity",
    "text_encoder": "text features",
    "image_encoder": "image features",
    "vae_encoder": "encoded latents",
    "vae_decoder": "decoded frames",
}


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The least cosine that passes.

    Attributes:
        dit: of the velocity, at every step and branch.
        vae: of decoded frames and of encoded latents.
        text: of the features of each prompt.
        image_encoder: of the features of the images.
    """

    dit: float = 0.99
    vae: float = 0.999
    text: float = 0.98
    image_encoder: float = 0.98

    def of(self, component: str) -> float:
        """The gate of a component such as ``vae_decoder``."""
        if component.startswith("vae"):
            return self.vae
        gates = {"dit": self.dit, "text_encoder": self.text, "image_encoder": self.image_encoder}
        return gates[component]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Distance of a candidate's output from the reference's, for the same input.

    Attributes:
        component: ``dit``, ``text_encoder``, ``image_encoder``, ``vae_encoder`` or ``vae_decoder``.
        branch: of guidance, where the component has one.
        step: of denoising, from 1, where the component is the DiT; 0 otherwise.
        timestep: what the DiT was fed at that step; 0 otherwise.
        cosine: see :func:`wanx.accuracy.metrics.cosine`; nan where an output is not finite.
        sqnr_db: see :func:`wanx.accuracy.metrics.sqnr_db`, likewise.
    """

    component: str
    branch: Branch | None = None
    step: int = 0
    timestep: float = 0.0
    cosine: float
    sqnr_db: float

    @property
    def equal(self) -> bool:
        """True if the two are equal to the bit, or as good as that."""
        return self.sqnr_db >= MAX_DB

    @property
    def output(self) -> str:
        """Name of the output that was compared, in words."""
        return _OUTPUTS[self.component] + (f", {self.branch}" if self.branch else "")


def agreement(candidate: NDArray[Any], reference: NDArray[Any], **where: Any) -> Agreement:
    """Compare two tensors of one shape; ``where`` are the other fields of :class:`Agreement`."""
    return Agreement(
        cosine=cosine(candidate, reference), sqnr_db=sqnr_db(candidate, reference), **where
    )


def worst(agreements: Sequence[Agreement]) -> Agreement:
    """Agreement of the least cosine; one that is not finite is worse than any other."""
    return min(agreements, key=lambda a: a.cosine if math.isfinite(a.cosine) else -math.inf)
