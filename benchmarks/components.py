"""Measure each component of a bundle on several providers of ONNX Runtime.

Run it as ``python -m benchmarks.components BUNDLE --providers cpu openvino``. Every figure is of a
process of its own, and the providers take turns: the seconds until the component is loaded, of its
first call and of a later one, the peak of resident memory, of which the mapped weights belong to
the page cache, and how far the result is from the first provider's. Medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CALLS = 3  # in a row; the last counts as a later one
# Latents of 128x128 pixels; a video of 256x256 pixels and 13 frames.
AXES = {"h": 16, "w": 16, "L": 1024}


def random_feeds(
    inputs: list[tuple[str, str, list[int | str]]], axes: dict[str, int]
) -> dict[str, Any]:
    """Draw the inputs of a graph, of which axes are called ``h`` or ``8*h``."""
    generator = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for name, kind, shape in inputs:
        sizes = []
        for size in shape:
            factor, _, axis = str(size).rpartition("*")
            sizes.append(size if isinstance(size, int) else int(factor or 1) * axes[axis])
        if "int64" in kind:
            feeds[name] = generator.integers(3, 40, sizes)
        else:
            feeds[name] = generator.standard_normal(sizes, dtype=np.float32)
    return feeds


def one(bundle: str, component: str, provider: str, tokens: int, output: Path) -> None:
    """Load and call a component; print the figures, keep the result."""
    from wanx.builtin import open_named
    from wanx.runtime.sessions import open_session
    from wanx.runtime.sessions.onnxruntime.session import OnnxRuntimeSession

    opened = open_named(bundle, verify="size")
    start = time.perf_counter()
    session = open_session(opened, component, provider=provider)
    figures = {"load_seconds": time.perf_counter() - start}
    assert isinstance(session, OnnxRuntimeSession)
    feeds = random_feeds(session.graph_inputs(), AXES | {"n": tokens})
    for number in range(CALLS):
        start = time.perf_counter()
        results = session.run(feeds)
        taken = time.perf_counter() - start
        figures["first_seconds" if number == 0 else "later_seconds"] = taken
    figures["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    np.save(output, next(iter(results.values())))
    print(json.dumps(figures))


def measure(
    bundle: str, components: list[str], providers: list[str], tokens: list[int], rounds: int
) -> list[dict[str, Any]]:
    """Measure a bundle; a row for each component, provider and number of text tokens."""
    cases = [
        (component, count)
        for component in components
        for count in (tokens if component == "text_encoder" else tokens[:1])
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for component, count in cases:
            taken: dict[str, list[dict[str, float]]] = {provider: [] for provider in providers}
            results: dict[str, Any] = {}
            for _ in range(rounds):
                for provider in providers:
                    output = Path(folder) / "result.npy"
                    command = [sys.executable, "-m", "benchmarks.components", bundle]
                    command += ["--one", component, provider, str(count), str(output)]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    taken[provider].append(json.loads(done.stdout.splitlines()[-1]))
                    results[provider] = np.load(output)
            expected = results[providers[0]]
            for provider in providers:
                difference = np.linalg.norm(results[provider] - expected)
                row: dict[str, Any] = {
                    "bundle": Path(bundle).name, "component": component, "provider": provider,
                    "difference": float(difference / np.linalg.norm(expected)),
                } | ({"tokens": count} if component == "text_encoder" else {})  # fmt: skip
                for name in taken[provider][0]:
                    row[name] = statistics.median(figures[name] for figures in taken[provider])
                row["ratio"] = statistics.median(
                    ours["later_seconds"] / first["later_seconds"]
                    for ours, first in zip(taken[provider], taken[providers[0]], strict=True)
                )
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--providers", nargs="+", default=["cpu", "openvino"])
    parser.add_argument("--components", nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16], help="of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        component, provider, tokens, output = arguments.one
        one(arguments.bundles[0], component, provider, int(tokens), Path(output))
        return
    from wanx.builtin import open_named

    rows = []
    for bundle in arguments.bundles:
        known = list(open_named(bundle, verify="size").manifest.components)
        wanted = [name for name in known if name in (arguments.components or known)]
        rows += measure(bundle, wanted, arguments.providers, arguments.tokens, arguments.rounds)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
