"""Files that are written whole: a reader sees the old or the new one, also after a crash. And
folders that lie elsewhere: fsspec's gs://, s3:// and others."""

import contextlib
import os
import pathlib
import posixpath
import re
import tempfile
import threading
from collections.abc import Iterator

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
    """Whether this is a URL such as gs://bucket/folder."""
    return re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(path)) is not None


def opened(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """What reads and writes there, and the path in it.

    Raises ValueError where the package for this kind of storage is missing.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{url} cannot be opened: {error}. Install what reads it: `pip install gcsfs` for "
            "gs://, s3fs for s3://"
        ) from error


@contextlib.contextmanager
def at(
    folder: str | os.PathLike, *, processes: int = 1, every: float = 30.0
) -> Iterator[pathlib.Path]:
    """A local folder that stands for this one while the context lasts.

    A local one is itself. Of a remote one everything is copied here first, and what is written
    here (under TMPDIR) is copied there every so many seconds and at the end, also after an error;
    see `Mirror`. One process may write to a remote folder at a time: raises ValueError in a run of
    several `processes`.
    """
    if not is_remote(folder):
        yield pathlib.Path(folder)
        return
    if processes > 1:
        raise ValueError(
            f"{folder} is written by one process and this run has {processes}; give a "
            "folder that all of them share, such as a bucket that is mounted"
        )
    with tempfile.TemporaryDirectory(prefix="jaxvid-") as local:
        mirror, done = Mirror(os.fspath(folder), pathlib.Path(local)), threading.Event()
        mirror.pull()

        def work() -> None:
            while not done.wait(every):
                try:
                    mirror.push()
                except OSError as error:  # the next time may do; the last one has to
                    print(f"{mirror.url}: {error}; it is tried again", flush=True)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield pathlib.Path(local)
        finally:
            done.set()
            worker.join()
            mirror.push()


class Mirror:
    """A remote folder and a local copy of it, to which alone is written.

    A checkpoint (checkpoints/STEP) is all there or not at all: it counts once there is a file
    checkpoints/STEP.whole, which is written last and removed first.
    """

    def __init__(self, url: str, local: pathlib.Path):
        self.url, self.local = url.rstrip("/"), local
        self.fs, self.root = opened(self.url)
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of what is there

    def pull(self) -> None:
        """Copy everything here but checkpoints that are not whole."""
        there = self._there()
        for name in there:
            step = _step(name)
            if (step is None or f"{step}.whole" in there) and not name.endswith(".whole"):
                path = self.local / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(f"{self.root}/{name}", str(path))
                self._sent[name] = _stamp(path)

    def push(self) -> None:
        """Copy there what has changed here, and remove checkpoints there that are gone here.

        Raises OSError if that fails; what is there is then older, and whole.
        """
        here = {path.relative_to(self.local).as_posix(): path for path in _files(self.local)}
        there = self._there()
        steps = {step for step in map(_step, here) if step is not None}
        for step in {_step(name) for name in there} - steps - {None}:
            self._remove(step, there)
        for name in sorted(here, key=lambda name: _step(name) is not None):  # checkpoints last
            with contextlib.suppress(FileNotFoundError):  # replaced or removed meanwhile
                stamp = _stamp(here[name])
                if self._sent.get(name) != stamp:
                    self.fs.makedirs(posixpath.dirname(f"{self.root}/{name}"), exist_ok=True)
                    self.fs.put_file(str(here[name]), f"{self.root}/{name}")
                    self._sent[name] = stamp
        for step in steps:
            mine = [name for name in here if _step(name) == step]
            if all(here[name].exists() for name in mine) and f"{step}.whole" not in there:
                self.fs.pipe_file(f"{self.root}/{step}.whole", b"")

    def _there(self) -> set[str]:
        self.fs.invalidate_cache()
        return {name[len(self.root) :].lstrip("/") for name in self.fs.find(self.root)}

    def _remove(self, step: str, there: set[str]) -> None:
        if f"{step}.whole" in there:
            self.fs.rm_file(f"{self.root}/{step}.whole")
        for name in there:
            if _step(name) == step:
                self.fs.rm_file(f"{self.root}/{name}")
                self._sent.pop(name, None)


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Every file but those that are being written."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not re.search(r"orbax-checkpoint-tmp|\.partial$", name):
            yield path


def _step(name: str) -> str | None:
    """The checkpoint, checkpoints/STEP, that a file is of."""
    found = re.match(r"(checkpoints/\d+)/", name)
    return found and found[1]


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
