"""Duality-normalised RL of Qwen2.5-VL-72B (DNA-Train, arXiv 2512.24271, section 4).

As dna_7b_rl, whose docstring says what is the paper's and what is ours; 20 steps are the paper's.
Two slices: each holds all weights, and gradients alone cross between them.

Run:     jaxvid train configs/dna_72b_rl.py --workdir runs/dna_72b_rl
Test:    jaxvid train configs/dna_72b_rl.py:runlocal --workdir /tmp/dna_72b_rl
Expect:  not run here at this size. The base has 58.9 % of DualityVidQA-Test's pairs right on both
         sides (Real 95.8, CF 62.8); the paper's main table has what comes out. Fits 2 slices of
         v5p:4x4x4 by the compiler (docs/preflight.md)
"""

from configs import _paper
from jaxvid.config import PolicyRun

BASE = "Qwen/Qwen2.5-VL-72B-Instruct"
TOPOLOGY = "v5p:4x4x4"
SLICES = 2


def get_config(runlocal: bool = False) -> PolicyRun:
    run = _paper.dna_rl(
        "runs/dna_72b_sft/model", _paper.QWEN25, steps=20, rows=32, tensor=4, replica=SLICES
    )
    return _paper.twin_rl(run, "qwen2_5_vl") if runlocal else run
