"""Nobody is told that wanx runs: telemetry of dependencies is off, and nothing else is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from tests.support.paths import ROOT

NAMESPACE = ["unshare", "--map-root-user", "--net"]
TELEMETRY_SINCE = Version("1.29")
SMALL = ["--steps", "1", "--frames", "5", "--size", "64x64", "--threads", "1"]
COMMANDS = {
    "doctor": ["doctor"],
    "inspect": ["inspect", "tiny"],
    "verify": ["verify", "tiny"],
    "run": ["run", "tiny", "a red circle", "-q", "-o", "{out}/v.mp4", *SMALL],
    "compare": ["compare", "tiny", "tiny", "--steps", "1", "-o", "{out}/report"],
    "bench": ["bench", "tiny", "--steps", "1", "--repeat", "1", "-o", "{out}/speed"],
    "export": ["export", "tiny", "--precision", "fp32", "-o", "{out}/bundle"],
    "export-int8": ["export", "tiny", "--precision", "int8", "-o", "{out}/bundle"],
}
SLOW = ("bench", "export-int8")
# Fonts of the machine, which Matplotlib lists for the plots of a report.
FONT_LIST = ".cache/matplotlib/fontlist-"
# Python imports it first, in the process under test and in those it starts.
RECORDER = """
import os, sys

def record(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        with open(os.environ["RECORD"], "a") as file:
            print(event, arguments[1:] or arguments, file=file)

sys.addaudithook(record)
"""


class Home:
    """A new user's home, temporary folder and working folder, with no network to talk to."""

    def __init__(self, folder: Path) -> None:
        self.home, self.temporary, self.out = (folder / name for name in ("home", "tmp", "out"))
        recorder = folder / "recorder"
        for path in (self.home, self.temporary, self.out, recorder):
            path.mkdir()
        (recorder / "sitecustomize.py").write_text(RECORDER)
        self._record = folder / "record.txt"
        kept = {k: v for k, v in os.environ.items() if k == "PATH" or k.startswith("LC_")}
        self.environment = kept | {
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "RECORD": str(self._record),
            "PYTHONPATH": os.pathsep.join([str(recorder), str(ROOT)]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def python(self, *arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [*NAMESPACE, sys.executable, *arguments],
            cwd=self.out, env=self.environment | environment,
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def contacted(self) -> list[str]:
        return self._record.read_text().splitlines() if self._record.exists() else []

    @property
    def written(self) -> set[str]:
        """Files outside the output, relative to the home or the temporary folder."""
        folders = self.home, self.temporary
        return {
            path.relative_to(folder).as_posix()
            for folder in folders
            for path in folder.rglob("*")
            if not path.is_dir()
        }


@pytest.fixture
def home(tmp_path: Path) -> Home:
    try:
        subprocess.run([*NAMESPACE, "true"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine gives no network namespace ({error})")
    return Home(tmp_path)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in COMMANDS],
)
@pytest.mark.fault("dependency that talks to somebody")
def test_a_command_writes_to_its_own_cache_and_calls_nobody(name: str, home: Home) -> None:
    if name.startswith("export"):
        pytest.importorskip("torch")
    home.python("-m", "wanx", *(word.format(out=home.out) for word in COMMANDS[name]))
    own = ".cache/wanx/", *((FONT_LIST,) if name in ("compare", "bench") else ())
    assert {path for path in home.written if not path.startswith(own)} == set()
    assert home.contacted == []


def test_a_converted_tokenizer_asks_no_hub(home: Home) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = home.out / "corpus.txt"
    corpus.write_text("a red circle moving right on a blue background\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(home.out / "spiece"), vocab_size=40, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    home.python(
        "-c",
        "from pathlib import Path; from wanx.checkpoints.tokenizer_source import *;"
        "write_tokenizer(TokenizerFile(path=Path('spiece.model')), Path('tokenizer.json'))",
    )
    assert "model" in json.loads((home.out / "tokenizer.json").read_text())
    assert home.written == set()
    assert home.contacted == []


@pytest.mark.parametrize("module", ["onnxruntime", "wanx; import onnxruntime"])
def test_where_it_is_allowed_the_listing_shows_it(module: str, home: Home) -> None:
    if Version(version("onnxruntime")) < TELEMETRY_SINCE:
        pytest.skip("this ONNX Runtime has no telemetry")
    home.python("-c", f"import {module}", WANX_ALLOW_TELEMETRY="1")
    assert any(path.endswith(".onnxruntime/deviceid") for path in home.written)


def test_the_recorder_sees_a_worker_that_calls_somebody(home: Home) -> None:
    call = "import socket; socket.getaddrinfo('127.0.0.1', 80)"
    home.python("-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {call!r}])")
    assert len(home.contacted) == 1


@pytest.mark.parametrize(
    ("allowed", "before"), [(None, None), (None, "0"), ("", "1"), ("0", None), ("true", "0")]
)
@pytest.mark.fault("dependency that talks to somebody")
def test_it_is_off_in_every_process(allowed: str | None, before: str | None) -> None:
    assert settings_of_a_worker(before, allowed) == ["1", "1"]


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_it_is_left_alone_where_the_user_allows_it(before: str | None) -> None:
    assert settings_of_a_worker(before, "1") == [before, before]


def settings_of_a_worker(before: str | None, allowed: str | None) -> list[str | None]:
    """Values of the switches in a process that was started by one that imports wanx."""
    switches = ["ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"]
    changes = dict.fromkeys(switches, before) | {"WANX_ALLOW_TELEMETRY": allowed}
    environment = {k: v for k, v in (os.environ | changes).items() if v is not None}
    inner = f"import json, os; print(json.dumps([os.environ.get(name) for name in {switches}]))"
    code = f"import subprocess, sys, wanx; subprocess.run([sys.executable, '-c', {inner!r}])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    settings: list[str | None] = json.loads(done.stdout)
    return settings
