"""Probes of trajectories in the laptop world: what a box does, where a thing is, and its track.

`temporal` and `spatial` are choices of four; `track` is graded by the mean overlap (intersection
over union) of its boxes, so its `grade` is the figure to read. The format is not paid, so that the
grade of a choice is 1 if it is right.

Run:     jaxvid eval configs/tiny_utr_eval.py --model runs/utr/train/model --workdir runs/utr/probe
Test:    jaxvid eval configs/tiny_utr_eval.py:runlocal --workdir /tmp/utr_eval
Expect:  580 questions of each kind on 300 held-out pairs (test split of seed 0), greedy, 95 % over
         records, 2 min of CPU. The base: temporal 16.4 % (13.5 to 19.6), spatial 0.9 (0.0 to 1.8),
         track 0, and 79 % of all replies unparsed. After tiny_utr.py, 120 steps of seed 0: temporal
         31.6 (27.8 to 35.4), spatial 26.4 (22.9 to 30.0, chance is 25), tracks of mean overlap
         0.047 (0.035 to 0.059); 10 % unparsed. With blank frames (200 of each) 28.5 (22.4 to 34.3),
         24.5 (18.7 to 30.8) and 0: what is gained is mostly form.
"""

from configs import _tiny
from jaxvid import rewards
from jaxvid.config import ProbeRun
from jaxvid.data import layout, pipeline
from jaxvid.eval.probe import Settings
from jaxvid.models.layers import Compute


def get_config(runlocal: bool = False) -> ProbeRun:
    return ProbeRun(
        model=_tiny.BASE,
        compute=Compute(remat="none", unroll=4),
        data=pipeline.Data(
            shards=("runs/utr/shards",),
            split="test",
            tasks=("policy",),
            budget=layout.Budget(rows=8, tokens=160, scored=8, branches=1, frames=4, patches=36),
            sampling=_tiny.SAMPLING,
        ),
        reward=rewards.ByAnswer(format_weight=0.0),
        ask=Settings(
            max_tokens=8 if runlocal else 128,
            rows=12 if runlocal else 96,
            limit=12 if runlocal else 0,
        ),
    )
