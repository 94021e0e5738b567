"""Plan of a run that is not run: its options, and memory and time of each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wanx.bundle.reader import Bundle
from wanx.runtime.duration.estimate import Durations, stage_seconds
from wanx.runtime.memory.plan import StageMemory
from wanx.runtime.options import ResolvedRun
from wanx.runtime.run_parts import prompts_by_branch
from wanx.runtime.step_cache import CachePlan, plan_cache
from wanx.runtime.text import PromptTokenizer, clean_prompt


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run that was not run.

    Attributes:
        options: every option.
        stages: memory of each stage, of those where it is known.
        seconds: likewise its time, by the name of the stage; good to a factor of two.
        cache: plan of the step cache.
    """

    options: ResolvedRun
    stages: tuple[StageMemory, ...]
    seconds: Mapping[str, float]
    cache: CachePlan | None = None


def plan_run(
    bundle: Bundle, run: ResolvedRun, stages: Sequence[StageMemory], provider: str
) -> RunPlan:
    """Add the time of the stages to their memory.

    Args:
        bundle: of the model.
        run: that is planned.
        stages: memory of each stage, with the plans of the VAE.
        provider: that will run.
    """
    with bundle.names_in_errors():
        tokenizer = PromptTokenizer(bundle.held(bundle.tokenizer_path))
    longest = bundle.manifest.config.dit.text_len
    tokens = [
        min(tokenizer.count(clean_prompt(prompt)), longest)
        for prompt in prompts_by_branch(run).values()
    ]
    cache = plan_cache(bundle, run)
    seconds = stage_seconds(
        bundle.manifest, run, tokens, Durations(bundle.manifest, provider),
        {stage.name: stage.vae for stage in stages if stage.vae is not None},
        None if cache is None else cache.forwards,
    )  # fmt: skip
    return RunPlan(options=run, stages=tuple(stages), seconds=seconds, cache=cache)
