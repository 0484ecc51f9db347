"""Whatever strikes a run, it ends with the parameters, metrics and data of the run left alone.

The faults, and what is compared after them, are in faults.py.
"""

import itertools
import random

import faults
import pytest


def test_six_faults(tmp_path):
    """One of each kind, two for each objective; run after run until all have struck."""
    with faults.Harm(tmp_path, 0, mount=False) as harm:
        harm.whole()
        for arm, kind in zip(itertools.cycle(faults.ARMS), faults.KINDS):
            harm.harm(arm, kind)
        harm.end()
    assert len(harm.told) == 6 and min(harm.finished.values()) > 0


@pytest.mark.slow
def test_fifty_four_faults(tmp_path, capsys):
    """Three of each kind for each objective, in a drawn order."""
    plan = 3 * list(itertools.product(faults.ARMS, faults.KINDS))
    random.Random(1).shuffle(plan)
    with faults.Harm(tmp_path, 1, mount=faults.can_mount(tmp_path / "disk")) as harm:
        harm.whole()
        for n, (arm, kind) in enumerate(plan, 1):
            harm.harm(arm, kind)
            with capsys.disabled():
                print(n, harm.told[-1], flush=True)
        harm.end()
    with capsys.disabled():
        print(harm.table())
    assert len(harm.told) == 54 and min(harm.finished.values()) > 0
