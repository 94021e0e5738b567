"""Provenance that goes in comes out, of every format and past every tool's reader."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from wanx.errors import CorruptInputError, UsageError
from wanx.runtime.output.checks import BYTES_PER_PIXEL
from wanx.runtime.output.provenance import read_metadata
from wanx.runtime.output.video import VideoWriter

SUFFIXES = list(BYTES_PER_PIXEL)
METADATA = {
    "prompt": '一只🐱 "drinks" café;\n\t# = \\ -y \x01 </s> {}',
    "seed": "-1",
    "bundle": "0" * 64,
    "empty": "",
}


def write(path: Path, metadata: dict[str, str]) -> None:
    frames = 1 if path.suffix == ".png" else 3
    scene = np.arange(frames * 16 * 16 * 3, dtype=np.uint8).reshape(frames, 16, 16, 3)
    with VideoWriter(path, 16, 16, metadata=metadata) as writer:
        writer.write(scene)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "metadata",
    [METADATA, {}, {"prompt": "é" * 2**19}, {"prompt": "x" * 240}, {"prompt": "x" * 241}],
    ids=["unicode", "none", "1MB", "255 bytes", "256 bytes"],
)
def test_round_trip(tmp_path: Path, suffix: str, metadata: dict[str, str]) -> None:
    path = tmp_path / f"v{suffix}"
    write(path, metadata)
    assert read_metadata(path) == metadata


def test_other_tools_find_the_comment(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        write(tmp_path / f"v{suffix}", METADATA)
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert json.loads(container.metadata["comment"]) == METADATA
    with av.open(str(tmp_path / "v.webm")) as container:
        assert json.loads(container.metadata["COMMENT"]) == METADATA
    with Image.open(tmp_path / "v.gif") as image:
        assert json.loads(image.info["comment"]) == METADATA
        assert sum(1 for _ in ImageSequence.Iterator(image)) == 3
    with Image.open(tmp_path / "v.png") as image:
        assert json.loads(image.info["Comment"]) == METADATA


def test_unencodable_metadata_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not valid UTF-8"):
        VideoWriter(tmp_path / "v.mp4", 16, 16, metadata={"prompt": "\udcff"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("comment", ["made with love", "[1]", "7", '{"n": 1}', ""])
def test_foreign_comments_are_no_provenance(tmp_path: Path, comment: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "v.gif", comment=comment)
    assert read_metadata(tmp_path / "v.gif") == {}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"not a video\n", b"ffconcat version 1.0"])
def test_damaged_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"v{suffix}"
    path.write_bytes(content)
    with pytest.raises(CorruptInputError, match=f"v{suffix} cannot be read") as caught:
        read_metadata(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file_never_crashes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    write(path, METADATA)
    data = path.read_bytes()
    outcomes = set()
    for length in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:length])
        try:
            outcomes.add(str(read_metadata(path)))
        except CorruptInputError:
            outcomes.add("corrupt")
    assert outcomes <= {"corrupt", str({}), str(METADATA)}
    assert "corrupt" in outcomes


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        read_metadata(tmp_path / "v.mp4")
    with pytest.raises(UsageError, match="no known extension"):
        read_metadata(tmp_path / "v.avi")
    with pytest.raises(UsageError, match="looks like a URL"):
        read_metadata("http://127.0.0.1/v.mp4")
