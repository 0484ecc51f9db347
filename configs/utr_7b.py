"""SFT on trajectories asked both ways (Video-UTR, arXiv 2502.12081), from LLaVA-OneVision-7B.

The paper's: Qwen2-7B, SigLIP so400m and a projector of two layers; 32 frames, rate 1e-5 and 2e-6
for the vision tower, batch 512, one epoch. Ours: LLaVA-OneVision has the three parts and is where
we start, so that the projector is trained already; 300,000 dialogues; AdamW, warm-up of 3 %,
cosine. Two slices: each holds all weights, and gradients alone cross between them.

Run:     jaxvid train configs/utr_7b.py --workdir runs/utr_7b
Test:    jaxvid train configs/utr_7b.py:runlocal --workdir /tmp/utr_7b
Expect:  not run here at this size. The paper: MVBench 58.8, TempCompass 59.7, VideoMME 52.6;
         without the data modelling MVBench 54.6, without the task modelling 58.5. Fits 2 slices of
         v6e:8x8 by the compiler (docs/preflight.md)
"""

import dataclasses

from configs import _paper, _tiny
from jaxvid.config import SFTRun
from jaxvid.data import pipeline
from jaxvid.models.layers import Compute
from jaxvid.train.optimizers import AdamW

BASE = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
TOPOLOGY = "v6e:8x8"
SLICES = 2


def get_config(runlocal: bool = False) -> SFTRun:
    clip = _paper.ONEVISION
    run = SFTRun(
        model="models/llava-onevision-qwen2-7b-ov-hf",
        compute=Compute(dtype="bfloat16", ffn_parts=4),
        data=pipeline.Data(
            shards=("data/utr",),
            tasks=("sft", "choice", "caption"),
            budget=_paper.budget(clip, rows=128, room=895, scored=768, branches=4),
            pairs=512,
            microbatches=4,
            questions=1,
            sampling=clip.sampling,
            workers=16,
            cache="data/cache",
        ),
        replica=SLICES,
        rates=(("tower", 0.2),),
        optimizer=AdamW(lr=1e-5, warmup=17),
        steps=585,
        checkpoint_every=100,
    )
    if runlocal:
        old, small = _tiny.supervised(2, shards="runs/utr/shards"), _paper.TINY["llava_onevision"]
        room = _paper.budget(small, 4, 256, 224, 4)
        seen = {"budget": room, "questions": 1, "sampling": small.sampling}
        local = dataclasses.replace(old, tasks=("sft", "choice"), **seen)
        return _paper.twin(run, "llava_onevision", local)
    return run
