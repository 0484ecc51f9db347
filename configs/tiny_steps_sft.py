"""SFT on replies in steps to the laptop world's pairs: where video-SALMONN-o1's pDPO starts.

    jaxvid-forge procedural --out runs/world --train 1500 --validation 60
    jaxvid-forge steps --shards runs/world --out runs/steps

Run:     jaxvid train configs/tiny_steps_sft.py --workdir runs/steps_sft
Test:    jaxvid train configs/tiny_steps_sft.py:runlocal --workdir /tmp/steps_sft
Expect:  (seed 0, 1,500 pairs) loss 0.039, validation 0.046 at step 160; 31 min on two cores shared
         with other work. On 300 held-out pairs (configs/tiny_eval.py with --ask.max-tokens 56
         --ask.samples 20; 95 % intervals over pairs) Real 63.0 %, CF 63.3 %, Both 41.7 % (36.0 to
         47.3), none unparsed; Both by Major@20 40.0 (34.3 to 45.3), best of 20 42.3 (36.7 to 48.0),
         pass@20 97.0 (95.0 to 98.7). Its last step names the right outcome in 87 % of the replies;
         the letter after it is the option it named in 70 %.
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
