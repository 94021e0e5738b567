"""Bundles in the hub's cache, whose files are links, and links that come from elsewhere."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import wanx
from tests.support.hub_server import COMMIT, Hub
from wanx.builtin import builtin_bundle, find_bundle
from wanx.bundle.reader import open_bundle
from wanx.errors import CorruptInputError, UsageError
from wanx.files.hub_cache import cached_blob, hub_name, is_snapshot, without_links
from wanx.files.onnx_wire import external_data
from wanx.runtime.options import RunOptions

QUICK = {"prompt": "a red circle", "steps": 1, "frames": 1, "width": 32, "height": 32, "seed": 1}


def in_cache(source: Path, cache: Path, shared: bool = False) -> Path:
    """Put a folder into a cache as ``huggingface_hub`` does; returns the snapshot."""
    repository = cache / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    blobs.mkdir(parents=True)
    for file in source.rglob("*"):
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            blob = blobs / digest
            if shared:  # equal files of several repositories are stored once
                store = cache / "blobs" / digest[:2] / digest
                store.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, store)
                if not blob.is_symlink():
                    blob.symlink_to(os.path.relpath(store, blobs))
            else:
                shutil.copy(file, blob)
            link = snapshot / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture(params=[False, True], ids=["own blobs", "shared blobs"])
def snapshot(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return in_cache(builtin_bundle(), tmp_path / "hub", request.param)


def test_a_bundle_of_links_runs(snapshot: Path) -> None:
    (snapshot / "README.md").write_text("# A card")
    made = wanx.load(snapshot).run(RunOptions(**QUICK))
    expected = wanx.load("tiny").run(RunOptions(**QUICK))
    assert made.frames is not None
    assert expected.frames is not None
    assert (made.frames == expected.frames).all()
    verified = wanx.verify(snapshot)
    assert verified.intact
    assert hub_name(snapshot) == f"owner/name@{COMMIT}"


def test_weights_are_named_without_links(snapshot: Path) -> None:
    graph = snapshot / "graphs" / "dit.onnx"
    root, model = without_links(snapshot, graph.read_bytes())
    before = list(external_data(graph.read_bytes()))
    after = list(external_data(model))
    assert root == Path(os.path.realpath(snapshot)).parents[2]
    assert [entry[1:] for entry in after] == [entry[1:] for entry in before]
    for old, new in zip(before, after, strict=True):
        path = root / new.location
        assert not path.is_symlink()
        assert path.samefile(snapshot / old.location)
    assert without_links(builtin_bundle(), b"x") == (builtin_bundle(), b"x")
    link = snapshot / before[0].location
    link.unlink()
    link.symlink_to("/dev/null")  # after the check
    with pytest.raises(CorruptInputError, match="leads out of the hub's cache"):
        without_links(snapshot, graph.read_bytes())


def elsewhere(snapshot: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    shutil.copy(snapshot / "weights" / "dit.safetensors", target)
    (snapshot / "weights" / "dit.safetensors").unlink()
    (snapshot / "weights" / "dit.safetensors").symlink_to(target)


def linked_blob(snapshot: Path, tmp_path: Path) -> None:
    """A blob that leads out of the cache."""
    blob = snapshot / "weights" / os.readlink(snapshot / "weights" / "dit.safetensors")
    shutil.copy(blob, tmp_path / "elsewhere")
    os.unlink(blob)
    os.symlink(tmp_path / "elsewhere", blob)


def hard_linked(snapshot: Path, tmp_path: Path) -> None:
    os.link(os.path.realpath(snapshot / "weights" / "dit.safetensors"), tmp_path / "other")


def linked_folder(snapshot: Path, tmp_path: Path) -> None:
    (snapshot / "weights").rename(tmp_path / "weights")
    (snapshot / "weights").symlink_to(tmp_path / "weights")


def gone(snapshot: Path, tmp_path: Path) -> None:
    os.unlink(os.path.realpath(snapshot / "weights" / "dit.safetensors"))


def changed(snapshot: Path, tmp_path: Path) -> None:
    path = Path(os.path.realpath(snapshot / "weights" / "dit.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def foreign(snapshot: Path, tmp_path: Path) -> None:
    (snapshot / "weights" / "more.safetensors").symlink_to(snapshot / "manifest.json")


@pytest.mark.parametrize(
    "damage", [elsewhere, linked_blob, hard_linked, linked_folder, gone, changed, foreign]
)
@pytest.mark.fault("links in a bundle of the hub's cache")
def test_other_links_stay_refused(
    damage: Callable[[Path, Path], None], snapshot: Path, tmp_path: Path
) -> None:
    damage(snapshot, tmp_path)
    with pytest.raises(CorruptInputError, match=r"weights"):
        open_bundle(snapshot)


def test_links_outside_a_cache_stay_refused(snapshot: Path, tmp_path: Path) -> None:
    """The same links, where no cache is: the folder has another name."""
    repository = snapshot.parents[1]
    other = repository.rename(repository.with_name("bundles"))
    with pytest.raises(CorruptInputError, match="is a symbolic link: make a copy"):
        open_bundle(other / "snapshots" / COMMIT)
    assert not is_snapshot(other / "snapshots" / COMMIT)
    link = tmp_path / "link"
    link.symlink_to(other)
    assert cached_blob(link) is None
    assert hub_name(tmp_path) is None


def test_what_a_bundle_lists_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add_folder("owner/name", builtin_bundle())
    repo.files |= {"README.md": b"# A card" * 2000, "demo.mp4": b"x" * 90_000}
    assert wanx.inspect("owner/name").manifest.name == "tiny"
    assert hub.fetched() == {"manifest.json"}
    made = wanx.load("owner/name").run(RunOptions(**QUICK))
    assert made.frames is not None
    assert hub.fetched() == set(repo.files) - {".gitattributes", "README.md", "demo.mp4"}
    hub.sent.clear()
    assert find_bundle("hf://owner/name@main") == find_bundle("owner/name")
    assert not hub.sent


@pytest.mark.fault("hub id that is no bundle")
def test_repositories_that_are_no_bundle(hub: Hub, tmp_path: Path) -> None:
    hub.add_folder("owner/name", builtin_bundle())
    hub.repos["owner/name"].files["manifest.json"] = b'{"wanx_version": 3}'
    with pytest.raises(CorruptInputError, match="manifest"):
        wanx.load("owner/name")
    del hub.repos["owner/name"].files["manifest.json"]
    with pytest.raises(UsageError, match="`wanx export owner/name` makes one of a checkpoint"):
        wanx.load("owner/name")
    hub.add_folder("owner/other", builtin_bundle())
    del hub.repos["owner/other"].files["weights/dit.safetensors"]
    with pytest.raises(CorruptInputError, match=r"weights/dit.safetensors is missing"):
        wanx.load("owner/other")


def test_nothing_is_built_into_the_cache(snapshot: Path) -> None:
    before = sorted(snapshot.rglob("*"))
    with pytest.raises(UsageError, match=r"is in the hub's cache and stays as it is; .* cp -RL"):
        wanx.build(snapshot, target="openvino")
    with pytest.raises(UsageError, match="hf download owner/name --local-dir NEW"):
        wanx.build("owner/name", target="openvino")
    assert sorted(snapshot.rglob("*")) == before
    command = open_bundle(snapshot).build_command("aoti")
    assert command.startswith(f"cp -RL {snapshot} NEW && wanx build NEW --target aoti")
