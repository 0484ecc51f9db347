"""Folders of ArrayRecord shards: written whole or not at all, read at random, verified.

    FOLDER/jaxvid-train.array_record-00000-of-00004   records, by `records.serialise`
    FOLDER/dataset_info.json, features.json           what makes it a tfds data set
    FOLDER/manifest.json                              schema; by split files, counts, bytes, sha256
    FOLDER/rejects.jsonl                              records that failed their check, and why

The manifest is written last and is the truth: files it does not name do not exist for a reader.
"""

import bisect
import contextlib
import fcntl
import glob
import hashlib
import itertools
import json
import os
import pathlib
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jaxvid import files
from jaxvid.data import media as media_lib
from jaxvid.data import records as records_lib
from jaxvid.data.records import Record

NAME = "jaxvid"  # tfds' name of the data set; it starts the names of its files
VERSION = "1.0.0"


class ShardError(ValueError):
    """A folder, file or record of shards that cannot be read as it should."""


class Written(NamedTuple):
    """What `write` did."""

    records: int
    rejected: int
    files: tuple[str, ...]


class Bad(NamedTuple):
    """Something wrong in a folder. `index` counts within the file; -1 is the file itself."""

    file: str
    index: int
    id: str
    reason: str


class Report(NamedTuple):
    """What `validate` found; the folder is good if `bad` is empty."""

    records: int
    bad: list[Bad]


# ---- writing


def write(
    folder: str | os.PathLike,
    records: Iterable[Record],
    *,
    split: str,
    shard_records: int = 256,
    replace: bool = False,
    resume: str = "",
) -> Written:
    """Writes one split; other splits of the folder stay. Holds one record at a time in memory.

    A record that fails its check, names another split or repeats an id goes to rejects.jsonl with
    the reason. If writing stops half-way the folder is as it was. With `resume`, a text that names
    the input (its settings and seed), finished shards are kept aside, and the next call with the
    same text goes on after them: give it the records from number `resumable(...)` on.

    Raises ShardError if the split exists (unless `replace`), if no record is left, or if the shards
    kept aside are of another input.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not replace and split in _manifest_or_empty(folder)["splits"]:
        raise ShardError(f"{folder} has a split {split!r} already; give replace=True or remove it")
    if resume:
        work = _aside(folder, split)
        work.mkdir(exist_ok=True)
    else:
        work = pathlib.Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder))
    try:
        parts = _parts(work, resume)
        _write_parts(work, records, split, shard_records, resume, parts)
        rejects = [r for p in parts for r in p["rejects"]]
        if not any(p["ids"] for p in parts):
            reasons = "".join(f"\n  {r['id']!r}: {r['reason']}" for r in rejects[:5])
            raise ShardError(f"{folder}: no record for split {split!r} is usable.{reasons}")
        with _lock(folder):
            names = _publish(folder, work, split, parts)
        resume = ""  # published: nothing is left to go on with
    finally:
        if not resume:
            shutil.rmtree(work)
    return Written(sum(len(p["ids"]) for p in parts), len(rejects), names)


def resumable(folder: str | os.PathLike, *, split: str, resume: str) -> int:
    """How many records of its input an interrupted `write` with this `resume` has dealt with."""
    work = _aside(pathlib.Path(folder), split)
    return sum(p["taken"] for p in _parts(work, resume)) if work.exists() else 0


def _aside(folder: pathlib.Path, split: str) -> pathlib.Path:
    return folder / f".{split}-parts"


def _parts(work: pathlib.Path, resume: str) -> list[dict]:
    """The finished parts, a line of parts.jsonl each: file, input taken, ids in it, rejects."""
    path = work / "parts.jsonl"
    parts = _lines(path) if path.exists() else []
    other = [p["resume"] for p in parts if p["resume"] != resume]
    if other:
        raise ShardError(
            f"{work} holds shards of an interrupted run with other settings ({other[0]!r}, now "
            f"{resume!r}). Finish that run with its settings, or remove {work}."
        )
    return parts


def _write_parts(
    work: pathlib.Path,
    records: Iterable[Record],
    split: str,
    shard_records: int,
    resume: str,
    parts: list[dict],
) -> None:
    """Files of at most `shard_records`; each is appended to `parts` and parts.jsonl when whole."""
    seen = {i for p in parts for i in p["ids"]}
    numbered = enumerate(records, start=sum(p["taken"] for p in parts))
    while True:
        path = work / f"part-{len(parts)}"
        part = {"file": path.name, "resume": resume, "taken": 0, "ids": [], "rejects": []}
        with contextlib.closing(_Writer(path)) as writer:
            for index, record in numbered:
                part["taken"] += 1
                reason = _fault(record, split, seen)
                if reason:
                    row = {"split": split, "index": index, "id": record.id, "reason": reason}
                    part["rejects"].append(row)
                    continue
                writer.write(records_lib.serialise(record))
                seen.add(record.id)
                part["ids"].append(record.id)
                if len(part["ids"]) == shard_records:
                    break
        if not part["taken"]:
            return
        files.sync(path)
        with open(work / "parts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(part, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        parts.append(part)


class _Writer:
    """An ArrayRecordWriter whose errors say what to do. It notices a full disk late, on closing."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._writer = self._call(ArrayRecordWriter, str(path), "group_size:1")  # a read unpacks 1

    def write(self, data: bytes) -> None:
        self._call(self._writer.write, data)

    def close(self) -> None:
        self._call(self._writer.close)

    def _call(self, function: Callable, *args):
        try:
            return function(*args)
        except (RuntimeError, OSError) as error:
            raise ShardError(
                f"{self._path} could not be written: {error}. Make room on the disk, or check the "
                f"rights of the folder, and run it again. Nothing half-written is ever read."
            ) from error


def _fault(record: Record, split: str, seen: set[str]) -> str:
    try:
        record.check()
    except ValueError as error:
        return str(error)
    if record.split != split:
        return f"its split is {record.split!r}, written is {split!r}"
    return "its id is used before" if record.id in seen else ""


def _publish(
    folder: pathlib.Path, work: pathlib.Path, split: str, parts: list[dict]
) -> tuple[str, ...]:
    """Moves the parts to their names, then writes the files that say that they are there."""
    manifest = _manifest_or_empty(folder)
    old = manifest["splits"].pop(split, [])
    if old:  # no moment at which the manifest names a file of other content
        _write_manifest(folder, manifest)
        for entry in old:
            (folder / entry["file"]).unlink(missing_ok=True)
    entries = []
    filled = [p for p in parts if p["ids"]]  # the last may have held rejects alone
    for i, part in enumerate(filled):
        path = work / part["file"]
        name = f"{NAME}-{split}.array_record-{i:05d}-of-{len(filled):05d}"
        entry = {"file": name, "records": len(part["ids"]), "bytes": path.stat().st_size}
        entries.append(entry | {"sha256": _sha256(path)})
        os.replace(path, folder / name)
    path = folder / "rejects.jsonl"
    others = _lines(path) if path.exists() else []
    kept = [r for r in others if r["split"] != split] + [r for p in parts for r in p["rejects"]]
    files.write(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
    manifest["splits"][split] = entries
    _write_manifest(folder, manifest)
    return tuple(e["file"] for e in entries)


def _write_manifest(folder: pathlib.Path, manifest: dict) -> None:
    splits = [
        {
            "name": split,
            "shardLengths": [str(e["records"]) for e in entries],
            "numBytes": str(sum(e["bytes"] for e in entries)),
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for split, entries in sorted(manifest["splits"].items())
    ]
    info = {"name": NAME, "version": VERSION, "fileFormat": "array_record", "splits": splits}
    files.write(folder / "features.json", json.dumps(records_lib.FEATURES.to_json(), indent=1))
    files.write(folder / "dataset_info.json", json.dumps(info, indent=1))
    files.write(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    """Two processes that write two splits of one folder must not lose one another's entry."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _manifest_or_empty(folder: pathlib.Path) -> dict:
    if (folder / "manifest.json").exists():
        return read_manifest(folder)
    return {"schema": records_lib.SCHEMA, "splits": {}}


# ---- reading


def read_manifest(folder: str | os.PathLike) -> dict:
    """{"schema": int, "splits": {split: [{"file", "records", "bytes", "sha256"}]}} of a folder."""
    path = posixpath.join(os.fspath(folder), "manifest.json")
    try:
        manifest = json.loads(_text(path))
    except FileNotFoundError as error:
        raise ShardError(
            f"no manifest.json in {folder}: it is not a folder of shards, or was never finished. "
            "Build it again, or name the folder that holds the manifest."
        ) from error
    except json.JSONDecodeError as error:
        raise ShardError(f"{path} is not JSON ({error}); build the shards again") from error
    if manifest["schema"] != records_lib.SCHEMA:
        raise ShardError(
            f"{folder} holds records of schema {manifest['schema']}; this version of jaxvid reads "
            f"schema {records_lib.SCHEMA}. Build the shards again with this version."
        )
    return manifest


def _text(path: str) -> str:
    if not files.is_remote(path):
        return pathlib.Path(path).read_text(encoding="utf-8")
    fs, name = files.opened(path)
    return fs.cat_file(name).decode()


def splits(folder: str | os.PathLike) -> tuple[str, ...]:
    """The finished splits of a folder; none where nothing was ever finished."""
    return tuple(_manifest_or_empty(pathlib.Path(folder))["splits"])


def _folders(pattern: str) -> list[str]:
    if files.is_remote(pattern):
        fs, path = files.opened(pattern)
        folders = [fs.unstrip_protocol(p) for p in sorted(fs.glob(path)) if fs.isdir(p)]
    else:
        folders = [p for p in sorted(glob.glob(pattern)) if os.path.isdir(p)]
    if not folders:
        raise ShardError(f"no folder of shards at {pattern}")
    return folders


def fetched(folder: str, entry: dict, local: str = "") -> pathlib.Path:
    """A shard of a remote folder as a local file, copied once; `entry` is the manifest's.

    It lies in `local` ("" is ~/.cache/jaxvid/shards) under its checksum, and gets that name when
    its content has that checksum. A copy that was cut short is gone on with. Raises ShardError if
    what is there is not what the manifest says.
    """
    home = pathlib.Path(local or "~/.cache/jaxvid/shards").expanduser()
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"{entry['sha256']}-{entry['file']}"
    partial = path.with_name(f".{path.name}.partial")
    with _lock(home):  # the processes of a host share it
        if path.exists() and not _size_fault(path, entry):
            return path
        fs, name = files.opened(posixpath.join(folder, entry["file"]))
        with fs.open(name, "rb") as there, partial.open("ab") as here:
            there.seek(here.tell())
            shutil.copyfileobj(there, here, 2**20)
        fault = _size_fault(partial, entry)
        if fault or _sha256(partial) != entry["sha256"]:
            partial.unlink()
            fault = fault or "its sha256 is not the manifest's: its content has changed"
            raise ShardError(f"{folder}/{entry['file']}: {fault}. Copy or build the shards again.")
        os.replace(partial, path)
        files.sync(home)
    return path


class Source:
    """Records of one split of some folders at random access; what Grain reads.

    Pickles (to worker processes) as its list of files. `repr` speaks of content, not of paths, so
    that a saved iterator is accepted after the folder has moved, and refused after it has changed.
    """

    def __init__(
        self,
        folders: str | os.PathLike | Iterable[str | os.PathLike],
        split: str,
        *,
        local: str = "",
    ):
        """`folders` are folders or glob patterns. Shards of remote ones (gs://, s3://) are copied
        to `local`: see `fetched`. Raises ShardError for what is not as written."""
        one = isinstance(folders, str | os.PathLike)
        patterns = [os.fspath(f) for f in ([folders] if one else folders)]
        self.split, self._files, ends, content = split, [], [0], hashlib.sha256()
        for folder in itertools.chain.from_iterable(map(_folders, patterns)):
            splits = read_manifest(folder)["splits"]
            if split not in splits:
                raise ShardError(f"{folder} has no split {split!r}; it has {sorted(splits)}")
            for entry in splits[split]:
                if files.is_remote(folder):
                    path = fetched(folder, entry, local)
                else:
                    path = pathlib.Path(folder, entry["file"])
                if fault := _size_fault(path, entry):
                    raise ShardError(f"{path}: {fault}. Copy or build the shards again.")
                self._files.append(str(path))
                ends.append(ends[-1] + entry["records"])
                content.update(entry["sha256"].encode())
        self._starts, self._length = ends[:-1], ends[-1]
        self._content = content.hexdigest()[:16]
        self._readers: dict[int, ArrayRecordReader] = {}

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Source(split={self.split!r}, records={self._length}, content={self._content})"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_readers": {}}  # open files stay in their process

    def where(self, index: int) -> tuple[str, int]:
        """(file, index in the file) of a record."""
        if not 0 <= index < self._length:
            raise IndexError(f"record {index} of {self._length} in split {self.split!r}")
        file = bisect.bisect_right(self._starts, index) - 1
        return self._files[file], index - self._starts[file]

    def read(self, index: int) -> bytes:
        """The bytes of a record."""
        path, at = self.where(index)
        file = bisect.bisect_right(self._starts, index) - 1
        if file not in self._readers:
            # No read-ahead: access is random.
            options = "readahead_buffer_size:0"
            self._readers[file] = ArrayRecordReader(path, options, file_reader_buffer_size=32768)
        try:
            return self._readers[file].read([at])[0]
        except (RuntimeError, IndexError, ValueError) as error:
            raise ShardError(f"{path} record {at} cannot be read: {error}") from error

    def __getitem__(self, index: int) -> Record:
        try:
            return records_lib.parse(self.read(int(index)))
        except ShardError:
            raise
        except ValueError as error:
            path, at = self.where(int(index))
            raise ShardError(f"{path} record {at}: {error}") from error


def _size_fault(path: pathlib.Path, entry: dict) -> str:
    """Cheap enough for every start: is the file there, and as long as it was written?"""
    if not path.exists():
        return "the manifest names it but it is not there"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"it has {size} bytes, the manifest says {entry['bytes']}: cut off or overwritten"
    return ""


# ---- verifying


def validate(folder: str | os.PathLike, *, media: bool = False) -> Report:
    """Reads every byte of a folder: hashes, records, their checks and, with `media`, every clip.

    Nothing is raised for what is bad; it is all in the report.
    """
    folder = pathlib.Path(folder)
    try:
        manifest = read_manifest(folder)
    except ShardError as error:
        return Report(0, [Bad("manifest.json", -1, "", str(error))])
    count, bad, seen = 0, [], {}
    for split, entries in sorted(manifest["splits"].items()):
        for entry in entries:
            bad += _file_faults(folder, entry)
            for index, record, reason in _parsed(folder / entry["file"], entry["records"]):
                count += record is not None
                found = [reason] if reason else []
                if record is not None:
                    found += _record_faults(record, split, seen, media)
                    seen[record.id] = split
                name = "" if record is None else record.id
                bad += [Bad(entry["file"], index, name, fault) for fault in found]
    named = {e["file"] for entries in manifest["splits"].values() for e in entries}
    strays = {p.name for p in folder.glob("*.array_record-*")} - named
    bad += [Bad(name, -1, "", "the manifest does not name it") for name in sorted(strays)]
    return Report(count, bad)


def _file_faults(folder: pathlib.Path, entry: dict) -> list[Bad]:
    path = folder / entry["file"]
    fault = _size_fault(path, entry)
    if not fault and _sha256(path) != entry["sha256"]:
        fault = "its sha256 is not the manifest's: its content has changed"
    return [Bad(entry["file"], -1, "", fault)] if fault else []


def _parsed(path: pathlib.Path, count: int) -> Iterator[tuple[int, Record | None, str]]:
    """(index, record or None, reason) for every record the manifest promises of a file."""
    if not path.exists():
        return
    reader = ArrayRecordReader(str(path))
    for index in range(count):
        try:
            yield index, records_lib.parse(reader.read([index])[0]), ""
        except (RuntimeError, IndexError, ValueError) as error:
            yield index, None, f"cannot be read: {error}"


def _record_faults(record: Record, split: str, seen: dict[str, str], media: bool) -> list[str]:
    bad = []
    try:
        record.check()
    except ValueError as error:
        bad.append(str(error))
    if record.split != split:
        bad.append(f"its split is {record.split!r}, it lies in {split!r}")
    if record.id in seen:
        bad.append(f"its id is also in split {seen[record.id]!r}")
    for m in record.media if media else ():
        try:
            if m.kind != "audio":
                media_lib.decode(m.data, media_lib.Sampling(frames=2))
            if m.kind != "image":
                media_lib.decode_sound(m.data)
        except media_lib.MediaError as error:
            bad.append(f"media {m.name!r}: {error}")
    return bad
