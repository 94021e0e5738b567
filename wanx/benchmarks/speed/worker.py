"""The process of one trial: ``python -m wanx.benchmarks.speed.worker SPEC RESULT``.

It makes one video as ``wanx run`` does, and writes what that took. Progress goes to stdout, a JSON
array for each call of the progress function.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanx.errors import WanxError

if TYPE_CHECKING:
    from wanx.bundle.reader import Bundle
    from wanx.runtime.options import RunOptions


def main(spec_path: str, result_path: str) -> None:
    """Run the trial of a spec; see :mod:`wanx.benchmarks.speed.trial`."""
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    try:
        result = _peer(spec) if spec["peer"] else _wanx(spec)
    except WanxError as error:
        result = {"error": str(error), "exit_code": error.exit_code}
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


def _wanx(spec: dict[str, Any]) -> dict[str, Any]:
    from wanx.runtime.pipeline import Pipeline

    pipeline = Pipeline(_bundle(spec), threads=spec["threads"], provider=spec["provider"])
    ready = time.monotonic()
    latents = []
    generated = pipeline.run(
        _options(spec),
        output=spec["output"],
        on_step=lambda step, steps, latent: latents.append(latent) if step in (1, steps) else None,
        progress=_tell,
    )
    finished = time.monotonic()
    _keep(spec, latents[0], latents[-1])
    return _result(spec, ready, finished, [asdict(stage) for stage in generated.stages])


def _peer(spec: dict[str, Any]) -> dict[str, Any]:
    from wanx.benchmarks.peers.diffusers import generate
    from wanx.runtime.inputs.reading import read_inputs
    from wanx.runtime.resolve import resolve

    bundle = _bundle(spec)
    options = _options(spec)
    inputs = read_inputs(options, bundle.manifest.task)
    run = resolve(options, bundle.manifest.config, inputs)
    ready = time.monotonic()
    generated = generate(
        bundle, run,
        compiled=spec["peer"] == "diffusers-compiled",
        threads=spec["threads"],
        output=Path(spec["output"]),
    )  # fmt: skip
    finished = time.monotonic()
    _keep(spec, generated.first_latent, generated.latent)
    return _result(spec, ready, finished, [asdict(stage) for stage in generated.stages])


def _bundle(spec: dict[str, Any]) -> Bundle:
    """Open the bundle of a spec, and no other one that has taken its place."""
    from wanx.builtin import open_named

    bundle = open_named(spec["bundle"])
    if bundle.hash != spec["hash"]:
        raise WanxError(f"{bundle.root} was replaced while it was measured: run this again")
    return bundle


def _options(spec: dict[str, Any]) -> RunOptions:
    from wanx.runtime.options import RunOptions

    options = spec["options"]
    return RunOptions(**options | {"references": tuple(options["references"])})


def _result(
    spec: dict[str, Any], ready: float, finished: float, stages: list[dict[str, Any]]
) -> dict[str, Any]:
    # The clock is one for all processes of a machine.
    return {
        "cold_start_seconds": ready - spec["started"],
        "end_to_end_seconds": finished - spec["started"],
        "stages": stages,
    }


def _keep(spec: dict[str, Any], first: Any, last: Any) -> None:
    import numpy as np

    np.savez(spec["latents"], first=first, last=last)


def _tell(stage: str, done: int, total: int, unit: str) -> None:
    print(json.dumps([stage, done, total, unit]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
