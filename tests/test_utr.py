"""Trajectories to text and back, of the laptop world and of trackers; and what is asked of them."""

import collections
import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data_gen import utr
from data_gen.build import main
from data_gen.procedural import draw, motion
from data_gen.procedural.make import Mix, chunk
from data_gen.procedural.scene import COLOURS, Settings, sample
from data_gen.utr import Asking, Track
from jaxvid import answers, rewards
from jaxvid.data import shards
from jaxvid.data.records import Example, Media, Record, Response

ASKING = Asking(scale=9)


@pytest.fixture(scope="module")
def world():
    """32 pairs of the laptop world, and the records made of them."""
    sources = chunk(0, "train", 0, 32, Settings(side=32), Mix())
    known = utr.pool(sources, ASKING, 0)
    faults = []
    made = list(utr.records(sources, known, ASKING, 0, faults))
    assert not faults and len(made) == 32
    return sources, made


def seen(row, **change):
    """A track of a tracker at 10 boxes a second, for 4 s, from left to right."""
    boxes = [[t / 10, 0.1 + t / 100, 0.2, 0.3 + t / 100, 0.5] for t in range(41)]
    return {"name": row, "action": "goes right", "boxes": boxes, **change}


def tracked(*clips, seconds=4.0, caption=True):
    media = tuple(Media(f"m{i}", "video", b"clip", seconds) for i in range(len(clips)))
    told = (Response("A red car."),)
    examples = [Example(f"c{i}", "caption", i, "Tell.", responses=told) for i in range(len(clips))]
    examples = examples if caption else [Example("t", "sft", -1, "Say it.", responses=told)]
    return Record("r", "train", media, tuple(examples), {"tracks": list(clips)}, {}, "CC0-1.0")


# --- boxes


def test_boxes_of_the_world_are_where_its_pixels_are():
    settings, checked = Settings(side=96, grain=0.0), 0
    scenes = [sample(0, f"box {i}", settings, "gravity") for i in range(24)]
    for scene in (s for s in scenes if s.premise == "weight"):  # a balloon has a string
        plan = motion.plan(scene, scene.ordinary[0], 24)
        frames = draw.frames(plan, settings).astype(int)
        (subject,) = [a for a in plan.actors if a.name == "subject"]
        for f in (0, 8, 16, 23):
            near = np.abs(frames[f] - COLOURS[scene.subject.colour]).sum(-1) < 30
            rows, columns = np.nonzero(near)
            got = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            wanted = [v * 96 for v in draw.box(subject, f)]
            np.testing.assert_allclose(got, wanted, atol=2.5)
            checked += 1
    assert checked > 20


def test_what_hides_behind_the_wall_has_no_box_there():
    scene = next(
        s
        for i in range(40)
        if "it stays hidden behind" in (s := sample(0, f"w {i}", Settings(), "wall")).ordinary
    )
    plan = motion.plan(scene, "it stays hidden behind", 40)
    (subject,) = [t for t in utr._seen(plan) if not t["name"].startswith("small")]
    assert 5 < len(subject["boxes"]) < 35
    assert max(b[0] for b in subject["boxes"]) < 0.7 * scene.seconds


def test_whole_boxes_have_an_area_inside_the_scale():
    assert utr.whole((0.1, 0.2, 0.3, 0.4), 100) == (10, 20, 30, 40)
    assert utr.whole((-0.2, 0.999, 0.001, 1.4), 9) == (0, 8, 1, 9)


# --- text


def test_texts_are_read_back_as_the_tracks(world):
    """What the dialogues say is what `answers.tracks` reads, and is where the scene has it."""
    for source, made in zip(*world):
        clips = utr.tracks(source, ASKING)
        names = {side: {t.name: t.boxes for t in clip} for side, clip in enumerate(clips)}
        for e in made.examples:
            if e.name.startswith(("temporal from", "spatial from", "track/")):
                lines = e.answer.splitlines()
                text = lines[1] if e.name.startswith("temporal from") else e.answer
                ((name, boxes),) = answers.tracks(text).items()
                assert names[e.media][name] == boxes
            if e.name.startswith("temporal from"):
                caption = next(
                    c.answer for c in source.examples if c.task == "caption" and c.media == e.media
                )
                assert lines[2] == caption and len(lines) == 3


def test_graded_answers_earn_full_marks(world):
    kinds = collections.Counter()
    for made in world[1]:
        made.check()
        asked = {(e.media, e.prompt): e for e in made.examples if e.task == "policy"}
        taught = {(e.media, e.prompt): e for e in made.examples if e.task == "choice"}
        assert asked.keys() == taught.keys()
        for at, e in asked.items():
            reward = rewards.Answer() if e.options else rewards.Tracks()
            assert reward(e, taught[at].responses[0].text)[:3] == (2.0, 1.0, 1.0)
            kinds[e.name] += 1
    each = set(kinds.values())  # every clip of a record is asked the same kinds
    assert set(kinds) == {f"{k}/{s}" for k in ("temporal", "spatial", "track") for s in (0, 1)}
    assert min(each) >= 30, kinds


def test_options_are_apart_and_one_is_right(world):
    for source, made in zip(*world):
        clips = utr.tracks(source, ASKING)
        for e in made.examples:
            if e.task != "policy" or not e.options:
                continue
            right = e.options["ABCD".index(e.answer)]
            assert len(set(e.options)) == 4
            if e.name.startswith("spatial"):
                boxes = [tuple(map(int, o[1:-1].split(","))) for o in e.options]
                pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
                assert max(utr.overlap(a, b) for a, b in pairs) < utr.APART
                moment = int(e.prompt.split("frame")[1].split("?")[0])
                (track,) = [t for t in clips[e.media] if f"the {t.name} in" in e.prompt]
                assert utr.box_text(track.boxes[moment]) == right
            else:
                at = e.prompt.split(" doing?")[0].removeprefix("What is ")
                found = {
                    t.action
                    for t in clips[e.media]
                    for k, b in t.boxes.items()
                    if utr.at_text(k, b) == at
                }
                assert right in found


def test_a_guess_by_what_is_common_gains_little():
    """Over 300 clips, without pixels: neither the action nor the place that is most often right."""
    asked = []
    rng = np.random.default_rng(0)
    sources = []
    for i in range(150):
        scene = sample(0, f"train/{i:06d}", Settings())
        meta = {"scene": json.loads(json.dumps(dataclasses.asdict(scene)))}
        meta["outcomes"] = [scene.ordinary[0], scene.odd[0]]
        media = tuple(Media(n, "video", b"x", scene.seconds) for n in "ab")
        provenance = {"settings": {"fps": 16.0}}
        told = (Example("e", "sft", 0, "?", responses=(Response("x"),)),)
        sources.append(Record(scene.id, "train", media, told, meta, provenance, "CC0-1.0"))
    known = utr.pool(sources, ASKING, 0)
    for record in utr.records(sources, known, ASKING, 0, []):
        asked += [e for e in record.examples if e.task == "policy" and e.options]
    for kind in ("temporal", "spatial"):
        each = [(e.options, "ABCD".index(e.answer)) for e in asked if e.name.startswith(kind)]
        order = rng.permutation(len(each))
        known_part, rest = order[: len(each) // 2], order[len(each) // 2 :]
        right = collections.Counter(each[i][0][each[i][1]] for i in known_part)
        offered = collections.Counter(o for i in known_part for o in each[i][0])
        rate = {o: right[o] / n for o, n in offered.items()}
        for guess in (rate, dict(right), {o: -n for o, n in right.items()}):
            at = [np.argmax([guess.get(o, 0) for o in each[i][0]]) for i in rest]
            assert np.mean([k == each[i][1] for k, i in zip(at, rest)]) < 0.4, kind


# --- trackers


def test_tracks_of_a_tracker():
    low, gap = seen("b", confidence=0.4), seen("c", seconds=[1.0, 2.0])
    gap["boxes"] = [b for b in gap["boxes"] if not 1.2 < b[0] < 1.8]  # moment 2 is at 1.5 s
    (found,) = utr.tracks(tracked([seen("a", confidence=0.5), low, gap]), Asking())
    assert [t.name for t in found] == ["a", "c"]
    assert found[0].boxes == {k: (10 + 10 * k - 5, 20, 30 + 10 * k - 5, 50) for k in range(1, 5)}
    assert found[0].seconds == (0.0, 4.0) and found[1].seconds == (1.0, 2.0)
    assert list(found[1].boxes) == [1, 3, 4]
    (found,) = utr.tracks(tracked([seen("a"), low]), Asking(confidence=0.4, moments=2))
    assert [list(t.boxes) for t in found] == [[1, 2], [1, 2]]
    sparse = seen("a", boxes=[[t, 0.1, 0.1, 0.5, 0.5] for t in (0.0, 1.0, 2.0, 3.0, 4.0)])
    (found,) = utr.tracks(tracked([sparse]), Asking())
    assert list(found[0].boxes) == [1, 2, 3, 4]


def test_dialogues_go_both_ways():
    other = seen("blue dog", action="jumps", seconds=[1.0, 2.0])
    record = tracked([seen("red car"), seen("van"), other])
    known = utr.pool([record], Asking(), 0)
    made = utr.record(record, known, Asking(), 0)
    said = {e.name: (e.prompt, e.answer) for e in made.examples if e.task == "sft"}
    assert [n.rsplit(" ", 2)[0] for n in said].count("temporal from spatial") == 3
    spatial = [v for n, v in said.items() if n.startswith("spatial")]  # two do the same: not asked
    text = "blue dog<id1>frame1:[15,20,35,50];frame2:[25,20,45,50];frame3:[35,20,55,50];"
    text += "frame4:[45,20,65,50]</id1>"
    asked = "Who or what does this from frame1 to frame4 (1.0 to 2.0 s): jumps? Where is it?"
    assert spatial == [(asked, text)]
    question, answer = said["temporal from spatial 0 2"]
    assert question.endswith("trajectory? By the way, what happens in this video?")
    assert answer == f"jumps\n{text}\nA red car." and question.startswith("What is frame")
    assert made.id == "utr/r" and made.provenance["asking"]["confidence"] == 0.5
    assert made == utr.record(record, known, Asking(), 0) != utr.record(record, known, Asking(), 1)
    mute = tracked([other], caption=False)
    (first, *_) = utr.record(mute, utr.pool([mute], Asking(), 0), Asking(), 0).examples
    assert first.prompt.endswith("trajectory?") and first.answer == f"jumps\n{text}"


@pytest.mark.parametrize(
    "record, said",
    [
        (tracked([seen("a", name="")]), "track 0 has no name"),
        (tracked([seen("a", boxes=[])]), "track 0 has no boxes"),
        (tracked(["a"]), "has no name and no action and no boxes"),
        (tracked([seen("a<id1>")]), "a sign of the track text"),
        (tracked([seen("a"), seen("a")]), "two tracks have one name"),
        (tracked([seen("a", boxes=[[0, 0.5, 0.1, 0.4, 0.2]])]), "with an area"),
        (tracked([seen("a", boxes=[[0, 0.5, 0.1]])]), "want .second, x0"),
        (tracked([seen("a")], seconds=0.0), "length is not stated"),
        (dataclasses.replace(tracked([]), meta={"tracks": [[], []]}), "each of its 1 media"),
        (dataclasses.replace(tracked([]), meta={}), "neither meta..tracks.. nor a scene"),
        (tracked([seen("a", confidence=0.1)]), "confidence of 0.5"),
    ],
)
def test_what_cannot_be_asked_about_says_why(record, said):
    with pytest.raises(ValueError, match=said):
        utr.record(record, utr.Pool({"goes right": 1}, (), ()), Asking(), 0)


def test_settings_are_checked():
    for wrong in ({"confidence": 1.5}, {"moments": 1}, {"scale": 3}):
        with pytest.raises(ValueError, match="wanted"):
            Asking(**wrong)
    assert utr.overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert utr.track_text(Track("a", "b", {2: (1, 2, 3, 4)}, (0.0, 1.0))) == (
        "a<id1>frame2:[1,2,3,4]</id1>"
    )


# --- the command


def test_forge_writes_what_has_tracks_and_lists_the_rest(world, tmp_path, capsys):
    bare = dataclasses.replace(world[0][0], id="bare", meta={})
    shards.write(tmp_path / "in", [*world[0][:3], bare], split="train")
    line = ["utr", "--shards", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    main([*line, "--scale", "9"])
    assert "1 records left out" in capsys.readouterr().out
    source = shards.Source(tmp_path / "out", "train")
    assert [source[i].id for i in range(len(source))] == [f"utr/{r.id}" for r in world[0][:3]]
    assert source[0].media == world[0][0].media and not shards.validate(tmp_path / "out").bad
    (fault,) = (tmp_path / "out/untracked.jsonl").read_text().splitlines()
    assert json.loads(fault)["record"] == "bare"
    with pytest.raises(SystemExit, match="has a split 'train' already"):
        main(line)
    shards.write(tmp_path / "none", [bare], split="train")
    with pytest.raises(SystemExit, match="no record for split.*\n.*nor a scene"):
        main(["utr", "--shards", str(tmp_path / "none"), "--out", str(tmp_path / "no")])
    with pytest.raises(SystemExit, match="no finished split"):
        main(["utr", "--shards", str(tmp_path / "nowhere"), "--out", str(tmp_path / "no")])


# --- the recipes


def test_recipes_train_and_probe(world, tmp_path):
    """Two steps from the shipped base, and some probes of what came out; on one device."""
    for split in ("train", "validation", "test"):
        some = [dataclasses.replace(r, split=split) for r in world[1][:4]]
        shards.write(tmp_path / "shards", some, split=split)
    train = ["train", "configs/tiny_utr.py:runlocal", "--workdir", str(tmp_path / "run")]
    train += ["--validation.shards", str(tmp_path / "shards"), "--compute.unroll", "1"]
    probe = ["eval", "configs/tiny_utr_eval.py:runlocal", "--workdir", str(tmp_path / "probe")]
    probe += ["--model", str(tmp_path / "run/model"), "--compute.unroll", "1"]
    data = ["--data.shards", str(tmp_path / "shards")]
    code = f"import sys; from jaxvid.main import main; r = main({train + data!r})"
    code += f"; sys.exit(r or main({probe + data!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert all(f"{kind}: " in done.stdout for kind in ("spatial", "temporal", "track", "overall"))
    found = json.loads((tmp_path / "probe/results.json").read_text())
    each = dict.fromkeys(("spatial", "temporal", "track"), 4)
    assert {kind: s["n"] for kind, s in found["kinds"].items()} == each
