"""Greedy answers to the held-out pairs of the laptop world: Real, CF and Both accuracy.

Run:     jaxvid eval configs/tiny_eval.py --model runs/dna/model --workdir runs/dna/eval/none
Test:    jaxvid eval configs/tiny_eval.py:runlocal --workdir /tmp/eval
Expect:  300 pairs (test split of seed 0), 12 s a control on 2 cores: Both 2.3 % for the shipped
         base, 61.0 % for DNA
"""

from configs import _tiny
from jaxvid.config import EvalRun
from jaxvid.eval.run import Settings
from jaxvid.models.layers import Compute


def get_config(runlocal: bool = False) -> EvalRun:
    return EvalRun(
        model=_tiny.BASE,
        compute=Compute(remat="none", unroll=4),
        data=_tiny.questions(8, "test"),
        ask=Settings(
            max_tokens=_tiny.REPLY, rows=16 if runlocal else 100, limit=8 if runlocal else 0
        ),
    )
