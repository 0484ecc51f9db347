"""Log-probs of a fixed reference, computed once and kept beside the shards.

    FOLDER/sidecar.json              what the numbers were made with, and of which shards
    FOLDER/part-00000.safetensors    keys, ends, logp: 256 records a file, written whole or not

A branch is found by what the reference saw of it: the bytes of its clip, the tokens and positions
of its prompt, the tokens before it and its own. `Sidecar` compares what a run asks for with
sidecar.json first, so that a difference is told before anything is trained. Numpy only; runs in
Grain workers.
"""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Float

from jaxvid import files
from jaxvid.data.layout import Tree

FORMAT = 1
RECORDS = 256  # in a part
FILE = "sidecar.json"
AGAIN = "Run `jaxvid score` again with this run's settings and another --out"
WORDS = ("tokenizer.json", "chat_template.jinja", "chat_template.json")  # of a model folder
WHOLE, BLOCK, BLOCKS = 64 * 2**20, 2**20, 64  # larger files are known by 64 blocks of 1 MiB


class SidecarError(ValueError):
    """A sidecar that is not of this run's reference, or lacks a branch."""


def of_files(folder: str | pathlib.Path, pattern: str | Sequence[str]) -> str:
    """A hash of a folder's files, by name and content; of a very large file, its size and blocks
    spread over it. Raises FileNotFoundError where there are none."""
    folder = pathlib.Path(folder)
    patterns = [pattern] if isinstance(pattern, str) else pattern
    found = sorted({f for p in patterns for f in folder.glob(p)})
    if not found:
        raise FileNotFoundError(f"{folder} has no {' or '.join(patterns)}")
    digest = hashlib.sha256()
    for path in found:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= WHOLE:
                digest.update(file.read())
                continue
            for at in np.linspace(0, size - BLOCK, BLOCKS).astype(np.int64):
                file.seek(int(at))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:32]


def keys(tree: Tree, clip: bytes) -> list[bytes]:
    """One key of 16 bytes for each branch. `clip` are the encoded bytes of the tree's medium; b""
    is text alone."""
    root = hashlib.blake2b(digest_size=16)
    for part in (hashlib.sha256(clip).digest(), _sized(tree.prompt), _sized(tree.positions)):
        root.update(part)
    paths = []
    for b in tree.branches:
        path = (paths[b.parent - 1] if b.parent else root).copy()
        path.update(_sized(b.tokens))
        path.update(_sized(b.scored))
        paths.append(path)
    return [path.digest() for path in paths]


def _sized(values: np.ndarray) -> bytes:
    """Its shape goes first, so that no two lists of arrays read alike."""
    return f"{values.shape}".encode() + np.ascontiguousarray(values, np.int32).tobytes()


# Writing ------------------------------------------------------------------------------------------


def begin(folder: pathlib.Path, made: dict[str, Any], parts: int) -> list[int]:
    """Start a sidecar, or go on with one; returns the numbers of the parts that are missing.

    `made` is plain JSON: everything that the numbers depend on. Raises SidecarError where the
    folder holds the numbers of something else.
    """
    path, now = folder / FILE, {"format": FORMAT, "parts": parts, "made": made}
    if path.exists():
        _same(json.loads(path.read_text()), now, folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(now, indent=1, sort_keys=True) + "\n")
    return [i for i in range(parts) if not _part(folder, i).exists()]


def write(
    folder: pathlib.Path, part: int, found: dict[bytes, Float[np.ndarray, "s"]]
) -> pathlib.Path:
    """Write a part: the log-probs of each key, in the order of the keys."""
    order = sorted(found)
    none = np.zeros(0, np.float32)
    tensors = {
        "keys": np.frombuffer(b"".join(order), np.uint8).reshape(-1, 16),
        "ends": np.cumsum([len(found[k]) for k in order], dtype=np.int64),
        "logp": np.concatenate([none, *(found[k] for k in order)]).astype(np.float32),
    }
    path = _part(folder, part)
    files.write(path, safetensors.numpy.save(tensors))
    return path


def _part(folder: pathlib.Path, part: int) -> pathlib.Path:
    return folder / f"part-{part:05d}.safetensors"


def _same(there: dict[str, Any], now: dict[str, Any], folder: pathlib.Path) -> None:
    """Raise SidecarError that names what differs."""
    flat = lambda d: {k: json.dumps(v, sort_keys=True) for k, v in _flat(d)}
    before, after = flat(there), flat(now)
    names = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    if names:
        told = "; ".join(f"{n} was {before.get(n)}, is {after.get(n)}" for n in names)
        raise SidecarError(f"{folder} holds log-probs of another reference: {told}. {AGAIN}.")


def _flat(value: dict[str, Any], path: str = ""):
    for name, x in value.items():
        at = f"{path}.{name}" if path else name
        if isinstance(x, dict):
            yield from _flat(x, at)
        else:
            yield at.removeprefix("made."), x


class Numbers:
    """Stands in a builder for a `Sidecar` while its numbers are made: each branch's `record` is the
    index of its key in `keys`."""

    def __init__(self):
        self.keys: list[bytes] = []

    def attach(self, tree: Tree, clip: bytes) -> Tree:
        first = len(self.keys)
        self.keys += keys(tree, clip)
        branches = (b._replace(record=i) for i, b in enumerate(tree.branches, first))
        return tree._replace(branches=tuple(branches))


# Reading ------------------------------------------------------------------------------------------


class Sidecar:
    """The log-probs of a folder. Pickles, to worker processes, as its path."""

    def __init__(self, folder: str | pathlib.Path, made: dict[str, Any]):
        """`made` is what the run would make now. Raises SidecarError where it was made otherwise,
        or is not finished; FileNotFoundError where there is none."""
        self.folder = pathlib.Path(folder)
        path = self.folder / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path}; run `jaxvid score` with this config and --out {self.folder.parent}"
            )
        there = json.loads(path.read_text())
        _same(there, {"format": FORMAT, "parts": there["parts"], "made": made}, self.folder)
        self.parts = there["parts"]
        missing = sum(not _part(self.folder, i).exists() for i in range(self.parts))
        if missing:
            raise SidecarError(
                f"{self.folder} lacks {missing} of {self.parts} parts: scoring was stopped. Run "
                "the same `jaxvid score` again; it goes on."
            )
        self._found: dict[bytes, Float[np.ndarray, "s"]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_found": None}

    def attach(self, tree: Tree, clip: bytes) -> Tree:
        """The tree with `ref` of every scored branch. Raises SidecarError for one that was not
        scored, or not as it is now."""
        branches = []
        for i, (b, key) in enumerate(zip(tree.branches, keys(tree, clip))):
            if b.scored.any():
                ref = self.found.get(key)
                if ref is None or len(ref) != b.scored.sum():
                    raise SidecarError(
                        f"record {tree.name!r}, branch {i}: {self.folder} has no log-probs of it. "
                        f"Its clip, its words, or how they become tokens have changed. {AGAIN}."
                    )
                b = b._replace(ref=ref)
            branches.append(b)
        return tree._replace(branches=tuple(branches))

    @property
    def found(self) -> dict[bytes, Float[np.ndarray, "s"]]:
        """All log-probs by key, read on first use."""
        if self._found is None:
            self._found = {}
            for i in range(self.parts):
                x = safetensors.numpy.load_file(_part(self.folder, i))
                values = np.split(x["logp"], x["ends"][:-1]) if len(x["ends"]) else []
                self._found |= dict(zip(map(bytes, x["keys"]), values))
        return self._found
