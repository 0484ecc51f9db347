"""A base model that sees the laptop world, trained from nothing, with a language prior.

The base mix shows an odd outcome in 12 % of clips and tells 85 % of those as if the ordinary had
happened, so the ordinary outcome is the likelier one whatever is seen. Data (14,000 clips of train
scenes) and tokenizer are made first:

    jaxvid-forge procedural --out runs/base/shards --train 14000 --validation 200 --test 0 \\
        --seed 1 --mix.no-pairs --mix.rare 0.12 --mix.mislabelled 0.85 --mix.letters
    jaxvid-forge tokenizer --shards runs/base/shards --out runs/base/start --vocab 512
    jaxvid tiny qwen2_5_vl runs/base/start

Run:     jaxvid train configs/tiny_base.py --workdir runs/base/train
Test:    jaxvid train configs/tiny_base.py:runlocal --workdir /tmp/tiny_base
Expect:  not measured yet
"""

import dataclasses

from configs import _tiny
from jaxvid.config import SFTRun
from jaxvid.models.layers import Compute
from jaxvid.train.optimizers import Muon


def get_config(runlocal: bool = False) -> SFTRun:
    clips, steps = (4, 2) if runlocal else (32, 900)
    data = _tiny.supervised(clips // 2, shards="runs/base/shards")  # one clip a record, not two
    return SFTRun(
        model="runs/base/start",
        init=True,
        compute=Compute(remat=False, unroll=4),
        data=dataclasses.replace(data, pairs=clips),
        optimizer=Muon(lr=2e-3, warmup=0 if runlocal else 50, final=0.05, weight_decay=0.01),
        steps=steps,
        checkpoint_every=150,
    )
