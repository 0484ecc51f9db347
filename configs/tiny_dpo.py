"""DPO on three axes of statements about the laptop world (VideoPASTA), from the SFT checkpoint.

L = l_s L_spatial + l_t L_temporal + l_c L_crossframe (arXiv 2504.14096); weights and beta are open
in the paper and ours here, as are rate and steps.

Run:     jaxvid train configs/tiny_dpo.py --workdir runs/dpo
Test:    jaxvid train configs/tiny_dpo.py:runlocal --workdir /tmp/dpo
Expect:  not measured yet
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
        compute=Compute(remat=False, unroll=4),
        data=_tiny.preferences(pairs),
        validation=_tiny.preferences(pairs, "validation"),
        objective=DPO(beta=0.1, axis_weights=(1.0, 1.0, 1.0)),
        optimizer=AdamW(lr=2e-5, warmup=0 if runlocal else 5, final=0.1),
        steps=steps,
        eval_every=20,
        checkpoint_every=20,
    )
