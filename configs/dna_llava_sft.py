"""SFT of LLaVA-NeXT-Video-7B on duality pairs (DNA-Train, arXiv 2512.24271, section 4).

As dna_7b_sft, whose docstring says what is the paper's and what is ours. One frame is 144 tokens of
its own, and there are 16.

Run:     jaxvid train configs/dna_llava_sft.py --workdir runs/dna_llava_sft
Test:    jaxvid train configs/dna_llava_sft.py:runlocal --workdir /tmp/dna_llava_sft
Expect:  not run here at this size. The paper gives the whole method alone: pairs of
         DualityVidQA-Test right on both sides 16.9 % before, 67.6 % after. Fits v5e:4x4 by the
         compiler (docs/preflight.md)
"""

from configs import _paper
from jaxvid.config import SFTRun

BASE = "llava-hf/LLaVA-NeXT-Video-7B-hf"
TOPOLOGY = "v5e:4x4"


def get_config(runlocal: bool = False) -> SFTRun:
    run = _paper.dna_sft("models/LLaVA-NeXT-Video-7B-hf", _paper.NEXT_VIDEO)
    return _paper.twin_sft(run, "llava_next_video") if runlocal else run
