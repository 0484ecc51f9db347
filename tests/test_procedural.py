"""The laptop world: what its texts say is true, and nothing but the picture gives the answer."""

import collections
import itertools

import numpy as np
import pytest

from data_gen.procedural import draw, make, tell
from data_gen.procedural.make import Mix, chunk
from data_gen.procedural.motion import plan
from data_gen.procedural.outcomes import CATEGORIES, EDITS, FAMILIES, NOTHING, VISUAL, level
from data_gen.procedural.scene import Settings, held_out, sample
from jaxvid.data import media

SETTINGS = Settings()
FRAMES = 32


@pytest.fixture(scope="module")
def scenes():
    return list(make.scenes(3, "train", 0, 4000, SETTINGS))


@pytest.fixture(scope="module")
def records():
    return [r for i in range(0, 192, 32) for r in chunk(5, "train", i, i + 32, SETTINGS, Mix())]


def auc(edited, real):
    """Probability that an edited clip scores above a real one; ties count half."""
    edited, real = np.asarray(edited)[:, None], np.asarray(real)[None]
    return float((edited > real).mean() + 0.5 * (edited == real).mean())


def test_every_edit_has_a_level_and_a_category():
    wanted = {
        *("contrast", "saturation", "brightness", "hue", "blur", "local_distortion", "noise"),
        *("freeze", "appear", "vanish", "substitute", "gravity_reversed", "time_reversed"),
        *("collision_without_contact", "passing_through_wall", "motion_without_cause"),
        "material_change",
    }
    assert set(EDITS.values()) == set(CATEGORIES) == wanted
    assert len(set(CATEGORIES.values())) == 4
    assert {level(e) for e in wanted} == {"visual", "semantic", "commonsense"}
    assert set(EDITS) | {NOTHING} >= {
        o for f in FAMILIES.values() for p in f.premises.values() for o in p
    }


def test_records_are_whole_and_a_function_of_seed_and_index(records):
    for record in records:
        record.check()
        assert [m.name for m in record.media] == ["real", "counterfactual"]
    again = chunk(5, "train", 32, 64, SETTINGS, Mix())
    assert again == records[32:64]


def test_options_hold_two_ordinary_and_two_odd_one_true_a_side(scenes):
    for scene in scenes:
        premises = FAMILIES[scene.family].premises
        ordinary = {*premises[scene.premise], NOTHING}
        assert set(scene.ordinary) <= ordinary and not set(scene.odd) & ordinary
        assert sorted(tell.options(scene)) == sorted({*scene.ordinary, *scene.odd})


def test_every_string_plays_every_part_equally_often(scenes):
    real, edited, offered = (collections.Counter() for _ in range(3))
    for scene in scenes:
        real[scene.ordinary[0]] += 1
        edited[scene.odd[0]] += 1
        offered.update(tell.options(scene))
    for outcome in EDITS:
        assert abs(real[outcome] / offered[outcome] - 0.25) < 0.1, outcome
        assert abs(edited[outcome] / offered[outcome] - 0.25) < 0.1, outcome


def test_nothing_unusual_is_offered_on_both_sides_and_true_of_real_ones_only(records):
    shown = lambda side: [
        e
        for r in records
        for e in r.examples
        if e.task == "policy" and e.media == side and NOTHING in e.options
    ]
    assert len(shown(0)) == len(shown(1)) > 0
    right = [e.options[tell.LETTERS.index(e.answer)] == NOTHING for e in shown(0)]
    assert 0.25 < np.mean(right) < 0.75
    assert not any(e.options[tell.LETTERS.index(e.answer)] == NOTHING for e in shown(1))


def test_joint_position_of_the_answers_is_uniform(scenes):
    place = lambda s, outcome: tell.options(s).index(outcome)
    joint = collections.Counter((place(s, s.ordinary[0]), place(s, s.odd[0])) for s in scenes)
    assert len(joint) == 12
    expected = len(scenes) / 12
    chi2 = sum((n - expected) ** 2 / expected for n in joint.values())
    assert chi2 < 31.3  # 99.9 % of the chi-square distribution with 11 degrees of freedom


def test_text_alone_finds_neither_side(scenes):
    """The strongest reader of texts: how often an option was right with this question."""
    key = lambda s: (s.premise, tuple(sorted(tell.options(s))))
    counts = collections.defaultdict(collections.Counter)
    for s in scenes[:3000]:
        counts[key(s)][s.ordinary[0]] += 1
        counts[key(s)][s.odd[0]] += 1
    picked = [max(tell.options(s), key=lambda o: counts[key(s)][o]) for s in scenes[3000:]]
    real = np.mean([p == s.ordinary[0] for p, s in zip(picked, scenes[3000:])])
    assert real <= 0.6
    assert not any(p == s.ordinary[0] == s.odd[0] for p, s in zip(picked, scenes[3000:]))


def test_knowing_which_side_is_edited_is_not_enough(scenes):
    key = lambda s: (s.premise, tuple(sorted(tell.options(s))))
    sides = [collections.defaultdict(collections.Counter) for _ in range(2)]
    for s in scenes[:3000]:
        sides[0][key(s)][s.ordinary[0]] += 1
        sides[1][key(s)][s.odd[0]] += 1
    right = []
    for s in scenes[3000:]:
        guess = [max(tell.options(s), key=lambda o: c[key(s)][o]) for c in sides]
        right.append(guess == [s.ordinary[0], s.odd[0]])
    assert np.mean(right) <= 0.3


def test_chosen_and_rejected_hold_the_same_sentences(records):
    """Stronger than a bag-of-words probe: over a chunk the two sides are the same multiset."""
    for start in range(0, len(records), make.CHUNK):
        for axis in ("spatial", "temporal", "crossframe"):
            found = {"chosen": [], "rejected": []}
            for record in records[start : start + make.CHUNK]:
                for e in record.examples:
                    if e.task == "preference" and e.name.startswith(axis):
                        pair = {r.role: r.text for r in e.responses}
                        assert pair["chosen"] != pair["rejected"]
                        for role, text in pair.items():
                            found[role].append(text)
            assert sorted(found["chosen"]) == sorted(found["rejected"])
            assert len(found["chosen"]) >= make.CHUNK


def test_files_do_not_tell_edited_from_real(records):
    size = lambda side: [len(r.media[side].data) for r in records]
    assert abs(auc(size(1), size(0)) - 0.5) <= 0.05
    assert all(r.media[0].seconds == r.media[1].seconds for r in records)
    native = media.Sampling(frames=8, height=96, width=96)
    for record in records[:8]:
        clips = [media.decode(m.data, native) for m in record.media]
        assert clips[0].seconds_per_frame == clips[1].seconds_per_frame


def test_frames_before_the_event_are_the_same_on_both_sides():
    for family in FAMILIES:
        if family == "reversal":  # the whole clip is the edit
            continue
        scene = sample(1, f"{family}/0", SETTINGS, family)
        sides = [plan(scene, o, FRAMES) for o in (scene.ordinary[0], scene.odd[0])]
        before = int(scene.start / 2 * (FRAMES - 1))
        shown = [draw.frames(p, SETTINGS)[:before] for p in sides]
        np.testing.assert_array_equal(*shown)


def test_train_never_sees_a_held_out_combination(scenes):
    share = SETTINGS.held_out
    for s in scenes:
        assert not held_out(s.subject, s.ordinary[0], share)
        assert not held_out(s.subject, s.odd[0], share)
    test = list(make.scenes(3, "test", 0, 400, SETTINGS))
    kept = [
        held_out(s.subject, s.ordinary[0], share) or held_out(s.subject, s.odd[0], share)
        for s in test
    ]
    assert 0.1 < np.mean(kept) < 0.45
    assert not {s.id for s in test} & {s.id for s in scenes}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_outcome_is_visible_after_encoding_and_sampling(family):
    """A template-matching oracle: which of the four outcomes, rendered, lies nearest the clip?"""
    sampling, right, total = media.Sampling(), 0, 0
    for i in range(8):
        scene = sample(9, f"{family}/{i}", SETTINGS, family)
        frames = round(scene.seconds * SETTINGS.fps)
        rendered = {o: draw.frames(plan(scene, o, frames), SETTINGS) for o in tell.options(scene)}
        seen = {
            o: media.decode(media.encode(f, SETTINGS.fps, None), sampling).frames.astype(float)
            for o, f in rendered.items()
        }
        at = np.round(np.linspace(0, frames - 1, sampling.frames)).astype(int)
        clean = {o: draw.frames(plan(scene, o, frames), Settings(grain=0.0))[at] for o in rendered}
        halve = lambda f: f.astype(float).reshape(len(f), 48, 2, 48, 2, 3).mean(axis=(2, 4))
        templates = {o: halve(f) for o, f in clean.items()}
        for shown in (scene.ordinary[0], scene.odd[0]):
            apart = {o: np.abs(seen[shown] - t).mean() for o, t in templates.items()}
            right += min(apart, key=apart.get) == shown
            total += 1
        real, edited = seen[scene.ordinary[0]], seen[scene.odd[0]]
        changed = np.abs(real - edited).max(axis=(1, 2, 3)) > 40
        patches = changed.reshape(-1, 2).any(axis=1)
        assert patches.sum() >= 2, f"{family}/{i}: {scene.odd[0]} shows in {patches.sum()} patches"
    assert right / total >= 0.95


def test_impacts_sound_when_they_happen():
    scene = sample(2, "gravity/impact", SETTINGS, "gravity")
    shown = plan(scene, "it falls and stays down", FRAMES)
    sound = draw.sound(shown)
    (when, _), *_ = shown.impacts
    loud = np.flatnonzero(np.abs(sound) > 0.05)[0] / draw.RATE
    assert abs(loud - when * scene.seconds) < 0.01
    subject = next(a for a in shown.actors if a.name == "subject")
    landed = np.flatnonzero(subject.y >= subject.y.max() - 1e-6)[0] / (FRAMES - 1)
    assert abs(landed - when) <= 1 / (FRAMES - 1) + 1e-6


def test_visual_edits_keep_the_sound():
    for i in range(12):
        scene = sample(4, f"picture/{i}", SETTINGS, "picture")
        assert EDITS[scene.odd[0]] in VISUAL
        sounds = [draw.sound(plan(scene, o, FRAMES)) for o in (scene.ordinary[0], scene.odd[0])]
        np.testing.assert_array_equal(*sounds)


def test_eight_open_questions_to_two_of_choice(records):
    tasks = collections.Counter(e.task for e in records[0].examples)
    assert tasks["sft"] + tasks["caption"] == 4 * tasks["choice"]


def test_base_mix_mislabels_its_stated_share():
    mix = Mix(pairs=False, rare=0.5, mislabelled=0.8)
    odd = wrong = 0
    for record in itertools.chain(
        *(chunk(1, "train", i, i + 32, SETTINGS, mix) for i in (0, 32, 64))
    ):
        assert len(record.media) == 1
        if record.media[0].name == "counterfactual":
            odd += 1
            wrong += record.meta["told"] != record.meta["outcomes"]
        else:
            assert record.meta["told"] == record.meta["outcomes"]
    assert 0.3 < odd / 96 < 0.7 and 0.6 < wrong / odd < 0.97


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"side": 95}, "even number"),
        ({"seconds": (1.0, 5.0)}, "2 to 4 s"),
        ({"ramps": 2.0}, "share"),
    ],
)
def test_bad_settings_say_the_remedy(setting, message):
    with pytest.raises(ValueError, match=message):
        Settings(**setting)


def _seen(record, side):
    return media.decode(record.media[side].data, media.Sampling()).frames.astype(np.float32)


def test_nearest_training_clip_does_not_answer(records):
    """By the frames before the event: a look-alike clip tells nothing of what happens next."""
    kept = [r for r in records if r.meta["family"] != "reversal"]  # whose edit is the whole clip
    looks = {(r.id, s): _seen(r, s)[:1].ravel() for r in kept for s in (0, 1)}
    train, test = kept[40:], kept[:40]
    known = [(looks[r.id, s], r.meta["outcomes"][s]) for r in train for s in (0, 1)]
    right = []
    for r in test:
        for side in (0, 1):
            order = np.argsort([np.abs(look - looks[r.id, side]).mean() for look, _ in known])
            options = [r.meta["scene"]["ordinary"], r.meta["scene"]["odd"]]
            offered = {o for pair in options for o in pair}
            nearest = next((known[i][1] for i in order if known[i][1] in offered), None)
            right.append(nearest == r.meta["outcomes"][side])
    # Chance is 1/4; 80 answers have a standard error of 0.05.
    assert np.mean(right) <= 0.25 + 3 * np.sqrt(0.25 * 0.75 / len(right))


def test_one_frame_is_not_enough_for_motion():
    """The oracle that always knows from the whole clip, given one frame at an unknown time."""
    rng, right = np.random.default_rng(0), []
    for family in ("gravity", "collision", "wall", "reversal", "cause"):
        for i in range(12):
            scene = sample(11, f"{family}/{i}", SETTINGS, family)
            frames = round(scene.seconds * SETTINGS.fps)
            shown = {
                o: draw.frames(plan(scene, o, frames), Settings(grain=0.0)).astype(np.float32)
                for o in tell.options(scene)
            }
            for truth in (scene.ordinary[0], scene.odd[0]):
                frame = shown[truth][rng.integers(frames)]
                apart = {o: np.abs(f - frame).mean(axis=(1, 2, 3)).min() for o, f in shown.items()}
                least = min(apart.values())
                tied = [o for o in apart if apart[o] <= least + 1e-6]
                right.append((truth in tied) / len(tied))
    assert np.mean(right) <= 0.85  # the whole clip gives it at least 0.95
