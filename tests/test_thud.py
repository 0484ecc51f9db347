"""Interventions on sound, the records of them, and what their probes amount to."""

import dataclasses
import pathlib

import numpy as np
import pytest

from data_gen import sound as interventions
from data_gen.procedural import hear, strikes
from jaxvid.data import media
from jaxvid.eval import sound
from jaxvid.eval.probe import Prediction

CLIPS = pathlib.Path(__file__).parent / "clips"
OFFSETS = (0.4, 0.8, 1.2)
ORDER = ("delayed", "in sync", "early")


def prediction(record, kind, media_, answer, read, options=ORDER):
    reply = f"<answer>{read}</answer>"
    return Prediction(
        record, f"{kind}/{media_}", kind, media_, "?", options, answer, reply, read, 0, 0, 4, True
    )


def test_measures_by_hand():
    """Two delayed, one early; of these one seen right, one called in sync, one the wrong way."""
    heard, fits = ("drum", "nothing"), ("fits", "foreign")
    predictions = [
        prediction("a", "shift", 0, "B", "B"),
        prediction("a", "shift", 1, "A", "A"),
        prediction("b", "shift", 0, "B", "A"),  # a false alarm
        prediction("b", "shift", 1, "A", "B"),  # blind
        prediction("c", "shift", 0, "B", None),
        prediction("c", "shift", 1, "C", "A"),  # the wrong direction
        prediction("a", "mute", 0, "A", "A", heard),
        prediction("a", "mute", 2, "B", "A", heard),
        prediction("a", "swap", 0, "A", "A", fits),
        prediction("a", "swap", 3, "B", "A", fits),
        prediction("b", "swap", 0, "A", "A", fits),
        prediction("b", "swap", 3, "B", "B", fits),
        prediction("a", "offset", 0, "0.0", "0.0", ()),
        prediction("a", "offset", 1, "0.8", "1.2", ()),
        prediction("b", "offset", 0, "0.0", "0.4", ()),
        prediction("b", "offset", 1, "-0.4", "0.0", ()),
        prediction("a", "where/0", 0, "A", "A", heard),  # no probe of sound
    ]
    found = {name: m.value for name, m in sound.measures(predictions).items()}
    want = {
        "shift original": 1 / 3,
        "shift intervened": 1 / 3,
        "mute original": 1,
        "mute intervened": 0,
        "swap original": 1,
        "swap intervened": 1 / 2,
        "average gap": (0 + 1 + 1 / 2) / 3,
        "combined": (1 / 3 + 1 / 2 + 3 / 4) / 3,
        "three classes": (1 / 3 + 1 / 2 + 0) / 3,
        "offset blindness": 1 / 3,
        "direction confusion": 1 / 2,
        "false sync alarm": 1 / 3,
        "mute hallucination": 1,
        "swap false match": 1 / 2,
        "offset error": 0.4,
        "shift unparsed": 1 / 6,
        "mute unparsed": 0,
        "swap unparsed": 0,
        "offset unparsed": 0,
    }
    assert found == pytest.approx(want)


def test_a_constant_answer_has_a_third_of_three_classes():
    predictions = [
        prediction(f"r{i}", "shift", m, a, "B")
        for i, moved in enumerate("AACCACAC")
        for m, a in ((0, "B"), (1, moved))
    ]
    found = sound.measures(predictions)
    assert found["three classes"].value == pytest.approx(1 / 3)
    assert found["offset blindness"] == (1, 1, 1)
    with pytest.raises(ValueError, match="the original was not asked"):
        sound.measures(predictions[1:])


def test_a_difference_is_paired():
    """Both replies to a record are drawn with it, so what they share is not noise."""
    heard = ("drum", "nothing")
    asked = [(f"r{i:02d}", m, "AB"[m > 0]) for i in range(20) for m in (0, 2)]
    say = lambda right: [
        prediction(r, "mute", m, a, a if right(i) else "AB"[a == "A"], heard)
        for i, (r, m, a) in enumerate(asked)
    ]
    before, after = say(lambda i: i % 4 < 2), say(lambda i: i % 4 < 2 or i < 20)
    found = sound.difference(after, before)
    assert found["combined"].value == pytest.approx(0.25)
    assert 0 < found["combined"].low < 0.25 < found["combined"].high
    alone = sound.measures(after)["combined"].value - sound.measures(before)["combined"].value
    assert found["combined"].value == pytest.approx(alone)
    assert sound.difference(after, after)["combined"] == (0, 0, 0)
    assert sound.difference(after, before) == sound.difference(after[::-1], before)
    with pytest.raises(ValueError, match="20 replies after and 40 before are not to the same"):
        sound.difference(after[:20], before)


def test_any_clip_is_shifted_muted_and_swapped():
    """On footage: a phone's clip of other size, rate and codecs."""
    data = (CLIPS / "dog.mp4").read_bytes()
    clear = interventions.encoded_again(data)
    before = media.decode_sound(clear, interventions.RATE)
    later = interventions.shifted(data, 0.4)
    after = media.decode_sound(later, interventions.RATE)
    assert interventions.measured(before, after, 0.4) == pytest.approx(0.4, abs=0.002)
    assert np.abs(after[: int(0.35 * interventions.RATE)]).max() < 0.01
    quiet = media.decode_sound(interventions.muted(data), interventions.RATE)
    assert np.abs(quiet).max() < 1e-4 and len(quiet) == len(before)
    shapes = {media.decode_whole(x).frames.shape for x in (clear, later)}
    assert len(shapes) == 1
    with pytest.raises(ValueError, match="sounds are alike"):
        interventions.swapped(data, clear)
    with pytest.raises(ValueError, match="no sound"):
        interventions.shifted(media.encode(np.zeros((8, 16, 16, 3), np.uint8), 8.0), 0.1)
    with pytest.raises(ValueError, match="leaves nothing"):
        interventions.moved(before, len(before) / interventions.RATE)


@pytest.mark.parametrize("offset", (-1.2, -0.4, 0.8))
def test_landings_stay_inside_both_tracks_and_are_not_periodic(offset):
    for i in range(60):
        scene = strikes.strikes(0, f"s{i}", 3.2, offset, OFFSETS)
        times = np.array([e.time for e in scene.landings])
        assert len(times) >= 2 and len({e.kind for e in scene.landings}) == len(times)
        for t in (times, times + offset):
            assert t.min() >= strikes.EARLIEST - 1e-9 and t.max() <= 3.2 - strikes.LATEST + 1e-9
        gaps = np.abs(times[:, None] - times[None])[np.triu_indices(len(times), 1)]
        assert all(abs(g - o) >= strikes.CLEAR for g in gaps for o in OFFSETS)
        if len(times) == 3:
            assert abs(np.diff(times)[0] - np.diff(times)[1]) >= strikes.CLEAR
    with pytest.raises(ValueError, match="no room for two landings"):
        strikes.strikes(0, "s", 1.4, offset, OFFSETS)


@pytest.fixture(scope="module")
def intervened():
    return [hear.record(0, "test", i, hear.Mix(), hear.Picture(side=32)) for i in range(4)]


def test_a_record_has_every_probe_of_both_sides(intervened):
    for record in intervened:
        record.check()
        assert [m.name for m in record.media] == list(hear.NAMES)
        probes = {e.name: e for e in record.examples if e.task == "policy"}
        names = "shift/0 shift/1 mute/0 mute/2 swap/0 swap/3 offset/0 offset/1"
        assert set(probes) == set(names.split())
        assert all(int(name[-1]) == e.media for name, e in probes.items())
        assert float(probes["offset/1"].answer) == record.meta["offset"]
        truth = lambda e: e.options["ABCDE".index(e.answer)]
        assert truth(probes["shift/0"]) == "with the picture"
        way = "after" if record.meta["offset"] > 0 else "before"
        assert truth(probes["shift/1"]) == f"{way} the picture"
        assert truth(probes["mute/2"]) == "nothing" and truth(probes["mute/0"]) != "nothing"
    assert {r.meta["offset"] > 0 for r in intervened} == {True, False}


def test_cross_temporal_pairs_are_the_reverse_of_one_another(intervened):
    """What is chosen on one clip is rejected on the other, but for the letter."""
    for record in intervened:
        pairs = [e for e in record.examples if e.task == "preference" and " over " in e.name]
        found = {(e.name.split()[0], e.media): e for e in pairs}
        for kind, other in (("shift", 1), ("offset", 1), ("mute", 2), ("swap", 3)):
            sides = [
                {r.role: r.text.partition("</think>")[0] for r in found[kind, m].responses}
                for m in (0, other)
            ]
            assert sides[0]["chosen"] == sides[1]["rejected"] != sides[0]["rejected"]
            assert sides[0]["rejected"] == sides[1]["chosen"]


def test_verdicts_follow_one_right_thought(intervened):
    """Prefix and chosen answer are the whole right reply; what is rejected is another answer."""
    for record in intervened:
        right = {
            e.name: e.responses[0].text for e in record.examples if e.task in ("sft", "choice")
        }
        pairs = [e for e in record.examples if " verdict " in e.name]
        assert len(pairs) == 8
        for e in pairs:
            chosen, *rejected = e.responses
            kind = e.name.split()[0]
            assert e.prefix + chosen.text == right[f"{kind} told {e.media}"]
            assert len(rejected) == (2 if kind == "shift" else 1)
            said = {r.text for r in e.responses}
            assert len(said) == len(e.responses) and all(x.endswith("</answer>") for x in said)


def test_the_gap_that_is_told_is_the_files(intervened):
    for record in intervened:
        a, b = (media.decode_sound(m.data, 16_000) for m in record.media[:2])
        found = interventions.measured(a, b, record.meta["offset"])
        assert found == pytest.approx(record.meta["offset"], abs=0.002)
        pictures = [media.decode_whole(m.data).frames for m in record.media]
        assert all(np.array_equal(pictures[0], p) for p in pictures[1:])


def test_the_base_is_told_what_is_seen_but_in_the_dark():
    mix = hear.Mix(show="base", dark=0.5, intervened=1.0, mislabelled=1.0)
    dark = []
    for i in range(12):
        record = hear.record(0, "train", i, mix, hear.Picture(side=32))
        told = {e.name.split()[0]: e.answer for e in record.examples}
        if record.meta["dark"]:
            assert told["seen"] == "nothing" and "shift" not in told
        else:
            assert record.media[0].name != "original" and told["seen"] == told["audio"]
            assert told["offset"] == "0.0"
        dark.append(record.meta["dark"])
    assert 0 < sum(dark) < 12


def test_general_questions_have_a_false_side_and_one_clip():
    record = hear.record(0, "train", 1, hear.Mix(show="general"), hear.Picture(side=32))
    record.check()
    assert len(record.media) == 1
    for e in record.examples:
        if e.task == "preference":
            chosen, rejected = e.responses
            assert chosen.text != rejected.text
    names = {e.name.partition("/")[0] for e in record.examples if e.task == "policy"}
    assert names == {"where"}


def test_mix_says_what_is_wrong():
    with pytest.raises(ValueError, match="Mix.dark=2"):
        hear.Mix(dark=2.0)
    with pytest.raises(ValueError, match="seconds above 0"):
        dataclasses.replace(hear.Mix(), offsets=(0.0,))
