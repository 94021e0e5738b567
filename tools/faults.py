"""Writes docs/faults.md: the faults that wanx survives, with the tests that show it.

    python tools/faults.py

A test says what it shows with ``@pytest.mark.fault("the name of a fault", ...)``, the names being
those of ``FAULTS``. The page is read off the tests' source, so that it cannot drift.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
MARKER = "pytest.mark.fault"

# By part, the faults and what happens instead of the worst.
FAULTS: Mapping[str, Mapping[str, str]] = {
    "Checkpoints": {
        "cut or padded weights": "refused, with the file and the sizes",
        "hostile weights header": "too large, overlapping, overflowing: refused",
        "repeated key": "refused by name",
        "weights that are not finite": "refused by the tensor's name",
        "pickle that runs code": "nothing runs; refused, with a way to get the tensors",
        "pickle that builds too much": "refused before it is loaded",
        "tensors that do not fit": "missing, extra and misshaped ones are listed at once",
        "shard index out of the folder": "refused",
        "unplanned storage type": "read, or refused by its name",
        "tokenizer that cannot encode": "the export writes nothing; run and verify say so",
        "8-bit weights without their scales": "refused by name",
        "cut or damaged GGUF": "refused, whatever its bytes say",
        "GGUF type that nothing widens": "refused by the tensor's name and its type",
        "part that is nowhere": "says where people get it",
        "two files for one part": "refused with both names",
        "LoRA of another model": "refused; three tensors that do not fit are listed",
        "LoRA that is not finite": "refused by the tensor's name",
        "LoRA of a kind that is not fused": "refused by its kind",
    },
    "Hugging Face hub": {
        "hub id that is nearly one": "the nearest name that is known is offered",
        "hub id that is no bundle": "says how to make one",
        "repository that cannot be read": "private, gated, no model, no such revision: what to do",
        "repository without a checkpoint": "says what it holds and which option takes it",
        "no network": "the cache is used; what it lacks is named",
        "download that is cut": "resumed where it broke, and what is complete is kept",
        "download with another hash": "removed from the cache, and fetched again",
        "disk too small for a download": "said before the first byte",
        "links in a bundle of the hub's cache": "followed to its own blobs alone",
    },
    "Bundles": {
        "weights outside the bundle": "paths out of it and links are refused",
        "hard-linked weights": "refused, but for the bundle that is installed with wanx",
        "graph under another name": "checked by what it is used as",
        "missing file": "named",
        "flipped bit": "found by its SHA-256 and named",
        "hostile manifest": "refused",
        "manifest of a newer wanx": "says that an upgrade is needed",
        "read-only bundle": "runs, and building says in one line why it cannot",
        "engine of another machine": "says what it was built for, what is here and what to run",
        "engine from elsewhere": "not loaded unless trusted; `wanx build` makes it anew",
        "bundle replaced during a run": "the run goes on with the files that it verified",
        "advice that does not help": "the command that an error advises resolves the error",
        "folder of any name": "spaces, quotes and names that are not UTF-8 are names like others",
    },
    "Export and build": {
        "kill at any moment": "no half bundle is seen, and a rerun works",
        "kill at every file operation": "the old bundle or the new one; the next command cleans up",
        "Ctrl-C": "exit 130, nothing is left",
        "SIGTERM, SIGHUP and the like": "as Ctrl-C; the next command removes what SIGKILL left",
        "full disk": "estimated before, one line at every write, nothing is left",
        "power loss": "files and folders are synced before the rename",
        "target that exists": "kept without --force, and replaced only by a whole one",
        "two exporters": "the second is refused and told who the first is; a stale lock is none",
        "a damaged graph cache": "one line, and the graph is traced again",
        "a graph cache that cannot be written": "one line, and nothing is kept",
        "two exports that fill the graph cache": "each entry appears whole",
        "out of memory": "the component is named, and what to do",
        "quantisation that did nothing": "read back from the graph; the export fails",
    },
    "Runs": {
        "a budget of memory": "refused before anything runs, with the least that would do",
        "memory that others take": "the next tiles are smaller, or one line",
        "a bundle of an earlier version": "the command that makes it anew",
        "out of GPU memory": "one line with what to do, and no file",
        "kill while writing": "no partial video under the name",
        "frames that are not finite": "NaN, black and frozen output fail",
        "output that cannot be written": "said before anything is computed",
        "two runs with one name": "each has its own; workers on one file make no line twice",
        "odd prompt": "a leading minus, NUL, a megabyte, bad UTF-8: run, or refused in one line",
        "prompt that is cut": "said once, and kept in the video's metadata",
        "output named like an option or a URL": "a file, or refused; no protocol is opened",
        "bad size, frames or steps": "the nearest valid values are offered",
        "steps and guidance that cannot be": "lists that do not fall, shares that overlap, unknown "
        "presets: one line with what can be",
        "a saving that cannot be": "refused before anything runs, with the most that can be saved",
        "a table of a step cache that is not one": "refused, and one of another bundle too",
        "number without bounds": "refused with the bound, before anything is allocated",
        "wrong type from Python": "one validation for all ways in; the name and the value are said",
        "two runs on one bundle": "do not disturb each other",
        "odd separators in JSON Lines": "lines end at LF or CRLF alone; a BOM is skipped",
        "line that cannot be run": "costs itself, and no other line of the batch",
        "output that cannot be shown": "no stdout, stderr or encoding costs the video",
        "dependency that talks to somebody": "nothing leaves the machine unasked",
    },
    "Images and videos": {
        "image bomb": "refused by its header, and by a cap of our own",
        "damaged image or video": "cut or flipped anywhere: one line",
        "decoding without end": "a budget of pixels and seconds",
        "odd metadata": "what is not needed never refuses a sound image",
        "mirrored or turned video": "all eight orientations, and oblong pixels, as players do",
        "noise of a decoder": "nothing stands beside the one line",
    },
}  # fmt: skip

HEADER = """# Faults that are survived

Errors are one line: what, the value that was seen, what to do. Exit codes: 0 ok, 1 failure,
2 usage, 3 accuracy gate, 4 environment, 5 corrupt input, 128 + the signal for what was interrupted.
Each test below plants the fault; `python tools/faults.py` makes the tables from their source.
"""


def render() -> str:
    """Make the page.

    Raises:
        ValueError: a test marks a fault that is not listed, or a fault has no test.
    """
    tests: dict[str, list[str]] = {}
    for fault, test in marked_tests():
        tests.setdefault(fault, []).append(test)
    listed = {fault for faults in FAULTS.values() for fault in faults}
    if unknown := sorted(tests.keys() - listed):
        raise ValueError(f"tests mark faults that tools/faults.py does not list: {unknown}")
    if untested := sorted(listed - tests.keys()):
        raise ValueError(f"no test shows {untested}")
    parts = [HEADER]
    for part, faults in FAULTS.items():
        rows = [
            f"| {fault} | {outcome} | {'<br>'.join(sorted(tests[fault]))} |"
            for fault, outcome in faults.items()
        ]
        header = f"\n## {part}\n\n| fault | outcome | tests |\n|---|---|---|"
        parts.append("\n".join([header, *rows, ""]))
    return "".join(parts)


def marked_tests() -> Iterator[tuple[str, str]]:
    """Yield each fault that a test marks, with the test as a link."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if MARKER not in text:
            continue
        name = path.relative_to(ROOT)
        for node in ast.parse(text).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == MARKER:
                    words = node.name.removeprefix("test_").replace("_", " ")
                    for argument in decorator.args:
                        yield ast.literal_eval(argument), f"[{words}](../{name})"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
