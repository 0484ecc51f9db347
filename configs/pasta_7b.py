"""DPO of Qwen2.5-VL-7B against adversaries on three axes (VideoPASTA, arXiv 2504.14096).

L = l_s L_spatial + l_t L_temporal + l_c L_crossframe. The paper's: Qwen2.5-VL-7B, 32 frames, 7,020
pairs of ActivityNet's videos, three adversarial responses for each preferred one. Ours, where it is
silent: weights of 1, beta 0.1, rate 5e-7 for all weights but a frozen vision tower, 3 epochs, 32
records an update, AdamW, warm-up of 3 %, cosine; at most 256 tokens for two frames. The reference
is a copy of the start; `jaxvid score` and --sidecar leave it out of memory.

Run:     jaxvid train configs/pasta_7b.py --workdir runs/pasta_7b
Test:    jaxvid train configs/pasta_7b.py:runlocal --workdir /tmp/pasta_7b
Expect:  not run here at this size. The paper (base -> VideoPASTA): TempCompass 71.7 -> 72.3,
         PerceptionTest 68.6 -> 69.4, NeXTQA 75.8 -> 77.3, MVBench 65.2 -> 66.3, Vinoground 27.9 ->
         28.3, MLVU 68.7 -> 69.2, LongVideoBench 60.7 -> 61.5, VideoMME 62.2 -> 64.1. Fits v6e:4x4
         by the compiler (docs/preflight.md)
"""

from configs import _paper, _tiny
from jaxvid.config import PreferenceRun
from jaxvid.data import pipeline
from jaxvid.models.layers import Compute
from jaxvid.objectives.preference import DPO
from jaxvid.train.optimizers import AdamW

BASE = "Qwen/Qwen2.5-VL-7B-Instruct"
TOPOLOGY = "v6e:4x4"


def get_config(runlocal: bool = False) -> PreferenceRun:
    clip = _paper.QWEN25_LONG
    run = PreferenceRun(
        model="models/Qwen2.5-VL-7B-Instruct",
        compute=Compute(dtype="bfloat16", ffn_parts=4),
        data=pipeline.Data(
            shards=("data/pasta",),
            tasks=("preference",),
            budget=_paper.budget(clip, rows=16, room=1536, scored=1280, branches=10),
            pairs=32,
            microbatches=2,
            sampling=clip.sampling,
            workers=16,
            cache="data/cache",
        ),
        freeze=("tower",),
        frozen_dtype="bfloat16",
        objective=DPO(beta=0.1, axis_weights=(1.0, 1.0, 1.0)),
        optimizer=AdamW(lr=5e-7, warmup=7, final=0.1),
        steps=220,  # 3 epochs of 2,340 records: 7,020 pairs, three to a preferred response
        checkpoint_every=40,
    )
    if runlocal:
        return _paper.twin_preferences(run, "qwen2_5_vl", _tiny.adversaries(2), rows=4)
    return run
