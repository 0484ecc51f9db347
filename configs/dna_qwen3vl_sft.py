"""SFT of Qwen3-VL-8B on duality pairs (DNA-Train, arXiv 2512.24271, section 4).

As dna_7b_sft, whose docstring says what is the paper's and what is ours. This model is not the
paper's: all settings are those of its 7B.

Run:     jaxvid train configs/dna_qwen3vl_sft.py --workdir runs/dna_qwen3vl_sft
Test:    jaxvid train configs/dna_qwen3vl_sft.py:runlocal --workdir /tmp/dna_qwen3vl_sft
Expect:  not run here at this size. The paper has no such model: there is nothing to compare with.
         Fits v6e:4x4 by the compiler (docs/preflight.md)
"""

from configs import _paper
from jaxvid.config import SFTRun

BASE = "Qwen/Qwen3-VL-8B-Instruct"
TOPOLOGY = "v6e:4x4"


def get_config(runlocal: bool = False) -> SFTRun:
    run = _paper.dna_sft("models/Qwen3-VL-8B-Instruct", _paper.QWEN3)
    return _paper.twin_sft(run, "qwen3_vl") if runlocal else run
