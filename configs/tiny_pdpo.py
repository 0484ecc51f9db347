"""pDPO on pairs of steps and of whole replies in the laptop world (video-SALMONN-o1).

L = -E[a log P + (1 - a) log(1 - P)] (arXiv 2502.11775), hard labels, from the model that the pairs
were sampled from; beta is the paper's kind of value, rate and steps are ours.

Run:     jaxvid train configs/tiny_pdpo.py --workdir runs/pdpo
Test:    jaxvid train configs/tiny_pdpo.py:runlocal --workdir /tmp/pdpo
Expect:  not measured yet
"""

from configs import _tiny
from jaxvid.config import PreferenceRun
from jaxvid.models.layers import Compute
from jaxvid.objectives.preference import PDPO
from jaxvid.train.optimizers import AdamW


def get_config(runlocal: bool = False) -> PreferenceRun:
    records, steps = (2, 2) if runlocal else (8, 48)
    return PreferenceRun(
        model=_tiny.BASE if runlocal else "runs/steps_sft/model",
        compute=Compute(remat="none", unroll=4),
        data=_tiny.step_pairs(records),
        objective=PDPO(beta=0.1, labels="hard"),
        optimizer=AdamW(lr=1e-5, warmup=0 if runlocal else 5, final=0.1),
        steps=steps,
        checkpoint_every=24,
    )
