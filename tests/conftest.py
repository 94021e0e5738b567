"""Pipelines of diffusers with random weights, their checkpoints, and the bundles made of them."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.command_line import Outcome, Wanx

# `make floors` runs tests of the runtime where there is no PyTorch, and so no kernel.
if find_spec("torch"):
    from tests.support import interpreter  # noqa: F401  # before any kernel is imported

# The heavy packages are imported where they are used: most tests need none of them.
if TYPE_CHECKING:
    from diffusers import WanPipeline

    from tests.support.hub_server import Hub
    from wanx.bundle.reader import Bundle
    from wanx.progress import Progress

Export = Callable[..., "Bundle"]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remember nothing from other runs: which files are sound, calibration, compiled code."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _deliverable_sigint() -> None:
    """A background job ignores SIGINT, and so would every process that a test interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def _torch_threads() -> int | None:
    """How many threads torch takes by itself, where a test has imported it."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else None


@pytest.fixture(autouse=True)
def _own_threads(_torch_threads: int | None) -> Iterator[None]:
    """A session with a number of threads sets it for the process."""
    yield
    torch = sys.modules.get("torch")
    if torch and _torch_threads and torch.get_num_threads() != _torch_threads:
        torch.set_num_threads(_torch_threads)


@pytest.fixture(scope="session")
def peer_of() -> Callable[[str], Any]:
    """The oracle for a task, in fp32; tests must not change it."""
    from tests.support.peers import random_pipeline

    return functools.cache(random_pipeline)


@pytest.fixture(scope="session")
def checkpoint_of(
    peer_of: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The oracle as the Diffusers layout that it saves itself; tests must not change it."""
    base = tmp_path_factory.mktemp("checkpoint")

    @functools.cache
    def checkpoint(task: str) -> Path:
        folder = base / ("random" if task == "t2v" else f"random-{task}")
        peer_of(task).save_pretrained(folder)
        return folder

    return checkpoint


@pytest.fixture(scope="session")
def peer(peer_of: Callable[[str], Any]) -> WanPipeline:
    return peer_of("t2v")


@pytest.fixture(scope="session")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("t2v")


@pytest.fixture(scope="session")
def export_quickly() -> Export:
    """Export as :func:`wanx.exporter.export.export` does; each network is traced only once."""

    from wanx.exporter.export import export
    from wanx.exporter.options import ExportOptions
    from wanx.progress import no_progress

    def act(
        source: Path, output: Path, *, progress: Progress = no_progress, **options: Any
    ) -> Bundle:
        return export(ExportOptions(source=source, output=output, **options), progress)

    return act


@pytest.fixture(scope="session")
def bundle_of(
    checkpoint_of: Callable[[str], Path],
    export_quickly: Export,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Bundle]:
    """The checkpoint for a task as a bundle of a given precision; tests must not change it."""
    folder = tmp_path_factory.mktemp("bundles")

    @functools.cache
    def bundle(task: str, precision: str) -> Bundle:
        source, output = checkpoint_of(task), folder / f"{task}-{precision}"
        return export_quickly(source, output, precision=precision)

    return bundle


@pytest.fixture(scope="session")
def bundles(bundle_of: Callable[[str, str], Bundle]) -> Callable[[str], Bundle]:
    """The text-to-video checkpoint as a bundle of a given precision."""
    return functools.partial(bundle_of, "t2v")


@pytest.fixture(scope="session")
def bundle_fp32(bundles: Callable[[str], Bundle]) -> Bundle:
    return bundles("fp32")


@pytest.fixture
def wanx(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Wanx:
    """Run the command line in this process, in an empty folder."""
    from wanx.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["wanx", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        code = exit_info.value.code
        return Outcome(0 if code is None else int(code), captured.out, captured.err)

    return run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub on loopback, an empty cache in ``tmp_path / "hub"``, and no token."""
    from huggingface_hub import constants

    from tests.support.hub_server import serve

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
