"""Verification of a bundle: the hash of every file, and the golden steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wanx.accuracy.gates import Agreement, Gates
from wanx.accuracy.golden_check import check_golden, require_golden
from wanx.accuracy.golden_tokens import check_golden_tokens
from wanx.builtin import find_bundle, is_builtin
from wanx.bundle.reader import FileCheck, read_bundle, verify_bundle
from wanx.errors import CorruptInputError, GateError
from wanx.progress import Progress, byte_counter, no_progress


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of :func:`verify`.

    Attributes:
        files: every file of the bundle, with what is wrong with it.
        golden_steps: agreement per step and branch; empty where there are no golden steps, where
            they were not asked for, or where a file is damaged.
        text_error: why the tokenizer is not what it was at the export; None where it is, or was not
            asked for.
    """

    files: tuple[FileCheck, ...]
    golden_steps: tuple[Agreement, ...]
    text_error: CorruptInputError | GateError | None = None

    @property
    def intact(self) -> bool:
        """True if every file is what the manifest says."""
        return not any(check.problem for check in self.files)

    def require_accuracy(self, gates: Gates | None = None) -> None:
        """Refuse other token ids than at the export, and golden steps below the gates.

        Raises:
            CorruptInputError: the tokenizer cannot encode.
            GateError: names the worst step, or the number of ids.
        """
        if self.text_error is not None:
            raise self.text_error
        require_golden(self.golden_steps, gates or Gates())


def verify(
    bundle: str | Path,
    *,
    golden: bool = True,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Hash every file of a bundle, and run its golden steps if all are intact.

    Args:
        bundle: folder, or the name of a built-in bundle.
        golden: whether to encode the golden text and run the golden steps, which loads the
            denoiser.
        threads: threads of the processor; None takes all cores.
        progress: told how far each stage is.

    Raises:
        WanxError: the manifest cannot be used.
    """
    folder = find_bundle(bundle, progress)
    opened = read_bundle(folder)
    files = tuple(
        verify_bundle(
            opened,
            on_bytes=byte_counter(progress, "verify", opened.size_bytes),
            allow_hard_links=is_builtin(folder),
        )
    )
    steps: tuple[Agreement, ...] = ()
    text_error = None
    if golden and not any(check.problem for check in files):
        try:
            check_golden_tokens(opened)
        except (CorruptInputError, GateError) as error:
            text_error = error
        steps = check_golden(opened, threads=threads, progress=progress)
    return Verification(files=files, golden_steps=steps, text_error=text_error)
