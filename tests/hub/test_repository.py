"""Downloads from a server on loopback: whole, resumed, cut, wrong, refused, offline."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import wanx.hub.download as module
from tests.support.hub_server import COMMIT, TOKEN, Hub, Repo
from wanx.errors import CorruptInputError, EnvironmentMismatchError, UsageError, WanxError
from wanx.hub import repository as repositories
from wanx.hub.download import download, require_space
from wanx.hub.reference import HubReference
from wanx.hub.remote_file import open_remote
from wanx.hub.repository import Repository, open_repository

NAME = "owner/name"
FILES = {
    "config.json": b"{}",
    "sub/a.safetensors": bytes(range(256)) * 400,
    "b[1].safetensors": bytes(reversed(range(256))) * 200,
    "README.md": b"x" * 5000,
}
WANTED = [name for name in FILES if name != "README.md"]


@pytest.fixture
def repo(hub: Hub) -> Repo:
    hub.repos[NAME] = Repo(files=dict(FILES), revisions=("main", "v1"))
    return hub.repos[NAME]


def opened(**options: Any) -> Repository:
    return open_repository(HubReference(repository=NAME, **options))


def assert_whole(folder: Path, names: list[str] = WANTED) -> None:
    for name in names:
        assert (folder / name).read_bytes() == FILES[name]
        assert (folder / name).is_symlink()


def assert_no_rest(tmp_path: Path) -> None:
    assert not list((tmp_path / "hub").rglob("*.incomplete"))


def test_files_come_into_the_cache_once(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    repository = opened()
    assert repository.missing([]) == []
    assert repository.sizes == {name: len(data) for name, data in FILES.items()}
    assert repository.missing(WANTED) == WANTED
    folder = download(
        repository, WANTED, lambda stage, done, total, unit: calls.append((stage, done, total))
    )
    assert folder == tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    assert_whole(folder)
    assert hub.fetched() == set(WANTED)
    total = sum(len(FILES[name]) for name in WANTED)
    arrived = [done for stage, done, of in calls if stage == "download" and of == total]
    assert arrived[0] == 0
    assert arrived == sorted(arrived)
    assert arrived[-1] == total
    hub.sent.clear()
    assert download(opened(), WANTED) == folder
    assert download(opened(revision="v1"), WANTED) == folder
    assert download(opened(revision=COMMIT), WANTED) == folder
    assert not hub.sent


@pytest.mark.fault("download that is cut")
def test_a_cut_connection_is_resumed(
    hub: Hub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what is written at once
    hub.cut_after = [30_000, 20_000]
    assert_whole(download(opened(), ["sub/a.safetensors"]), ["sub/a.safetensors"])
    ranges = [asked for method, path, asked in hub.requests if "a.safetensors" in path and asked]
    assert len(ranges) == 2
    assert all(int(asked.removeprefix("bytes=").rstrip("-")) > 0 for asked in ranges)
    assert hub.sent["sub/a.safetensors"] < len(FILES["sub/a.safetensors"]) + 3 * 4096
    assert_no_rest(tmp_path)


@pytest.mark.fault("download that is cut")
def test_a_connection_that_stays_cut(
    hub: Hub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    repository = opened()
    download(repository, ["config.json"])
    hub.cut_after = [0] * 50
    with pytest.raises(EnvironmentMismatchError, match="run the command again: what is complete"):
        download(repository, WANTED)
    assert_no_rest(tmp_path)
    hub.cut_after.clear()
    hub.sent.clear()
    assert_whole(download(repository, WANTED))
    assert "config.json" not in hub.sent


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.fault("download with another hash")
def test_a_file_whose_hash_differs(name: str, hub: Hub, repo: Repo) -> None:
    repo.lies = frozenset({name})
    with pytest.raises(CorruptInputError) as caught:
        download(opened(), WANTED)
    assert str(caught.value).startswith(f"{name} of owner/name is not what the hub says")
    repo.lies = frozenset()
    hub.sent.clear()
    assert_whole(download(opened(), WANTED))
    assert hub.fetched() == {name}


def test_hashes_are_read_once(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download(opened(), WANTED)
    past = time.time() - 100
    for name in WANTED:
        os.utime(folder / name, (past, past))
    monkeypatch.setattr("wanx.files.checksum._SETTLED_NS", 0)
    download(opened(), WANTED)

    def never(*args: object) -> str:
        raise AssertionError("it was hashed again")

    monkeypatch.setattr(module, "sha256_file", never)
    download(opened(), WANTED)


@pytest.mark.parametrize(
    ("change", "reference", "kind", "words"),
    [
        ({"private": True}, {}, UsageError, "is neither a folder here nor a model on the hub"),
        ({"kind": "datasets"}, {}, UsageError, "owner/name is a data set, not a model"),
        ({"kind": "spaces"}, {}, UsageError, "owner/name is a space, not a model"),
        ({"gated": True}, {}, EnvironmentMismatchError, "is gated: accept its terms at http"),
        ({}, {"revision": "v2"}, UsageError, "owner/name has no revision v2"),
        ({}, {"repository": "Wan-AI/Wan2_1-T2V-1_3B"}, UsageError,
         "did you mean Wan-AI/Wan2.1-T2V-1.3B?"),
    ],
)  # fmt: skip
@pytest.mark.fault("repository that cannot be read")
def test_repositories_that_cannot_be_read(
    change: dict[str, Any], reference: dict[str, str], kind: type[WanxError], words: str,
    repo: Repo,
) -> None:  # fmt: skip
    for name, value in change.items():
        setattr(repo, name, value)
    with pytest.raises(kind) as caught:
        download(open_repository(HubReference(**{"repository": NAME} | reference)), WANTED)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["private", "gated"])
def test_a_token_opens_them(
    change: str, hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    setattr(repo, change, True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_whole(download(opened(), WANTED))


@pytest.mark.parametrize("offline", ["variable", "network", "503", "429", "silence"])
@pytest.mark.fault("no network")
def test_offline(
    offline: str, hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from huggingface_hub import constants

    folder = download(opened(), ["config.json"])
    if offline == "variable":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif offline == "network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif offline == "silence":
        hub.silent = 3.0
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    else:
        hub.status = int(offline)
    repository = opened()
    assert repository.offline
    assert "taken as the cache has it" in caplog.text
    assert download(repository, ["config.json"]) == folder
    with pytest.raises(EnvironmentMismatchError) as caught:
        download(repository, WANTED)
    assert "the cache has 1 of 3 files of owner/name, not b[1].safetensors, sub/a.saf" in str(
        caught.value
    )
    with pytest.raises(EnvironmentMismatchError) as caught:
        open_repository(HubReference(repository="owner/other"))
    words = {"variable": "HF_HUB_OFFLINE is set", "503": "answers 503", "429": "answers 429"}
    assert words.get(offline, "is not here, and the hub is not reached") in str(caught.value)


@pytest.mark.fault("disk too small for a download")
def test_a_disk_that_is_too_small(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = opened()
    needed = repository.bytes_of(WANTED) + module._RESERVE

    def free(path: Path) -> Any:
        return type("Usage", (), {"free": needed + 10})

    monkeypatch.setattr(module.shutil, "disk_usage", free)
    require_space(repository, WANTED, 10)
    with pytest.raises(WanxError, match=r"brings 0\.2 MB and 0\.0 MB beside them, and the disk"):
        require_space(repository, WANTED, 11)


def test_interruption_leaves_no_rest(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    repo.files["sub/a.safetensors"] = bytes(40 << 20)

    def interrupt(stage: str, done: int, total: int, unit: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(opened(), WANTED, interrupt)
    assert_no_rest(tmp_path)
    deadline = time.monotonic() + 30  # its threads hear of it at their next piece
    while any("PoolExecutor" in t.name for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_parts_of_a_file(hub: Hub, repo: Repo) -> None:
    data = FILES["sub/a.safetensors"]
    with open_remote(opened(), "sub/a.safetensors") as file:
        assert file.read(10) == data[:10]
        file.seek(-7, 2)
        assert file.read() == data[-7:]
        file.seek(1000)
        assert file.read(5) == data[1000:1005]
        file.seek(len(data) + 5)
        assert file.read(5) == b""
    hub.ignores_ranges = True
    with open_remote(opened(), "sub/a.safetensors") as file:
        file.seek(50_000)
        with pytest.raises(WanxError, match="cannot be read in parts"):
            file.read(10)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repositories, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentMismatchError, match=r"pip install 'wanx\[hub\]'"):
        opened()


def test_a_new_commit_with_the_same_files(hub: Hub, repo: Repo, monkeypatch: Any) -> None:
    """What another commit brought counts as there, and is linked without a download."""
    from tests.support import hub_server

    download(opened(), WANTED)
    monkeypatch.setattr(hub_server, "COMMIT", "f" * 40)
    hub.sent.clear()
    repository = opened()
    assert repository.commit == "f" * 40
    assert repository.missing(WANTED) == []
    assert_whole(download(repository, WANTED))
    assert not hub.sent


@pytest.mark.fault("download with another hash")
def test_copies_are_checked_too(hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no links, as on Windows."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *args: False)
    repo.lies = frozenset({"sub/a.safetensors"})
    with pytest.raises(CorruptInputError, match=r"sub/a\.safetensors of owner/name is not what"):
        download(opened(), WANTED)
    repo.lies = frozenset()
    folder = download(opened(), WANTED)
    assert not (folder / "sub" / "a.safetensors").is_symlink()
    assert (folder / "sub" / "a.safetensors").read_bytes() == FILES["sub/a.safetensors"]


def test_a_revision_is_remembered(hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repo.revisions = ("main", "feature/x")
    folder = download(opened(revision="feature/x"), WANTED)
    assert download(opened(), WANTED) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "feature/x", COMMIT):
        assert download(opened(revision=revision), WANTED) == folder


@pytest.mark.parametrize("name", ["/abs/x.safetensors", "../x", "a//b", "a/./b"])
def test_names_that_no_repository_has(name: str, hub: Hub, repo: Repo) -> None:
    repo.files[name] = b"x"
    with pytest.raises(CorruptInputError, match="which no repository can have; check HF_ENDPOINT"):
        opened()


def test_a_damaged_file_in_a_shared_store(hub: Hub, repo: Repo) -> None:
    """The blob that several repositories lead to is removed, or it would come back."""
    folder = download(opened(), WANTED)
    link = folder / "sub" / "a.safetensors"
    blob = Path(os.path.realpath(link))
    store = folder.parents[2] / "blobs" / "ab" / ("c" * 64)
    store.parent.mkdir(parents=True)
    store.write_bytes(bytes(len(FILES["sub/a.safetensors"])))
    blob.unlink()
    blob.symlink_to(store)
    with pytest.raises(CorruptInputError, match="its hash differs"):
        download(opened(), WANTED)
    assert not store.exists()
    assert_whole(download(opened(), WANTED))
