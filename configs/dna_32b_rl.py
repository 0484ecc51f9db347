"""Duality-normalised RL of Qwen2.5-VL-32B (DNA-Train, arXiv 2512.24271, section 4).

As dna_7b_rl, whose docstring says what is the paper's and what is ours; 60 steps are the paper's.

Run:     jaxvid train configs/dna_32b_rl.py --workdir runs/dna_32b_rl
Test:    jaxvid train configs/dna_32b_rl.py:runlocal --workdir /tmp/dna_32b_rl
Expect:  not run here at this size. The paper trains it; its figures are in its main table. Fits
         v5p:4x4x4 by the compiler (docs/preflight.md)
"""

from configs import _paper
from jaxvid.config import PolicyRun

BASE = "Qwen/Qwen2.5-VL-32B-Instruct"
TOPOLOGY = "v5p:4x4x4"


def get_config(runlocal: bool = False) -> PolicyRun:
    # By the compiler a decode over fsdp 64 alone takes four times as long.
    run = _paper.dna_rl("runs/dna_32b_sft/model", _paper.QWEN25, steps=60, tensor=4)
    return _paper.twin_rl(run, "qwen2_5_vl") if runlocal else run
