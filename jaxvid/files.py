"""Files that are written whole: a reader sees the old or the new one, also after a crash. And
folders that lie elsewhere: fsspec's gs://, s3:// and others."""

import contextlib
import os
import pathlib
import posixpath
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import fsspec


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Put `content` (text as UTF-8) into the file, which is on the disk when this returns.

    It is written beside the file first and takes its name then. Raises OSError as writing does,
    and leaves the file as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)  # the new name


def sync(path: pathlib.Path) -> None:
    """Wait until a file, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether this is a URL such as gs://bucket/folder.

    Raises ValueError for one that was made a path (gs:/bucket/folder), which is a local folder to
    everybody else.
    """
    text = os.fspath(path)
    if re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", text):
        raise ValueError(f"{text} has one slash behind the colon; a URL has two")
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None


def inside(folder: str | os.PathLike, name: str) -> str | pathlib.Path:
    """The URL or path of what lies in a folder."""
    if is_remote(folder):
        return f"{os.fspath(folder).rstrip('/')}/{name}"
    return pathlib.Path(folder) / name


def read(path: str | os.PathLike) -> str:
    """The text of a file, here or elsewhere. Raises FileNotFoundError."""
    if not is_remote(path):
        return pathlib.Path(path).read_text()
    fs, there = opened(os.fspath(path))
    return fs.cat_file(there).decode()


def opened(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """What reads and writes there, and the path in it.

    Raises ValueError where the package for this kind of storage is missing.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{url} cannot be opened: {error}. Install what reads it: `pip install 'jaxvid[gcs]'` "
            "for gs://, 'jaxvid[s3]' for s3://"
        ) from error


def checkpoints(workdir: str | os.PathLike, processes: int = 1) -> str:
    """The URL to which Orbax itself writes the checkpoints of a run, from all of its processes; ""
    where they are written into the work folder that `at` gives.

    Raises ValueError where `processes` cannot all write to this kind of storage.
    """
    if not is_remote(workdir):
        return ""
    url = os.fspath(workdir)
    if url.startswith("gs://"):
        return f"{url.rstrip('/')}/checkpoints"
    if processes > 1:
        raise ValueError(
            f"--workdir {url}: checkpoints of a run of {processes} processes are written by Orbax "
            "from all of them, which it can do to gs:// and to a folder on a disk that all of them "
            "share (NFS, Lustre, Filestore, FSx). Give one of those, or train in one process"
        )
    return ""


def _wait(over: Callable[[], bool]) -> None:
    while not over():
        time.sleep(0.01)


@contextlib.contextmanager
def at(
    folder: str | os.PathLike,
    *,
    checkpoints: bool = False,
    until: Callable[[Callable[[], bool]], None] = _wait,
    every: float = 30.0,
) -> Iterator[pathlib.Path]:
    """A local folder that stands for this one while the context lasts.

    A local one is itself. Of a remote one, what a run reads of itself is copied here first, and
    what is written here (under TMPDIR) is copied there every so many seconds and at the end, also
    after an error; see `Mirror`. Every process of a run has a folder of its own, and copies what it
    has written.

    until: waits for a condition in all processes of the run. None of them goes before all have
    copied everything: JAX would end those that still do.

    Raises ValueError at once where one cannot write there, and OSError at the end for what could
    not be copied; it is left here then.
    """
    if not is_remote(folder):
        yield pathlib.Path(folder)
        return
    local = pathlib.Path(tempfile.mkdtemp(prefix="jaxvid-"))
    copier = None
    try:
        mirror = Mirror(os.fspath(folder), local, checkpoints=checkpoints)
        mirror.probe()
        mirror.pull()
        copier = _Copier(mirror, every)
        copier.start()
        yield local
        copier.end.set()
        until(copier.over)
    finally:
        if copier is None or copier.ended():
            shutil.rmtree(local)
        else:
            print(f"{copier.fault}; what was written is left in {local}", flush=True)
    if copier.fault:
        raise OSError(f"not everything was copied to {folder}; it is in {local}") from copier.fault


class Mirror:
    """A remote folder and a local one, to which alone is written.

    A run goes on from the files that lie in its folder itself (config.json, metrics.jsonl,
    faults.jsonl): they are copied here. What lies in folders (model, rollouts, tensorboard,
    profile, replies) is only ever written, and not copied here; nor are checkpoints that Orbax
    writes there by itself.

    With `checkpoints` those are copied too, to and fro. One (checkpoints/STEP) is all there or not
    at all: it counts once there is a file checkpoints/STEP.whole, which is written last and removed
    first.
    """

    def __init__(self, url: str, local: pathlib.Path, *, checkpoints: bool = False):
        self.url, self.local, self.checkpoints = url.rstrip("/"), local, checkpoints
        self.fs, self.root = opened(self.url)
        self.moved = time.monotonic()  # when something was last copied
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of what is there

    def probe(self) -> None:
        """Raises ValueError unless a file can be written there and removed."""
        name = f"{self.root}/.jaxvid-{uuid.uuid4().hex}"
        try:
            with _told(self.url):
                self._folder(name)
                self.fs.pipe_file(name, b"written by jaxvid to see whether it can; remove it")
                self.fs.rm_file(name)
        except OSError as error:
            raise ValueError(
                f"{error}\nNothing can be written there, or not removed. Is the name of the bucket "
                "right, does this machine have credentials (`gcloud auth application-default "
                "login`, a service account, AWS_PROFILE), and may they write and delete there?"
            ) from error

    def pull(self) -> None:
        """Copy here what a run reads of itself. Raises OSError."""
        with _told(self.url):
            there = self._there() if self.checkpoints else set()
            names = self._lying() | {
                name for name in there if (step := _step(name)) and f"{step}.whole" in there
            }
            for name in names:
                path = self.local / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(f"{self.root}/{name}", str(path))
                self._sent[name] = _stamp(path)

    def push(self) -> None:
        """Copy there what has changed here. Removed there are checkpoints that are gone here, and
        files of an earlier model.

        Raises OSError if that fails; what is there is then older, and whole.
        """
        self.moved = time.monotonic()
        with _told(self.url):
            here = {path.relative_to(self.local).as_posix(): path for path in _files(self.local)}
            there = self._there() if self.checkpoints else set()
            steps = {step for step in map(_step, here) if step is not None}
            for step in {_step(name) for name in there} - steps - {None}:
                self._remove(step, there)
            for name in sorted(here, key=lambda name: _step(name) is not None):  # checkpoints last
                try:
                    self._send(name, here[name])
                except FileNotFoundError:
                    if here[name].exists():
                        raise  # the bucket is gone; else the file was removed meanwhile
            for step in steps:
                mine = [name for name in here if _step(name) == step]
                if all(here[name].exists() for name in mine) and f"{step}.whole" not in there:
                    self.fs.pipe_file(f"{self.root}/{step}.whole", b"")
            if any(name.startswith("model/") for name in here):
                for name in self._there("model/") - here.keys():
                    self.fs.rm_file(f"{self.root}/{name}")

    def _send(self, name: str, path: pathlib.Path) -> None:
        stamp = _stamp(path)
        if self._sent.get(name) != stamp:
            self._folder(f"{self.root}/{name}")
            self.fs.put_file(str(path), f"{self.root}/{name}")
            self._sent[name], self.moved = stamp, time.monotonic()

    def _folder(self, name: str) -> None:
        """Make the folder of a file, where storage has folders: s3fs would make a bucket."""
        if not self.url.startswith(("gs:", "gcs:", "s3:", "s3a:")):
            self.fs.makedirs(posixpath.dirname(name), exist_ok=True)

    def _lying(self) -> set[str]:
        """Names of the files that lie in the folder itself."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.root, detail=True)
        except FileNotFoundError:
            return set()
        names = {posixpath.basename(one["name"]) for one in found if one["type"] == "file"}
        return {name for name in names if name and not name.startswith(".")}

    def _there(self, prefix: str = "") -> set[str]:
        self.fs.invalidate_cache()
        names = {name[len(self.root) :].lstrip("/") for name in self.fs.find(self.root)}
        return {name for name in names if name.startswith(prefix)}

    def _remove(self, step: str, there: set[str]) -> None:
        if f"{step}.whole" in there:
            self.fs.rm_file(f"{self.root}/{step}.whole")
        for name in there:
            if _step(name) == step:
                self.fs.rm_file(f"{self.root}/{name}")
                self._sent.pop(name, None)


class _Copier(threading.Thread):
    """Pushes a mirror every so many seconds, and once more at the `end`."""

    PATIENCE = 1800.0  # seconds in which at least one file is copied

    def __init__(self, mirror: Mirror, every: float):
        super().__init__(daemon=True)
        self.mirror, self.every, self.end = mirror, every, threading.Event()
        self.fault: OSError | None = None

    def run(self) -> None:
        while not self.end.wait(self.every):
            try:
                self.mirror.push()
            except OSError as error:  # the next time may do; the last one has to
                print(f"{error}; it is tried again", flush=True)
        try:
            self.mirror.push()
        except OSError as error:
            self.fault = error

    def over(self) -> bool:
        """Whether all is copied, or will not be."""
        if self.is_alive() and time.monotonic() - self.mirror.moved > self.PATIENCE:
            self.fault = OSError(f"{self.mirror.url}: nothing was copied for {self.PATIENCE:.0f} s")
        return self.fault is not None or not self.is_alive()

    def ended(self) -> bool:
        """Wait for the last push; whether it went well."""
        self.end.set()
        _wait(self.over)
        return self.fault is None


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Whatever goes wrong as an OSError that says where."""
    try:
        yield
    except Exception as error:  # packages for storage raise what they please
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Every file but those that are being written, which have hidden names or folders."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = re.search(r"(^|/)\.", name) and _step(name) is None
        if path.is_file() and not hidden and "orbax-checkpoint-tmp" not in name:
            yield path


def _step(name: str) -> str | None:
    """The checkpoint, checkpoints/STEP, that a file is of."""
    found = re.match(r"(checkpoints/\d+)/", name)
    return found and found[1]


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
