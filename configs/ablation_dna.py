"""GRPO, DAPO and DNA from one SFT checkpoint, over seeds: what duality normalisation adds.

grpo   groups normalised alone, symmetric clip, mean over sequences, no filter
dapo   clip-higher, token mean over the batch, pairs without signal drawn again
dna    dapo, and both sides of a pair scaled to equal signal (arXiv 2512.24271)

Run:     jaxvid ablate configs/ablation_dna.py --workdir runs/ablation --seeds 5
Test:    jaxvid ablate configs/ablation_dna.py:runlocal --workdir /tmp/ablation --seeds 2
Expect:  Both on 300 pairs, 5 seeds, from the SFT of jaxvid-launch local: grpo 52.8 %, dapo 53.7 %,
         dna 52.9 %; dna - dapo -0.7 points (-2.7 to 1.3). No difference; see docs/train.md.
         4 to 6 min a run on one core.
"""

import dataclasses

from configs import _tiny, tiny_dna
from jaxvid.config import PolicyRun
from jaxvid.objectives.advantages import GRPO
from jaxvid.objectives.policy import Policy

ARMS = ("grpo", "dapo", "dna")


def get_config(runlocal: bool = False, arm: str = "dna") -> PolicyRun:
    dna = tiny_dna.get_config(runlocal)
    if not runlocal:
        dna = dataclasses.replace(
            dna, data=_tiny.questions(16), steps=40, eval_every=0, checkpoint_every=20
        )
    if arm == "dna":
        return dna
    dapo = dataclasses.replace(dna, advantages=GRPO())
    if arm == "dapo":
        return dapo
    if arm == "grpo":
        return dataclasses.replace(
            dapo,
            objective=Policy(clip_low=0.2, clip_high=0.2, dual_clip=None, aggregation="sequence"),
            rollout=dataclasses.replace(dapo.rollout, pair_filter="none"),
        )
    raise ValueError(f"arm {arm!r}; choose one of {ARMS}")
