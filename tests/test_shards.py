"""Folders of shards: whole or not at all, exact, verified, a tfds data set, read by workers."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from jaxvid.data import media, records, shards
from jaxvid.data.records import Example, Media, Record

CLIP = media.encode(np.zeros((4, 16, 16, 3), np.uint8), 4.0, np.zeros(16000, np.float32))


def record(i, split="train", clip=CLIP):
    sides = (Media("real", "video", clip, 1.0), Media("cf", "video", clip, 1.0))
    example = Example("q", "policy", 1, f"Question {i}?", ("a", "b"), "AB"[i % 2])
    return Record(f"{split}-{i}", split, sides, (example,), {"i": i}, {"seed": i}, "CC0-1.0")


def build(folder, counts=(("train", 10), ("test", 3)), clip=CLIP):
    for split, n in counts:
        shards.write(
            folder, (record(i, split, clip) for i in range(n)), split=split, shard_records=4
        )
    return folder


def corrupt(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 0xFF
    path.write_bytes(data)


def test_round_trip_over_splits_and_shards(tmp_path):
    build(tmp_path)
    train, test = shards.Source(tmp_path, "train"), shards.Source(str(tmp_path), "test")
    assert [train[i] for i in range(len(train))] == [record(i) for i in range(10)]
    assert [test[i] for i in range(len(test))] == [record(i, "test") for i in range(3)]
    assert train.where(9) == (str(tmp_path / "jaxvid-train.array_record-00002-of-00003"), 1)
    assert shards.validate(tmp_path, media=True) == shards.Report(13, [])
    with pytest.raises(IndexError, match="record 10 of 10"):
        train[10]


def test_same_records_same_bytes(tmp_path):
    a, b = (build(tmp_path / name) for name in "ab")
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name


def test_writer_streams(tmp_path):
    """Records are taken one by one: the first shard is on disk before the last record is made."""
    seen = []

    def make():
        for i in range(6):
            seen.append(len(list(tmp_path.glob(".train-*/part-*"))))
            yield record(i)

    shards.write(tmp_path, make(), split="train", shard_records=2)
    assert seen == [1, 1, 2, 2, 3, 3]  # the file being written, then also those before


def test_failure_leaves_the_folder_as_it_was(tmp_path):
    build(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def breaks():
        yield record(0)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        shards.write(tmp_path, breaks(), split="train", replace=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


FULL = """
import pathlib, resource, sys
from jaxvid.data import shards
from test_shards import record
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
rows = (record(i, clip=i.to_bytes(2, "big") * 5_000) for i in range(20))
shards.write(pathlib.Path(sys.argv[1]), rows, split="train", shard_records=10, resume="seed 0")
"""


def test_a_disk_that_fills_is_named_and_leaves_nothing_to_read(tmp_path):
    """A limit on file size stands for the disk: the writer sees the same failing write."""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1 and "Make room on the disk" in ran.stderr, ran.stderr
    with pytest.raises(shards.ShardError, match="no manifest"):
        shards.Source(tmp_path, "train")
    assert shards.resumable(tmp_path, split="train", resume="seed 0") == 0
    rows = [record(i) for i in range(20)]
    shards.write(tmp_path, rows, split="train", shard_records=10, resume="seed 0")
    assert shards.validate(tmp_path, media=True) == shards.Report(20, [])


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    bad = dataclasses.replace(record(1), licence="")
    rows = [record(0), bad, *(record(i) for i in range(2, 8))]

    def breaks():
        yield from rows[:6]
        raise KeyboardInterrupt

    whole, again = tmp_path / "whole", tmp_path / "again"
    shards.write(whole, rows, split="train", shard_records=2)
    with pytest.raises(KeyboardInterrupt):
        shards.write(again, breaks(), split="train", shard_records=2, resume="seed 0")
    with pytest.raises(shards.ShardError, match="no manifest"):
        shards.Source(again, "train")
    assert shards.resumable(again, split="test", resume="seed 0") == 0
    with pytest.raises(shards.ShardError, match="other settings .'seed 0', now 'seed 1'"):
        shards.resumable(again, split="train", resume="seed 1")
    done = shards.resumable(again, split="train", resume="seed 0")
    assert done == 5  # two whole shards and the reject between
    rest = (r for r in rows[done:])
    assert shards.write(again, rest, split="train", shard_records=2, resume="seed 0")[:2] == (7, 1)
    assert {p.name for p in whole.iterdir()} == {p.name for p in again.iterdir()}
    for file in whole.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_an_existing_split_is_replaced_only_on_demand(tmp_path):
    build(tmp_path)
    with pytest.raises(shards.ShardError, match="already; give replace=True"):
        shards.write(tmp_path, [record(0)], split="train")
    shards.write(tmp_path, [record(5)], split="train", replace=True)
    assert shards.Source(tmp_path, "train")[0] == record(5)
    assert shards.validate(tmp_path) == shards.Report(4, [])


def test_rejects_are_kept_with_their_reason(tmp_path):
    bad = dataclasses.replace(record(1), licence="")
    rows = [record(0), bad, record(0), record(2, "test"), record(3)]
    written = shards.write(tmp_path, rows, split="train")
    assert (written.records, written.rejected) == (2, 3)
    lines = [json.loads(s) for s in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [r["index"] for r in lines] == [1, 2, 3]
    for r, words in zip(lines, ["licence is empty", "id is used before", "split is 'test'"]):
        assert words in r["reason"]
    with pytest.raises(shards.ShardError, match="no record for split 'x' is usable"):
        shards.write(tmp_path, [bad], split="x")


def test_source_spans_folders_and_globs(tmp_path):
    build(tmp_path / "a"), build(tmp_path / "b", (("train", 2),))
    assert len(shards.Source(tmp_path / "*", "train")) == 12
    both = shards.Source([tmp_path / "b", tmp_path / "a"], "train")
    assert [both[i].id for i in (1, 2, 11)] == ["train-1", "train-0", "train-9"]
    with pytest.raises(shards.ShardError, match="no split 'test'; it has"):
        shards.Source(tmp_path / "*", "test")
    with pytest.raises(shards.ShardError, match="no folder of shards at"):
        shards.Source(tmp_path / "none*", "train")


def test_source_pickles_and_its_name_is_its_content(tmp_path):
    source = shards.Source(build(tmp_path / "a"), "train")
    source[3]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == source[3] and repr(copy) == repr(source)
    os.rename(tmp_path / "a", tmp_path / "moved")
    assert repr(shards.Source(tmp_path / "moved", "train")) == repr(source)
    assert repr(shards.Source(tmp_path / "moved", "test")) != repr(source)


def test_source_refuses_what_is_not_as_written(tmp_path):
    with pytest.raises(shards.ShardError, match="no manifest.json"):
        shards.Source(tmp_path, "train")
    build(tmp_path)
    file = tmp_path / "jaxvid-train.array_record-00001-of-00003"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(shards.ShardError, match="cut off or overwritten"):
        shards.Source(tmp_path, "train")
    file.unlink()
    with pytest.raises(shards.ShardError, match="it is not there"):
        shards.Source(tmp_path, "train")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(shards.ShardError, match="schema 99; .* schema 2"):
        shards.Source(tmp_path, "test")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(shards.ShardError, match="is not JSON"):
        shards.Source(tmp_path, "test")


def test_a_flipped_byte_is_found(tmp_path):
    clip = np.random.default_rng(0).bytes(60_000)  # does not compress: spans the file's blocks
    build(tmp_path, clip=clip)
    file = tmp_path / "jaxvid-train.array_record-00000-of-00003"
    corrupt(file, 150_000)
    report = shards.validate(tmp_path)
    assert (file.name, -1) in {(b.file, b.index) for b in report.bad}
    assert {b.file for b in report.bad} == {file.name}
    lost = [b.index for b in report.bad if b.index >= 0]
    assert lost and report.records == 13 - len(lost)
    source = shards.Source(tmp_path, "train")
    with pytest.raises(shards.ShardError, match=f"record {lost[0]} cannot be read"):
        source[lost[0]]


def test_validate_reports_every_kind_of_fault(tmp_path):
    build(tmp_path)
    good = [b for b in shards.validate(tmp_path).bad]
    assert not good
    shards.write(tmp_path, [dataclasses.replace(record(1), split="extra")], split="extra")
    broken = (Media("real", "video", CLIP[:-50], 1.0), Media("cf", "video", b"no film", 1.0))
    rows = [dataclasses.replace(record(0, "clips"), media=broken)]
    shards.write(tmp_path, rows, split="clips")
    (tmp_path / "jaxvid-old.array_record-00000-of-00001").write_bytes(b"")
    (tmp_path / "jaxvid-test.array_record-00000-of-00001").unlink()
    found = [b.reason for b in shards.validate(tmp_path, media=True).bad]
    for words in (
        "id is also in split 'extra'",
        "media 'real': clip is cut off",
        "media 'cf': 7 bytes are not a readable clip",
        "the manifest does not name it",
        "it is not there",
    ):
        assert any(words in reason for reason in found), (words, found)
    assert "no manifest.json" in shards.validate(tmp_path / "nowhere").bad[0].reason


def test_tfds_opens_the_folder_and_tensorflow_stays_away(tmp_path):
    build(tmp_path)
    code = f"""
import sys
import tensorflow_datasets as tfds
from jaxvid.data import media, records, shards
builder = tfds.builder_from_directory({str(tmp_path)!r})
assert {{k: v.num_examples for k, v in builder.info.splits.items()}} == {{"train": 10, "test": 3}}
source = builder.as_data_source(split="train[50%:]")
assert len(source) == 5 and source[0]["id"] == b"train-5", source[0]["id"]
clip = source[0]["media"]["data"][1]
assert media.decode(clip, media.Sampling(2, 16, 16)).frames.shape == (2, 16, 16, 3)
assert source[1]["options"]["text"] == [b"a", b"b"]
shards.Source({str(tmp_path)!r}, "train")[2]
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_two_processes_write_two_splits(tmp_path):
    code = """
import sys
from tests.test_shards import record, shards
shards.write(sys.argv[1], (record(i, sys.argv[2]) for i in range(5)), split=sys.argv[2])
"""
    splits = ("train", "validation", "test")
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), split]) for split in splits
    ]
    assert [p.wait() for p in running] == [0, 0, 0]
    assert sorted(shards.read_manifest(tmp_path)["splits"]) == sorted(splits)
    assert shards.validate(tmp_path) == shards.Report(15, [])


def test_manifest_states_the_schema(tmp_path):
    assert shards.read_manifest(build(tmp_path))["schema"] == records.SCHEMA
