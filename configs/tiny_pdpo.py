"""pDPO on pairs of steps and of whole replies in the laptop world (video-SALMONN-o1).

L = -E[a log P + (1 - a) log(1 - P)] (arXiv 2502.11775), hard labels, from the model that the pairs
were sampled from; beta, rate and steps are ours.

It does not help here: greedy replies, Major@20 and best of 20 fall. The SFT model names the right
outcome in 87 % of its replies, and gives the letter of the outcome it named in 70 % only; so many
wrong paths differ from right ones in a letter. On the failed questions alone, as in the paper, what
is preferred is mostly what the model finds unlikely, and it unlearns to look letters up (that this
is the cause is a guess: the two runs below differ in rate too).

Run:     jaxvid train configs/tiny_pdpo.py --workdir runs/pdpo
Test:    jaxvid train configs/tiny_pdpo.py:runlocal --workdir /tmp/pdpo
Expect:  (seed 0) loss 0.661 and 64 % of the pairs the right way at step 48; 5 to 10 s a step on two
         cores shared with other work. On 300 held-out pairs (configs/tiny_eval.py with
         --ask.max-tokens 56 --ask.samples 20; 95 % intervals over pairs; difference to the SFT):

             greedy       Real 57.3, CF 55.7, Both 32.7 (27.3 to 38.0), -9.0 (-14.0 to -4.0)
             Major@20     Both 32.3 (27.0 to 37.7), -7.7 (-13.0 to -2.7)
             best of 20   Both 34.0 (28.7 to 39.3), -8.3 (-13.3 to -3.7)
             pass@20      Both 96.0 (93.7 to 98.0), -1.0 (-3.3 to 1.0)

         Of the single samples 49.3 % are right, of the SFT's 48.7 %. On the pairs of failed
         questions with a rate of 3e-5: Both 5.7 (3.3 to 8.3), Major@20 6.0, best of 20 5.3,
         pass@20 49.3; 461 of 600 replies say A.
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
