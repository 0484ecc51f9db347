"""SFT of Qwen2.5-VL-7B on duality pairs (DNA-Train, arXiv 2512.24271, section 4).

The paper's: one epoch of 54,879 real and 50,000 counterfactual questions about 25,000 pairs, rate
1e-6, as many real as counterfactual samples in a batch. Ours, where it is silent: 16 frames of at
most 256 tokens for two, both sides of 16 pairs with two questions each an update (its batch is 4,
of what it does not say), a frozen vision tower, AdamW, warm-up of 3 %, cosine to a tenth.

Run:     jaxvid train configs/dna_7b_sft.py --workdir runs/dna_7b_sft
Test:    jaxvid train configs/dna_7b_sft.py:runlocal --workdir /tmp/dna_7b_sft
Expect:  not run here at this size. The paper's ablation has 58.7 % of DualityVidQA-Test's pairs
         right on both sides after SFT (base: 52.8 %). Fits v5e:4x4 by the compiler
         (docs/preflight.md)
"""

from configs import _paper
from jaxvid.config import SFTRun

BASE = "Qwen/Qwen2.5-VL-7B-Instruct"
TOPOLOGY = "v5e:4x4"


def get_config(runlocal: bool = False) -> SFTRun:
    run = _paper.dna_sft("models/Qwen2.5-VL-7B-Instruct", _paper.QWEN25)
    return _paper.twin_sft(run, "qwen2_5_vl") if runlocal else run
