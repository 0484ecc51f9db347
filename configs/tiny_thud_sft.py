"""SFT warm-up on clips whose sound is shifted, muted or swapped (THUD, arXiv 2605.16403, sec. 5).

All four clips of a record are in every batch, and all of their questions are asked: a probe as
often of the original as of its twin. The paper's 3 epochs at 2e-6 are for 30B; rate and steps are
ours.

    jaxvid-forge sound --out runs/sound/intervened --train 600 --validation 16 --test 120

Run:     jaxvid train configs/tiny_thud_sft.py --workdir runs/thud/sft
Test:    jaxvid train configs/tiny_thud_sft.py:runlocal --workdir /tmp/thud_sft
Expect:  loss 0.074 at step 120 (seed 0; 4 min on one core). On 120 test records combined 50.4 %
         (95 %: 50.0 to 51.0) -> 81.2 (78.9 to 83.6), shift in three classes 33.3 -> 77.8 (72.3 to
         83.2), mute intervened 2.5 -> 100, swap 100 -> 58.3 on originals and 0 -> 64.2 on swapped
         sound. Places 63.1 -> 60.7 (54.9 to 66.9)
"""

from configs import _omni
from jaxvid.config import SFTRun
from jaxvid.models.layers import Compute
from jaxvid.train.optimizers import Muon


def get_config(runlocal: bool = False) -> SFTRun:
    records, steps = (1, 2) if runlocal else (2, 120)
    return SFTRun(
        model=_omni.BASE,
        compute=Compute(remat="none", unroll=4),
        data=_omni.supervised(4 * records, records, (_omni.SOUND,), questions=0),
        optimizer=Muon(lr=1e-3, warmup=0 if runlocal else 5, final=0.1),
        steps=steps,
        checkpoint_every=20,
    )
