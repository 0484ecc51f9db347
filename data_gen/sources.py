"""Footage of one's own: a folder of clips as (name, bytes), in a fixed order."""

import pathlib
from collections.abc import Iterator

VIDEO = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


def clips(folder: pathlib.Path) -> list[pathlib.Path]:
    """Every video below `folder`, by path.

    Raises FileNotFoundError where there is no folder or no video in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; give a folder that holds videos")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO and p.is_file())
    if not found:
        other = sorted({p.suffix.lower() for p in folder.rglob("*") if p.is_file()})
        raise FileNotFoundError(
            f"{folder} holds no video; looked for {', '.join(VIDEO)}, found "
            f"{', '.join(filter(None, other)) or 'no files'}. Give a folder with videos in it."
        )
    return found


def named(folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """(name, path): the path below the folder without its suffix, unique and stable."""
    seen: dict[str, int] = {}
    for path in clips(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        count = seen[name] = seen.get(name, 0) + 1
        yield (name if count == 1 else f"{name}.{count}"), path
