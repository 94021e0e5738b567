"""Names that mean a repository of the hub, and names that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from wanx.errors import UsageError
from wanx.hub.official import OFFICIAL, nearest
from wanx.hub.reference import HubReference, hub_reference


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Wan-AI/Wan2.1-T2V-14B", ("Wan-AI/Wan2.1-T2V-14B", None, None)),
        ("owner/name@v1.0", ("owner/name", "v1.0", None)),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3", None)),
        ("hf://owner/name", ("owner/name", None, None)),
        ("hf://models/owner/name", ("owner/name", None, None)),
        ("hf://owner/name@abc", ("owner/name", "abc", None)),
        ("hf://owner/name@refs%2Fpr%2F3/a/b.gguf", ("owner/name", "refs/pr/3", "a/b.gguf")),
        ("hf://owner/name/a/b.safetensors", ("owner/name", None, "a/b.safetensors")),
        ("hf://owner/name/", ("owner/name", None, None)),
        ("owner/name/", ("owner/name", None, None)),
        ("https://huggingface.co/owner/name", ("owner/name", None, None)),
        ("https://huggingface.co/owner/name/tree/v1/a", ("owner/name", "v1", "a")),
        (
            "https://huggingface.co/owner/name/blob/refs%2Fpr%2F3/a.gguf?x=1",
            ("owner/name", "refs/pr/3", "a.gguf"),
        ),
        ("t2v-1.3B", ("Wan-AI/Wan2.1-T2V-1.3B", None, None)),
        ("T2V-14b", ("Wan-AI/Wan2.1-T2V-14B", None, None)),
    ],
)
def test_names_of_the_hub(
    name: str, expected: tuple[str, str | None, str | None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found = hub_reference(name)
    assert found is not None
    assert (found.repository, found.revision, found.file) == expected
    assert hub_reference(f"hf://{found}") == found


@pytest.mark.parametrize(
    "name",
    ["tiny", "./owner/name", "/owner/name", "../owner", "a/b/c", "~/name", "a/b.safetensors",
     "owner/", "a b/c", "", "x.gguf", "folder", "ü/b", "/a/b/"],
)  # fmt: skip
def test_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_reference(name) is None
    assert hub_reference(Path("owner/name")) is None


@pytest.mark.parametrize("name", ["owner/name", "t2v-1.3B"])
def test_what_is_here_comes_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_reference(name) is not None
    Path(name).mkdir(parents=True)
    assert hub_reference(name) is None
    assert hub_reference(f"hf://{HubReference(repository='owner/name')}") is not None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf://datasets/owner/name", "is a data set; give a repository of models"),
        ("hf://spaces/owner/name/x", "is a space"),
        ("hf://owner", "is no address on the hub; write hf://owner/name@revision/file"),
        ("hf://owner/name/../../x", "is no path in a repository"),
        ("hf://owner/name//abs/x", "is no path in a repository"),
        ("hf://owner/name/a\\b", "is no path in a repository"),
        ("owner/name@v/../..", "is no revision of a repository"),
        ("hf://owner/name@..%2F..", "is no "),
        ("https://huggingface.co/datasets/owner/name", "is a data set"),
        ("hf:///name", "is no address"),
        ("t2v-1_3B", "did you mean t2v-1.3B?"),
        ("i2v-14B-480", "did you mean i2v-14B-480P?"),
    ],
)
@pytest.mark.fault("hub id that is nearly one")
def test_names_that_are_nearly_one(name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        hub_reference(name)
    assert words in str(caught.value)


def test_nearest_names() -> None:
    assert nearest("Wan-AI/Wan2.1-T2V-1.3b-Difusers") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert nearest("wan-ai/wan2.1-i2v-14b-480p") == "Wan-AI/Wan2.1-I2V-14B-480P"
    assert nearest("stabilityai/sdxl") is None
    assert len({one.name.lower() for one in OFFICIAL}) == len(OFFICIAL)
