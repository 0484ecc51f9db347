"""Duality-normalised RL of Qwen2.5-VL-7B on duality pairs (DNA-Train, arXiv 2512.24271, section 4).

The paper's: rate 1e-6, batch 64, 16 replies to a prompt, 600 steps, format and correctness as
reward, dynamic sampling, advantages of both sides scaled to equal signal. DAPO's where it is
silent: clip 0.2 and 0.28, no KL, token mean, temperature 1, soft punishment of long replies. Ours:
64 counts prompts (32 pairs), 16 frames of at most 256 tokens for two, replies of at most 512
tokens, a frozen vision tower, a constant rate after warm-up.

Run:     jaxvid train configs/dna_7b_rl.py --workdir runs/dna_7b_rl
Test:    jaxvid train configs/dna_7b_rl.py:runlocal --workdir /tmp/dna_7b_rl
Expect:  not run here at this size. The paper has 76.8 % of DualityVidQA-Test's pairs right on both
         sides (Real 95.8, CF 80.1; GRPO 74.6, DAPO 74.8, SFT 58.7). Fits v5p:2x2x4 by the compiler
         (docs/preflight.md)
"""

from configs import _paper
from jaxvid.config import PolicyRun

BASE = "Qwen/Qwen2.5-VL-7B-Instruct"
TOPOLOGY = "v5p:2x2x4"


def get_config(runlocal: bool = False) -> PolicyRun:
    run = _paper.dna_rl("runs/dna_7b_sft/model", _paper.QWEN25, steps=600, rows=16)
    return _paper.twin_rl(run, "qwen2_5_vl") if runlocal else run
