"""Visual edits: they do what they say, where and when they say, and nowhere else."""

import dataclasses
import pathlib

import numpy as np
import pytest

from data_gen import visual
from data_gen.visual import KINDS, WHOLE, Edit
from jaxvid.data import media, records, shards

CLIPS = pathlib.Path(__file__).parent / "clips"
BUNNY = media.decode_whole((CLIPS / "bunny.mp4").read_bytes(), max_pixels=96 * 64).frames[40:88:4]
BOX = (0.25, 0.25, 0.75, 0.75)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_changes(kind):
    """Outside the segment and outside the box every pixel is equal; inside it is seen."""
    before = BUNNY.copy()
    edit = Edit(kind, "region", BOX, 3, 9, 0, 1.0)
    out = visual.apply(BUNNY, edit)
    np.testing.assert_array_equal(BUNNY, before)
    top, left, bottom, right = visual.area(edit, *BUNNY.shape[1:3])
    outside = np.ones(BUNNY.shape[1:3], bool)
    outside[top:bottom, left:right] = False
    np.testing.assert_array_equal(out[:3], BUNNY[:3])
    np.testing.assert_array_equal(out[9:], BUNNY[9:])
    np.testing.assert_array_equal(out[:, outside], BUNNY[:, outside])
    assert visual.visibility(BUNNY, out, edit) > visual.VISIBLE
    np.testing.assert_array_equal(visual.apply(BUNNY, edit), out)


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_is_edited_inside_its_mask(kind):
    """A mask that moves; with the whole picture masked it is the edit of the entire frame."""
    mask = np.zeros(BUNNY.shape[:3], bool)
    for i in range(len(mask)):
        mask[i, 10:40, 10 + i : 50 + i] = True
    edit = Edit(kind, "object", WHOLE, 0, 12)
    out = visual.apply(BUNNY, edit, mask)
    np.testing.assert_array_equal(out[~mask], BUNNY[~mask])
    full = visual.apply(BUNNY, edit, np.ones_like(mask))
    np.testing.assert_array_equal(full, visual.apply(BUNNY, Edit(kind, "frame", WHOLE, 0, 12)))
    np.testing.assert_array_equal(out[mask], full[mask])
    assert (out != BUNNY).any()


def spread(frames):
    return float(frames.astype(float).std(axis=(1, 2, 3)).mean())


def colour(frames):
    return float((frames.max(axis=-1).astype(float) - frames.min(axis=-1)).mean())


def sharpness(frames):
    return float(np.abs(np.diff(frames.astype(float), axis=2)).mean())


@pytest.mark.parametrize(
    "kind, measure, up",
    [("contrast", spread, 1), ("saturation", colour, 1), ("blur", sharpness, -1)],
)
def test_effects_go_the_way_they_say(kind, measure, up):
    def at(strength):
        return measure(visual.apply(BUNNY, Edit(kind, stop=12, strength=strength)))

    plain = measure(BUNNY)
    assert up * (at(1.0) - plain) > up * (at(0.3) - plain) > 0
    if kind in visual.SIGNED:
        assert at(-1.0) < at(-0.3) < plain


def test_effects_by_hand():
    picture = np.full((4, 4, 3), (200, 100, 60), np.uint8)
    assert visual.brightness(picture, 0.1)[0, 0].tolist() == [214, 114, 74]
    assert visual.brightness(picture, -1.0)[0, 0].tolist() == [60, 0, 0]
    assert visual.saturation(picture, -1.0)[0, 0].tolist() == [125] * 3  # 0.299 R + ...
    assert visual.hue(np.full((4, 4, 3), (255, 0, 0), np.uint8), 1.0)[0, 0].tolist() == [
        0,
        255,
        255,
    ]
    half = np.concatenate([np.full((2, 4, 3), 100), np.full((2, 4, 3), 140)]).astype(np.uint8)
    assert visual.contrast(half, -0.5)[[0, 3], 0, 0].tolist() == [110, 130]
    assert visual.contrast(half, 0.5)[[0, 3], 0, 0].tolist() == [80, 160]
    grey = np.full((64, 64, 3), 128, np.uint8)
    made = visual.noise(grey, 0.25, np.random.default_rng(0))
    assert made.std() == pytest.approx(20, rel=0.05) and made.mean() == pytest.approx(128, abs=1)
    np.testing.assert_array_equal(visual.blur(grey, 1.0), grey)


def test_distortion_leaves_the_rim_and_the_outside():
    picture = BUNNY[0]
    out = visual.distortion(picture, 1.0, (10, 20, 40, 60))
    changed = np.argwhere((out != picture).any(axis=-1))
    assert len(changed) > 100
    assert changed.min(axis=0).tolist() >= [10, 20] and changed.max(axis=0).tolist() <= [39, 59]


def test_freeze_holds_the_frame():
    out = visual.apply(BUNNY, Edit("freeze", start=3, stop=9))
    assert all((frame == BUNNY[3]).all() for frame in out[3:9])
    assert (BUNNY[8] != BUNNY[3]).any()


def test_ramp_and_hard_cut():
    hard = Edit("brightness", start=2, stop=6)
    ramp = dataclasses.replace(hard, ramp=2)
    assert visual.weights(hard, 7).tolist() == [0, 0, 1, 1, 1, 1, 0]
    assert visual.weights(ramp, 7).tolist() == [0, 0, 0.5, 1, 1, 0.5, 0]
    grey = np.full((7, 8, 8, 3), 50, np.uint8)
    assert visual.apply(grey, ramp)[:, 0, 0, 0].tolist() == [50, 50, 120, 190, 190, 120, 50]


def test_wrong_edits_are_refused():
    for changes, words in [
        ({"kind": "sepia"}, "kind 'sepia'"),
        ({"level": "pixel"}, "level 'pixel'"),
        ({"box": (0.5, 0.0, 0.2, 1.0)}, "box"),
        ({"box": BOX}, "level 'frame'"),
        ({"start": 6}, "frames 6 to 6"),
        ({"strength": -0.5}, "strength -0.5, want 0.0 to 1"),
        ({"ramp": -1}, "ramp -1"),
    ]:
        with pytest.raises(ValueError) as caught:
            dataclasses.replace(Edit("blur", stop=6), **changes)
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="edit of frames 0 to 13; the clip has 12"):
        visual.apply(BUNNY, Edit("blur", stop=13))
    with pytest.raises(ValueError, match="want one a frame"):
        visual.apply(BUNNY, Edit("blur", stop=3), np.ones((1, 4, 4), bool))
    with pytest.raises(ValueError, match="needs the object's box"):
        visual.sample(0, "a", 12, levels=("object",))


def test_sampled_edits_depend_on_seed_and_id_alone():
    drawn = [visual.sample(0, f"clip-{i}", 40) for i in range(300)]
    assert drawn == [visual.sample(0, f"clip-{i}", 40) for i in range(300)]
    assert visual.sample(1, "clip-0", 40) != drawn[0]
    assert {e.kind for e in drawn} == set(KINDS)
    assert {e.level for e in drawn} == {"frame", "region"}
    assert {e.ramp > 0 for e in drawn} == {True, False}
    assert all(0 <= e.start < e.stop <= 40 and 12 <= e.stop - e.start <= 28 for e in drawn)
    assert len({e.start for e in drawn}) > 15
    assert {e.strength > 0 for e in drawn if e.kind == "hue"} == {True, False}
    placed = visual.sample(0, "x", 40, levels=("object",), box=BOX, kinds=("blur",))
    assert (placed.level, placed.box, placed.kind) == ("object", BOX, "blur")
    assert visual.sample(0, "x", 1).stop == 1


def test_pair_keeps_length_and_sound_in_step():
    """A click in the film and in its track stay together on both sides."""
    frames = np.zeros((24, 32, 32, 3), np.uint8)
    frames[12:] = 200
    t = np.arange(48000) / 16000
    sound = (0.5 * np.sin(2 * np.pi * 440 * t) * (t >= 1.5)).astype(np.float32)
    data = media.encode(frames, 8.0, sound)
    for clip in visual.pair(data, Edit("blur", start=2, stop=5)):
        back, track = media.decode_whole(clip), media.decode_sound(clip)
        assert back.frames.shape == frames.shape and len(track) == 48000
        assert int(np.argmax(back.frames.mean(axis=(1, 2, 3)) > 100)) == 12
        assert np.argmax(np.abs(track) > 0.1) / 16000 == pytest.approx(1.5, abs=0.004)
    silent = media.encode(frames, 8.0)
    assert media.decode_sound(visual.pair(silent, Edit("blur", stop=5))[1]) is None


def test_record_of_a_real_clip(tmp_path):
    data = (CLIPS / "bunny.mp4").read_bytes()
    made = [
        visual.record(0, f"bunny-{i}", data, split="train", licence="CC-BY-3.0", max_pixels=64 * 96)
        for i in range(3)
    ]
    again = visual.record(
        0, "bunny-0", data, split="train", licence="CC-BY-3.0", max_pixels=64 * 96
    )
    assert records.serialise(again) == records.serialise(made[0])
    shards.write(tmp_path, made, split="train")
    assert shards.validate(tmp_path, media=True) == shards.Report(3, [])
    for record in made:
        edit = Edit(**record.meta["parameters"] | {"box": tuple(record.meta["parameters"]["box"])})
        policy = [e for e in record.examples if e.task == "policy"]
        assert policy[0].prompt == policy[1].prompt and policy[0].answer != policy[1].answer
        truths = [e.options["ABCD".index(e.answer)] for e in policy]
        assert truths == [visual.NOTHING, visual.describe(edit)]
        real, edited = (media.decode_whole(m.data).frames for m in record.media)
        assert visual.visibility(real, edited, edit) > visual.VISIBLE / 2


def test_an_edit_that_shows_nothing_is_not_used():
    """In a grey and still film neither hue nor saturation, blur, whirl or freeze can be seen."""
    grey = np.full((8, 32, 32, 3), 128, np.uint8)
    for kind in ("hue", "saturation", "blur", "distortion", "freeze"):
        edit = Edit(kind, stop=8)
        assert visual.visibility(grey, visual.apply(grey, edit), edit) < 1
    data = media.encode(grey, 8.0)
    for i in range(5):
        record = visual.record(0, f"grey-{i}", data, split="train", licence="CC0-1.0")
        assert record.meta["edit"] in ("brightness", "noise")
