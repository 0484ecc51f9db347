"""Folders that lie elsewhere, in fsspec's memory: shards, and what a run writes."""

import dataclasses
import json

import fsspec
import jax
import numpy as np
import pytest
from toy import SETTINGS, Stream, assert_same, train

from jaxvid import files
from jaxvid.data import records, shards
from jaxvid.train import checkpoint, metrics

URL = "memory://bucket/run"


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def make_record(i):
    media = (records.Media("m", "image", b"x" * 3000, 1.0),)
    said = (records.Response("yes"),)
    examples = (records.Example("q", "sft", 0, "?", responses=said),)
    return records.Record(f"r{i}", "train", media, examples, {}, {}, "CC0-1.0")


@pytest.fixture
def there(memory, tmp_path):
    """Shards in memory://bucket/shards."""
    made = map(make_record, range(5))
    shards.write(tmp_path / "made", made, split="train", shard_records=2)
    memory.put(f"{tmp_path}/made/", "/bucket/shards/", recursive=True)
    return tmp_path / "made"


def test_remote_shards_are_copied_once(there, memory, tmp_path):
    local = tmp_path / "local"
    one = shards.Source("memory://bucket/sh*", "train", local=str(local))
    assert [one[i].id for i in range(5)] == [f"r{i}" for i in range(5)]
    assert repr(one) == repr(shards.Source(there, "train"))
    copies = sorted(local.glob("*array_record*"))
    memory.rm([p for p in memory.find("/bucket/shards") if "array_record" in p])
    again = shards.Source("memory://bucket/shards", "train", local=str(local))
    assert again[4] == one[4] and sorted(local.glob("*array_record*")) == copies
    with pytest.raises(shards.ShardError, match="no manifest.json in memory:/+bucket"):
        shards.Source("memory://bucket", "train", local=str(local))
    with pytest.raises(shards.ShardError, match="no folder of shards at memory://nowhere"):
        shards.Source("memory://nowhere/a*", "train")


def test_a_copy_cut_short_is_gone_on_with(there, memory, tmp_path, monkeypatch):
    entry = shards.read_manifest("memory://bucket/shards")["splits"]["train"][0]
    content = (there / entry["file"]).read_bytes()
    partial = tmp_path / f".{entry['sha256']}-{entry['file']}.partial"
    partial.write_bytes(content[:1000])
    read = []
    honest = shards.shutil.copyfileobj
    monkeypatch.setattr(
        shards.shutil, "copyfileobj", lambda a, *rest: (read.append(a.tell()), honest(a, *rest))
    )
    path = shards.fetched("memory://bucket/shards", entry, str(tmp_path))
    assert path.read_bytes() == content and read == [1000]
    path.unlink()
    partial.write_bytes(b"\0" * 1000)
    with pytest.raises(shards.ShardError, match="its sha256 is not the manifest's"):
        shards.fetched("memory://bucket/shards", entry, str(tmp_path))
    assert not partial.exists()  # the next try begins anew
    assert shards.fetched("memory://bucket/shards", entry, str(tmp_path)).read_bytes() == content


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ValueError, match="nosuch://a cannot be opened.*pip install gcsfs"):
        files.opened("nosuch://a")


def test_a_local_folder_is_itself(tmp_path):
    for processes in (1, 2):
        with files.at(tmp_path, processes=processes) as folder:
            assert folder == tmp_path
    with pytest.raises(ValueError, match="memory://.*one process and this run has 2"):
        files.at(URL, processes=2).__enter__()


def test_a_run_in_a_remote_folder_goes_on_bit_for_bit(memory, tmp_path):
    """Stopped after four updates, and gone on with by a machine that has nothing."""
    straight = train(tmp_path, Stream())
    for steps in (4, 6):
        with files.at(URL) as folder:
            result = train(folder, Stream(), dataclasses.replace(SETTINGS, steps=steps))
        assert not folder.exists()
    assert_same(*(jax.tree.map(np.array, x.state) for x in (straight, result)))
    text = memory.cat_file("/bucket/run/metrics.jsonl").decode()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6]
    assert [x["loss"] for x in lines] == [x["loss"] for x in metrics.read(tmp_path)]
    steps = {p.split("/")[4] for p in memory.find("/bucket/run/checkpoints")}
    assert steps == {"4", "6", "4.whole", "6.whole"}  # as many as are kept
    assert any("tensorboard/" in p for p in memory.find("/bucket/run"))


def test_half_a_checkpoint_does_not_count(memory, tmp_path):
    with files.at(URL) as folder:
        train(folder, Stream(), dataclasses.replace(SETTINGS, steps=4))
    memory.rm_file("/bucket/run/checkpoints/4.whole")  # as if the copying had been cut short
    with files.at(URL) as folder:
        saver = checkpoint.Checkpoints(folder / "checkpoints")
        assert saver.latest() == 2
        saver.close()
    assert not memory.find("/bucket/run/checkpoints/4")


def test_what_is_written_is_copied_at_intervals(memory, capsys, monkeypatch):
    """Also after a time in which the storage cannot be reached; the last time has to do."""
    honest, broken = files.Mirror.push, [True]

    def push(self):
        if broken[0]:
            broken[0] = False
            raise OSError("no route")
        honest(self)

    monkeypatch.setattr(files.Mirror, "push", push)
    with files.at(URL, every=0.02) as folder:
        (folder / "a.txt").write_text("one")
        for _ in range(500):
            if memory.exists("/bucket/run/a.txt"):
                break
            files.threading.Event().wait(0.01)
        assert memory.cat_file("/bucket/run/a.txt") == b"one"
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / ".a.partial").write_text("half")
    assert "no route; it is tried again" in capsys.readouterr().out
    assert not [p for p in memory.find("/bucket/run") if "partial" in p]
    broken[0] = True
    with pytest.raises(OSError, match="no route"), files.at(URL, every=60.0):
        pass
