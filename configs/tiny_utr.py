"""SFT on bidirectional dialogues about trajectories (Video-UTR, arXiv 2502.12081), from the base.

Temporal from spatial and spatial from temporal, boxes in ninths of the frame at four moments.
The learning rate and the steps are ours; the paper's are for 7B. The dialogues are made first:

    jaxvid-forge procedural --out runs/world --train 1500 --validation 60 --test 300
    jaxvid-forge utr --shards runs/world --out runs/utr/shards --scale 9

Run:     jaxvid train configs/tiny_utr.py --workdir runs/utr/train
Test:    jaxvid train configs/tiny_utr.py:runlocal --workdir /tmp/utr
Expect:  loss 0.315, validation 0.310 at step 120 (seed 0; 7 s a step on two cores shared with other
         work). The form is learnt, the places are not yet: tiny_utr_eval.py has the figures. TPL of
         the validation answers under what comes out: 0.078 (0.072 to 0.085), ratio 1.22.
"""

from configs import _tiny
from jaxvid.config import SFTRun
from jaxvid.data import layout, pipeline
from jaxvid.models.layers import Compute
from jaxvid.train.optimizers import Muon


def get_config(runlocal: bool = False) -> SFTRun:
    pairs, questions, steps = (2, 1, 2) if runlocal else (4, 3, 120)
    return SFTRun(
        model=_tiny.BASE,
        compute=Compute(remat="none", unroll=4),
        data=dialogues(pairs, "train", questions),
        validation=dialogues(pairs, "validation", questions),
        optimizer=Muon(lr=1e-3, warmup=0 if runlocal else 5, final=0.1),
        steps=steps,
        checkpoint_every=30,
    )


def dialogues(pairs: int, split: str = "train", questions: int = 3) -> pipeline.Data:
    """So many questions on each clip of `pairs` records an update; one has at most 201 tokens, and
    133 on average, of which 73 are the answer's."""
    return pipeline.Data(
        shards=("runs/utr/shards",),
        split=split,
        tasks=("sft", "choice"),
        budget=layout.Budget(
            rows=pairs + 2,
            tokens=64 + 320 * questions,
            scored=192 * questions,
            branches=2 * questions,
            frames=8,
            patches=36,
        ),
        pairs=pairs,
        questions=questions,
        sampling=_tiny.SAMPLING,
    )
