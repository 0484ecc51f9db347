"""Folders that lie elsewhere, in fsspec's memory: shards, and what a run writes."""

import dataclasses
import json
import pathlib
import threading

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
    with pytest.raises(
        ValueError, match=r"nosuch://a cannot be opened.*pip install 'jaxvid\[gcs\]'"
    ):
        files.opened("nosuch://a")


def test_a_local_folder_is_itself(tmp_path):
    with files.at(tmp_path) as folder:
        assert folder == tmp_path
    assert files.checkpoints(tmp_path, 2) == ""


def test_who_writes_checkpoints_where():
    """Orbax at gs://, from all processes; elsewhere they are written here and copied, by one."""
    for processes in (1, 2):
        assert files.checkpoints("gs://bucket/run/", processes) == "gs://bucket/run/checkpoints"
    for url in (URL, "s3://bucket/run"):
        assert files.checkpoints(url) == ""
        with pytest.raises(ValueError, match=f"{url}: .*2 processes.*can do to gs://"):
            files.checkpoints(url, 2)


def test_a_url_never_becomes_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="s3://bucket/run: Orbax .* at gs://"):
        checkpoint.Checkpoints("s3://bucket/run")
    for path in (pathlib.Path("gs://bucket/run"), pathlib.Path("s3://bucket/run")):
        for use in (checkpoint.Checkpoints, files.checkpoints, lambda p: files.at(p).__enter__()):
            with pytest.raises(ValueError, match=f"{path} has one slash"):
                use(path)
    assert not list(tmp_path.iterdir())


def test_a_run_in_a_remote_folder_goes_on_bit_for_bit(memory, tmp_path):
    """Stopped after four updates, and gone on with by a machine that has nothing."""
    straight = train(tmp_path, Stream())
    for steps in (4, 6):
        with files.at(URL, checkpoints=True) as folder:
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
    with files.at(URL, checkpoints=True) as folder:
        train(folder, Stream(), dataclasses.replace(SETTINGS, steps=4))
    memory.rm_file("/bucket/run/checkpoints/4.whole")  # as if the copying had been cut short
    with files.at(URL, checkpoints=True) as folder:
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
            if memory.exists("/bucket/run/a.txt") and memory.cat_file("/bucket/run/a.txt"):
                break  # it may have been copied before it was written
            files.threading.Event().wait(0.01)
        assert memory.cat_file("/bucket/run/a.txt") == b"one"
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / ".a.partial").write_text("half")
    assert "no route; it is tried again" in capsys.readouterr().out
    assert not [p for p in memory.find("/bucket/run") if "partial" in p]


def test_what_cannot_be_copied_at_the_end_is_left_here(memory, monkeypatch, capsys):
    def push(self):
        raise OSError("no route")

    monkeypatch.setattr(files.Mirror, "push", push)
    with pytest.raises(OSError, match="not everything was copied to memory"):
        with files.at(URL) as folder:
            (folder / "a.txt").write_text("one")
    assert (folder / "a.txt").read_text() == "one"
    with pytest.raises(KeyError, match="what went wrong first"), files.at(URL) as folder:
        raise KeyError("what went wrong first")
    assert f"no route; what was written is left in {folder}" in capsys.readouterr().out


def test_a_bucket_that_goes_away_is_told(memory, monkeypatch):
    """It is said in the same way as that a file here is gone, which is no fault."""

    def gone(*args):
        raise FileNotFoundError("no such bucket")

    monkeypatch.setattr(memory, "put_file", gone)
    with pytest.raises(OSError, match="not everything was copied"), files.at(URL) as folder:
        (folder / "a.txt").write_text("one")


def test_a_copy_that_stands_still_is_given_up(memory, monkeypatch):
    """Others wait for this process, so it must not wait for ever."""
    monkeypatch.setattr(files._Copier, "PATIENCE", 0.05)
    still = threading.Event()
    monkeypatch.setattr(memory, "put_file", lambda *args: still.wait(60))
    with pytest.raises(OSError, match="not everything was copied") as caught:
        with files.at(URL) as folder:
            (folder / "a.txt").write_text("one")
    still.set()
    assert "nothing was copied for" in str(caught.value.__cause__)


def test_no_process_goes_before_all_have_copied(memory):
    asked = []

    def until(over):
        while not over():
            pass
        asked.append(memory.exists("/bucket/run/a.txt"))

    with files.at(URL, until=until) as folder:
        (folder / "a.txt").write_text("one")
    assert asked == [True]


def test_storage_that_cannot_be_written_to_is_told_at_once(memory, monkeypatch, tmp_path):
    def refused(*args):
        raise PermissionError("not yours")

    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    for name in ("pipe_file", "rm_file"):
        with monkeypatch.context() as patch:
            patch.setattr(memory, name, refused)
            with pytest.raises(ValueError, match="(?s)memory://.*not yours.*credentials"):
                files.at(URL).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_run_pulls_what_it_reads_of_itself(memory):
    for name in ("config.json", "metrics.jsonl", ".jaxvid-1", "checkpoints/2/a", "model/b", "x/c"):
        memory.pipe_file(f"/bucket/run/{name}", b"there")
    assert files.read(files.inside(URL, "config.json")) == "there"
    for kept in (False, True):
        with files.at(URL, checkpoints=kept) as folder:
            assert sorted(p.name for p in folder.iterdir()) == ["config.json", "metrics.jsonl"]
        assert memory.exists("/bucket/run/checkpoints/2/a") != kept  # it was not whole


def test_a_model_takes_the_place_of_the_one_before(memory):
    for name in ("model-1-of-2", "model-2-of-2"):
        memory.pipe_file(f"/bucket/run/model/{name}", b"old")
    with files.at(URL) as folder:
        part = folder / ".model-x" / "new"
        part.mkdir(parents=True)
        (part / "model").write_text("half")
        mirror = files.Mirror(URL, folder)
        mirror.push()  # while the model is written beside its place
        assert len(memory.find("/bucket/run")) == 2
        part.rename(folder / "model")
    assert memory.find("/bucket/run") == ["/bucket/run/model/model"]
