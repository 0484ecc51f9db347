"""Files that are written whole: a reader sees the old or the new one, also after a crash."""

import os
import pathlib


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
