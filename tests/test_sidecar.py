"""A reference's log-probs, computed once: the same training, and errors for another reference."""

import dataclasses
import pathlib
import pickle
import shutil

import jax
import numpy as np
import pairs
import pytest

from jaxvid import config, main, runs, scoring
from jaxvid.data import records, shards, sidecar
from jaxvid.data.records import Response
from jaxvid.models import hf, lora
from jaxvid.objectives.preference import DPO
from jaxvid.train import loop, metrics, optimizers

SAID = ("it gets brighter", "it gets darker", "it stays grey", "it turns red")


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """`quick` for the fixtures of the module too: what is compared is compiled alike."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def record(i):
    """Three rejected ones on their axes; one on the other clip; steps behind a prefix."""
    axes = zip(SAID[1:], records.AXES[1:])
    three = Response(SAID[0], "chosen"), *(Response(t, "rejected", a) for t, a in axes)
    other = Response(SAID[1], "chosen"), Response(SAID[1], "rejected", media=0)
    step = Response(" brighter", "chosen"), Response(" darker", "rejected", "temporal")
    examples = (
        records.Example("three", "preference", 0, "What happens?", (), SAID[0], three),
        records.Example("other", "preference", 1, "What happens?", (), SAID[1], other),
        records.Example("step", "preference", 0, "Which?", (), "", step, prefix="it gets"),
    )
    return dataclasses.replace(pairs.record(i, split="train"), examples=examples[: 1 + i % 3])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sidecar")
    pairs.write(folder, [record(i) for i in range(6)], split="train")
    base = hf.initialise(pairs.config(folder), 0)
    shutil.move(folder / "model", folder / "tokens")
    hf.save(folder / "model", base.cfg, base.params, like=folder / "tokens", dtype="float32")
    moved = jax.tree.map(lambda x: 1.05 * x, base.params)
    hf.save(folder / "other", base.cfg, moved, like=folder / "tokens", dtype="float32")
    data = pairs.builder(folder, "train").data
    data = dataclasses.replace(data, tasks=("preference",), pairs=2)
    return config.PreferenceRun(
        model=str(folder / "model"),
        reference=str(folder / "other"),
        compute=config.Compute(remat="none"),
        data=data,
        validation=data,
        objective=DPO(beta=0.5, axis_weights=(1.0, 2.0, 0.5)),
        # AdamW makes steps of the rate's size of a gradient that is rounding alone (a key's bias).
        optimizer=optimizers.AdamW(lr=1e-4),
        steps=2,
        log_every=1,
    )


@pytest.fixture(scope="module")
def scored(run, tmp_path_factory):
    """The run with its sidecar, which was made in parts of two records."""
    out = tmp_path_factory.mktemp("scored") / "reference"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sidecar, "RECORDS", 2)
        scoring.score(run, out)
    return dataclasses.replace(run, sidecar=str(out))


def test_training_with_it_is_training_with_the_reference(run, scored, tmp_path, monkeypatch):
    online = runs.train(run, tmp_path / "online")
    monkeypatch.setattr(loop, "preference", None)  # no pass of a reference
    monkeypatch.setattr(hf, "load", only_the_model(hf.load, run.model))
    kept = runs.train(scored, tmp_path / "kept")
    near = {"atol": 1e-6, "rtol": 0}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **near),
        online.state.params,
        kept.state.params,
    )
    both = [metrics.read(tmp_path / name) for name in ("online", "kept")]
    for a, b in zip(*both, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for name in (n for n in a if not n.startswith(("step_time", "perf/", "time/"))):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    margins = [line["rewards/margins"] for line in both[1] if "loss" in line]
    assert margins[0] != 0  # the reference is another model


def only_the_model(load, model):
    def checked(folder, **how):
        assert str(folder) == model, "the reference is loaded"
        return load(folder, **how)

    return checked


def test_a_stopped_pass_goes_on_to_the_same_files(run, scored, tmp_path, monkeypatch):
    monkeypatch.setattr(sidecar, "RECORDS", 2)
    write, written = sidecar.write, []

    def stops(folder, part, found):
        written.append(part)
        if len(written) == 2:
            raise KeyboardInterrupt
        return write(folder, part, found)

    monkeypatch.setattr(sidecar, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        scoring.score(run, tmp_path)
    cut = dataclasses.replace(scored, sidecar=str(tmp_path))
    with pytest.raises(sidecar.SidecarError, match="lacks 2 of 3 parts.*it goes on"):
        runs.train(cut, tmp_path / "run")
    monkeypatch.setattr(sidecar, "write", write)
    scoring.score(run, tmp_path)
    whole = files(scored.sidecar)
    assert files(tmp_path) == whole and len(whole) == 8
    monkeypatch.setattr(config, "load_model", None)
    scoring.score(run, tmp_path)  # nothing is left to do


def files(folder):
    root = pathlib.Path(folder)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_every_scored_branch_has_its_numbers_and_travels_to_workers(run, scored):
    cfg = hf.read_config(run.model)
    builder = scoring.with_sidecar(scored, config.make_builder(run.model, cfg, run.data), "data")
    for i in range(3):
        for tree in pickle.loads(pickle.dumps(builder))(record(i), np.random.default_rng(i)):
            for b in tree.branches:
                assert (b.ref is not None) == b.scored.any()
                if b.ref is not None:
                    assert len(b.ref) == b.scored.sum() and (b.ref < 0).all()


def test_what_does_not_fit_is_named(run, scored, tmp_path):
    change = lambda **data: dataclasses.replace(
        scored, data=dataclasses.replace(scored.data, **data), validation=None
    )
    sampling = dataclasses.replace(run.data.sampling, frames=2)
    for other, words in (
        (dataclasses.replace(scored, reference=run.model), "model was .*, is .*another --out"),
        (change(sampling=sampling), "sampling.frames was 4, is 2"),
        (change(sound=True), "sound was false, is true"),
        (dataclasses.replace(scored, compute=config.Compute(dtype="bfloat16")), 'is "bfloat16"'),
        (change(blank=0.1), "data.blank is 0.1.*Set --data.blank 0"),
        (dataclasses.replace(scored, init=True, reference=""), "fresh weights"),
    ):
        with pytest.raises(ValueError, match=words):
            runs.train(other, tmp_path / "run")
    with pytest.raises(ValueError, match="data.blank is 0.1"):
        scoring.score(change(blank=0.1), tmp_path / "blank")
    with pytest.raises(sidecar.SidecarError, match="model was"):
        scoring.score(dataclasses.replace(run, reference=run.model), pathlib.Path(scored.sidecar))
    with pytest.raises(FileNotFoundError, match="run `jaxvid score`"):
        runs.train(dataclasses.replace(run, sidecar=str(tmp_path / "none")), tmp_path / "run")


def test_changed_shards_and_changed_words_are_refused(run, scored, tmp_path):
    changed = dataclasses.replace(record(0), id="another")
    shards.write(tmp_path, [changed, record(1)], split="train")
    data = dataclasses.replace(scored.data, shards=(str(tmp_path),))
    with pytest.raises(sidecar.SidecarError, match="shards was .* is "):
        runs.train(dataclasses.replace(scored, data=data), tmp_path / "run")
    cfg = hf.read_config(run.model)
    builder = scoring.with_sidecar(scored, config.make_builder(run.model, cfg, run.data), "data")
    one = record(0)
    chosen, *rest = one.examples[0].responses
    other = dataclasses.replace(chosen, text="it is new")
    moved = dataclasses.replace(one.examples[0], responses=(other, *rest))
    for broken in (
        dataclasses.replace(one, examples=(moved, *one.examples[1:])),
        dataclasses.replace(one, media=one.media[::-1]),
    ):
        with pytest.raises(sidecar.SidecarError, match="'pair 0', branch 0: .* have changed"):
            builder(broken, np.random.default_rng(0))


def test_what_a_lora_run_starts_from_is_its_reference(run, tmp_path):
    """Adapters that nothing was learned by change nothing, so its sidecar is the plain model's."""
    adapters = lora.LoRA(rank=2, targets=("decoder.blocks.attention",))
    tuned = dataclasses.replace(run, reference="", lora=adapters, validation=None)
    plain = dataclasses.replace(tuned, lora=lora.LoRA())
    folders = [scoring.score(r, tmp_path / name) for r, name in ((tuned, "a"), (plain, "b"))]
    made = [scoring.identity(r, r.data) for r in (tuned, plain)]
    one, two = (sidecar.Sidecar(f / "data", m).found for f, m in zip(folders, made, strict=True))
    assert one.keys() == two.keys() and one
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=1e-6)


def test_the_command_line(run, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main.main(["score", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "example: jaxvid score configs/tiny_pasta.py --out" in out
    assert main.main(["score", "tiny_sft", "--out", str(tmp_path)]) == 1
    assert "wants a PreferenceRun" in capsys.readouterr().err
    monkeypatch.setattr(runs, "load_config", lambda *given: run)
    called = []
    monkeypatch.setattr(scoring, "score", lambda *given: called.append(given) or tmp_path)
    assert main.main(["score", "tiny_pasta", "--out", str(tmp_path)]) == 0
    assert called == [(run, tmp_path)] and f"--sidecar {tmp_path}" in capsys.readouterr().out
