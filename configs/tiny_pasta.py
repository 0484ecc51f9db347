"""DPO against adversaries on three axes (VideoPASTA), on the laptop world, from an SFT checkpoint.

L = l_s L_spatial + l_t L_temporal + l_c L_crossframe (arXiv 2504.14096); rate, steps and the
likelihood of the chosen reply beside it (`ce_weight`) are ours. The shards are made of the world's,
and the start is the world's SFT, taught the form of the probe's questions:

    jaxvid-forge procedural --out runs/world --train 1200 --validation 60 --test 300
    jaxvid-forge pasta --shards runs/world --out runs/pasta
    jaxvid train configs/tiny_sft.py --workdir runs/pasta_sft --model runs/sft/model \\
        --data.shards runs/pasta --validation.shards runs/pasta --data.pairs 8 \\
        --data.budget.rows 8 --steps 80 --eval-batches 1

Run:     jaxvid train configs/tiny_pasta.py --workdir runs/pasta_dpo
Test:    jaxvid train configs/tiny_pasta.py:runlocal --workdir /tmp/pasta
Expect:  94.8 % of 96 validation preferences the right way (spatial 90.6, temporal 93.8, cross-frame
         100); 8 to 10 min on 2 busy cores. The probe (tiny_pasta_eval, --ask.limit 1200: 100
         scenes, seed 0; 95 % over scenes): refusals that are right 59.8 % -> 64.2 % (+4.3 points,
         0.3 to 8.3; n = 625): spatial +9.3 (1.0 to 17.8), temporal +1.9 (-5.0 to 9.0), cross-frame
         +2.0 (-2.5 to 6.7); "none of the above" 80.5 -> 86.2 (+5.7, 0.6 to 11.0), false premises
         38.4 -> 41.4 (+2.9, -2.4 to 8.5). Controls 47.0 -> 44.5 (-2.4, -6.2 to 1.2; n = 575), so
         all of it 53.7 -> 54.7 (+1.1, -1.6 to 3.6): part of the gain is a habit of refusing; only
         the cross-frame axis gains with its controls (+5.5, 1.8 to 9.5; n = 400).
         Without the likelihood term (--objective.ce-weight 0 --optimizer.lr 4e-5) 94.8 % of the
         preferences are right too and the probe falls by 5.3 points (2.7 to 8.0).
"""

from configs import _tiny
from jaxvid.config import PreferenceRun
from jaxvid.models.layers import Compute
from jaxvid.objectives.preference import DPO
from jaxvid.train.optimizers import AdamW


def get_config(runlocal: bool = False) -> PreferenceRun:
    pairs, steps = (2, 2) if runlocal else (8, 40)
    return PreferenceRun(
        model=_tiny.BASE if runlocal else "runs/pasta_sft/model",
        compute=Compute(remat="none", unroll=4),
        data=_tiny.adversaries(pairs),
        validation=_tiny.adversaries(pairs, "validation"),
        objective=DPO(beta=0.1, axis_weights=(1.0, 1.0, 1.0), ce_weight=2.0),
        optimizer=AdamW(lr=1e-4, warmup=0 if runlocal else 5, final=0.1),
        steps=steps,
        eval_every=20,
        checkpoint_every=20,
    )
