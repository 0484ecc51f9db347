"""Temporal perplexity against transformers' losses; going on, filtering, what is refused."""

import dataclasses
import io
import json

import numpy as np
import pairs
import pytest
from PIL import Image
from prompts import filled

from jaxvid import main, perplexity, runs, sharding, sift
from jaxvid.data import chat, media, shards
from jaxvid.data.records import Example, Media, Record, Response
from jaxvid.models import hf, qwen25vl

NO_TORCH = "the oracle: pip install jaxvid[oracle]"
SAMPLING = pairs.SAMPLING  # 4 frames of 16 x 16: two temporal patches of 16 patches


def said(name, side, *texts, task="sft", prompt="What happens?"):
    return Example(name, task, side, prompt, (), "", tuple(map(Response, texts)))


def png():
    out = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(out, "PNG")
    return out.getvalue()


def noise(i):
    frames = np.random.default_rng(i).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    return Media("noise", "video", media.encode(frames, 8.0), 1.0)


def record(i):
    """A pair with two answers of one question, a short one and a caption."""
    examples = (
        said("both 0", 0, "gets brighter", "it gets brighter A"),
        said("short 1", 1, "B"),
        said("caption 1", 1, "stays grey", task="caption", prompt=pairs.ASKED),
        Example("asked 1", "policy", 1, "Which?", pairs.OPTIONS, "B"),
    )
    clips = (noise(i), pairs.clips()[1])
    return Record(f"pair {i}", "train", clips, examples, {}, {"tool": "tests"}, "CC0-1.0")


def still():
    one = media.encode(np.full((1, 16, 16, 3), 60, np.uint8), 8.0)
    clips = Media("one", "video", one, 0.1), Media("image", "image", png())
    examples = said("frame", 0, "stays grey"), said("image", 1, "B"), said("none", -1, "no clip")
    return Record("still", "train", clips, examples, {}, {}, "CC0-1.0")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with shards of five records and a model that transformers places as we do."""
    folder = tmp_path_factory.mktemp("tpl")
    shards.write(folder / "shards", [*map(record, range(4)), still()], split="train")
    chat.build_tokenizer([pairs.ASKED, *pairs.REPLIES], 320, folder / "model")
    cfg = dataclasses.replace(pairs.config(folder), text_after_video="hf5")
    params = filled(hf.abstract(cfg)[1], 0.9)
    hf.save(folder / "out", cfg, params, like=folder / "model", dtype="float32")
    return folder


def measure(there, workdir, **settings):
    source = shards.Source(there / "shards", "train")
    settings = perplexity.Settings(**{"chunk": 2} | settings)
    return runs.tpl(there / "out", source, SAMPLING, settings, workdir)


@pytest.fixture
def measured(there):
    if not (there / "work/tpl.jsonl").exists():
        measure(there, there / "work")
    return perplexity.load(there / "work")


# --- the oracle


def their_loss(model, tokenizer, frames, prompt, answer):
    """transformers' mean loss of the answer and its closing token, below these frames."""
    import torch

    user = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": prompt}]}]
    text = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    pairs_of_frames = (len(frames) + 1) // 2
    text = text.replace("<|video_pad|>", "<|video_pad|>" * (pairs_of_frames * 4))
    before = tokenizer(text).input_ids
    after = tokenizer(answer + "<|im_end|>").input_ids
    ids = torch.tensor([before + after])
    labels = torch.tensor([[-100] * len(before) + after])
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])
    patches, grid = media.patchify(frames, pairs.VISION)
    tower = model.config.vision_config
    each = 3 * tower.temporal_patch_size * tower.patch_size**2 // 3
    mean = np.repeat(np.float32([0.48145466, 0.4578275, 0.40821073]), each)
    std = np.repeat(np.float32([0.26862954, 0.26130258, 0.27577711]), each)
    pixels = (patches.reshape(-1, 3 * each).astype(np.float32) / 255 - mean) / std
    with torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            labels=labels,
            pixel_values_videos=torch.tensor(pixels),
            video_grid_thw=torch.tensor([grid]),
            second_per_grid_ts=torch.tensor([0.5]),
            mm_token_type_ids=2 * (ids == model.config.video_token_id),
        )
    return float(out.loss), len(after)


@pytest.mark.parametrize("frame, at", [("last", 3), ("middle", 1)])
def test_losses_equal_transformers(there, tmp_path, frame, at):
    """Of every answer to a video of several frames: all frames, and the one. 1e-4 in float32."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(there / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(there / "out")
    rows, _ = measure(there, tmp_path, frame=frame)
    checked = 0
    for row in rows:
        if row.record == "still":
            continue
        source = record(int(row.record.split()[1]))
        example = next(e for e in source.examples if e.name == row.example)
        frames = np.asarray(media.decode(source.media[row.media].data, SAMPLING).frames)
        text = example.responses[row.response].text
        each = (frames, row.loss), (frames[at : at + 1], row.loss_one)
        for shown, ours in each:
            loss, tokens = their_loss(model, tokenizer, shown, example.prompt, text)
            assert abs(loss - ours) < 1e-4 and tokens == row.tokens
        assert row.tpl == row.loss_one - row.loss and row.ratio == row.loss_one / row.loss
        assert row.frames == 4
        checked += 1
    assert checked == 16 and max(abs(r.tpl) for r in rows) > 0.01


# --- what a table holds


def test_a_clip_of_one_frame_has_none(measured):
    """By definition: T is 1, as of an image; text alone is not scored."""
    rows, skipped = measured
    still = [r for r in rows if r.record == "still"]
    assert [(r.example, r.frames, r.tpl, r.ratio) for r in still] == [
        ("frame", 1, 0.0, 1.0),
        ("image", 1, 0.0, 1.0),
    ]
    assert [(s.record, s.example) for s in skipped] == [("still", "none")]
    assert "no frames" in skipped[0].reason


def test_packed_equals_alone(there, measured, tmp_path):
    alone, _ = measure(there, tmp_path, chunk=1)
    assert [r[:7] for r in alone] == [r[:7] for r in measured[0]]
    np.testing.assert_allclose([r.tpl for r in alone], [r.tpl for r in measured[0]], atol=1e-5)


def test_interrupted_goes_on_to_the_same_bytes(there, measured, tmp_path, monkeypatch):
    real, calls = perplexity.scored, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(perplexity, "scored", stops)
    with pytest.raises(KeyboardInterrupt):
        measure(there, tmp_path)
    assert not (tmp_path / "tpl.jsonl").exists()
    measure(there, tmp_path)
    assert len(calls) == 4  # two chunks, the third cut off, the third
    for name in ("tpl.jsonl", "skipped.jsonl"):
        assert (tmp_path / name).read_bytes() == (there / "work" / name).read_bytes()
    with pytest.raises(ValueError, match="another run .*'frame': 'last'.*--workdir"):
        measure(there, tmp_path, frame="middle")
    assert not (tmp_path / "parts").exists()


def test_the_frame_is_chosen_as_named():
    drawn = perplexity.Settings(frame="random")
    ats = {perplexity.which(drawn, 8, f"r{i}", 0) for i in range(40)}
    assert ats == set(range(8))
    assert perplexity.which(drawn, 8, "r", 0) == perplexity.which(drawn, 8, "r", 0)
    other = perplexity.Settings(frame="random", seed=1)
    assert any(
        perplexity.which(drawn, 8, f"r{i}", 0) != perplexity.which(other, 8, f"r{i}", 0)
        for i in range(9)
    )
    named = [perplexity.which(perplexity.Settings(frame=f), 8, "r", 0) for f in ("last", "middle")]
    assert named == [7, 3]


def row(name, tpl, example="e"):
    return perplexity.Row(name, example, 0, "sft", 0, 4, 3, 1.0, 1.0 + tpl, tpl, 1.0 + tpl)


def test_summary_by_hand():
    found = perplexity.summary([row("a", 0.0), row("a", 0.2), row("b", 1.0)], [])
    assert (found.answers, found.records, found.skipped) == (3, 2, 0)
    assert found.tpl.value == pytest.approx(0.4) and found.loss.value == 1.0
    assert found.tpl.low == pytest.approx(0.1) and found.tpl.high == pytest.approx(1.0)
    assert found.ratio == pytest.approx(1.4) and found.quantiles["50"] == pytest.approx(0.2)
    assert sum(n for *_, n in found.histogram) == 3
    text = perplexity.page(found, perplexity.Settings())
    assert "TPL 0.4000 (0.1000 to 1.0000), ratio 1.400" in text


# --- filtering


def test_filters_keep_what_they_say():
    values = {("a", ""): 0.1, ("b", ""): 0.3, ("c", ""): 0.3, ("d", ""): -1.0}
    keep = lambda **how: {name for name, _ in sift.keep(values, sift.Filter(**how))}
    assert keep(above=0.3) == {"b", "c"} and keep(above=0.1) == {"a", "b", "c"}
    assert keep(top=0.25) == {"b"} and keep(top=0.75) == {"a", "b", "c"}
    with pytest.raises(ValueError, match="no record of 4 is at least 2.0; the largest TPL is 0.3"):
        keep(above=2.0)
    for wrong in ({}, {"above": 0.1, "top": 0.2}, {"top": 0.0}, {"top": 1.5}):
        with pytest.raises(ValueError, match="keep-top"):
            sift.Filter(**wrong)


@pytest.mark.parametrize("by", ["record", "example"])
def test_a_filtered_folder_is_a_folder_of_shards(there, measured, tmp_path, by):
    rows, _ = measured
    source = shards.Source(there / "shards", "train")
    how = sift.Filter(top=0.4, by=by)
    written, left = sift.write(source, rows, how, tmp_path, {"model": "m"})
    values = sift.judged(rows, by)
    kept = sift.keep(values, how)
    assert len(kept) == round(0.4 * len(values)) and not shards.validate(tmp_path).bad
    made = shards.Source(tmp_path, "train")
    found = [made[i] for i in range(len(made))]
    assert {r.id for r in found} == {name for name, _ in kept} and written.records == len(found)
    assert all(r.provenance["tpl"]["filter"]["top"] == 0.4 for r in found)
    scored = [(r.id, e.name) for r in found for e in r.examples if e.task != "policy"]
    if by == "example":
        assert {*scored} - {("still", "none")} == kept
    listed = [json.loads(x) for x in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert [sift.Left(**x) for x in listed] == left
    gone = {(x.record, x.example): x.tpl for x in left}
    assert gone == {key: value for key, value in values.items() if key not in kept}


# --- the command


def test_command_scores_and_filters(there, tmp_path, capsys):
    line = ["tpl", str(there / "shards"), "--model", str(there / "out"), "--frames", "4"]
    line += ["--height", "16", "--width", "16", "--workdir", str(tmp_path / "w")]
    assert main.main([*line, "--keep-top", "0.5", "--out", str(tmp_path / "kept")]) == 0
    said = capsys.readouterr().out
    assert "18 answers of 5 records, 1 skipped" in said and "TPL" in said and "#" in said
    assert len(shards.Source(tmp_path / "kept", "train")) == 2
    lines = (tmp_path / "w/tpl.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == set(perplexity.Row._fields) and len(lines) == 18
    assert main.main([*line, "--keep-above", "9", "--out", str(tmp_path / "none")]) == 1
    assert "no record of 5 is at least 9" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_is_refused_says_why(there, tmp_path, capsys):
    shown = ["--frames", "4", "--height", "16", "--width", "16"]
    good = [str(there / "shards"), "--model", str(there / "out"), *shown]
    (tmp_path / "text").mkdir()
    (tmp_path / "text/config.json").write_text('{"model_type": "qwen2"}')
    text = dataclasses.replace(record(0), examples=(said("a", -1, "B"),))
    asked = dataclasses.replace(record(0), examples=record(0).examples[-1:])
    shards.write(tmp_path / "text only", [text], split="train")
    shards.write(tmp_path / "no answers", [asked], split="train")
    for line, wanted in (
        ([str(tmp_path / "nowhere"), *good[1:]], "no folder of shards"),
        ([good[0], "--model", str(tmp_path / "nothing")], "no config.json"),
        ([good[0], "--model", str(tmp_path / "text")], "model_type 'qwen2'"),
        ([*good, "--split", "test"], "no split 'test'"),
        ([*good, "--keep-top", "0.5"], "--out"),
        ([*good, "--out", "x"], "--keep-above"),
        ([*good, "--tasks", "policy"], "those with an answer"),
        ([str(tmp_path / "text only"), *good[1:]], "text alone"),
        ([str(tmp_path / "no answers"), *good[1:]], "its examples are of \\['policy'\\]"),
    ):
        work = tmp_path / f"work {len(list(tmp_path.iterdir()))}"
        assert main.main(["tpl", *line, "--workdir", str(work)]) == 1
        told = capsys.readouterr().err
        assert wanted.replace("\\", "") in told and told.count("\n") == 1, told


class Hears(qwen25vl.Prompting):
    """As of a model that takes sound alone."""

    markers = {"audio": "<sound>"}


def test_a_model_that_only_hears_is_refused(there, tmp_path):
    source, mesh = shards.Source(there / "shards", "train"), sharding.make_mesh()
    builder, model = pairs.builder(there), hf.abstract(hf.read_config(there / "out"))
    builder = dataclasses.replace(builder, prompting=Hears(pairs.config(there)))
    with pytest.raises(ValueError, match="sees no video, only \\['audio'\\]"):
        how = perplexity.Settings()
        perplexity.measure(*model, builder, source, SAMPLING, how, tmp_path, mesh=mesh, about={})
