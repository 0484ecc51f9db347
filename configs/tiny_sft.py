"""SFT on duality pairs of the laptop world, from the shipped base (DNA-Train, first stage).

Both sides of a pair are in every batch, so real and counterfactual clips are equally many. The
learning rate and the steps are ours; the paper's are for 7B (arXiv 2512.24271, section 4).

Run:     jaxvid train configs/tiny_sft.py --workdir runs/sft
Test:    jaxvid train configs/tiny_sft.py:runlocal --workdir /tmp/sft
Expect:  in jaxvid-launch local (seed 0, 1,200 pairs) loss 0.056, validation 0.066 at step 120;
         6 min on 2 cores. On 300 held-out pairs Real 72.3 %, CF 73.7 %, Both 54.3 % (95 %: 48.7
         to 60.3); the base has 80.0, 4.0 and 2.3. Blank frames: Both 0; shuffled frames: 34.3.
"""

from configs import _tiny
from jaxvid.config import SFTRun
from jaxvid.models.layers import Compute
from jaxvid.train.optimizers import Muon


def get_config(runlocal: bool = False) -> SFTRun:
    pairs, steps = (2, 2) if runlocal else (16, 120)
    return SFTRun(
        model=_tiny.BASE,
        compute=Compute(remat="none", unroll=4),
        data=_tiny.supervised(pairs),
        validation=_tiny.supervised(pairs, "validation"),
        optimizer=Muon(lr=1e-3, warmup=0 if runlocal else 5, final=0.1),
        steps=steps,
        eval_every=40,
        checkpoint_every=60,
    )
