"""Image-to-video, first-last-frame and VACE, end to end, against the pipelines of diffusers.

Inputs have the size of the video, because the two packages resize differently: wanx follows the
reference (see docs/numerics.md). The features of CLIP are handed to diffusers for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import wanx
from tests.support.peers import SHIFT, image_features
from tests.support.videos import assert_same_video, levels_of, psnr
from wanx.bundle.reader import Bundle
from wanx.runtime.inputs.image import to_signed
from wanx.runtime.inputs.resize import clip_pixels
from wanx.runtime.inputs.video_input import open_video
from wanx.runtime.output.video import VideoWriter
from wanx.runtime.sampling.solvers import make_sampler

Pixels = NDArray[np.uint8]
PROMPT, NEGATIVE = "a red circle moving right", "the left"
STEPS = 3


def picture(seed: int, height: int, width: int) -> Pixels:
    """Smooth colours, as an encoder sees them more often than noise."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def run_peer(peer: Any, **options: Any) -> tuple[Pixels, list[torch.Tensor]]:
    latents = []

    def note(_: Any, step: int, timestep: int, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"][0])
        return values

    peer.set_progress_bar_config(disable=True)
    with levels_of(peer.scheduler, make_sampler("unipc", STEPS, SHIFT)):
        video = peer(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5),
            callback_on_step_end=note,
            **options,
        ).frames[0]
    return np.rint(video * 255).astype(np.uint8), latents


def run_ours(bundle: Bundle, **options: Any) -> tuple[Pixels, list[NDArray[np.float32]]]:
    latents: list[NDArray[np.float32]] = []
    result = wanx.load(bundle.root, threads=1)(
        PROMPT, negative_prompt=NEGATIVE, steps=STEPS, guide_scale=3.0, shift=SHIFT, seed=5,
        on_step=lambda step, steps, latent: latents.append(latent.copy()), **options,
    )  # fmt: skip
    assert result.frames is not None
    assert [stage.name for stage in result.stages] == ["text", "condition", "denoise", "decode"]
    return result.frames, latents


def features(peer: Any, *pictures: Pixels) -> torch.Tensor:
    """What diffusers' image encoder makes of pictures that were squashed as the reference does."""
    side = peer.image_encoder.config.image_size
    pixels = np.stack([clip_pixels(to_signed(item), side) for item in pictures])
    return image_features(peer.image_encoder, torch.from_numpy(pixels))


@pytest.mark.parametrize(
    ("task", "size"),
    [
        ("i2v", (48, 80, 9)),
        ("i2v", (64, 32, 5)),
        ("i2v", (32, 48, 1)),
        ("flf2v", (48, 80, 9)),
        ("flf2v", (32, 48, 5)),
    ],
)
def test_images(
    task: str,
    size: tuple[int, int, int],
    peer_of: Callable[[str], Any],
    bundle_of: Callable[[str, str], Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    height, width, frames = size
    pictures = [picture(seed, height, width) for seed in range(1 if task == "i2v" else 2)]
    names = ["image", "last_image"][: len(pictures)]
    seen = features(peer_of(task), *pictures)
    monkeypatch.setattr(peer_of(task), "encode_image", lambda image, device: seen)
    theirs = run_peer(
        peer_of(task),
        height=height,
        width=width,
        num_frames=frames,
        **{n: Image.fromarray(p) for n, p in zip(names, pictures, strict=True)},
    )
    ours = run_ours(
        bundle_of(task, "fp32"),
        height=height,
        width=width,
        frames=frames,
        **dict(zip(names, pictures, strict=True)),
    )
    assert_same_video(ours, theirs)
    other = run_ours(
        bundle_of(task, "fp32"), height=height, width=width, frames=frames,
        **dict(zip(names, (picture(9, height, width), *pictures[1:]), strict=True)),
    )  # fmt: skip
    assert psnr(other[0], ours[0]) < 40  # the image counts


def write_video(path: Path, frames: Pixels) -> Path:
    with VideoWriter(path, frames.shape[2], frames.shape[1], quality=10, metadata={}) as writer:
        writer.write(frames)
    return path


@pytest.fixture
def control(tmp_path: Path) -> tuple[Path, Path, Pixels, Pixels]:
    """A video and its mask, as files and as what a reader makes of them."""
    video = np.stack([picture(i, 48, 64) for i in range(9)])
    mask = np.zeros_like(video)
    mask[:, 16:40, 16:56] = 255
    mask[7:] = 255
    paths = write_video(tmp_path / "v.mp4", video), write_video(tmp_path / "m.mp4", mask)
    read = [open_video(path).read(range(9), 48, 64) for path in paths]
    return *paths, *read


@pytest.mark.parametrize(
    "given", ["video", "video, mask", "video, mask, references", "references", ""]
)
def test_vace(
    given: str,
    control: tuple[Path, Path, Pixels, Pixels],
    peer_of: Callable[[str], Any],
    bundle_of: Callable[[str, str], Bundle],
) -> None:
    video_path, mask_path, video, mask = control
    references = [picture(20, 48, 64), picture(21, 48, 64)]
    ours: dict[str, Any] = {"width": 64, "height": 48, "frames": 9, "vace_scale": 0.8}
    theirs: dict[str, Any] = {
        "width": 64, "height": 48, "num_frames": 9, "conditioning_scale": 0.8
    }  # fmt: skip
    if "video" in given:
        ours["video"] = video_path
        theirs["video"] = [Image.fromarray(frame) for frame in video]
    if "mask" in given:
        ours["mask"] = mask_path
        theirs["mask"] = [Image.fromarray(frame) for frame in mask]
    if "references" in given:
        ours["references"] = tuple(references)
        # diffusers puts each one before those that came before it; the reference keeps their order.
        theirs["reference_images"] = [[Image.fromarray(item) for item in references[::-1]]]
    expected = run_peer(peer_of("vace"), **theirs)
    got = run_ours(bundle_of("vace", "fp32"), **ours)
    assert got[0].shape == (9, 48, 64, 3)
    assert_same_video(got, expected)


def test_the_scale_of_vace_counts(
    control: tuple[Path, Path, Pixels, Pixels], bundle_of: Callable[[str, str], Bundle]
) -> None:
    options = {"width": 64, "height": 48, "video": control[0]}
    strong = run_ours(bundle_of("vace", "fp32"), **options)
    weak = run_ours(bundle_of("vace", "fp32"), **options, vace_scale=0.2)
    assert psnr(strong[0], weak[0]) < 45
