"""Commands on the hub, as they are typed and as environment variables steer them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import PROMPT, SMALL

from tests.support.command_line import Wanx
from tests.support.hub_server import TOKEN, Hub, Repo
from tests.support.layouts import write_original
from wanx.builtin import builtin_bundle

QUICK = ("--golden-steps", "0")


def published(hub: Hub, folder: Path, name: str = "owner/name") -> Repo:
    return hub.add_folder(name, folder)


@pytest.fixture(scope="module")
def original(peer_of: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(peer_of("t2v"), tmp_path_factory.mktemp("o") / "original")


def test_the_official_checkpoints_are_listed(wanx: Wanx) -> None:
    result = wanx("export", "--list")
    assert result.code == 0
    assert "t2v-1.3B        Wan-AI/Wan2.1-T2V-1.3B        t2v    18 GB" in result.out
    listed = json.loads(wanx("export", "--list", "--json").out)
    assert {"name": "vace-14B", "repository": "Wan-AI/Wan2.1-VACE-14B"}.items() <= listed[
        -1
    ].items()


def test_a_short_name_from_plan_to_video(
    wanx: Wanx, original: Path, hub: Hub, tmp_path: Path
) -> None:
    published(hub, original, "Wan-AI/Wan2.1-T2V-1.3B")
    planned = wanx("export", "t2v-1.3b", "--dry-run", *QUICK)
    assert planned.code == 0
    assert "custom (t2v, original layout) at fp32" in planned.out
    assert "\nto download: " in planned.out
    facts = json.loads(wanx("export", "t2v-1.3B", "--dry-run", "--json", *QUICK).out)
    assert facts["download_bytes"] > 1e6
    assert facts["files"]["vae"][0].endswith("Wan2.1_VAE.pth")
    exported = wanx("export", "t2v-1.3B", "-o", "bundle", *QUICK)
    assert exported.code == 0
    lines = exported.err.splitlines()
    assert any(
        line.startswith("downloading ") and "GB free" in line and "8 files" in line
        for line in lines
    )
    assert [line for line in lines if line.startswith("download: ")]
    assert "made by wanx" in exported.out
    assert "from Wan-AI/Wan2.1-T2V-1.3B@0123" in exported.out
    again = wanx("export", "t2v-1.3B", "--dry-run", *QUICK)
    assert "to download: 0 B of " in again.out


def test_a_bundle_from_the_hub(wanx: Wanx, hub: Hub, tmp_path: Path) -> None:
    published(hub, builtin_bundle())
    for name in ("owner/name", "hf://owner/name@main"):
        result = wanx("run", name, PROMPT, "-o", "v.mp4", *SMALL)
        assert result.code == 0
        assert (tmp_path / "v.mp4").exists()
    assert wanx("run", "owner/name", "-o", "w.mp4", *SMALL).code == 0
    assert wanx("verify", "owner/name", "--no-golden").code == 0
    shown = wanx("inspect", "owner/name")
    assert shown.out.startswith("owner/name@0123")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["export", "owner/missing"], 2, "owner/missing is neither a folder here nor a model on"),
        (["export", "owner/data"], 2, "owner/data is a data set, not a model"),
        (["export", "hf://datasets/owner/data"], 2, "is a data set; give a repository of models"),
        (["export", "t2v-13B"], 2, "t2v-13B does not exist; did you mean t2v-1.3B?"),
        (["export", "Wan-AI/Wan2.1-T2V-1.3b-Difusers"], 2,
         "did you mean Wan-AI/Wan2.1-T2V-1.3B-Diffusers?"),
        (["export", "owner/gated", "-q"], 4, "owner/gated is gated: accept its terms at"),
        (["export", "owner/name", "--revision", "v9"], 2, "owner/name has no revision v9"),
        (["export", "tiny", "--revision", "v9"], 2, "--revision v9 is of a source on the hub"),
        (["export", "owner/bare"], 2, "owner/bare holds no checkpoint of Wan2.1"),
        (["export", "--dit", "hf://owner/name/x.safetensors"], 2, "owner/name has no file x.saf"),
        (["export", "--lora", "hf://owner/bare"], 2, "owner/bare holds 0 files of weights"),
        (["export", "--lora", "hf://owner/missing/x.safetensors"], 2, "is neither a folder here"),
        (["run", "owner/missing", "a cat"], 2, "is neither a folder here nor a model on the hub"),
        (["run", "owner/bare", "a cat"], 2, "owner/bare is no bundle, it has no manifest.json"),
        (["run", "hf://owner/name/x", "a cat"], 2, "is a file of a repository, not a bundle"),
        (["run", "hf://owner"], 2, "is no address on the hub"),
        (["build", "owner/name"], 2, "hf download owner/name --local-dir NEW"),
        (["bench", "owner/missing", "-o", "r"], 2, "is neither a folder here"),
        (["inspect", "owner/missing"], 2, "is neither a folder here"),
    ],
)  # fmt: skip
@pytest.mark.fault("hub id that is nearly one", "repository that cannot be read")
def test_one_line_each(
    arguments: list[str], code: int, words: str, wanx: Wanx, hub: Hub, original: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    published(hub, original)
    hub.repos["owner/data"] = Repo(files={"a": b"x"}, kind="datasets")
    hub.repos["owner/gated"] = Repo(
        files={"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"x" * 9000},
        gated=True,
    )
    hub.repos["owner/bare"] = Repo(files={"README.md": b"x"})
    result = wanx(*arguments)
    assert words in result.error
    assert result.code == code
    assert {path.name for path in tmp_path.iterdir()} <= {"hub"}


def environment(hub: Hub, tmp_path: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")} | more


def test_variables_of_the_environment(hub: Hub, tmp_path: Path) -> None:
    published(hub, builtin_bundle()).private = True

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "wanx", "inspect", "owner/name"]
        return subprocess.run(
            command, env=environment(hub, tmp_path, **more), capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip

    refused = run()
    assert refused.returncode == 2
    assert "a private one is read with a token: set HF_TOKEN" in refused.stderr
    assert run(HF_TOKEN=TOKEN).returncode == 0
    assert list((tmp_path / "home" / "hub").glob("models--owner--name"))
    hub.requests.clear()
    offline = run(HF_HUB_OFFLINE="1")
    assert (offline.returncode, hub.requests) == (0, [])
    other = run(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "other"))
    assert other.returncode == 4
    assert other.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE is set; unset it" in other.stderr


@pytest.mark.parametrize("command", ["export", "run"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_download_that_is_interrupted(
    command: str, number: signal.Signals, hub: Hub, original: Path, tmp_path: Path
) -> None:
    repo = published(hub, original if command == "export" else builtin_bundle())
    large = "Wan2.1_VAE.pth" if command == "export" else "weights/dit.safetensors"
    hub.slow = large
    arguments = [command, "owner/name", *(QUICK if command == "export" else ())]
    process = subprocess.Popen(
        [sys.executable, "-m", "wanx", *arguments],
        env=environment(hub, tmp_path, TMPDIR=str(tmp_path), PYTHONFAULTHANDLER="1"), cwd=tmp_path,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    cache, deadline = tmp_path / "home" / "hub", time.monotonic() + 120
    while not list(cache.rglob("*.incomplete")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(repo.files[large]) > 1e5
    start = time.monotonic()
    process.send_signal(number)
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # which prints the stacks of its threads
        pytest.fail(process.communicate()[1])
    assert time.monotonic() - start < 20
    assert process.returncode == 128 + number
    assert err.splitlines()[-1] == "interrupted: nothing partial was left behind"
    assert not list(cache.rglob("*.incomplete"))
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
