"""First stage of the shipped base: learn to look things up in the prompt, on text alone.

The practice and the untrained model are made first:

    jaxvid-forge procedural --out runs/base/shards --train 14000 --validation 200 --test 0 \\
        --seed 1 --mix.no-pairs --mix.rare 0.12 --mix.mislabelled 0.85
    jaxvid-forge practice --out runs/base/practice
    jaxvid-forge tokenizer --shards runs/base/shards --out runs/base/tokenizer
    jaxvid tiny qwen2_5_vl runs/base/start --tokenizer runs/base/tokenizer

Run:     jaxvid train configs/tiny_read.py --workdir runs/base/read
Test:    jaxvid train configs/tiny_read.py:runlocal --workdir /tmp/read
Expect:  loss 0.154 at step 400 (7 min on 2 cores); it stays near 1.3 until step 100, then falls.
         Of the letters 70 % have a probability above one half, where chance is 25 %.
"""

from configs import _tiny
from jaxvid.config import SFTRun
from jaxvid.data import layout, pipeline
from jaxvid.models.layers import Compute
from jaxvid.train.optimizers import Muon


def get_config(runlocal: bool = False) -> SFTRun:
    records, steps = (4, 2) if runlocal else (16, 400)
    return SFTRun(
        model="runs/base/start",
        init=True,
        compute=Compute(remat="none", unroll=4),
        data=pipeline.Data(
            shards=("runs/base/practice",),
            tasks=("sft",),
            budget=layout.Budget(
                rows=records, tokens=288, scored=144, branches=12, frames=0, patches=36
            ),
            pairs=records,
            sampling=_tiny.SAMPLING,
        ),
        optimizer=Muon(lr=2e-3, warmup=0 if runlocal else 10, final=0.3),
        steps=steps,
        checkpoint_every=100,
    )
