"""DPO against adversaries on three axes (VideoPASTA), on the laptop world, from an SFT checkpoint.

L = l_s L_spatial + l_t L_temporal + l_c L_crossframe (arXiv 2504.14096). The shards are made of the
world's, and the start is the world's SFT, taught the form of the probe's questions:

    jaxvid-forge pasta --shards runs/world --out runs/pasta
    jaxvid train configs/tiny_sft.py --workdir runs/pasta_sft --model runs/sft/model \\
        --data.shards runs/pasta --validation.shards runs/pasta --data.pairs 8 \\
        --data.budget.rows 8 --steps 80 --eval-batches 1
    jaxvid score configs/tiny_pasta.py --out runs/pasta/reference

Run:     jaxvid train configs/tiny_pasta.py --workdir runs/pasta_dpo
Test:    jaxvid train configs/tiny_pasta.py:runlocal --workdir /tmp/pasta
Expect:  figures
"""

from configs import _tiny
from jaxvid.config import PreferenceRun
from jaxvid.models.layers import Compute
from jaxvid.objectives.preference import DPO
from jaxvid.train.optimizers import AdamW


def get_config(runlocal: bool = False) -> PreferenceRun:
    pairs, steps = (2, 2) if runlocal else (8, 60)
    return PreferenceRun(
        model=_tiny.BASE if runlocal else "runs/pasta_sft/model",
        compute=Compute(remat="none", unroll=4),
        data=_tiny.adversaries(pairs),
        validation=_tiny.adversaries(pairs, "validation"),
        objective=DPO(beta=0.1, axis_weights=(1.0, 1.0, 1.0)),
        optimizer=AdamW(lr=2e-5, warmup=0 if runlocal else 5, final=0.1),
        steps=steps,
        eval_every=30,
        checkpoint_every=20,
    )
