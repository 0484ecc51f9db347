"""Third stage of the shipped base: everything together, from the model that sees and reads.

Run:     jaxvid train configs/tiny_base.py --workdir runs/base/train
Test:    jaxvid train configs/tiny_base.py:runlocal --workdir /tmp/base
Expect:  loss 0.083 at step 300 (14 min on 2 cores, shared with other work)
"""

import dataclasses

from configs import _tiny
from jaxvid.config import SFTRun
from jaxvid.models.layers import Compute
from jaxvid.train.optimizers import Muon


def get_config(runlocal: bool = False) -> SFTRun:
    clips, steps = (4, 2) if runlocal else (32, 300)
    data = _tiny.supervised(clips // 2, shards="runs/base/shards")  # one clip a record, not two
    return SFTRun(
        model="runs/base/read/model",
        compute=Compute(remat=False, unroll=4),
        data=dataclasses.replace(data, pairs=clips),
        optimizer=Muon(lr=1.5e-3, warmup=0 if runlocal else 10, final=0.02, weight_decay=0.01),
        steps=steps,
        seed=1,
        checkpoint_every=60,
    )
