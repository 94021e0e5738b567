"""Decode a random latent, or encode a random video, within budgets of memory.

Run it as ``python -m benchmarks.vae BUNDLE --size 832x480 --frames 17 --memory 8G 6G``. Each run
is a process of its own: the tiles and how much they compute again, the seconds, the peak of
resident memory (mapped weights included) and its prediction. ``none`` computes whole frames with
what is free; ``--encode`` is what conditioning on a video does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.builtin import open_named
from wanx.memory_size import parse_budget
from wanx.runtime.output.frame_checks import FrameCheck
from wanx.runtime.peak_rss import peak_bytes, reset_peak
from wanx.runtime.run_parts import RunParts
from wanx.runtime.sizes import latent_shape, parse_size


def one(
    bundle: str, size: str, frames: int, memory: str, provider: str, direction: str
) -> dict[str, Any]:
    """Decode or encode once; the figures."""
    parts = RunParts.of(open_named(bundle, verify="size"), provider=provider)
    if memory != "none":
        parts = replace(parts, memory=parse_budget("--memory", memory))
    width, height = parse_size(size)
    shape = latent_shape(width, height, frames, parts.config.vae)
    draw = np.random.default_rng(0)
    latent = draw.standard_normal(shape, dtype=np.float32)
    check = FrameCheck()

    def clip(begin: int, end: int) -> NDArray[np.float32]:
        return draw.uniform(-1, 1, (3, end - begin, height, width)).astype(np.float32)

    reset_peak()
    start = time.perf_counter()
    if direction == "decode":
        plan = parts.vae_plan("vae_decoder_up", shape[1:])
        for pixels in parts.decode(latent, check.convert, plan=plan):
            check.update(pixels)
    else:
        plan = parts.vae_plan("vae_encoder_down", shape[1:])
        parts.encode_clips([(clip, frames)], shape[1:])
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    assert peak is not None
    assert plan.bytes is not None
    return {
        "direction": direction, "size": size, "frames": frames, "memory": memory,
        "provider": plan.provider,
        "tiles": len(plan.tiling.tiles), "overhead": round(plan.tiling.overhead, 3),
        "predicted_gb": round(plan.bytes / 1e9, 2), "peak_gb": round(peak / 1e9, 2),
        "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--memory", nargs="+", default=["none"])
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--encode", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    common = (arguments.bundle, arguments.size, arguments.frames)
    if arguments.one:
        direction = "encode" if arguments.encode else "decode"
        print(json.dumps(one(*common, arguments.memory[0], arguments.provider, direction)))
        return
    rows = []
    for memory in arguments.memory:
        command = [sys.executable, "-m", "benchmarks.vae", "--one", arguments.bundle]
        command += ["--size", arguments.size, "--frames", str(arguments.frames)]
        command += ["--memory", memory, "--provider", arguments.provider]
        command += ["--encode"] * arguments.encode
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
