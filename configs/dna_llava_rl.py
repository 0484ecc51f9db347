"""Duality-normalised RL of LLaVA-NeXT-Video-7B (DNA-Train, arXiv 2512.24271, section 4).

As dna_7b_rl, whose docstring says what is the paper's and what is ours; 600 steps, as for 7B, are
ours.

Run:     jaxvid train configs/dna_llava_rl.py --workdir runs/dna_llava_rl
Test:    jaxvid train configs/dna_llava_rl.py:runlocal --workdir /tmp/dna_llava_rl
Expect:  not run here at this size. The paper has 16.9 % of DualityVidQA-Test's pairs right on both
         sides before, and 67.6 % after the whole method. Fits v5p:2x2x4 by the compiler
         (docs/preflight.md)
"""

from configs import _paper
from jaxvid.config import PolicyRun

BASE = "llava-hf/LLaVA-NeXT-Video-7B-hf"
TOPOLOGY = "v5p:2x2x4"


def get_config(runlocal: bool = False) -> PolicyRun:
    run = _paper.dna_rl("runs/dna_llava_sft/model", _paper.NEXT_VIDEO, steps=600, rows=16)
    return _paper.twin_rl(run, "llava_next_video") if runlocal else run
