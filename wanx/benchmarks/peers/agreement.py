"""Agreement of a peer with the bundle whose weights it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.accuracy.metrics import cosine, psnr_db

Float32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class PeerAgreement:
    """Agreement of two implementations from one noise, one text and the same weights.

    Attributes:
        subject: index of the peer.
        case: index of the video.
        first_step_cosine: of the guided velocity of the first step, for which both have the same
            inputs.
        latent_cosine: of the last latent; each has followed its own latents until then.
        psnr_db_min: of the worst frame, dB; None for videos of different shapes.
    """

    subject: int
    case: int
    first_step_cosine: float
    latent_cosine: float
    psnr_db_min: float | None


def agreement_of_runs(
    noise: Float32,
    ours: tuple[Float32, Float32],
    theirs: tuple[Float32, Float32],
    videos: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    **where: Any,
) -> PeerAgreement:
    """Compare two runs.

    The first step of both solvers is ``latent + (σ' - σ)·velocity``, so what it added has the
    direction of the velocity.

    Args:
        noise: ``[C, T, h, w]``, from which both started.
        ours: latents after the first and after the last step, without references.
        theirs: likewise.
        videos: uint8 ``[F, H, W, 3]`` of both.
        where: subject and case.
    """
    ours_video, theirs_video = videos
    same = ours_video.shape == theirs_video.shape
    return PeerAgreement(
        first_step_cosine=cosine(theirs[0] - noise, ours[0] - noise),
        latent_cosine=cosine(theirs[1], ours[1]),
        psnr_db_min=float(psnr_db(theirs_video, ours_video).min()) if same else None,
        **where,
    )
