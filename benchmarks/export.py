"""Measure an export against copying the same bytes, in one run on one disk.

Run it as ``python -m benchmarks.export [--lora FILE] CHECKPOINT OUTPUT -- EXPORT-OPTIONS``. It
copies the checkpoint's weights beside OUTPUT, removes the copy, exports, and prints JSON: both
times, their ratio, and the largest anonymous memory of the exporting process. The page cache is
dropped for the source before each, and both end with their bytes on disk (fsync). With ``--lora
FILE`` it exports with these LoRAs as well, and prints the ratio of that to the export without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

WEIGHTS = (".safetensors", ".pth")


def weight_files(source: Path) -> list[Path]:
    """List the files whose bytes the bundle will hold."""
    return sorted(path for path in source.rglob("*") if path.suffix in WEIGHTS)


def forget(files: list[Path]) -> None:
    """Drop the files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(files: list[Path], folder: Path) -> float:
    """Copy the files to ``folder`` and to disk, and remove the copies."""
    forget(files)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    for path in files:
        target = folder / path.name
        shutil.copyfile(path, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def export_seconds(files: list[Path], command: list[str]) -> tuple[float, int]:
    """Run the export; return its time and its peak of anonymous memory in bytes."""
    forget(files)
    start = time.perf_counter()
    child = subprocess.Popen(command)
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.02)
    if child.returncode:
        raise SystemExit(child.returncode)
    return time.perf_counter() - start, peak


def anonymous_bytes(pid: int) -> int:
    """Resident anonymous memory of a process: everything but the page cache."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = (line.split() for line in lines if line.startswith("RssAnon:"))
    return next((int(words[1]) * 1024 for words in fields), 0)


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--lora", type=Path, action="append", default=[])
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()
    files = weight_files(arguments.source)
    copying = copy_seconds(files, arguments.output.with_name(arguments.output.name + ".copy"))
    command = [sys.executable, "-m", "wanx", "export", "-q", str(arguments.source)]
    command += ["-o", str(arguments.output), *arguments.options]
    exporting, peak = export_seconds(files, command)
    figures = {
        "source_gb": sum(path.stat().st_size for path in files) / 1e9,
        "copy_seconds": copying,
        "export_seconds": exporting,
        "ratio": exporting / copying,
        "peak_anonymous_gb": peak / 1e9,
    }
    if arguments.lora:
        shutil.rmtree(arguments.output)
        given = [word for file in arguments.lora for word in ("--lora", str(file))]
        seconds, peak = export_seconds([*files, *arguments.lora], [*command, *given])
        figures |= {
            "export_with_loras_seconds": seconds,
            "ratio_of_loras": seconds / exporting,
            "peak_anonymous_gb_with_loras": peak / 1e9,
        }
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
