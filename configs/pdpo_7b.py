"""pDPO of the audio-visual stack of video-SALMONN-o1 (arXiv 2502.11775, section 4): SigLIP, Whisper
with a window Q-Former, Qwen2-7B with LoRA.

The paper's: LoRA of rank 64 and alpha 256, 2 frames a second and at most 60, pairs of steps and of
whole paths beside each other, about 100,000 of each. Ours, where it is silent: beta 0.1, soft
labels with mu 0.1, rate 5e-6, one epoch of 64 records an update, at most 60 s of sound. The start
is an SFT of a folder that `assemble.video_salmonn_o1` makes of the released parts; shards of steps
are made by `jaxvid steps`.

Run:     jaxvid train configs/pdpo_7b.py --workdir runs/pdpo_7b
Test:    jaxvid train configs/pdpo_7b.py:runlocal --workdir /tmp/pdpo_7b
Expect:  not run here at this size. The paper (SFT -> pDPO): VideoMME 62.9 -> 65.6, NExT-QA 78.2 ->
         82.3, StandUp 68.6 -> 76.7, Academic 42.5 -> 48.3, SynthDec F1 5.8 -> 17.8. Fits v5e:4x8
         by the compiler (docs/preflight.md)
"""

from configs import _paper, _tiny
from jaxvid.config import PreferenceRun
from jaxvid.data import pipeline
from jaxvid.models.layers import Compute
from jaxvid.models.lora import LoRA
from jaxvid.objectives.preference import PDPO
from jaxvid.train.optimizers import AdamW

BASE = "video-salmonn-o1-7b"
TOPOLOGY = "v5e:4x8"


def get_config(runlocal: bool = False) -> PreferenceRun:
    clip = _paper.SALMONN
    run = PreferenceRun(
        model="runs/salmonn_sft/model",
        compute=Compute(dtype="bfloat16", ffn_parts=4),
        data=pipeline.Data(
            shards=("data/steps", "data/paths"),
            weights=(1.0, 1.0),
            tasks=("preference",),
            budget=_paper.budget(clip, rows=32, room=1848, scored=1536, branches=16),
            pairs=64,
            microbatches=2,
            sampling=clip.sampling,
            sound=True,
            workers=16,
            cache="data/cache",
        ),
        lora=LoRA(rank=64, alpha=256.0),
        frozen_dtype="bfloat16",
        objective=PDPO(beta=0.1, labels="soft", mu=0.1),
        optimizer=AdamW(lr=5e-6, warmup=90, final=0.1),
        steps=3125,
        checkpoint_every=250,
    )
    if runlocal:
        return _paper.twin_preferences(run, "video_salmonn_o1", _tiny.step_pairs(2), rows=4)
    return run
