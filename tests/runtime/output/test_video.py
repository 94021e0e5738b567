"""The final name holds a whole video or what it held before, whatever happens."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from wanx.errors import CancelledError, UsageError, WanxError
from wanx.runtime.output.checks import BYTES_PER_PIXEL
from wanx.runtime.output.provenance import read_metadata
from wanx.runtime.output.video import VideoWriter

SUFFIXES = list(BYTES_PER_PIXEL)
NOISE = np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), dtype=np.uint8)


def frames_for(suffix: str) -> NDArray[np.uint8]:
    return NOISE[:1] if suffix == ".png" else NOISE


def write_batches(path: Path, batches: Iterable[NDArray[np.uint8]]) -> None:
    with VideoWriter(path, 48, 32) as writer:
        for batch in batches:
            writer.write(batch)


def batches_then_raise(
    frames: NDArray[np.uint8], error: type[BaseException]
) -> Iterator[NDArray[np.uint8]]:
    yield frames
    raise error


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def decode(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray() for frame in container.decode(video=0)])


# Quality 10 is lossless after the conversion to 4:2:0. Below that x264 may code the same frames
# differently from call to call.
@pytest.mark.parametrize("cuts", [[1, 5], range(1, 8), [0, 4]])
def test_batches_of_any_size_make_the_same_video(tmp_path: Path, cuts: Iterable[int]) -> None:
    for name, batches in {"one": [NOISE], "many": np.split(NOISE, list(cuts))}.items():
        with VideoWriter(tmp_path / f"{name}.mp4", 48, 32, quality=10) as writer:
            for batch in batches:
                writer.write(batch)
    assert np.array_equal(decode(tmp_path / "one.mp4"), decode(tmp_path / "many.mp4"))


def test_frames_need_not_be_contiguous(tmp_path: Path) -> None:
    planar = np.ascontiguousarray(np.moveaxis(NOISE, -1, 0))
    for name, frames in {"plain": NOISE, "strided": np.moveaxis(planar, 0, -1)}.items():
        with VideoWriter(tmp_path / f"{name}.mp4", 48, 32, quality=10) as writer:
            writer.write(frames)
    assert np.array_equal(decode(tmp_path / "plain.mp4"), decode(tmp_path / "strided.mp4"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_batch_is_kept(tmp_path: Path, suffix: str) -> None:
    with VideoWriter(tmp_path / f"v{suffix}", 48, 32) as writer:
        batch = frames_for(suffix).copy()
        gone = weakref.ref(batch)
        writer.write(batch)
        del batch
        assert gone() is None


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_name_appears_when_the_file_is_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    path.write_text("old")
    with VideoWriter(path, 48, 32) as writer:
        writer.write(frames_for(suffix))
        (other,) = set(tmp_path.iterdir()) - {path}
        assert other.name.startswith(".")
        assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert len(decode(path)) == len(frames_for(suffix))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("old", [None, b"precious"])
@pytest.mark.parametrize("written", [0, 1, 8])
@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelledError, RuntimeError])
def test_nothing_is_left_after_an_error(
    tmp_path: Path, suffix: str, old: bytes | None, written: int, error: type[BaseException]
) -> None:
    path = tmp_path / f"v{suffix}"
    if old:
        path.write_bytes(old)
    with pytest.raises(error):
        write_batches(path, batches_then_raise(frames_for(suffix)[:written], error))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old else [])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_frames_is_an_error(tmp_path: Path, suffix: str) -> None:
    with (
        pytest.raises(WanxError, match="no frame was decoded"),
        VideoWriter(tmp_path / f"v{suffix}", 48, 32),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frames",
    [
        NOISE.astype(np.float32), NOISE[0], NOISE[:, :-1], NOISE[:, :, :-1], NOISE[..., :1],
        np.moveaxis(NOISE, -1, 0),
    ],
)  # fmt: skip
def test_wrong_frames_are_refused(tmp_path: Path, frames: NDArray[np.uint8]) -> None:
    with (
        pytest.raises(UsageError, match=r"frames must be uint8 \[n, 32, 48, 3\], not"),
        VideoWriter(tmp_path / "v.mp4", 48, 32) as writer,
    ):
        writer.write(frames)
    assert not list(tmp_path.iterdir())


def test_a_second_frame_does_not_fit_a_png(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one frame only"):
        write_batches(tmp_path / "v.png", [NOISE[:1], NOISE[1:2]])
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with VideoWriter(path, 48, 32, metadata={"by": "first"}) as first:
        first.write(NOISE)
        with VideoWriter(path, 48, 32, metadata={"by": "second"}) as second:
            second.write(NOISE[:2])
        assert read_metadata(path) == {"by": "second"}
    assert read_metadata(path) == {"by": "first"}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["-y", "%d", "concat:a|b", "ü 🐱", "n" * 250])
def test_strange_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, name: str
) -> None:
    folder = tmp_path / f"a:b,%03d {os.fsdecode(bytes([255]))}"
    folder.mkdir()
    monkeypatch.chdir(folder)
    prefix = "./" if ":" in name else ""
    with VideoWriter(prefix + name + suffix, 48, 32, metadata={"seed": "1"}) as writer:
        writer.write(frames_for(suffix))
    assert os.listdir() == [name + suffix]
    assert read_metadata(prefix + name + suffix) == {"seed": "1"}


def test_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    for suffix in SUFFIXES:
        with VideoWriter(tmp_path / f"v{suffix}", 48, 32) as writer:
            writer.write(frames_for(suffix))
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_disk_failure_while_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "v.mp4").write_text("precious")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(WanxError, match=rf"cannot write .*v\.mp4: {os.strerror(code)}; nothing"):
        write_batches(tmp_path / "v.mp4", [NOISE])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


# The kernel refuses to let a file grow past the limit, as a full disk would.
LIMITED = """
    import os, resource, sys
    import numpy as np
    from wanx.errors import WanxError
    from wanx.runtime.output.video import VideoWriter
    path, frames = sys.argv[1], int(sys.argv[2])
    noise = np.random.default_rng(0).integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8)
    for limit in map(int, sys.argv[3:]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            with VideoWriter(path, 64, 64, metadata={"prompt": "x" * 4000}) as writer:
                writer.write(noise)
        except WanxError as error:
            print(limit, error.exit_code, error)
        else:
            print(limit, "written", os.path.getsize(path))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_full_disk_at_every_stage(tmp_path: Path, suffix: str) -> None:
    frames = {".png": 1, ".gif": 8}.get(suffix, 40)
    whole = tmp_path / "whole" / f"v{suffix}"
    path = tmp_path / "target" / f"v{suffix}"
    whole.parent.mkdir()
    path.parent.mkdir()
    path.write_text("precious")
    first = run(LIMITED, whole, frames, 2**30)
    size = int(first.communicate()[0].removeprefix(f"{2**30} written "))
    assert size == whole.stat().st_size
    limits = sorted({0, 1, 100, 5000, size // 2, size - 5000, size - 100, size - 1})
    process = run(LIMITED, path, frames, *limits)
    output, errors = process.communicate()
    lines = output.splitlines()
    assert errors == ""
    assert len(lines) == len(limits)
    fitted = False
    for limit, line in zip(limits, lines, strict=True):
        if line.startswith(f"{limit} written "):  # an encoder's threads may make it smaller
            assert size - 5000 <= int(line.split()[-1]) <= limit
            fitted = True
            continue
        assert line.startswith(f"{limit} 1 cannot write {path}: File too large; nothing was left")
    assert list(path.parent.iterdir()) == [path]
    assert fitted or path.read_text() == "precious"


SLOW = """
    import sys, time
    import numpy as np
    from wanx.runtime.output.video import VideoWriter
    with VideoWriter(sys.argv[1], 64, 64) as writer:
        noise = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), dtype=np.uint8)
        writer.write(noise)
        print("writing", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.fault("kill while writing")
def test_killed_while_writing(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "v.mp4"
    process = run(SLOW, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    process.communicate(timeout=50)  # it would end by itself after 60 s
    assert not path.exists()
    assert all(p.name.startswith(".wanx-") for p in tmp_path.iterdir())
    if number == signal.SIGINT:
        assert not list(tmp_path.iterdir())
