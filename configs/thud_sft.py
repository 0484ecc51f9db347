"""SFT warm-up of Qwen2.5-Omni-7B on clips whose sound is shifted, muted or swapped (THUD, arXiv
2605.16403, section 5), all weights.

The paper's: 3 epochs, rate 2e-6, batch 32, cosine, warm-up of 3 %, gradient norm 1, on
Qwen3-Omni-30B-A3B. Ours: the 7B of the generation before, whose thinker is one dense decoder; 10 s
of 2 frames a second with their sound, a record's clips in one batch, 10,000 clips.

Run:     jaxvid train configs/thud_sft.py --workdir runs/thud_sft
Test:    jaxvid train configs/thud_sft.py:runlocal --workdir /tmp/thud_sft
Expect:  not run here at this size. For its 30B model the paper says that SFT alone on the mixture
         makes VideoMME collapse to 43.8; it is the start of thud_dpo. Fits v6e:4x4 by the compiler
         (docs/preflight.md)
"""

from configs import _omni, _paper
from jaxvid.config import SFTRun
from jaxvid.data import pipeline
from jaxvid.models.layers import Compute
from jaxvid.train.optimizers import AdamW

BASE = "Qwen/Qwen2.5-Omni-7B"
TOPOLOGY = "v6e:4x4"


def get_config(runlocal: bool = False) -> SFTRun:
    clip = _paper.OMNI
    run = SFTRun(
        model="models/Qwen2.5-Omni-7B",
        compute=Compute(dtype="bfloat16", ffn_parts=4),
        data=pipeline.Data(
            shards=("data/thud/intervened",),
            tasks=("sft", "choice"),
            # a row holds two of the four clips of a record: original, shifted, muted, swapped
            budget=_paper.budget(clip, rows=16, room=262, scored=256, branches=2, clips=2),
            pairs=8,
            microbatches=1,
            questions=1,
            sampling=clip.sampling,
            sound=True,
            workers=16,
            cache="data/cache",
        ),
        optimizer=AdamW(lr=2e-6, warmup=28, clip=1.0),
        steps=937,
        checkpoint_every=100,
    )
    if runlocal:
        local = _omni.supervised(4, 1, (_omni.SOUND,))
        return _paper.twin(run, "qwen2_5_omni_thinker", local)
    return run
