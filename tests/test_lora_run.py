"""A LoRA run from flags to folders: what it saves, resumes, refuses and exports."""

import dataclasses
import shutil

import jax
import numpy as np
import pairs
import pytest

from jaxvid import config, main, runs
from jaxvid.models import hf, lora, peft
from jaxvid.objectives.policy import Policy
from jaxvid.rollout.sampler import Sampling
from jaxvid.train import metrics, optimizers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Reinforcement learning under LoRA with dropout, against the start; two steps."""
    folder = tmp_path_factory.mktemp("lora")
    pairs.write(folder, [pairs.record(i, split="train") for i in range(4)], split="train")
    base = hf.initialise(pairs.config(folder), 0)
    shutil.move(folder / "model", folder / "tokens")
    hf.save(folder / "model", base.cfg, base.params, like=folder / "tokens", dtype="float32")
    return config.PolicyRun(
        model=str(folder / "model"),
        compute=config.Compute(remat="none"),
        data=dataclasses.replace(pairs.builder(folder, "train").data, pairs=2),
        ask=None,
        optimizer=optimizers.AdamW(lr=1e-2),
        objective=Policy(kl_coef=0.01, entropy_coef=0.1),  # which pays whatever is replied
        rollout=config.Rollout(
            group=2, sampling=Sampling(max_tokens=3), pair_filter="none", max_refills=0
        ),
        lora=lora.LoRA(rank=2, dropout=0.1, targets=("decoder.blocks.attention",)),
        frozen_dtype="bfloat16",
        rates=(("lora.b", 2.0),),
        steps=2,
        checkpoint_every=1,
    )


def test_a_run_resumes_exports_and_refuses_another_base(run, tmp_path, capsys):
    whole = runs.train(run, tmp_path / "whole")
    assert {x.dtype.name for x in jax.tree.leaves(whole.state.frozen)} == {"bfloat16"}
    first = metrics.read(tmp_path / "whole")[-1]
    assert first["learning_rate/lora.b"] == pytest.approx(2 * first["learning_rate"])
    assert first["kl"] > 0 and first["grad_norm"] > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/2")
    cut = runs.train(run, tmp_path / "cut")
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.tree.map(same, whole.state, cut.state)

    assert main.main(["export", str(tmp_path / "cut"), str(tmp_path / "a"), "--adapter"]) == 0
    base = hf.load(run.model, dtype="bfloat16")
    settings, _, params = peft.load(tmp_path / "a", base.cfg, base.graph, base.params)
    assert (settings.rank, settings.scale) == (2, run.lora.scale)
    assert main.main(["export", str(tmp_path / "cut"), str(tmp_path / "m"), "--which", "2"]) == 0
    merged = hf.load(tmp_path / "m").params
    want = jax.tree.map(lambda x: x.astype("bfloat16"), lora.merge(params, settings))
    jax.tree.map(same, want, merged)
    jax.tree.map(same, merged, hf.load(tmp_path / "cut/model").params)

    moved = jax.tree.map(lambda x: x + 0.01, base.params)
    other = str(tmp_path / "other")
    hf.save(other, base.cfg, moved, like=run.model, dtype="float32")
    with pytest.raises(ValueError, match="frozen weights are not those that the run"):
        runs.train(dataclasses.replace(run, model=other), tmp_path / "cut")


def test_settings_that_exclude_each_other(run, tmp_path, capsys):
    with pytest.raises(ValueError, match="LoRA freezes all but its adapters"):
        runs.train(dataclasses.replace(run, freeze=("tower",)), tmp_path / "a")
    plain = dataclasses.replace(run, lora=lora.LoRA(), rates=(), freeze=("towr",))
    with pytest.raises(ValueError, match="freeze: 'towr' fits nothing.*tower.merger"):
        runs.train(plain, tmp_path / "b")
    workdir = tmp_path / "c"
    runs._save_config(dataclasses.replace(plain, freeze=()), workdir)
    assert main.main(["export", str(workdir), str(tmp_path / "d"), "--adapter"]) == 1
    assert "has no adapters (lora.rank 0)" in capsys.readouterr().err
