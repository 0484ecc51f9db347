"""Duality-normalised RL of Qwen3-VL-8B (DNA-Train, arXiv 2512.24271, section 4).

As dna_7b_rl, whose docstring says what is the paper's and what is ours; this model is not the
paper's: all settings are those of its 7B.

Run:     jaxvid train configs/dna_qwen3vl_rl.py --workdir runs/dna_qwen3vl_rl
Test:    jaxvid train configs/dna_qwen3vl_rl.py:runlocal --workdir /tmp/dna_qwen3vl_rl
Expect:  not run here at this size. The paper has no such model: there is nothing to compare with.
         Fits v5p:2x2x4 by the compiler (docs/preflight.md)
"""

from configs import _paper
from jaxvid.config import PolicyRun

BASE = "Qwen/Qwen3-VL-8B-Instruct"
TOPOLOGY = "v5p:2x2x4"


def get_config(runlocal: bool = False) -> PolicyRun:
    run = _paper.dna_rl("runs/dna_qwen3vl_sft/model", _paper.QWEN3, steps=600, rows=16)
    return _paper.twin_rl(run, "qwen3_vl") if runlocal else run
