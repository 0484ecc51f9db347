"""DPO on intervened and general preferences, half and half, from the SFT warm-up (THUD).

Cross-temporal pairs: on the original "in time" is chosen over "shifted", on the shifted clip the
reverse, and so for muted and swapped sound; general pairs describe and localise what is seen. LoRA
of rank 32, alpha 64, dropout 0.05, sigmoid, beta 0.1, warm-up, cosine and a gradient norm of 1 are
the paper's (arXiv 2605.16403); rate, steps and batch are ours. The reference is the model without
its adapters.

    jaxvid-forge sound --out runs/sound/general --train 400 --validation 0 --test 60 \\
        --mix.show general

Run:     jaxvid train configs/tiny_thud.py --workdir runs/thud/dpo
Test:    jaxvid train configs/tiny_thud.py:runlocal --workdir /tmp/thud
Expect:  92 % of the preferences the right way at step 60 (seed 0, from 120 steps of SFT; 5 min on
         two cores), and no gain: combined 73.5 % (71.4 to 75.4) -> 71.7 (69.2 to 74.2), shift in
         three classes 73.9 -> 69.2 (64.4 to 73.9); swap original 0.8 -> 22.5, shift original 58.3
         -> 30.8. Two replies differ in their thought already, so the letter after a right
         thought is hardly taught; it is what fails (docs/sound.md)
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
