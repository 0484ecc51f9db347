"""DPO on intervened and general preferences, half and half, from the SFT warm-up (THUD).

Cross-temporal pairs: on the original "in time" is chosen over "shifted", on the shifted clip the
reverse, and so for muted and swapped sound. Verdicts: behind one right thought the right answer is
chosen over another, for two whole replies differ in their thought and the margin is won there.
General pairs describe and localise what is seen. LoRA of rank 32, alpha 64, dropout 0.05, sigmoid,
warm-up, cosine and a gradient norm of 1 are the paper's (arXiv 2605.16403); verdicts, beta (there
0.1), the likelihood of the chosen, rate, steps and batch are ours. The reference is the model
without its adapters.

    jaxvid-forge sound --out runs/sound/general --train 400 --validation 0 --test 60 \\
        --mix.show general

Run:     jaxvid train configs/tiny_thud.py --workdir runs/thud/dpo
Test:    jaxvid train configs/tiny_thud.py:runlocal --workdir /tmp/thud
Expect:  95 % of the preferences the right way at step 160 (seed 0, from 120 steps of SFT; 7 min on
         one core). On 120 test records combined 81.2 % (95 %: 78.9 to 83.6) -> 94.6 (92.8 to 96.1),
         paired gain 13.3 points (11.1 to 15.6; with seeds 1 and 2 13.7 and 10.6); shift in three
         classes 77.8 -> 95.6 (92.7 to 97.8), swap original 58.3 -> 92.5, swap intervened 64.2 ->
         85.0 (docs/sound.md)
"""

from configs import _omni
from jaxvid.config import PreferenceRun
from jaxvid.models.layers import Compute
from jaxvid.models.lora import LoRA
from jaxvid.objectives.preference import DPO
from jaxvid.train.optimizers import AdamW


def get_config(runlocal: bool = False) -> PreferenceRun:
    records, steps = (2, 2) if runlocal else (4, 160)
    return PreferenceRun(
        model=_omni.BASE if runlocal else "runs/thud/sft/model",
        compute=Compute(remat="none", unroll=4),
        data=_omni.preferences(records, (_omni.SOUND, _omni.GENERAL)),
        lora=LoRA(rank=32, alpha=64.0, dropout=0.05),
        objective=DPO(beta=0.5, ce_weight=1.0),
        optimizer=AdamW(lr=1e-3, warmup=0 if runlocal else 5, clip=1.0),
        steps=steps,
        checkpoint_every=20,
    )
