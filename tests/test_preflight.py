"""Preflight: the reader of HLO by hand and by compiled programs, shapes of published models, the
programs of a recipe on a CPU mesh, the search, the knobs, what bad input is told; and, with the TPU
compiler, recipes on their slices."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy import mesh_of

from jaxvid import config, flops, runs
from jaxvid.models import hf
from launch import preflight
from launch.ahead import chips, hlo, programs, published, tell, weigh
from launch.ahead.__main__ import check

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/preflight"
# Compiled in every test run, a training and a rollout; all else under -m slow.
CI = {"dna_llava_sft": ("train",), "dna_llava_rl": ("rollout",)}
HERE = (sys.platform, platform.machine()) == ("linux", "x86_64")
needs_libtpu = pytest.mark.skipif(
    not (HERE and importlib.util.find_spec("libtpu")), reason="libtpu is not installed"
)

# ---- HLO

TEXT = """\
HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0: f32[8,128], param_1: s32[]) -> f32[128] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %slice = f32[1,128]{1,0:T(1,128)} dynamic-slice(%param_0, %param_1, %param_1), sizes={1,128}
  ROOT %flat = f32[128]{0:T(128)} bitcast(%slice)
}

%all-reduce-scatter.1 (param_0: f32[16]) -> f32[4] {
  %param_0 = f32[16]{0:T(128)} parameter(0)
  %inner = f32[16]{0:T(128)} all-reduce(%param_0), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %own = f32[4]{0:T(128)} slice(%inner), slice={[0:4]}
}

%body (p: (s32[], f32[8,128], bf16[2,4])) -> (s32[], f32[8,128], bf16[2,4]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, /*index=2*/bf16[2,4]{1,0:T(2,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %w = bf16[2,4]{1,0:T(2,128)(2,1)} get-tuple-element(%p), index=2
  %taken = f32[128]{0:T(128)S(1)} fusion(%x, %i), kind=kLoop, calls=%fused_computation.1
  %gathered = bf16[16,4]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=1, replica_groups=mesh['a'=2,'b'=8] {'b'}, dimensions={0}
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[2,4]{1,0:T(2,128)(2,1)}) tuple(%i, %x, %w)
}

%condition (p.1: (s32[], f32[8,128], bf16[2,4])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[2,4]{1,0:T(2,128)(2,1)}) parameter(0)
  %end = s32[]{:T(128)} constant(28)
  %at = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %more = pred[]{:T(512)} compare(%at, %end), direction=LT
}

ENTRY %main (a: f32[8,128], b: bf16[2,4], c: f32[16]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = bf16[2,4]{1,0:T(2,128)(2,1)} parameter(1)
  %c = f32[16]{0:T(128)} parameter(2)
  %first = s32[]{:T(128)} constant(3)
  %carry = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[2,4]{1,0:T(2,128)(2,1)}) tuple(%first, %a, %b)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[2,4]{1,0:T(2,128)(2,1)}) while(%carry), condition=%condition, body=%body
  %y = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %part = f32[4]{0:T(128)} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1
  %after = token[] after-all()
  %sent = (f32[4]{0:T(128)}, u32[], token[]) send(%part, %after), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %sum = f32[8,128]{1,0:T(8,128)} add(%y, %y)
}
"""  # noqa: E501


def test_a_program_by_hand():
    """A loop of 25 (from 3 to 28), a fusion that takes a slice, fast memory, a fused
    reduce-scatter, a send between two slices."""
    found = hlo.traffic(TEXT, [0] * 8 + [1] * 8)
    by_kind = {m.kind: m for m in found.collectives}
    gather = by_kind["all-gather"]
    assert (gather.times, gather.group, gather.ici) == (25, 8, 25 * 7 * 2 * 4 * 2)
    scatter = by_kind["reduce-scatter"]
    assert (scatter.times, scatter.group, scatter.ici) == (1, 4, 16 * 4 * 3 / 4)
    between = by_kind["all-reduce"]
    assert (between.group, between.ici, between.dcn) == (2, 0, 2 * 16 / 2)
    one = 128 * 4 + 4 + (2 * 4 * 2 + 16 * 4 * 2)  # the slice, its index; the gather. Not S(1)
    last = 3 * 8 * 128 * 4
    outside = (16 * 4 + 4 * 4) + (4 * 4 + 4 * 4 + 4)  # the fusion; the send
    assert found.memory == 25 * one + last + outside
    assert found.unknown == 0 and found.dcn == between.dcn


def test_a_slice_in_a_fusion_of_a_fusion_is_no_more_than_a_slice():
    """As of a layer's weight, out of those of all layers, that is cast where it is multiplied; and
    the same of a row that is written."""
    name, taken = "%fused_computation.1", "%taken = f32[128]{0:T(128)S(1)} fusion(%x, %i)"
    outer = """%outer (param_0: f32[8,128], param_1: s32[]) -> f32[128] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %row = f32[128]{0:T(128)} fusion(%param_0, %param_1), kind=kLoop, calls=%fused_computation.1
  ROOT %twice = f32[128]{0:T(128)} add(%row, %row)
}

"""
    assert f"{taken}, kind=kLoop, calls={name}" in TEXT
    nested = TEXT.replace("%body (p:", outer + "%body (p:", 1)
    nested = nested.replace(f"{taken}, kind=kLoop, calls={name}", f"{taken}, calls=%outer")
    of = lambda text: hlo.traffic(text, [0] * 16).memory
    assert of(nested) == of(TEXT)
    whole = nested.replace("add(%row, %row)", "reduce(%row, %param_0)")
    assert of(whole) == of(TEXT) + 25 * 7 * 128 * 4
    write = """%inner (param_0: f32[8,128], param_1: f32[1,128], param_2: s32[]) -> f32[8,128] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[1,128]{1,0:T(1,128)} parameter(1)
  %param_2 = s32[]{:T(128)} parameter(2)
  ROOT %written = f32[8,128]{1,0:T(8,128)} dynamic-update-slice(%param_0, %param_1, %param_2)
}

%outer (param_0: f32[8,128], param_1: f32[1,128], param_2: s32[]) -> f32[8,128] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[1,128]{1,0:T(1,128)} parameter(1)
  %param_2 = s32[]{:T(128)} parameter(2)
  ROOT %row = f32[8,128]{1,0:T(8,128)} fusion(%param_0, %param_1, %param_2), calls=%inner
}

ENTRY %main (a: f32[8,128], b: f32[1,128], c: s32[]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = f32[1,128]{1,0:T(1,128)} parameter(1)
  %c = s32[]{:T(128)} parameter(2)
  ROOT %out = f32[8,128]{1,0:T(8,128)} fusion(%a, %b, %c), kind=kLoop, calls=%outer
}
"""
    assert of(write) == 2 * 128 * 4 + 4  # the row is read and written, and its number is read


def test_a_loop_of_unknown_length_counts_as_told():
    endless = TEXT.replace("compare(%at, %end)", "compare(%at, %at)")
    found = hlo.traffic(endless, [0] * 16, loop=7)
    assert found.unknown == 1
    assert next(m for m in found.collectives if m.kind == "all-gather").times == 7


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("channel_id=1", []),
    ],
)
def test_groups_of_every_spelling(text, want):
    assert hlo.groups(text) == want


def test_groups_that_cross_slices_send_the_rest_over_dcn():
    across = TEXT.replace("mesh['a'=2,'b'=8] {'b'}", "{{0,1,2,3,8,9,10,11}}")
    gather = next(
        m for m in hlo.traffic(across, [0] * 8 + [1] * 8).collectives if m.kind == "all-gather"
    )
    part = 2 * 4 * 2
    assert gather.dcn == 25 * part and gather.ici == 25 * 3 * 2 * part


def test_a_compiled_program_has_the_collectives_that_were_written():
    """A scan of five with a sum over four of eight devices in it, compiled here."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P("x", "y"), out_specs=P("x", None), check_vma=False)
    def f(x):
        step = lambda c, _: (jax.lax.psum(jnp.sin(c), "y"), None)
        return jax.lax.scan(step, x, None, length=5)[0]

    x = jax.ShapeDtypeStruct((8, 64), "f4", sharding=NamedSharding(mesh, P("x", "y")))
    found = hlo.traffic(f.lower(x).compile().as_text(), [0] * 8)
    (sums,) = found.collectives
    part = 4 * 16 * 4
    assert (sums.kind, sums.times, sums.group) == ("all-reduce", 5, 4)
    assert sums.ici == 5 * 2 * part * 3 / 4 and found.memory > 5 * 2 * part


# ---- chips, meshes, published models


def test_slices_are_known_by_name():
    one = chips.read("v5p:4x4x4")
    assert (one.kind, one.size, str(one)) == ("v5p", 64, "v5p:4x4x4")
    assert str(chips.read("v5e:16x16", 2)) == "2 x v5e:16x16"
    for name, near in (("v5p:4x4", "v5p:2x2x1"), ("v5q:4x4", "v5e:4x4"), ("tpu", "v5e:1x1")):
        with pytest.raises(ValueError, match=f"no slice '{name}'.*{near}"):
            chips.read(name)
    with pytest.raises(ValueError, match="0 slices of v5e:4x4"):
        chips.read("v5e:4x4", 0)


def test_a_mesh_that_does_not_divide_is_told():
    two = chips.read("v5e:4x4", 2)
    sizes = lambda r, f, t: chips.sizes(two, {"replica": r, "fsdp": f, "tensor": t})
    assert sizes(2, -1, 4) == {"replica": 2, "fsdp": 4, "tensor": 4}
    with pytest.raises(ValueError, match="does not divide the 32 chips of 2 x v5e:4x4"):
        sizes(2, -1, 3)
    with pytest.raises(ValueError, match="at most one axis may be -1"):
        sizes(-1, -1, 1)
    with pytest.raises(ValueError, match="replica 1 does not divide over the 2 slices"):
        sizes(1, -1, 1)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
        ("Qwen/Qwen2.5-VL-32B-Instruct", 33_452_718_336),
        ("Qwen/Qwen2.5-VL-72B-Instruct", 73_410_777_344),
        ("Qwen/Qwen2.5-Omni-7B", 8_931_813_888),
        ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
        ("llava-hf/LLaVA-NeXT-Video-7B-hf", 7_063_431_168),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", 8_030_348_832),
        ("video-salmonn-o1-7b", 8_739_779_696),
    ],
)
def test_published_models_have_their_size(name, count):
    """As transformers counts the same config.json on the meta device; the last is ours."""
    cfg = published.read("nowhere", name)
    assert sum(x.size for x in jax.tree.leaves(hf.abstract(cfg)[1])) == count


def test_a_folder_that_is_there_is_read_and_a_name_that_is_not_known_is_told():
    base = str(ROOT / "configs/checkpoints/tiny_base")
    assert published.read(base, "") == hf.read_config(base)
    with pytest.raises(ValueError, match=r"nearest: Qwen/Qwen2.5-VL-7B-Instruct"):
        published.read("nowhere", "Qwen/Qwen2.5-VL-7B-Instrukt")
    with pytest.raises(ValueError, match="the recipe names no BASE"):
        published.read("nowhere", "")


# ---- programs, on a CPU mesh


def planned(monkeypatch, name, rows, **changes):
    """The plan of a recipe's twin on eight CPU devices."""
    monkeypatch.setattr(chips, "mesh_of", lambda topology, asked: mesh_of(4, 2))
    run = runs.load_config(f"{name}:runlocal", ["--data.budget.rows", str(rows)])
    run = dataclasses.replace(run, **changes)
    cfg = published.read(run.model, "")
    return programs.plan(run, cfg, chips.read("v5e:2x4"))


def test_a_policy_recipe_is_weighed_whole(monkeypatch):
    """State as long as the real one, all programs compile, the decode's loop counts a reply."""
    plan = planned(monkeypatch, "dna_7b_rl", 4)
    topology = chips.read("v5e:2x4")
    found = [
        weigh.weigh(p, topology, plan.mesh) for p in (programs.train(plan), *programs.rollout(plan))
    ]
    train, prefill, decode = found
    assert [w.program for w in found] == ["train", "prefill", "decode"]
    assert all(w.fits and w.need < 2**30 and w.products > 0 for w in found)
    params = jax.tree.leaves(plan.state.params)
    assert all(x.dtype == jnp.float32 for x in params)
    assert {x.dtype for x in jax.tree.leaves(plan.state.frozen)} == {np.dtype("bfloat16")}
    # two moments in float32 beside each weight; they stay on the chip while it samples
    assert train.kinds["optimizer"] == pytest.approx(2 * train.kinds["gradients"], rel=1e-3)
    assert decode.kinds["optimizer"] == train.kinds["optimizer"]
    cfg, run = plan.cfg.text, plan.run
    row = 2 * cfg.layers * cfg.kv_heads * cfg.head * 4  # bytes of a token's keys and values
    tokens = 4 * (128 + run.rollout.group * run.rollout.sampling.max_tokens)  # of 4 prompts
    assert decode.kinds["cache"] == pytest.approx(row * tokens / 8, rel=0.05)
    assert train.useful < train.products  # every layer is computed again
    assert {m["kind"] for m in train.collectives} >= {"all-reduce", "all-gather"}
    assert decode.seconds["dcn"] == 0 and 0 < train.mfu(train.least) < 1
    assert train.bound == max(train.seconds, key=train.seconds.get)


def test_frozen_weights_adapters_and_references_are_counted(monkeypatch):
    plan = planned(monkeypatch, "pasta_7b", 4)
    assert plan.batch.tokens.tokens.shape[:2] == (1, 4)
    now = programs.train(plan)
    assert now.beside == {"reference": programs.bytes_of(plan.state.params)}
    scored = dataclasses.replace(plan.run, sidecar="runs/reference")
    assert programs.train(plan._replace(run=scored)).beside == {}
    lora = config.LoRA(rank=4)
    plan = planned(monkeypatch, "pasta_7b", 4, lora=lora, freeze=())
    assert programs.train(plan).beside == {}
    assert sum(x.size for x in jax.tree.leaves(plan.state.params)) < 1e5
    rows = weigh.arrays(plan)
    assert len(rows) == 10 and rows[0]["bytes"] >= rows[-1]["bytes"] >= rows[-1]["chip"] / 8
    assert any("fsdp" in row["split"] for row in rows)


def test_rows_that_do_not_divide_are_told(monkeypatch):
    with pytest.raises(ValueError, match="a batch of 6 rows does not divide over the mesh's 4"):
        planned(monkeypatch, "dna_7b_sft", 6)


def test_products_in_a_loop_count_as_told():
    f = lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x)
    x = jax.ShapeDtypeStruct((3, 3), "f4")
    assert flops.count(f, x, loop=5) == 5 * 2 * 27
    with pytest.raises(ValueError, match="while loop"):
        flops.count(f, x)


# ---- the answer


REFUSAL = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
)


def test_a_refusal_is_an_answer(monkeypatch):
    assert weigh.exhausted(REFUSAL) == 20.5 * 2**30
    other = "memory required for HLO temporaries (40.00G) exceeds available HBM (15.75G)."
    assert weigh.exhausted(f"Ran out of memory on HBM, the total {other}") == 40 * 2**30
    assert weigh.exhausted("INTERNAL: something else") is None

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(REFUSAL)

    none = lambda: 0.0
    program = programs.Program("train", Lowered(), none, none, {}, {"reference": 2.0**30}, 1)
    weight = weigh.weigh(program, chips.read("v5e:4x4"), None)
    assert not weight.fits and weight.need == 21.5 * 2**30 and "Used 20.50G" in weight.told


@pytest.mark.parametrize(
    ("changes", "kinds", "said"),
    [
        ((), {"reference": 2**30}, "--sidecar FOLDER"),
        ((), {"parameters": 12 * 2**30}, "a larger --topology"),
        (("--compute.remat", "dots"), {}, "--compute.remat full"),
        (("--compute.ffn-parts", "1"), {}, "--compute.ffn-parts 4"),
        (("--data.budget.rows", "64"), {}, "--data.budget.rows 32"),
        ((), {}, "--data.budget.tokens below 5632"),
    ],
)
def test_what_does_not_fit_says_which_knob_to_turn(changes, kinds, said):
    run = runs.load_config("pasta_7b", list(changes))
    weight = weigh.Weight(program="train", fits=False, need=2e10, limit=1.7e10, kinds=kinds)
    told = weigh.knobs(run, weight, chips.read("v6e:4x4"))
    assert any(said in knob for knob in told), told
    rl = runs.load_config("dna_7b_rl", ["--rollout.rows", "0"])
    weight = dataclasses.replace(weight, program="decode")
    assert "--rollout.rows 16" in weigh.knobs(rl, weight, chips.read("v5p:2x2x4"))[0]


@pytest.mark.parametrize("limit", [3.0, 9.9, 57.0, 400.0])
def test_the_search_finds_the_largest(limit):
    """Memory that grows almost as a line, in steps of 8; few compiles."""
    calls = []

    def need(n):
        calls.append(n)
        return 2 + 0.11 * n + 0.3 * (n % 16 == 0)

    best, tried = weigh.search(need, 16, 8, limit, tries=12)
    every = [n for n in range(8, 8000, 8) if need(n) <= limit]
    assert best == (max(every) if every else 0)
    assert len(tried) <= 12 and calls[:2] == [16, 32]


def test_settings_on_the_command_line(monkeypatch, tmp_path):
    """What is asked goes to a process of its own, as JSON; `all` leaves out what is done."""
    asked, codes = [], iter([0, 3] + [0] * 50)

    class Done:
        @property
        def returncode(self):
            return next(codes)

    def run(command, env):
        assert command[1:3] == ["-m", "launch.ahead"] and env["TPU_SKIP_MDS_QUERY"] == "1"
        asked.append(json.loads(command[3]))
        return Done()

    monkeypatch.setattr(preflight.subprocess, "run", run)
    (tmp_path / "pdpo_7b.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        preflight.preflight(preflight.Preflight("all", out=str(tmp_path)))
    assert stop.value.code == preflight.DOES_NOT_FIT
    assert [a["config"] for a in asked] == [n for n in preflight.named() if n != "pdpo_7b"]
    assert asked[0]["out"] == str(tmp_path / f"{asked[0]['config']}.json")


def asked(name, **changes):
    return dataclasses.replace(preflight.Preflight(name), **changes)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (asked("dna_7b_sft", topology="v5p:3x3"), "no slice 'v5p:3x3'"),
        (asked("tiny_sft"), "the recipe names no TOPOLOGY"),
        (asked("tiny_eval", topology="v5e:4x4"), "no recipe of training"),
        (asked("dna_7b_sft", base="Qwen9"), "'Qwen9' is not known here"),
        (asked("dna_7b_sft", set=("tensor=3",)), "does not divide the 16 chips of v5e:4x4"),
        (asked("dna_7b_sft", set=("tensor",)), "write it as NAME=VALUE"),
        (asked("dna_7c_sft"), "perhaps 'dna_7b_sft'"),
    ],
)
def test_bad_input_is_told(what, said):
    with pytest.raises(ValueError, match=said):
        check(what)


@pytest.mark.parametrize(("what", "best"), [("rows", 56), ("tokens", 2560)])
def test_a_search_compiles_larger_batches_until_one_is_too_large(monkeypatch, what, best):
    """Plans of other rows or tokens, weighed by their size; the report tells what came out."""

    def weighed(plan, topology, mesh):
        (_, rows, tokens), seen = plan.batch.tokens.tokens.shape, plan.batch.vision.window.shape[2]
        assert seen == -(-8 * tokens // start)  # frames in proportion
        held = {"activations": 3e8 * rows if what == "rows" else 6.5e6 * tokens}
        need = sum(held.values())
        fits = need < topology.chip.hbm
        return weigh.Weight(program="train", fits=fits, need=need, limit=1.7e10, kinds=held)

    start = runs.load_config("dna_7b_sft:runlocal", []).data.budget.tokens
    monkeypatch.setattr(chips, "mesh_of", lambda topology, asked: mesh_of(8, 1))
    monkeypatch.setattr(programs, "train", lambda plan: plan)
    monkeypatch.setattr(weigh, "weigh", weighed)
    set_rows = ("data.budget.rows=8",)
    found = check(asked("dna_7b_sft:runlocal", topology="v5e:2x4", search=what, set=set_rows))
    assert found["search"][what][0] == best
    told = tell.report(found)
    assert f"largest {what} that fits: {best}" in told and "the largest arrays" in told


# ---- by the TPU compiler


def command(*words):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    line = [sys.executable, "-m", "launch.main", "preflight", *words]
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=3000)


def compiles(name, out, programs=("train", "rollout")):
    done = command(name, "--out", str(out), "--programs", *programs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())
    for w in found["programs"]:
        assert w["fits"] and w["need"] < w["limit"] and w["collectives"] and w["moved"] > 0
    stored = json.loads((RESULTS / f"{name}.json").read_text())["programs"]
    kinds = {"train": ("train",), "rollout": ("prefill", "decode")}
    asked = [w for w in stored if any(w["program"] in kinds[p] for p in programs)]
    for w, old in zip(found["programs"], asked, strict=True):
        assert w["need"] == pytest.approx(old["need"], rel=0.02)
        assert w["products"] == pytest.approx(old["products"], rel=1e-6)


@needs_libtpu
@pytest.mark.parametrize("name", CI)
def test_a_recipe_fits_its_slice(name, tmp_path):
    compiles(name, tmp_path / "found.json", CI[name])


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in preflight.named() if n != "dna_llava_sft"])
def test_every_recipe_fits_its_slice(name, tmp_path):
    compiles(name, tmp_path / "found.json")


@needs_libtpu
@pytest.mark.slow
def test_a_row_longer_than_memory_allows_does_not_fit(tmp_path):
    done = command("dna_7b_sft", "--set", "data.budget.tokens=65536", "compute.ffn_parts=1")
    assert done.returncode == preflight.DOES_NOT_FIT, done.stdout + done.stderr
    assert "train: DOES NOT FIT" in done.stdout and "--data.budget.tokens below" in done.stdout


def test_the_table_of_the_page_is_that_of_the_results():
    page = (ROOT / "docs/preflight.md").read_text()
    assert tell.in_page(page, tell.table(RESULTS)) == page
    assert {p.stem for p in RESULTS.glob("*.json")} <= set(preflight.named())
    for path in RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        assert all(w["fits"] for w in found["programs"]) and tell.report(found)
