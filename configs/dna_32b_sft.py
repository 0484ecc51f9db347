"""SFT of Qwen2.5-VL-32B on duality pairs (DNA-Train, arXiv 2512.24271, section 4).

As dna_7b_sft, whose docstring says what is the paper's and what is ours. Weights are split over 8
ways of the width and 8 of heads, ffn and vocabulary, so that 16 rows are enough.

Run:     jaxvid train configs/dna_32b_sft.py --workdir runs/dna_32b_sft
Test:    jaxvid train configs/dna_32b_sft.py:runlocal --workdir /tmp/dna_32b_sft
Expect:  not run here at this size. The paper gives figures of the whole method alone. Fits v6e:8x8
         by the compiler (docs/preflight.md)
"""

from configs import _paper
from jaxvid.config import SFTRun

BASE = "Qwen/Qwen2.5-VL-32B-Instruct"
TOPOLOGY = "v6e:8x8"


def get_config(runlocal: bool = False) -> SFTRun:
    run = _paper.dna_sft("models/Qwen2.5-VL-32B-Instruct", _paper.QWEN25, tensor=8)
    return _paper.twin_sft(run, "qwen2_5_vl") if runlocal else run
