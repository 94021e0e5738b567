"""What the command line prints, on streams that cannot take it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wanx.runtime.output.provenance import read_metadata

ONE = ["--steps", "1", "--frames", "1", "--threads", "1", "-o", "v.png"]
# Together in no 8-bit encoding: CJK, beyond the BMP, a middle dot, accents, currencies.
TEXT = "静态 \U0001f980 · é € ￥"
ENCODINGS = ["ascii", "cp932", "cp1252", "utf-16", "utf-8"]


def wanx(
    *arguments: object, cwd: Path, encoding: str = "utf-8", redirect: str = "", python: str = ""
) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, *python.split(), "-m", "wanx", *map(str, arguments)]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *command],
        cwd=cwd, capture_output=True, timeout=600, check=False,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip


def without_hint(stderr: bytes) -> bytes:
    """The lines of ``stderr`` but for the one hint that the built-in model lacks TEXT's words."""
    lines = stderr.splitlines(keepends=True)
    hints = [line for line in lines if line.startswith(b"tiny does not know ")]
    assert len(hints) <= 1
    return b"".join(line for line in lines if line not in hints)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.fault("output that cannot be shown")
def test_a_run_says_what_it_wrote_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    name = f"{TEXT}.png"
    done = wanx("run", "tiny", TEXT, *ONE, "-o", name, cwd=tmp_path, encoding=encoding)
    assert done.returncode == 0, done.stderr
    assert read_metadata(tmp_path / name)["prompt"] == TEXT
    shown = name.encode(encoding, "backslashreplace").decode(encoding)
    assert shown in done.stdout.decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_ascii_unless_utf8(tmp_path: Path, encoding: str) -> None:
    arguments = ["run", "tiny", TEXT, "--negative-prompt", TEXT, "--json", *ONE]
    done = wanx(*arguments, cwd=tmp_path, encoding=encoding)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert text.isascii() == (encoding != "utf-8")
    options = json.loads(text)["options"]
    assert (options["prompt"], options["negative_prompt"]) == (TEXT, TEXT)


def test_json_in_utf8_holds_names_that_are_not(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    done = wanx("run", "tiny", TEXT, "--json", *ONE, "-o", folder / "v.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode())["output"] == str(folder / "v.png")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_errors_are_one_line_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    done = wanx("inspect", TEXT, cwd=tmp_path, encoding=encoding)
    assert done.returncode == 2
    shown = TEXT.encode(encoding, "backslashreplace").decode(encoding)
    (line,) = done.stderr.decode(encoding).splitlines()
    assert line.startswith("error: ")
    assert shown in line


@pytest.mark.parametrize("command", ["", "run", "export", "doctor"])
def test_help_is_ascii(tmp_path: Path, command: str) -> None:
    done = wanx(*command.split(), "--help", cwd=tmp_path, encoding="ascii")
    assert done.returncode == 0
    assert done.stdout.decode("ascii")


@pytest.mark.parametrize("python", ["", "-u"])
@pytest.mark.parametrize(
    ("redirect", "code", "error"),
    [
        (">&-", 0, b""),
        ("2>&-", 0, b""),
        ("<&- >&- 2>&-", 0, b""),
        ("2>/dev/full", 0, b""),
        (">/dev/full", 1, b"error: what was printed is lost: No space left on device\n"),
        (">/dev/full 2>&1", 1, b""),
    ],
)
@pytest.mark.fault("output that cannot be shown")
def test_streams_that_fail_cost_no_video(
    tmp_path: Path, python: str, redirect: str, code: int, error: bytes
) -> None:
    # Two jobs, since the second one must not suffer from what the first one could not print.
    quiet = ["-q"] if redirect.startswith(">") else []
    arguments = ["run", "tiny", TEXT, "--count", "2", *quiet, *ONE]
    done = wanx(*arguments, cwd=tmp_path, redirect=redirect, python=python)
    assert (done.returncode, without_hint(done.stderr)) == (code, error)
    assert {path.name for path in tmp_path.iterdir()} == {"v-1.png", "v-2.png"}
    for path in tmp_path.iterdir():
        assert read_metadata(path)["prompt"] == TEXT


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_costs_no_video(tmp_path: Path, stream: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "wanx", "run", "tiny", TEXT, "--count", "2", *ONE],
        cwd=tmp_path, timeout=600, check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writer},
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == (1 if stream == "stdout" else 0)
    assert len(list(tmp_path.iterdir())) == 2
    if stream == "stdout":
        assert b"error" not in done.stderr
