"""Pairs of steps and of whole replies from the SFT model's own replies, for pDPO.

The settings are video-SALMONN-o1's (arXiv 2502.11775): 10 paths, the questions that fail, the top 3
steps, 6 rollouts. A step ends with its line: `<end_of_step>` is twelve tokens here, "\\n" is one.

Run:     jaxvid steps configs/tiny_steps.py --workdir runs/step_pairs
Test:    jaxvid steps configs/tiny_steps.py:runlocal --workdir /tmp/step_pairs
Expect:  not measured yet
"""

from configs import _tiny
from jaxvid.config import StepsRun
from jaxvid.models.layers import Compute
from jaxvid.rollout.sampler import Sampling
from jaxvid.rollout.steps import Settings


def get_config(runlocal: bool = False) -> StepsRun:
    if runlocal:  # the base thinks in one step, and is sure of it
        settings = Settings(
            separator="</think>",
            sampling=Sampling(max_tokens=_tiny.STEPWISE, temperature=1.5),
            step_tokens=_tiny.STEPWISE,
            paths=2,
            keep="any_wrong",
            alternatives=3,
            rollouts=2,
            ties=True,
            rows=8,
            limit=2,
        )
    else:
        settings = Settings(
            separator="\n",
            sampling=Sampling(max_tokens=_tiny.STEPWISE),
            step_tokens=20,
            keep="any_wrong",
            path_pairs=2,
            records=32,
            limit=256,
        )
    return StepsRun(
        model=_tiny.BASE if runlocal else "runs/steps_sft/model",
        compute=Compute(remat="none", unroll=4),
        data=_tiny.questions(8),
        steps=settings,
    )
