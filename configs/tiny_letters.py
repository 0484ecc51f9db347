"""Last stage of the shipped base: clips and reading practice together, so that both skills stay.

Run:     jaxvid train configs/tiny_letters.py --workdir runs/base/letters
Test:    jaxvid train configs/tiny_letters.py:runlocal --workdir /tmp/letters
Expect:  not measured yet
"""

import dataclasses

from configs import tiny_base
from jaxvid.config import SFTRun
from jaxvid.train.optimizers import Muon


def get_config(runlocal: bool = False) -> SFTRun:
    base = tiny_base.get_config(runlocal)
    budget = dataclasses.replace(base.data.budget, tokens=448)  # two records of practice in a row
    data = dataclasses.replace(
        base.data,
        shards=("runs/base/shards", "runs/base/practice"),
        weights=(1.0, 1.0),
        budget=budget,
    )
    return dataclasses.replace(
        base,
        model="runs/base/train/model",
        data=data,
        optimizer=Muon(lr=1.5e-3, warmup=0 if runlocal else 5, final=0.02),
        steps=2 if runlocal else 150,
        seed=2,
    )
