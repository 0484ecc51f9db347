"""DPO on three axes of statements about the laptop world (VideoPASTA), from the SFT checkpoint.

L = l_s L_spatial + l_t L_temporal + l_c L_crossframe (arXiv 2504.14096); weights and beta are open
in the paper and ours here, as are rate and steps.

Run:     jaxvid train configs/tiny_dpo.py --workdir runs/dpo
Test:    jaxvid train configs/tiny_dpo.py:runlocal --workdir /tmp/dpo
Expect:  in jaxvid-launch local (seed 0, 1,200 pairs) 94 % of validation preferences the right way
         at step 40; 2 min on 2 cores. On 300 held-out pairs Real 71.0 %, CF 70.3 %, Both 51.0 %
         (95 %: 45.3 to 56.7), 3.3 points (-0.3 to 7.0) below the SFT it starts from: it learns
         the statements, not the questions. A rate of 1e-4 cost 13.3 points.
"""

from configs import _tiny
from jaxvid.config import PreferenceRun
from jaxvid.models.layers import Compute
from jaxvid.objectives.preference import DPO
from jaxvid.train.optimizers import AdamW


def get_config(runlocal: bool = False) -> PreferenceRun:
    pairs, steps = (2, 2) if runlocal else (16, 40)
    return PreferenceRun(
        model=_tiny.BASE if runlocal else "runs/sft/model",
        compute=Compute(remat="none", unroll=4),
        data=_tiny.preferences(pairs),
        validation=_tiny.preferences(pairs, "validation"),
        objective=DPO(beta=0.1, axis_weights=(1.0, 1.0, 1.0)),
        optimizer=AdamW(lr=2e-5, warmup=0 if runlocal else 5, final=0.1),
        steps=steps,
        eval_every=20,
        checkpoint_every=20,
    )
