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
Expect:  not measured yet
"""

from configs import _omni
from jaxvid.config import PreferenceRun
from jaxvid.models.layers import Compute
from jaxvid.models.lora import LoRA
from jaxvid.objectives.preference import DPO
from jaxvid.train.optimizers import AdamW


def get_config(runlocal: bool = False) -> PreferenceRun:
    records, steps = (2, 2) if runlocal else (4, 60)
    return PreferenceRun(
        model=_omni.BASE if runlocal else "runs/thud/sft/model",
        compute=Compute(remat="none", unroll=4),
        data=_omni.preferences(records, (_omni.SOUND, _omni.GENERAL)),
        lora=LoRA(rank=32, alpha=64.0, dropout=0.05),
        objective=DPO(beta=0.1),
        optimizer=AdamW(lr=2e-4, warmup=0 if runlocal else 2, clip=1.0),
        steps=steps,
        checkpoint_every=20,
    )
