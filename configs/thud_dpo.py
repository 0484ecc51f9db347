"""DPO of Qwen2.5-Omni-7B on intervened and general preferences (THUD, arXiv 2605.16403, section 5),
from the warm-up.

The paper's: LoRA of rank 32, alpha 64, dropout 0.05, one epoch of 10,000 pairs, rate 1e-6, sigmoid,
beta 0.1, batch 64, cosine, warm-up of 3 %, gradient norm 1, on Qwen3-Omni-30B-A3B. Ours: the 7B of
the generation before, intervened and general preferences 1 : 1, 10 s of 2 frames a second. The
reference is the model without its adapters, in no memory of its own.

Run:     jaxvid train configs/thud_dpo.py --workdir runs/thud_dpo
Test:    jaxvid train configs/thud_dpo.py:runlocal --workdir /tmp/thud_dpo
Expect:  not run here at this size. The paper, for its 30B model (base -> DPO): shift in three
         classes 34.3 -> 83.1, mute combined 47.5 -> 73.9, swap 56.3 -> 65.1, VideoMME 69.2 -> 70.1.
         Fits v5e:4x4 by the compiler (docs/preflight.md)
"""

from configs import _omni, _paper
from jaxvid.config import PreferenceRun
from jaxvid.data import pipeline
from jaxvid.models.layers import Compute
from jaxvid.models.lora import LoRA
from jaxvid.objectives.preference import DPO
from jaxvid.train.optimizers import AdamW

BASE = "Qwen/Qwen2.5-Omni-7B"
TOPOLOGY = "v5e:4x4"


def get_config(runlocal: bool = False) -> PreferenceRun:
    clip = _paper.OMNI
    run = PreferenceRun(
        model="runs/thud_sft/model",
        compute=Compute(dtype="bfloat16"),
        data=pipeline.Data(
            shards=("data/thud/intervened", "data/thud/general"),
            weights=(1.0, 1.0),
            tasks=("preference",),
            budget=_paper.budget(clip, rows=32, room=774, scored=512, branches=4),
            pairs=64,
            microbatches=2,
            sampling=clip.sampling,
            sound=True,
            workers=16,
            cache="data/cache",
        ),
        lora=LoRA(rank=32, alpha=64.0, dropout=0.05),
        frozen_dtype="bfloat16",
        objective=DPO(beta=0.1),
        optimizer=AdamW(lr=1e-6, warmup=4, clip=1.0),
        steps=156,
        checkpoint_every=40,
    )
    if runlocal:
        local = _omni.preferences(2, (_omni.SOUND, _omni.GENERAL))
        return _paper.twin(run, "qwen2_5_omni_thinker", local)
    return run
