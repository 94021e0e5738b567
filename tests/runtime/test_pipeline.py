"""What a pipeline promises its caller: order of work, callbacks, files, and clean failures."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import wanx
import wanx.runtime.pipeline as pipeline_module
import wanx.runtime.run_parts as run_parts_module
from wanx.bundle.reader import Bundle
from wanx.errors import CancelledError, UsageError, WanxError
from wanx.runtime.output.provenance import read_metadata
from wanx.runtime.output.video import VideoWriter
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.sessions.base import Session
from wanx.runtime.sessions.onnxruntime.providers import AUTO

PROMPT = "a red circle moving right"
SMALL: dict[str, Any] = {"width": 48, "height": 32, "frames": 5, "steps": 3, "seed": 1}


@pytest.fixture(scope="module")
def pipeline(bundle_fp32: Bundle) -> Pipeline:
    return wanx.load(bundle_fp32.root, threads=1)


def frames_of(pipeline: Pipeline, **options: Any) -> NDArray[np.uint8]:
    frames = pipeline(PROMPT, **SMALL | options).frames
    assert frames is not None
    return frames


class Watch:
    """Sees every session that a pipeline opens, and may replace what one returns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[str] = []
        self.open: list[str] = []
        self.replace: Callable[[str, int, dict[str, Any]], dict[str, Any]] = lambda *a: a[-1]
        opener = run_parts_module.open_session

        def open_session(
            bundle: Bundle, component: str, *, threads: int | None, **options: object
        ) -> Session:
            assert not any(value for value in options.values() if value != AUTO)
            assert self.open == [], "two components in memory at once"
            assert threads == 1
            session = opener(bundle, component, threads=threads)
            self.open.append(component)
            run, close = session.run, session.close

            def watched_run(feeds: Any, state: Any = None) -> dict[str, Any]:
                self.runs.append(component)
                return self.replace(component, self.runs.count(component), run(feeds, state))

            def watched_close() -> None:
                self.open.remove(component)
                close()

            monkeypatch.setattr(session, "run", watched_run, raising=False)
            monkeypatch.setattr(session, "close", watched_close, raising=False)
            return session

        monkeypatch.setattr(run_parts_module, "open_session", open_session)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


@pytest.mark.parametrize(("guide_scale", "branches"), [(0.0, 1), (1.0, 1), (0.5, 2), (5.0, 2)])
def test_number_of_branches(
    guide_scale: float, branches: int, pipeline: Pipeline, watch: Watch
) -> None:
    """Components are loaded one after the other, and only what is needed is run."""
    frames_of(pipeline, guide_scale=guide_scale)
    assert watch.runs == [
        *["text_encoder"] * branches,
        *["dit"] * branches * SMALL["steps"],
        *(f"vae_decoder_{part}" for part in ("mid_first", "mid_rest", "up_first", "up_rest")),
    ]
    assert watch.open == []


def test_seeds(pipeline: Pipeline) -> None:
    first, again, other = (frames_of(pipeline, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 1


def test_a_drawn_seed_is_told(pipeline: Pipeline) -> None:
    options = {key: value for key, value in SMALL.items() if key != "seed"}
    drawn = pipeline(PROMPT, **options)
    assert drawn.options.seed >= 0
    again = pipeline(PROMPT, **options, seed=drawn.options.seed)
    assert again.frames is not None
    assert np.array_equal(drawn.frames, again.frames)
    assert pipeline(PROMPT, **options).options.seed != drawn.options.seed


def test_callbacks_and_stages(pipeline: Pipeline) -> None:
    steps: list[tuple[int, int, tuple[int, ...]]] = []
    told: dict[str, list[tuple[int, int, str]]] = {}
    result = pipeline(
        PROMPT,
        **SMALL,
        on_step=lambda step, total, latent: steps.append((step, total, latent.shape)),
        progress=lambda stage, *work: told.setdefault(stage, []).append(work),
    )
    assert steps == [(step, 3, (16, 2, 4, 6)) for step in (1, 2, 3)]
    assert told == {
        "encode text": [(done, 2, "steps") for done in range(3)],
        "denoise": [(done, 3, "steps") for done in range(4)],
        "decode": [(done, 2, "steps") for done in range(3)],
    }
    assert [stage.name for stage in result.stages] == ["text", "denoise", "decode"]
    assert all(stage.load_seconds > 0 and stage.seconds > 0 for stage in result.stages)
    assert [len(stage.calls) for stage in result.stages] == [2, 3, 2]
    assert all(0 < sum(stage.calls) <= stage.seconds for stage in result.stages)
    assert result.path is None
    assert result.frames is not None
    assert result.frames.shape == (5, 32, 48, 3)
    assert result.options.prompt == PROMPT


def test_a_video_file(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    result = pipeline(PROMPT, **SMALL, output=path, fps=8)
    assert result.path == path
    assert result.frames is None
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (48, 32, 8)
        assert len(list(container.decode(stream))) == 5
    facts = read_metadata(path)
    assert facts["prompt"] == PROMPT
    assert facts["seed"] == "1"
    assert facts["bundle"] == pipeline.bundle.hash
    assert facts["precision"] == "fp32"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a" * 252 + ".mp4", {}, "256 bytes long"),
        ("\ud800.mp4", {}, "no file name can have"),
        ("a.gif", {"fps": 60}, "fps 60 is outside 1 to 50"),
        ("a.mp4", {"fps": 240}, "fps 240 is outside 1 to 120"),
        ("a.webm", {"fps": 121}, "fps 121 is outside 1 to 120"),
        ("a.png", {}, "one frame"),
        ("no/a.mp4", {}, "does not exist"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_computing(
    pipeline: Pipeline, tmp_path: Path, name: str, options: dict[str, int], words: str
) -> None:
    stages: list[str] = []
    with pytest.raises(UsageError, match=words):
        pipeline(
            PROMPT, **SMALL | options, output=tmp_path / name,
            progress=lambda stage, *_: stages.append(stage),
        )  # fmt: skip
    assert stages == []
    assert list(tmp_path.iterdir()) == []


def test_one_frame_is_an_image(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    pipeline(PROMPT, **SMALL | {"frames": 1}, output=path)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), frames_of(pipeline, frames=1)[0])
    assert read_metadata(path)["prompt"] == PROMPT


@pytest.mark.parametrize("after", [1, 2])
def test_cancelled_between_steps(
    after: int, pipeline: Pipeline, watch: Watch, tmp_path: Path
) -> None:
    def cancelled() -> bool:
        return watch.runs.count("dit") == 2 * after

    with pytest.raises(CancelledError):
        pipeline(PROMPT, **SMALL, output=tmp_path / "video.mp4", cancelled=cancelled)
    assert watch.runs.count("dit") == 2 * after
    assert "vae_decoder_mid_first" not in watch.runs
    assert watch.open == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", ["text_encoder", "vae_decoder_up_first", "vae_decoder_up_rest"])
def test_cancelled_in_other_stages(
    at: str, pipeline: Pipeline, watch: Watch, tmp_path: Path
) -> None:
    """While it decodes, the file is begun already; the one it was to replace stays."""
    path = tmp_path / "video.mp4"
    path.write_bytes(b"the old video")
    with pytest.raises(CancelledError):
        pipeline(PROMPT, **SMALL, output=path, cancelled=lambda: at in watch.runs)
    assert watch.runs[-1] == at
    assert watch.open == []
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"]
    assert path.read_bytes() == b"the old video"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug")])
def test_interrupted(
    error: BaseException, pipeline: Pipeline, watch: Watch, tmp_path: Path
) -> None:
    def fail(component: str, count: int, outputs: dict[str, Any]) -> dict[str, Any]:
        if component == "vae_decoder_up_rest":
            raise error
        return outputs

    watch.replace = fail
    with pytest.raises(type(error)):
        pipeline(PROMPT, **SMALL, output=tmp_path / "video.mp4")
    assert watch.open == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_velocity_that_is_not_finite(
    value: float, pipeline: Pipeline, watch: Watch, tmp_path: Path
) -> None:
    def spoil(component: str, count: int, outputs: dict[str, Any]) -> dict[str, Any]:
        if component == "dit" and count == 3:  # the first branch of the second step
            outputs["velocity"][0, 2, 5] = value
        return outputs

    watch.replace = spoil
    with pytest.raises(WanxError, match="not finite after step 2 of 3"):
        pipeline(PROMPT, **SMALL, guide_scale=5.0, output=tmp_path / "video.mp4")
    assert watch.runs.count("dit") == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("NaN", lambda video: video * np.float32(np.nan)),
        ("black", lambda video: np.full_like(video, -1)),
        ("flat", lambda video: np.full_like(video, 0.5)),
        ("frozen", lambda video: video[:, :, :1] * 0 + np.linspace(-1, 1, video.shape[-1])),
    ],
)
def test_a_broken_video(
    kind: str,
    spoil: Callable[[Any], Any],
    pipeline: Pipeline,
    watch: Watch,
    tmp_path: Path,
) -> None:
    def replace(component: str, count: int, outputs: dict[str, Any]) -> dict[str, Any]:
        if component.startswith("vae_decoder_up"):
            outputs["video"] = np.broadcast_to(spoil(outputs["video"]), outputs["video"].shape)
        return outputs

    watch.replace = replace
    with pytest.raises(WanxError, match=kind):
        pipeline(PROMPT, **SMALL, output=tmp_path / "video.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "output", "message"),
    [
        ({}, "missing/video.mp4", "does not exist"),
        ({}, "video.png", "one frame"),
        ({}, "video.txt", "extension"),
        ({}, "http://host/video.mp4", "URL"),
        ({"width": 50}, "video.mp4", "use 48 or 64"),
        ({"frames": 6}, "video.mp4", "use 5 or 9"),
        ({"steps": 0}, "video.mp4", "steps is 0"),
        ({"solver": "heun"}, "video.mp4", "choose unipc, dpm"),
        ({"shift": 0.0}, "video.mp4", "shift is 0"),
        ({"guide_scale": math.nan}, "video.mp4", "guide scale is nan"),
        ({"seed": -2}, "video.mp4", "seed is -2"),
        ({"fps": 0}, "video.mp4", "fps is 0"),
        ({"prompt": "a\0b"}, "video.mp4", "NUL"),
        ({"negative_prompt": "\udc80"}, "video.mp4", "UTF-8"),
    ],
)
def test_refused_before_anything_is_computed(
    options: dict[str, Any],
    output: str,
    message: str,
    pipeline: Pipeline,
    watch: Watch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        pipeline(**{"prompt": PROMPT} | SMALL | options, output=output)
    assert "\n" not in str(caught.value)
    assert watch.runs == []
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_when_asked(
    pipeline: Pipeline, watch: Watch, tmp_path: Path
) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"the old video")
    with pytest.raises(UsageError, match="exists"):
        pipeline(PROMPT, **SMALL, output=path, overwrite=False)
    assert watch.runs == []
    assert path.read_bytes() == b"the old video"


def test_a_prompt_is_needed(pipeline: Pipeline) -> None:
    """This model, unlike the built-in one, has no prompt of its own; an empty one is a prompt."""
    with pytest.raises(UsageError, match="no prompt"):
        pipeline(**SMALL)
    assert pipeline("", **SMALL).options.prompt == ""


def test_unknown_options_fail(pipeline: Pipeline) -> None:
    with pytest.raises(TypeError, match="stepz"):
        pipeline(PROMPT, **SMALL, stepz=3)


def test_frames_are_written_while_the_next_are_decoded(
    pipeline: Pipeline, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first frame is held back until the second call of the decoder has come."""
    decoding, write = threading.Event(), VideoWriter.write

    def held_back(self: VideoWriter, frames: NDArray[np.uint8]) -> None:
        assert decoding.wait(60), "nothing was decoded meanwhile"
        write(self, frames)

    def decoded(component: str, count: int, outputs: dict[str, Any]) -> dict[str, Any]:
        if component == "vae_decoder_up_rest":
            decoding.set()
        return outputs

    watch.replace = decoded
    monkeypatch.setattr(VideoWriter, "write", held_back)
    result = pipeline(PROMPT, **SMALL, output=tmp_path / "a.mp4")
    assert result.path is not None
    with av.open(str(result.path)) as container:
        assert len(list(container.decode(video=0))) == 5


@pytest.mark.parametrize("call", [1, 2])
def test_an_error_of_the_writer(
    call: int, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the run, and its thread and file are gone."""
    calls = [0]

    def full(self: VideoWriter, frames: NDArray[np.uint8]) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise WanxError("the disk is full")

    monkeypatch.setattr(VideoWriter, "write", full)
    with pytest.raises(WanxError, match="the disk is full"):
        pipeline(PROMPT, **SMALL, output=tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("wanx-writer")]


def test_ctrl_c_twice_while_a_frame_is_written(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is closed when its writer is done, and is gone."""
    done, write, leave = threading.Event(), VideoWriter.write, VideoWriter.__exit__
    interrupts = [KeyboardInterrupt, KeyboardInterrupt]

    def slowly(self: VideoWriter, frames: NDArray[np.uint8]) -> None:
        assert done.wait(60)
        write(self, frames)

    def interrupted(futures: Any, seconds: float) -> None:
        if interrupts:
            raise interrupts.pop()
        done.set()

    def closed(self: VideoWriter, *error: Any) -> None:
        assert done.is_set(), "it was closed under its writer"
        leave(self, *error)

    monkeypatch.setattr(VideoWriter, "write", slowly)
    monkeypatch.setattr(VideoWriter, "__exit__", closed)
    monkeypatch.setattr(pipeline_module, "wait", interrupted)
    monkeypatch.setattr(pipeline_module, "result_of", lambda future: interrupted([future], 1))
    with pytest.raises(KeyboardInterrupt):
        pipeline(PROMPT, **SMALL, output=tmp_path / "a.mp4")
    assert not interrupts
    assert list(tmp_path.iterdir()) == []
