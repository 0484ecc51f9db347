"""Batches hold both sides of every record, depend on (seed, index) alone, and resume exactly."""

import collections
import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxvid.data import chat, layout, media, pipeline, records, shards
from jaxvid.prompting import Placed

VISION = media.Vision(patch=4, temporal=2, merge=2, window=16)
SAMPLING = media.Sampling(frames=4, height=16, width=16)
IMAGE, VIDEO = 5, 6
BUDGET = layout.Budget(rows=2, tokens=160, scored=48, branches=8, frames=4, patches=16)


class Prompting:
    """Stands in for a model's: text counts up on all axes, a clip's first axis is its seconds."""

    vision, sound, markers = VISION, None, chat.MARKERS

    def expand(self, medium, encode):
        n = int(np.prod(medium.grid)) // 4
        ids = np.array([3, *[IMAGE if medium.kind == "image" else VIDEO] * n, 4], np.int32)
        seen = np.array([0, *range(1, n + 1), 0], np.int32)
        return Placed(ids, seen, np.zeros_like(seen))

    def positions(self, tokens, media):
        out = np.tile(np.arange(len(tokens)), (3, 1))
        return out + np.int64(1000 * sum(m.seconds for m in media))


def make_record(i, folder, tasks):
    """A pair: real and counterfactual clip, three questions and a preference on each."""
    rng, examples = np.random.default_rng(i), []
    clips = [
        media.encode(np.full((8, 32, 32, 3), rng.integers(256), np.uint8), 8.0) for _ in range(2)
    ]
    say = records.Response
    for side, name in enumerate(("real", "cf")):
        for q in range(3):
            reply = (say(f"it is {folder}{i} {name}{q}"),)
            examples.append(
                records.Example(f"q{q} {name}", "sft", side, f"Colour {q}?", responses=reply)
            )
        replies = (say("up", "rejected", "spatial"), say("down", "chosen"), say("no", "rejected"))
        examples.append(
            records.Example(f"p {name}", "preference", side, "Where?", responses=replies)
        )
        for q in range(2):
            examples.append(
                records.Example(
                    f"g{q} {name}", "policy", side, f"Which {q}?", ("x", "y"), "AB"[side]
                )
            )
    return records.Record(
        id=f"{folder}{i}",
        split="train",
        media=tuple(records.Media(f"m{s}", "video", c, 1.0) for s, c in enumerate(clips)),
        examples=tuple(e for e in examples if e.task in tasks),
        licence="CC0-1.0",
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of 10 records, folder of 5 records, chat)."""
    root = tmp_path_factory.mktemp("world")
    for name, count in (("a", 10), ("b", 5)):
        made = (make_record(i, name, records.TASKS) for i in range(count))
        shards.write(root / name, made, split="train", shard_records=4)
    texts = ["Colour 0 1 2 3? it is real cf a b up down Where Which"] * 4
    chat.build_tokenizer(texts, 320, root / "model")
    return str(root / "a"), str(root / "b"), chat.Chat(root / "model")


def setup(world, folders="a", frames=None, **change):
    data = pipeline.Data(
        **{
            "shards": tuple(world["ab".index(f)] for f in folders),
            "tasks": ("sft",),
            "budget": BUDGET,
            "pairs": 4,
            "sampling": SAMPLING,
            **change,
        }
    )
    return data, pipeline.Builder(world[2], Prompting(), data, frames)


def take(world, n, seed=0, processes=1, process=0, **change):
    data, builder = setup(world, **change)
    batches = pipeline.batches(data, builder, seed, process=process, processes=processes)
    with contextlib.closing(iter(batches)) as it:
        return [next(it) for _ in range(n)]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def replies(batch, c):
    """(record, side) -> the texts of its scored tokens."""
    out = collections.defaultdict(list)
    for micro in range(len(batch.old)):
        x = jax.tree.map(lambda leaf, at=micro: leaf[at], batch)
        for row in range(len(x.old)):
            for m in range(BUDGET.branches):
                if x.branches.weight[row, m] > 0:
                    key = int(x.branches.record[row, m]), int(x.branches.side[row, m])
                    at = x.tokens.slot[row] == m + 1
                    out[key].append(c.decode(x.tokens.targets[row, at]))
    return out


def test_every_supervised_batch_holds_both_sides_of_its_records(world):
    data, builder = setup(world)
    it = iter(pipeline.batches(data, builder, 0))
    for step in range(3):
        batch, ids = next(it), pipeline.update_ids(data, 0, step)
        said = replies(batch, world[2])
        assert sorted(said) == [(r, side) for r in range(4) for side in range(2)]
        for (r, side), texts in said.items():
            name = ("real", "cf")[side]
            assert texts == [f"it is {ids[r]} {name}{q}" for q in range(3)]
        np.testing.assert_array_equal(batch.branches.pair, batch.branches.record)
        assert (batch.branches.weight[batch.branches.record >= 0] == 1).all()
        for micro in range(len(batch.old)):  # a pair never leaves its micro-batch
            sides = collections.Counter()
            where = batch.branches.record[micro] >= 0
            here = zip(batch.branches.record[micro][where], batch.branches.side[micro][where])
            for r, _ in set(here):
                sides[int(r)] += 1
            assert set(sides.values()) <= {2}


def test_an_epoch_meets_every_record_once_and_the_next_in_another_order(world):
    data, _ = setup(world, pairs=5)
    epochs = [
        pipeline.update_ids(data, 3, step) + pipeline.update_ids(data, 3, step + 1)
        for step in (0, 2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"a{i}" for i in range(10))
    assert epochs[0] != epochs[1]
    assert pipeline.update_ids(data, 4, 0) != epochs[0][:5]


def test_state_resumes_exactly(world):
    data, builder = setup(world, questions=2, blank=0.3)
    it = iter(pipeline.batches(data, builder, 0))
    for _ in range(2):
        next(it)
    state = it.get_state()
    wanted = [next(it) for _ in range(3)]
    again = iter(pipeline.batches(data, builder, 0))
    next(again)
    again.set_state(state)
    for batch in wanted:
        equal(next(again), batch)


def test_another_number_of_processes_goes_on_from_the_same_place(world):
    """One process, then two, then one with workers: each update has the records that it has in a
    run of one."""
    data, builder = setup(world, microbatches=4)

    def stream(process=0, processes=1, workers=0):
        how = dataclasses.replace(data, workers=workers)
        return iter(pipeline.batches(how, builder, 0, process=process, processes=processes))

    texts = lambda *batches: sorted(t for b in batches for t in replies(b, world[2]).values())
    alone = stream()
    whole = [texts(next(alone)) for _ in range(4)]
    first = stream()
    next(first)
    two = [stream(p, 2) for p in range(2)]
    for one in two:
        one.set_state(json.loads(json.dumps(first.get_state())))
    for n in (1, 2):
        assert texts(*(next(one) for one in two)) == whole[n]
    assert two[0].get_state() == two[1].get_state()
    with contextlib.closing(stream(workers=2)) as last:
        last.set_state(two[1].get_state())
        assert texts(next(last)) == whole[3]
        assert last.get_state()["taken"] == 4


def test_questions_go_on_over_another_number_of_processes(world):
    data, builder = setup(world, tasks=("policy",))
    name = lambda q: (q.record.id, [e.prompt for e in q.examples])
    stream = lambda *share: iter(
        pipeline.prompts(data, builder, 0, **dict(zip(("process", "processes"), share)))
    )
    alone = stream()
    whole = [name(next(alone)) for _ in range(12)]
    first = stream()
    for _ in range(4):
        next(first)
    two = [stream(p, 2) for p in range(2)]
    for one in two:
        one.set_state(first.get_state())
    assert [name(next(one)) for _ in range(3) for one in two] == whole[4:10]
    first.set_state(two[0].get_state())
    assert [name(next(first)) for _ in range(2)] == whole[10:]
    next(first)
    with pytest.raises(ValueError, match="13 items were taken, .* 2 processes"):
        two[0].set_state(first.get_state())


def test_a_place_in_other_data_is_refused(world):
    data, builder = setup(world)
    state = iter(pipeline.batches(data, builder, 0)).get_state()
    for seed, change, told in (
        (1, {}, "seed: 0 -> 1"),
        (0, {"pairs": 2}, r"pairs: \d -> 2"),
        (0, {"shards": (world[1],)}, r"shards: .*records=10, content=.* -> .*records=5"),
    ):
        other = iter(pipeline.batches(dataclasses.replace(data, **change), builder, seed))
        with pytest.raises(ValueError, match=f"lost or seen twice:\n  {told}"):
            other.set_state(state)


def test_workers_change_nothing(world):
    for mine, theirs in zip(take(world, 3, questions=1), take(world, 3, questions=1, workers=2)):
        equal(mine, theirs)


def test_processes_share_each_update(world):
    whole = take(world, 2, microbatches=4)
    shares = [take(world, 2, processes=2, process=p, microbatches=4) for p in range(2)]
    data, _ = setup(world, microbatches=4)
    for step in range(2):
        ids = [
            i for p in range(2) for i in pipeline.update_ids(data, 0, step, process=p, processes=2)
        ]
        assert sorted(ids) == sorted(pipeline.update_ids(data, 0, step))
        found = [replies(share[step], world[2]) for share in shares]
        assert sorted(r for f in found for r, _ in f) == sorted(
            r for r, _ in replies(whole[step], world[2])
        )
        for f in found:
            for (r, side), texts in f.items():
                assert texts[0] == f"it is {ids[r]} {('real', 'cf')[side]}0"
        assert [share[step].old.shape[:2] for share in shares] == [(4, 1)] * 2
    with pytest.raises(ValueError, match="set data.microbatches"):
        take(world, 1, processes=2)
    with pytest.raises(ValueError, match="must both divide over 3 processes"):
        take(world, 1, processes=3, microbatches=4)


@pytest.mark.parametrize("weights, share", [((), 2 / 3), ((1.0, 1.0), 1 / 2), ((1.0, 3.0), 1 / 4)])
def test_a_mixture_holds_its_weights(world, weights, share):
    data, _ = setup(world, folders="ab", weights=weights, pairs=12)
    ids = [i for step in range(10) for i in pipeline.update_ids(data, 0, step)]
    assert abs(np.mean([i[0] == "a" for i in ids]) - share) < 0.05
    assert {i for i in ids} == {f"a{i}" for i in range(10)} | {f"b{i}" for i in range(5)}


def test_a_finite_run_meets_every_record_once(world):
    data, builder = setup(world, folders="ab")
    found = [replies(b, world[2]) for b in pipeline.batches(data, builder, 0, epochs=1)]
    firsts = sorted(texts[0].split()[2] for f in found for (_, side), texts in f.items() if side)
    assert firsts == sorted([f"a{i}" for i in range(10)] + [f"b{i}" for i in range(5)])


def test_questions_are_drawn_alike_on_both_sides_and_anew(world):
    asked = set()
    for batch in take(world, 6, questions=1):
        said = replies(batch, world[2])
        for r in range(4):
            ((real,), (cf,)) = said[r, 0], said[r, 1]
            assert real[-1] == cf[-1]
            asked.add((real.split()[2], real[-1]))
    assert len(asked) > 12  # ten records, met more than once


def test_preferences_name_their_mates(world):
    (batch,) = take(world, 1, tasks=("preference",), pairs=1)
    table = jax.tree.map(lambda leaf: leaf[0, 0], batch.branches)
    np.testing.assert_array_equal(table.record[:6], 0)
    np.testing.assert_array_equal(table.side[:6], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(table.mate[:6], [0, 1, 1, 0, 4, 4])
    np.testing.assert_array_equal(table.axis[:6], [0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(table.value[:6], [1, 0, 0, 1, 0, 0])
    said = replies(batch, world[2])
    assert said[0, 0] == said[0, 1] == ["down", "up", "no"]


def test_several_preferences_share_their_clip(world):
    """The questions become branches of the clip, their replies go on from them."""
    record = make_record(0, "a", ("preference",))
    first = record.examples[0]
    more = dataclasses.replace(first, name="p2", prompt="Which?")
    record = dataclasses.replace(record, examples=(first, more))
    data, builder = setup(world, tasks=("preference",))
    (tree,) = builder(record, np.random.default_rng(0))
    assert [b.parent for b in tree.branches] == [0, 1, 1, 1, 0, 5, 5, 5]
    assert [b.mate for b in tree.branches] == [0, 0, 2, 2, 0, 0, 6, 6]
    assert [b.weight for b in tree.branches] == [0, 1, 1, 1, 0, 1, 1, 1]
    alone = [
        builder(dataclasses.replace(record, examples=(e,)), np.random.default_rng(0))[0]
        for e in (first, more)
    ]
    for i, one in enumerate(alone):
        np.testing.assert_array_equal(
            one.prompt, np.concatenate([tree.prompt, tree.branches[4 * i].tokens])
        )
        np.testing.assert_array_equal(one.branches[2].tokens, tree.branches[4 * i + 3].tokens)


def test_steps_share_their_prefixes(world):
    """Step pairs and a pair of whole replies to one question: what they share stands once."""
    record = make_record(0, "a", ("preference",))
    first, words = record.examples[0], setup(world)[1].chat

    def steps(name, prefix, good, bad, **how):
        both = records.Response(good, "chosen", **how), records.Response(bad, "rejected", **how)
        return dataclasses.replace(first, name=name, prefix=prefix, responses=both)

    examples = (
        steps("whole", "", "down no", "up no"),
        steps("late", "down up", " no", " down", ends=False),
        steps("early", "down", " up", " no", ends=False, value=0.25),
    )
    record = dataclasses.replace(record, examples=examples)
    _, builder = setup(world, tasks=("preference",))
    (tree,) = builder(record, np.random.default_rng(0))
    text = [words.decode(b.tokens) for b in tree.branches]
    assert text == ["down no", "up no", "down up", " no", " down", "down", " up", " no"]
    assert [b.parent for b in tree.branches] == [0, 0, 0, 3, 3, 0, 6, 6]
    assert [b.mate for b in tree.branches] == [0, 1, 0, 0, 4, 0, 0, 7]
    assert [b.value for b in tree.branches] == [1, 0, 0, 1, 0, 0, 0.25, 0.25]
    assert [b.tokens[-1] in words.stop_ids for b in tree.branches] == [True] * 2 + [False] * 6
    again = dataclasses.replace(record, examples=tuple(sorted(examples, key=lambda e: e.prefix)))
    (tree,) = builder(again, np.random.default_rng(0))
    text = [words.decode(b.tokens) for b in tree.branches]
    assert text == ["down no", "up no", "down", " up", " no", " up", " no", " down"]
    assert [b.parent for b in tree.branches] == [0, 0, 0, 3, 3, 3, 6, 6]


def test_a_rejected_reply_about_another_clip(world):
    """The same words, right of one clip and wrong of the other: compared across two trees."""
    record = make_record(0, "a", ("preference",))
    one = next(e for e in record.examples if e.media == 0)
    said = (records.Response("down", "chosen"), records.Response("down", "rejected", media=1))
    record = dataclasses.replace(record, examples=(dataclasses.replace(one, responses=said),))
    record.check()
    data, builder = setup(world, tasks=("preference",))
    trees = builder(record, np.random.default_rng(0))
    assert [[(b.mate, b.across, b.side) for b in t.branches] for t in trees] == [
        [(0, 0, 0)],
        [(1, -1, 1)],
    ]
    np.testing.assert_array_equal(trees[0].branches[0].tokens, trees[1].branches[0].tokens)
    single = layout.size(trees[0])
    (batch,) = layout.pack([trees], data.budget)
    np.testing.assert_array_equal(batch.branches.mate[0, :2], [0, 1])
    np.testing.assert_array_equal(batch.branches.side[0, :2], [0, 1])
    (batch,) = layout.pack([trees[:1], trees], data.budget)  # behind another tree
    row = np.flatnonzero(batch.branches.mate.any(1))[0]
    at = np.flatnonzero(batch.branches.mate[row])[0]
    assert batch.branches.side[row, batch.branches.mate[row, at] - 1] == 0
    small = dataclasses.replace(data.budget, tokens=2 * single.tokens - 1)
    with pytest.raises(ValueError, match=f"budget.tokens to at least {2 * single.tokens}"):
        layout.pack([trees], small)


def test_blank_clips_and_controls(world):
    data, builder = setup(world, blank=1.0)
    record = shards.Source(world[0], "train")[0]
    for tree in builder(record, np.random.default_rng(0)):
        assert (tree.clips[0].patches == pipeline.GREY).all()
    (blanked,) = take(world, 1, blank=1.0)
    assert set(np.unique(blanked.vision.patches)) == {pipeline.GREY}
    seen = []

    def reverse(frames, name):
        seen.append(name)
        return frames[::-1]

    _, plain = setup(world)
    _, turned = setup(world, frames=reverse)
    rng = np.random.default_rng(0)
    for a, b in zip(plain(record, rng), turned(record, rng)):
        wanted = a.clips[0].patches.reshape(2, 16, 3, 2, 16)[::-1, :, :, ::-1]
        got = b.clips[0].patches.reshape(2, 16, 3, 2, 16)
        np.testing.assert_array_equal(got, wanted)
    assert seen == [record.id] * 2


def test_cached_frames_give_the_same_batches(world, tmp_path):
    plain = take(world, 3)
    for _ in range(2):  # the first fills the cache
        for a, b in zip(plain, take(world, 3, cache=str(tmp_path))):
            equal(a, b)
    assert list(tmp_path.rglob("*.npy"))


def test_policy_prompts_are_pairs_of_one_question(world):
    data, builder = setup(world, tasks=("policy",))
    it = iter(pipeline.prompts(data, builder, 0))
    asked = set()
    for _ in range(30):
        record, trees, examples = next(it)
        assert [e.media for e in examples] == [0, 1] and len(trees) == 2
        assert examples[0].prompt == examples[1].prompt
        for tree, e in zip(trees, examples):
            assert tree.name == record.id and not tree.branches
            suffix = world[2].suffix(e.prompt, ["video"])
            np.testing.assert_array_equal(tree.prompt[-len(suffix) :], suffix)
            assert (tree.prompt == VIDEO).sum() == 8 == tree.seen.max()
        asked.add((record.id, examples[0].name))
    assert len(asked) > 12
    room = dict(rows=4, tokens=64, scored=0, branches=0, frames=2, patches=16)
    tokens, *_ = layout.prompts(trees, layout.Budget(**room))
    assert (tokens.end[:2] > 0).any() and not tokens.end[2:].any()


def test_evaluation_asks_every_question_once_in_order(world):
    data, builder = setup(world, folders="ab", tasks=("policy",))
    found = [(p.record.id, p.examples[0].name) for _, p in pipeline.questions(data, builder)]
    wanted = [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(5)]
    assert found == [(r, f"g{q} real") for r in wanted for q in range(2)]


def test_text_alone_and_images_make_trees(world):
    data, builder = setup(world, tasks=("caption",))
    file = io.BytesIO()
    Image.new("RGB", (20, 30), (200, 10, 10)).save(file, "PNG")
    reply = (records.Response("it is up"),)
    record = records.Record(
        id="mixed",
        split="train",
        media=(records.Media("i", "image", file.getvalue()),),
        examples=(
            records.Example("t", "caption", -1, "Colour?", responses=reply),
            records.Example("i", "caption", 0, "Colour?", responses=reply),
        ),
        licence="CC0-1.0",
    )
    text, image = builder(record, np.random.default_rng(0))
    assert not text.seen.any() and not text.clips
    assert (image.prompt == IMAGE).sum() == 4 and image.clips[0].patches.shape == (1, 16, 96)
    (batch,) = layout.pack([[text, image]], BUDGET)
    assert batch.vision.window.any(axis=-1).sum() == 1


def test_what_is_wrong_is_said(world):
    record = make_record(0, "a", ("preference",))
    data, builder = setup(world)
    with pytest.raises(ValueError, match=r"record 'a0' has no example of \('sft',\), only of"):
        builder(record, np.random.default_rng(0))
    with pytest.raises(ValueError, match="record 'a0' has no policy question"):
        builder.prompts(record)
    uneven = make_record(0, "a", ("policy",))
    with pytest.raises(ValueError, match=r"\[2, 1\] policy questions"):
        builder.prompts(dataclasses.replace(uneven, examples=uneven.examples[:3]))
    cut = dataclasses.replace(record.media[0], data=record.media[0].data[:200])
    broken = dataclasses.replace(make_record(0, "a", ("sft",)), media=(cut, record.media[1]))
    with pytest.raises(media.MediaError, match="record 'a0', media 0: .*cut off"):
        builder(broken, np.random.default_rng(0))
    sound = dataclasses.replace(record.media[0], kind="audio")
    deaf = dataclasses.replace(broken, media=(sound, record.media[1]))
    with pytest.raises(ValueError, match="a0', media 0: a video came where sound alone"):
        builder(deaf, np.random.default_rng(0))
    with pytest.raises(ValueError, match="2 micro-batches; data.microbatches is 1"):
        take(world, 1, microbatches=1)
    tight = dataclasses.replace(BUDGET, tokens=40)
    with pytest.raises(ValueError, match="budget.tokens to at least"):
        take(world, 1, budget=tight)
    for change, fault in (
        ({"tasks": ("dpo",)}, "data.tasks"),
        ({"shards": ()}, "data.shards is empty"),
        ({"weights": (1.0, 2.0)}, "data.weights"),
        ({"blank": 2.0}, "data.blank"),
        ({"pairs": 0}, "data.pairs"),
    ):
        with pytest.raises(ValueError, match=fault):
            setup(world, **change)


def test_answers_of_one_question_share_it(world):
    record = make_record(0, "a", ("sft",))
    asked = [e for e in record.examples if e.task == "sft" and e.media == 0]
    two = records.Response("down"), records.Response("up")
    record = dataclasses.replace(
        record, examples=(dataclasses.replace(asked[0], responses=two), *asked[1:])
    )
    _, builder = setup(world, tasks=("sft",))
    tree = builder(record, np.random.default_rng(0))[0]
    assert [b.parent for b in tree.branches[:3]] == [0, 1, 1]
    assert [b.weight for b in tree.branches[:3]] == [0, 1, 1]
    assert [int(b.scored.sum()) == len(b.tokens) for b in tree.branches[:3]] == [False, True, True]
    for k in (0, 1):
        alone = dataclasses.replace(
            record, examples=(dataclasses.replace(asked[0], responses=two[k : k + 1]),)
        )
        (one,) = builder(alone, np.random.default_rng(0))[0].branches
        both = np.concatenate([tree.branches[0].tokens, tree.branches[1 + k].tokens])
        np.testing.assert_array_equal(one.tokens, both)
