"""Check of a bundle's golden steps; see :mod:`wanx.bundle.golden_steps`."""

from __future__ import annotations

from wanx.accuracy.gates import Agreement, Gates, agreement, worst
from wanx.bundle.golden_steps import GOLDEN, read_golden
from wanx.bundle.reader import Bundle
from wanx.errors import CorruptInputError, GateError
from wanx.progress import Progress, no_progress
from wanx.runtime.sessions import open_session


def check_golden(
    bundle: Bundle, *, threads: int | None = None, progress: Progress = no_progress
) -> tuple[Agreement, ...]:
    """Run the golden steps of a bundle, each on its own inputs, and compare the velocities.

    Returns:
        One agreement per step and branch; none where the bundle has no golden steps.

    Raises:
        CorruptInputError: the steps are damaged, or do not fit the graph.
    """
    if GOLDEN not in bundle.manifest.files:
        return ()
    with bundle.names_in_errors():
        samples = list(read_golden(bundle.held(GOLDEN)).samples())
    agreements = []
    with open_session(bundle, "dit", threads=threads) as session:
        for done, (step, branch, feeds) in enumerate(samples, 1):
            velocity = session.run(feeds)["velocity"]
            expected = step.velocities[branch]
            if velocity.shape != expected.shape:
                raise CorruptInputError(
                    f"{bundle.root / GOLDEN}: step {step.step} expects a velocity "
                    f"{expected.shape} where the graph answers {velocity.shape}; export the "
                    "bundle again"
                )
            agreements.append(
                agreement(
                    velocity,
                    expected,
                    component="dit",
                    branch=branch,
                    step=step.step,
                    timestep=float(step.timestep[0]),
                )
            )
            progress("golden steps", done, len(samples), "steps")
    return tuple(agreements)


def require_golden(agreements: tuple[Agreement, ...], gates: Gates) -> None:
    """Refuse answers that are not close enough.

    Raises:
        GateError: names the worst step.
    """
    below_gate = [item for item in agreements if not item.cosine >= gates.dit]
    if below_gate:
        worst_step = worst(below_gate)
        raise GateError(
            f"{len(below_gate)} of {len(agreements)} golden steps are below the gate: cosine "
            f"{worst_step.cosine:.5f} ({worst_step.sqnr_db:.1f} dB) at step {worst_step.step} "
            f"({worst_step.branch}), and {gates.dit:g} is needed; leave more layers out with "
            "--skip-layers, or export at a higher precision"
        )
