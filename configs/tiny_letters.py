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
    shards = ("runs/base/shards", "runs/base/practice")
    return dataclasses.replace(
        base,
        model="runs/base/train/model",
        data=dataclasses.replace(base.data, shards=shards, weights=(1.0, 1.0)),
        optimizer=Muon(lr=1.5e-3, warmup=0 if runlocal else 5, final=0.02),
        steps=2 if runlocal else 150,
        seed=2,
    )
