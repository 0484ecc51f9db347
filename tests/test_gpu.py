"""benchmarks/gpu.py at a tiny size on CPU: both sides compute one thing, and its driver goes on
where it stopped. And what a GPU would run, lowered for CUDA."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

from benchmarks import _gpu_jaxvid as ours
from benchmarks import gpu, measure, work
from benchmarks.work import Case
from jaxvid import flops
from jaxvid.data import layout
from jaxvid.models import hf, lora
from jaxvid.models.layers import Compute
from jaxvid.ops import _choice
from jaxvid.rollout import groups
from jaxvid.rollout.sampler import Sampling
from jaxvid.train import state as states
from jaxvid.train import step

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
NO_TORCH = "the other side: pip install jaxvid[oracle]"


def case(model="tiny", kind="sft", side="jaxvid", repeats=2, micro=4):
    return Case(model=model, kind=kind, side=side, repeats=repeats, micro=micro)


# ---- both sides


@pytest.mark.parametrize(
    "model,kind",
    [("tiny", "sft"), ("tiny", "dpo"), ("tiny", "dna"), ("tiny-lora", "dna"), ("tiny-lora", "dpo")],
)
def test_both_sides_have_the_same_losses(model, kind, monkeypatch):
    """Of three steps from the same weights, in float32: of the model, its gradient and AdamW."""
    pytest.importorskip("torch", reason=NO_TORCH)
    from benchmarks import _gpu_torch as theirs

    monkeypatch.setattr(work, "RATE", 1e-3)
    mine = ours.measured(case(model, kind))
    other = theirs.measured(case(model, kind, "torch"))
    assert len(mine["seconds"]) == len(other["seconds"]) == 2
    assert mine["peak_gib"] is other["peak_gib"] is None
    np.testing.assert_allclose(mine["losses"], other["losses"], rtol=0, atol=1e-4)
    assert np.abs(np.diff(mine["losses"])).min() > 1e-3  # every step has moved the weights


@pytest.mark.parametrize("model", ["tiny", "tiny-lora"])
def test_weights_are_the_same_numbers(model, tmp_path):
    """Through the files that ours writes and transformers reads; and they have the size that they
    are to have."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    from benchmarks import peer

    of = case(model)
    cfg = work.config(of)
    graph, trained, still = ours.model(of, cfg)
    params = nnx.merge_state(trained, still)
    made = peer.build(cfg, "float32")
    if of.of.rank:
        made, params = peer.adapted(made, of.lora), lora.merge(params, of.lora)
    peer.fill(made)
    hf.save(tmp_path / "m", cfg, params, dtype="float32")
    stored = safetensors.numpy.load_file(tmp_path / "m/model.safetensors")
    seen, family = {}, hf.family_of(cfg)
    for name, p in made.named_parameters():
        if "lora_" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            seen[family.hub_name(name)] = p.detach().numpy()
    assert seen.keys() == stored.keys()
    for name, x in seen.items():
        np.testing.assert_array_equal(x, stored[name], err_msg=name)
    w = stored["model.layers.1.mlp.up_proj.weight"]
    assert abs(w.std() * 32**0.5 - 1) < 0.05 and abs(w.mean()) < 0.02
    assert not torch.isnan(made(torch.tensor([[7, 8]])).logits).any()
    if of.of.rank:
        a = dict(made.named_parameters())[
            "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.default.weight"
        ]
        mine = trained["decoder"]["blocks"]["mlp"]["up"]["lora"]["a"][...]
        np.testing.assert_array_equal(mine[1].T, a.detach().numpy())


@pytest.mark.parametrize("model,count", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_published_models_have_the_same_weights(model, count, monkeypatch):
    """By name and size, before a card is paid for."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    from benchmarks import peer

    monkeypatch.setattr(peer, "device", lambda: torch.device("meta"))
    cfg = work.config(case(model))
    family, mine = hf.family_of(cfg), {}
    where = family.places(cfg)
    for path, shape in hf.shapes(cfg).items():
        stacked = "{}" in where[path].name
        for i in range(shape[0] if stacked else 1):
            name = where[path].name.format(i)
            mine[name] = mine.get(name, 0) + np.prod(shape[1:] if stacked else shape)
    made = peer.build(cfg, "bfloat16")
    theirs = {family.hub_name(name): p.numel() for name, p in made.named_parameters()}
    assert mine == theirs and sum(mine.values()) == count


def test_a_row_in_processes_of_its_own(tmp_path, capsys):
    """As it runs on a card, but for the card."""
    pytest.importorskip("torch", reason=NO_TORCH)
    out = tmp_path / "gpu.jsonl"
    small = ["--only", "tiny/rollout", "tiny-lora/dna", "--repeats", "1", "--out", str(out)]
    gpu.main(small)
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split(" | ") for line in lines if line.startswith("| tiny")]
    told = {(c[0].strip("| "), c[1]): c[2:] for c in cells}
    assert len(told) == 5
    for c in told.values():
        assert float(c[0].split()[0]) > 0 and c[3] == "" and c[4] == "not known", told
    both = [told["tiny-lora/dna", side][5].split(" to ") for side in ("jaxvid", "torch")]
    np.testing.assert_allclose(*np.array(both, float), rtol=0, atol=1e-4)


# ---- the driver

H100 = gpu.Card("NVIDIA H100 80GB HBM3", "580.1", "81559 MiB")
GOOD = {"first": 9.0, "seconds": [2.0, 1.0, 4.0], "losses": [2.5, 2.25], "peak_gib": 60.0}
GOOD |= {"on": "cpu", "versions": "x 1"}


def test_the_driver_goes_on_and_tells(tmp_path, capsys, monkeypatch):
    out, asked, answers = tmp_path / "runs/gpu.jsonl", [], {}

    def run(case, on, limit):
        asked.append((case.model, case.kind, case.side))
        return answers.get(case.side, GOOD)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "card", lambda: H100)
    answers["torch"] = {"failed": "out of memory"}
    args = ["--only", "3b/dna", "--sides", "jaxvid", "torch", "--out", str(out)]
    gpu.main(args)
    assert asked == [("3b", "dna", "jaxvid"), ("3b", "dna", "torch")]
    told = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3, 81559 MiB, driver 580.1, 989 TFLOP/s" in told and "x 1" in told
    assert "| 3b/dna | torch | out of memory |" in told
    row = next(line for line in told.splitlines() if "3b/dna | jaxvid" in line).split(" | ")
    tokens = 2 * (2048 + 64 + 8 * 256)
    assert row[2:5] == ["2.000 (1.000 to 4.000)", "", f"{tokens / 2:,.0f}"]
    assert row[6:8] == ["60.0", "2.50000 to 2.25000"]
    share = float(row[5].strip("%")) / 100 * 2 * 989e12  # FLOPs; 3.09e9 parameters, 3 passes
    assert 1 < share / (6 * 3.09e9 * tokens) < 1.25  # and attention, and the tower

    with out.open("a") as file:
        file.write('{"card": {"name": "NVID')  # a run that was cut
    del answers["torch"]
    gpu.main(args)
    assert len(asked) == 2  # nothing is measured twice
    capsys.readouterr()
    gpu.main([*args, "--again"])
    assert asked[2:] == [("3b", "dna", "torch")]
    row = next(x for x in capsys.readouterr().out.splitlines() if "3b/dna | jaxvid" in x)
    assert row.split(" | ")[3] == "1.00"
    monkeypatch.setattr(gpu, "card", lambda: dataclasses.replace(H100, sliced=True))
    gpu.main([*args, "--stop", "1"])
    assert "2 left" in (told := capsys.readouterr().out) and "no MFU" in told
    assert len(asked) == 3  # another card has results of its own


def test_what_a_process_says_when_it_fails(monkeypatch, tmp_path, capsys):
    """Out of memory is told apart; the others are named; too long is too long."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$SAYS" >&2\necho \'{"seconds": [1.0]}\'\n$DOES\n')
    fake.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(fake))

    def told(says, does, limit=9.0):
        monkeypatch.setenv("SAYS", says)
        monkeypatch.setenv("DOES", does)
        return gpu.run(case(), gpu.Card(), limit)

    assert told("a warning: out of memory", "exit 0") == {"seconds": [1.0]}
    assert told("RESOURCE_EXHAUSTED: 9 GiB", "exit 1") == {"failed": "out of memory"}
    assert told("torch.OutOfMemoryError: CUDA", "exit 1") == {"failed": "out of memory"}
    assert told("ValueError: no", "exit 3") == {"failed": "exit 3: ValueError: no"}
    assert told("", "sleep 5", 0.2) == {"failed": "over 0 s"}


def test_what_is_asked_for_must_be_there(monkeypatch):
    monkeypatch.setattr(gpu, "card", gpu.Card)
    for args, why in ((["--only", "9b/*"], "fits no row"), (["--micro", "3"], "stand together")):
        with pytest.raises(ValueError, match=why):
            gpu.main(args)
    with pytest.raises(RuntimeError, match="no NVIDIA card"):
        gpu.main(["--only", "3b/sft"])
    on = gpu.environment("jaxvid", H100), gpu.environment("torch", H100)
    assert [x["JAX_PLATFORMS"] for x in on] == ["cuda", "cpu"]
    assert gpu.environment("jaxvid", gpu.Card())["JAX_PLATFORMS"] == "cpu"


# ---- the work


def test_useful_flops_are_those_counted():
    """With every pair of tokens computed, as short rows do it, and windows as masks over a frame:
    the decoder's forward pass and the tower's, by the jaxpr."""
    of = case(kind="dna")
    cfg = work.config(of)
    grown = work.trees(of, cfg)
    batch = jax.tree.map(lambda x: x[0], work.batch(grown))
    graph, shapes = hf.abstract(cfg)
    count = lambda f: flops.count(f, shapes)
    see = lambda p: nnx.merge(graph, p).tower(batch.vision)
    score = step.make_score(graph)
    tower, T = count(see), batch.tokens.tokens.shape[1]
    whole = dataclasses.replace(cfg.vision, full=(0, 1))
    turned = {"rtol": 2e-3}  # the angles of positions are products too
    np.testing.assert_allclose(tower, sum(work.tower_flops(whole, t) for t in grown), **turned)
    want = 2 * work.decoder_flops(cfg.text, T, T * T, batch.tokens.slot.shape[1])
    np.testing.assert_allclose(count(lambda p: score(p, batch)) - tower, want, **turned)

    P, R, G = 40, 3, 4
    assert (T, work.tokens(of, grown)) == (P + G * R, 2 * (P + G * R))
    pairs = P * (P + 1) // 2 + G * (R * P + R * (R + 1) // 2)
    assert work.seen(grown[0]) == pairs
    seen = np.asarray(layout.rows(grown, batch_budget(grown)).tokens.end)[0]
    at = np.arange(T)
    assert ((at[None] <= at[:, None]) & (at[:, None] < seen[None])).sum() == pairs
    forward = 2 * work.decoder_flops(cfg.text, T, pairs, G * R)
    towers = sum(work.tower_flops(cfg.vision, t) for t in grown)
    assert towers < tower
    assert work.flops(of, cfg, grown) == 3 * forward + towers
    assert work.flops(case("tiny-lora", "dna"), cfg, grown) == 2 * forward + towers
    assert work.flops(case("tiny", "dpo"), cfg, grown) == 4 * forward + towers
    assert work.flops(case("tiny", "rollout"), cfg, grown) is None
    assert work.tokens(case("tiny", "rollout"), grown) == G * R


def batch_budget(grown):
    need = layout.size(grown[0])
    return layout.Budget(
        rows=len(grown),
        tokens=need.tokens,
        scored=need.scored,
        branches=need.branches,
        frames=need.frames,
        patches=layout.most_patches(grown[0]),
    )


def test_the_bytes_that_the_script_states():
    count = lambda tree: round(sum(x.size for x in jax.tree.leaves(tree)) / 1e9, 2)
    for model, (text, tower, whole) in {"3b": (3.09, 0.67, 3.75), "7b": (7.62, 0.68, 8.29)}.items():
        graph, params = hf.abstract(work.config(case(model)))
        rest, seen = states.split(params, freeze=("tower",))
        assert (count(rest), count(seen), count(params)) == (text, tower, whole), model
    adapted = jax.eval_shape(lambda p: lora.attach(graph, p, case("7b").lora, 0)[1], params)
    assert count(states.split(adapted, train=lora.TRAINED)[0]) == 0.04


# ---- what a GPU runs


def lowered(traced) -> str:
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = set(re.findall(r"custom_call @(\w+)", text))
    assert calls <= {"Sharding", "cu_threefry2x32_ffi"}, calls  # no kernel of another machine
    assert "callback" not in text
    return text


@pytest.fixture
def one_gpu(monkeypatch):
    """A mesh of one device, of which ops are told that it is a GPU; and its model, tiny, with rows
    of the length that the 3B's have, in bfloat16."""
    monkeypatch.setattr(_choice, "platform", lambda: "gpu")
    monkeypatch.setattr(work, "TINY", work.LARGE)
    cfg = dataclasses.replace(work.config(case()), compute=Compute(dtype="bfloat16"))
    with jax.set_mesh(measure.one_device()):
        yield cfg, *hf.abstract(cfg)


@pytest.mark.parametrize("kind", ["sft", "dpo", "dna"])
def test_steps_lower_for_cuda(kind, one_gpu):
    cfg, graph, params = one_gpu
    tx, zero = optax.adamw(1e-5), jax.ShapeDtypeStruct((), "int32")
    trained, still = states.split(params, freeze=("tower",))
    now = states.TrainState(zero, trained, jax.eval_shape(tx.init, trained), zero, zero, still)
    batch = work.batch(work.trees(case(kind=kind), cfg))
    text = lowered(step.make_step(graph, ours.OBJECTIVES[kind], tx).trace(now, batch))
    T = batch.tokens.tokens.shape[-1]
    assert f"x{T}x{T}x" not in text  # a long row never holds all pairs
    if kind == "dpo":
        lowered(step.make_score(graph).trace(nnx.merge_state(trained, still), batch))


def test_rollouts_lower_for_cuda(one_gpu):
    cfg, graph, params = one_gpu
    (tree,) = work.trees(case(kind="rollout"), cfg)
    batch, how = work.batch([tree]), Sampling(max_tokens=8)
    inputs = [jax.tree.map(lambda x: jnp.asarray(x[0]), x) for x in batch[:3]]
    setup = groups.Setup(graph, 4, how, (cfg.text.vocab,), ())
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    slots = jax.eval_shape(lambda p, k: groups.begin(setup, 0, p, inputs, k), params, keys)
    lowered(groups.begin.trace(setup, 0, params, inputs, keys))
    most, waiting = np.int32(8), np.bool_(False)
    assert "while" in lowered(groups.advance.trace(setup, params, slots, most, waiting))
