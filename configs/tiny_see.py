"""First stage of the shipped base: learn to see the laptop world, from nothing.

Open questions, dense captions and some questions of choice, several per clip as branches of one
prompt. In the base mix 12 % of the clips show an odd outcome, and 85 % of those are told as if the
ordinary had happened: the language prior. Data and the untrained model are made first:

    jaxvid-forge procedural --out runs/base/shards --train 14000 --validation 200 --test 0 \\
        --seed 1 --mix.no-pairs --mix.rare 0.12 --mix.mislabelled 0.85 --mix.letters
    jaxvid-forge tokenizer --shards runs/base/shards --out runs/base/tokenizer
    jaxvid tiny qwen2_5_vl runs/base/start --tokenizer runs/base/tokenizer

Run:     jaxvid train configs/tiny_see.py --workdir runs/base/see
         jaxvid export runs/base/see runs/base/seen --which 300
Test:    jaxvid train configs/tiny_see.py:runlocal --workdir /tmp/see
Expect:  loss 0.14 at step 300 (14 min on 2 cores). The thoughts are right then, the letters are
         not: finding an option's letter in the prompt is what configs/tiny_read.py is for.
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
