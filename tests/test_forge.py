"""jaxvid-forge: what it writes, how it goes on, what it refuses."""

import json
import pathlib

import pytest

from data_gen import build, practice, sources
from data_gen.build import main
from jaxvid import answers
from jaxvid.data import shards

CLIPS = pathlib.Path(__file__).parent / "clips"


def procedural(out, *more):
    main(["procedural", "--out", str(out), "--workers", "0", *more])


def test_interrupted_forge_goes_on_to_the_same_files(tmp_path, monkeypatch):
    sizes = ("--train", "34", "--validation", "0", "--test", "2")
    procedural(tmp_path / "whole", *sizes)
    real, calls = build.chunk, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(build, "chunk", stops)
    with pytest.raises(KeyboardInterrupt):
        procedural(tmp_path / "cut", *sizes)
    assert shards.splits(tmp_path / "cut") == ()
    monkeypatch.setattr(build, "chunk", real)
    procedural(tmp_path / "cut", *sizes)
    for split, count in (("train", 34), ("test", 2)):
        whole, cut = (shards.Source(str(tmp_path / n), split) for n in ("whole", "cut"))
        assert len(whole) == count and repr(whole) == repr(cut)


def test_folder_of_other_settings_is_refused(tmp_path):
    procedural(tmp_path, "--train", "1", "--validation", "0", "--test", "0")
    with pytest.raises(SystemExit, match="other settings.*train: 1 there, 2 now"):
        procedural(tmp_path, "--train", "2", "--validation", "0", "--test", "0")


def test_visual_pairs_of_a_folder_with_a_broken_clip(tmp_path, capsys):
    videos = tmp_path / "videos" / "below"
    videos.mkdir(parents=True)
    (videos / "dog.mp4").write_bytes((CLIPS / "dog.mp4").read_bytes())
    (videos / "broken.mp4").write_bytes(b"not a video")
    (videos / "empty.mp4").write_bytes(b"")
    out = tmp_path / "out"
    main(["visual", "--videos", str(videos.parent), "--out", str(out), "--edits", "1"])
    assert len(shards.Source(str(out), "train")) == 1
    reasons = [json.loads(line) for line in (out / "unreadable.jsonl").read_text().splitlines()]
    assert sorted(pathlib.Path(r["clip"]).name for r in reasons) == ["broken.mp4", "empty.mp4"]
    assert all(r["reason"] for r in reasons)


def test_folder_without_videos_says_what_it_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(FileNotFoundError, match=r"holds no video.*\.mp4.*found \.txt"):
        sources.clips(tmp_path)
    with pytest.raises(SystemExit, match="holds no video"):
        main(["visual", "--videos", str(tmp_path), "--out", str(tmp_path / "out")])


def test_names_stay_apart_where_only_the_suffix_differs(tmp_path):
    for name in ("a.mp4", "a.mov"):
        (tmp_path / name).write_bytes(b"x")
    assert [n for n, _ in sources.named(tmp_path)] == ["a", "a.2"]


@pytest.mark.parametrize("flag", ["--tarin", "--settings.sied"])
def test_unknown_flag_names_the_nearest(flag, capsys):
    with pytest.raises(SystemExit):
        main(["procedural", "--out", "x", flag, "3"])
    told = capsys.readouterr()
    assert "--train" in told.err + told.out or "--settings.side" in told.err + told.out


def test_reading_practice_tells_every_letter_after_its_option_and_names_none():
    made = list(practice.records(3, "train", 40))
    assert made == list(practice.records(3, "train", 40)) != list(practice.records(4, "train", 40))
    for record in made:
        record.check()
        copied, *choices = record.examples
        assert copied.prompt == f"Repeat: {copied.answer}"
        for e in choices:
            question, *listed = e.prompt.splitlines()
            options = dict(line.split(". ") for line in listed)
            assert list(options) == list("ABCD") and len(set(options.values())) == 4
            assert not any(o in question for o in options.values())
            told = [r.text for r in e.responses]
            assert told == [f"<think>{o}</think> <answer>{a}</answer>" for a, o in options.items()]


def test_replies_in_steps_are_true_of_their_clips(tmp_path):
    sizes = ("--train", "2", "--validation", "0", "--test", "1")
    procedural(tmp_path / "world", *sizes)
    main(["steps", "--shards", str(tmp_path / "world"), "--out", str(tmp_path / "steps")])
    world, steps = (shards.Source(str(tmp_path / n), "train") for n in ("world", "steps"))
    assert shards.splits(tmp_path / "steps") == ("test", "train")
    for before, after in zip(world, steps):
        after.check()
        assert (after.id, after.media, after.meta) == (before.id, before.media, before.meta)
        named = {e.name: e for e in before.examples}
        for side in (0, 1):
            policy, told = after.examples[2 * side : 2 * side + 2]
            assert policy == named[f"policy {side}"]
            assert (told.task, told.media, told.prompt) == ("sft", side, policy.prompt)
            text = told.responses[0].text
            assert answers.formatted(text) and answers.is_right(text, policy.answer, 4)
            first, path, last, outcome, _ = text.removeprefix("<think>").split("\n")
            assert named[f"start {side}"].answer.replace("gone", "out of sight") in first
            assert path == f"Its path is {named[f'path {side}'].answer}."
            assert named[f"end {side}"].answer.replace("gone", "out of sight") in last
            assert outcome == policy.options["ABCD".index(policy.answer)]
    with pytest.raises(SystemExit, match="no example"):
        main(["steps", "--shards", str(tmp_path / "steps"), "--out", str(tmp_path / "again")])
