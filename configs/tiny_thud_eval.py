"""Probes of shifted, muted and swapped sound, and general questions: greedy, with THUD's measures.

Run:     jaxvid eval configs/tiny_thud_eval.py --model runs/thud/dpo/model \\
             --workdir runs/thud/dpo/probe
Test:    jaxvid eval configs/tiny_thud_eval.py:runlocal --workdir /tmp/thud_eval
Expect:  1,082 questions of 180 test records (seed 0). Combined: base 50.4 % (50.0 to 51.0), SFT
         81.2 (78.9 to 83.6), SFT and DPO 94.6 (92.8 to 96.1)
"""

from configs import _omni
from jaxvid import rewards
from jaxvid.config import Probe, ProbeRun
from jaxvid.models.layers import Compute


def get_config(runlocal: bool = False) -> ProbeRun:
    return ProbeRun(
        model=_omni.BASE,
        compute=Compute(remat="none", unroll=1),
        data=_omni.questions((_omni.SOUND, _omni.GENERAL), "test"),
        ask=Probe(max_tokens=_omni.REPLY, rows=16 if runlocal else 96, limit=16 if runlocal else 0),
        reward=rewards.Answer(format_weight=0.0),
        sound=True,
    )
