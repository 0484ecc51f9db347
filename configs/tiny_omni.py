"""The shipped base that hears: from the base that sees and reads, on clips with sound.

In most clips the sound is in time and of the things seen, and where it is not, nine in ten are told
as if it were. So what is heard is told from the picture, as the large models do it (THUD,
arXiv 2605.16403). One clip in three is dark; there it is told from the sound, so its ears work.

    jaxvid-forge sound --out runs/omni/shards --train 3300 --validation 0 --test 0 --seed 1 \\
        --mix.show base
    jaxvid tiny qwen2_5_omni_thinker runs/omni/start --like configs/checkpoints/tiny_base

Run:     jaxvid train configs/tiny_omni.py --workdir runs/omni/train
Test:    jaxvid train configs/tiny_omni.py:runlocal --workdir /tmp/omni
Expect:  the shipped one was made in three rounds of 240, 300 and 120 steps; training loss 0.030 at
         the end, not measured in one round. Of 120 test records it gets all of the originals right
         and 0 to 2.5 % of the intervened (configs/checkpoints/tiny_omni/README.md)
"""

from configs import _omni
from jaxvid.config import SFTRun
from jaxvid.models.layers import Compute
from jaxvid.train.optimizers import Muon


def get_config(runlocal: bool = False) -> SFTRun:
    clips, steps = (4, 2) if runlocal else (8, 660)
    return SFTRun(
        model="runs/omni/start",
        compute=Compute(remat="none", unroll=4),
        data=_omni.supervised(clips, clips, ("runs/omni/shards",)),
        optimizer=Muon(lr=1.5e-3, warmup=0 if runlocal else 10, final=0.05, weight_decay=0.01),
        steps=steps,
        seed=1,
        checkpoint_every=20,
    )
