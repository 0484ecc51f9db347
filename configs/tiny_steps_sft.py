"""SFT on replies in steps to the laptop world's pairs: where video-SALMONN-o1's pDPO starts.

    jaxvid-forge procedural --out runs/world --train 1500 --validation 60
    jaxvid-forge steps --shards runs/world --out runs/steps

Run:     jaxvid train configs/tiny_steps_sft.py --workdir runs/steps_sft
Test:    jaxvid train configs/tiny_steps_sft.py:runlocal --workdir /tmp/steps_sft
Expect:  not measured yet
"""

from configs import _tiny
from jaxvid.config import SFTRun
from jaxvid.models.layers import Compute
from jaxvid.train.optimizers import Muon


def get_config(runlocal: bool = False) -> SFTRun:
    pairs, steps = (2, 2) if runlocal else (16, 160)
    return SFTRun(
        model=_tiny.BASE,
        compute=Compute(remat="none", unroll=4),
        data=_tiny.steps(pairs),
        validation=_tiny.steps(pairs, "validation"),
        optimizer=Muon(lr=1e-3, warmup=0 if runlocal else 5, final=0.1),
        steps=steps,
        eval_every=40,
        checkpoint_every=40,
    )
