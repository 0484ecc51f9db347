"""The adversarial probe of the laptop world: false premises and "none of the above", by axis.

Each kind of question has its control, so that a model that always refuses is seen: `none` and
`premise` ask for a refusal, `listed` and `so` do not (data_gen/pasta.py). Four options each; the
scenes of the test split are in no other.

Run:     jaxvid eval configs/tiny_pasta_eval.py --model runs/pasta_dpo/model --workdir runs/probe
Test:    jaxvid eval configs/tiny_pasta_eval.py:runlocal --workdir /tmp/probe
Expect:  3,600 questions, 12 to a scene; before and after in configs/tiny_pasta.py
"""

from configs import _tiny
from jaxvid.config import Probe, ProbeRun
from jaxvid.models.layers import Compute


def get_config(runlocal: bool = False) -> ProbeRun:
    return ProbeRun(
        model=_tiny.BASE,
        compute=Compute(remat="none", unroll=4),
        data=_tiny.questions(8, "test", _tiny.PASTA),
        ask=Probe(
            max_tokens=_tiny.REPLY, rows=12 if runlocal else 100, limit=24 if runlocal else 0
        ),
    )
