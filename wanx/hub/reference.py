"""Names of repositories of the Hugging Face hub, and of files in them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from wanx.errors import UsageError
from wanx.hub.official import nearest, official

SCHEME = "hf://"
_SITE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/")
_NAME = r"[A-Za-z0-9][\w.-]*"
_REVISION = r"\w[\w./-]*"
_BARE = re.compile(rf"(?P<repository>{_NAME}/{_NAME})(?:@(?P<revision>{_REVISION}))?/?")
# In a URI the revision of a file has no slash unless it is written as %2F, or is one of these refs.
_URI = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME})"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[\w-]+|[\w%][\w.%-]*))?(?:/(?P<file>.*))?"
)
_PAGE = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME})"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[\w.%-]+))?(?:/(?P<file>[^?]*))?(?:\?.*)?"
)
_OTHER_KINDS = {"datasets": "a data set", "spaces": "a space", "buckets": "a bucket"}
_FILES = (".safetensors", ".sft", ".gguf", ".pth", ".pt", ".bin", ".ckpt", ".json", ".model")


@dataclass(frozen=True, kw_only=True)
class HubReference:
    """A repository of models, or a file or folder of one.

    Attributes:
        repository: ``owner/name``.
        revision: branch, tag or commit; None is the main branch.
        file: path of a file or folder in it; None stands for the repository.
    """

    repository: str
    revision: str | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        """Refuse what leads out of the repository, or of its folder in a cache.

        Raises:
            UsageError: the revision or the path is of no repository.
        """
        revision, file = self.revision, self.file
        if revision is not None and not (
            re.fullmatch(_REVISION, revision) and stays_inside(revision)
        ):
            raise UsageError(f"{revision!r:.80} is no revision of a repository")
        if file is not None and not stays_inside(file):
            raise UsageError(f"{file!r:.80} is no path in a repository")

    def __str__(self) -> str:
        """Name it as the command line takes it, without the scheme."""
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{self.repository}{revision}" + (f"/{self.file}" if self.file else "")


def stays_inside(path: str) -> bool:
    """True for a path that names something below the folder that it is put into."""
    parts = path.split("/")
    return "\\" not in path and not any(part in ("", ".", "..") for part in parts)


def is_uri(name: str) -> bool:
    """True for a name that can mean nothing but something on the hub."""
    return name.startswith(SCHEME) or bool(_SITE.match(name))


def hub_reference(name: str | Path | None) -> HubReference | None:
    """Reference that a name stands for; None for a path, whether anything is there or not.

    ``hf://owner/name@revision/file`` is always one, and so is the address of a page of the hub;
    ``owner/name@revision`` and the short name of an official checkpoint are unless a file or folder
    is called so.

    Raises:
        UsageError: the name begins with ``hf://`` and goes on as no repository of models does, or
            it is nearly a short name.
    """
    if name is None or isinstance(name, Path):
        return None
    if is_uri(name):
        return _parse_uri(name)
    if os.path.lexists(name):
        return None
    if known := official(name):
        return HubReference(repository=known.repository)
    match = _BARE.fullmatch(name)
    if match and not name.endswith(_FILES):
        return HubReference(repository=match["repository"], revision=match["revision"])
    if re.fullmatch(_NAME, name) and (similar := nearest(name)):
        raise UsageError(
            f"{name} does not exist; did you mean {similar}? (wanx export --list has all names)"
        )
    return None


def _parse_uri(text: str) -> HubReference:
    site = _SITE.match(text)
    rest = text[site.end() :] if site else text.removeprefix(SCHEME)
    if kind := _OTHER_KINDS.get(rest.partition("/")[0]):
        raise UsageError(f"{text} is {kind}; give a repository of models: {SCHEME}owner/name")
    rest = rest.removeprefix("models/") if rest.count("/") > 1 else rest
    match = (_PAGE if site else _URI).fullmatch(rest)
    if not match:
        raise UsageError(f"{text} is no address on the hub; write {SCHEME}owner/name@revision/file")
    revision, file = match["revision"], (match["file"] or "").rstrip("/")
    return HubReference(
        repository=match["repository"],
        revision=None if revision is None else unquote(revision),
        file=file or None,
    )
