"""safetensors files: what is in them, slices of it, and how they are written.

Each process reads only the slices its devices hold. Everything that is wrong with a folder's files
is collected, and said in one error by `check`.
"""

import contextlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from jaxvid.models.family import Path, Place

SHARD_BYTES = 5 * 2**30  # the hub's size of one safetensors file
INDEX = "model.safetensors.index.json"
KINDS = ("F64", "F32", "F16", "BF16")  # what can be a weight; packed integers cannot


def stored_shape(place: Place, shape: tuple[int, ...]) -> tuple[int, int]:
    """(first axis, the rest flat) of the stored tensor of one layer's weight."""
    if place.inputs:
        outputs, inputs = math.prod(shape[place.inputs :]), math.prod(shape[: place.inputs])
        return outputs * place.parts, inputs
    if place.name.endswith(".bias"):
        return math.prod(shape) * place.parts, 1
    return shape[0], math.prod(shape[1:])


def to_stored(x: np.ndarray, place: Place) -> np.ndarray:
    """One layer's weight as the files keep it; trailing axes flat."""
    if not place.inputs:
        return x.reshape(-1) if place.name.endswith(".bias") else x
    return x.reshape(math.prod(x.shape[: place.inputs]), -1).T


def _fault(file: pathlib.Path) -> str:
    """Why the file cannot be read; "" if it can."""
    if not file.is_file():
        return f"is not there, and {INDEX} names it; copy or download it"
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        if start == b"version ":
            return "is a pointer of Git LFS and not the file; fetch it with `git lfs pull`"
        length = int.from_bytes(start, "little")
        if size < 8 + length or length > 2**27:
            return f"is cut off or no safetensors file: it has {size} bytes; copy it again"
        try:
            header = json.loads(f.read(length))
        except ValueError:
            return "is no safetensors file: its header is not JSON; copy it again"
    header.pop("__metadata__", None)
    end = 8 + length + max((v["data_offsets"][1] for v in header.values()), default=0)
    if size != end:
        return f"has {size} bytes and its header says {end}: it was cut off; copy it again"
    return ""


class Files:
    """The tensors of a folder by hub name; reads only what is asked for.

    `problems` says what is wrong with the files themselves.
    """

    def __init__(
        self, folder: pathlib.Path, hub_name: Callable[[str], str], stack: contextlib.ExitStack
    ):
        self.handles: dict[str, tuple[Any, str]] = {}
        self.problems: list[str] = []
        index = self._index(folder)
        files = [folder / name for name in sorted(set(index.values()))]
        files = files or sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{folder} has no .safetensors file. Weights of other kinds (.bin, .pt) are not "
                f"read: they can run code. Convert the model with transformers' save_pretrained."
            )
        found: dict[str, str] = {}
        for file in files:
            if fault := _fault(file):
                self.problems.append(f"{file.name} {fault}")
                continue
            handle = stack.enter_context(safetensors.safe_open(file, "numpy"))
            for key in handle.keys():
                name = hub_name(key)
                found[key] = file.name
                if name in self.handles:
                    self.problems.append(f"{name} is there twice, as {key} in {file.name} too")
                self.handles[name] = handle, key
        if not self.problems:
            self.problems += [
                f"{key} is not in {file}, where {INDEX} has it"
                for key, file in index.items()
                if found.get(key) != file
            ]

    def _index(self, folder: pathlib.Path) -> Mapping[str, str]:
        """Tensor -> file by the folder's index, if it has one."""
        if not (folder / INDEX).is_file():
            return {}
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        if outside := sorted({f for f in index.values() if pathlib.Path(f).name != f}):
            raise ValueError(f"{folder / INDEX} names files outside of its folder: {outside}")
        return index

    def shape(self, name: str) -> tuple[int, int]:
        handle, key = self.handles[name]
        first, *rest = handle.get_slice(key).get_shape()
        return first, math.prod(rest)

    def kind(self, name: str) -> str:
        handle, key = self.handles[name]
        return handle.get_slice(key).get_dtype()

    def block(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        handle, key = self.handles[name]
        stored = handle.get_slice(key)
        if len(stored.get_shape()) == 2:
            return stored[rows, columns]
        x = stored[rows]
        return x.reshape(x.shape[0], -1)[:, columns]

    def weight(self, place: Place, shape: tuple[int, ...], index: tuple[slice, ...], layer: int):
        """`weight[index]` of a weight of `shape`, reading no row or column outside it."""
        name = place.name.format(layer)
        n = place.inputs
        first, rest = stored_shape(place, shape)
        if not n:
            i0, i1, _ = index[0].indices(shape[0])
            per, offset = first // place.parts // shape[0], place.part * (first // place.parts)
            rows = slice(offset + i0 * per, offset + i1 * per)
            if len(shape) == 2 and per == 1:
                return self.block(name, rows, index[1])
            x = self.block(name, rows, slice(0, rest)).reshape(i1 - i0, *shape[1:])
            return x[(slice(None), *index[1:])]
        bounds = [s.indices(d)[:2] for s, d in zip(index, shape)]
        (i0, i1), (o0, o1) = bounds[0], bounds[n]
        per_in, per_out = rest // shape[0], first // place.parts // shape[n]
        offset = place.part * (first // place.parts)
        rows = slice(offset + o0 * per_out, offset + o1 * per_out)
        x = self.block(name, rows, slice(i0 * per_in, i1 * per_in)).T
        x = x.reshape(i1 - i0, *shape[1:n], o1 - o0, *shape[n + 1 :])
        return x[tuple(slice(None) if a in (0, n) else s for a, s in enumerate(index))]


def check(
    files: Files,
    where: Mapping[Path, Place],
    shapes: Mapping[Path, tuple[int, ...]],
    ignored: Sequence[str],
) -> None:
    """Raise one ValueError naming every file that is damaged and every tensor that is missing,
    misshapen or not mapped."""
    problems, used = list(files.problems), set()
    for path, shape in shapes.items():
        place = where[path]
        stacked = "{}" in place.name
        for i in range(shape[0] if stacked else 1):
            used.add(name := place.name.format(i))
            wanted = stored_shape(place, shape[1:] if stacked else shape)
            if name not in files.handles:
                problems.append(f"{name} is missing (weight {'.'.join(path)})")
            elif (kind := files.kind(name)) not in KINDS:
                problems.append(f"{name} has numbers of kind {kind}; {KINDS} are read")
            elif (got := files.shape(name)) != wanted:
                problems.append(f"{name} has shape {got}; {'.'.join(path)} wants {wanted}")
    for name in sorted(set(files.handles) - used):
        if not any(re.fullmatch(pattern, name) for pattern in ignored):
            problems.append(f"{name} is in the files and this model has no place for it")
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if problems[20:] else [])
        raise ValueError("the weights do not fit config.json:\n  " + "\n  ".join(shown))


def write(folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """safetensors files of at most SHARD_BYTES, and an index if there are several."""
    names, total, shard, size = [], 0, {}, 0

    def flush():
        file = folder / f"part-{len(names):05d}.safetensors"
        file.touch()  # with the rights of a new file; safetensors gives them to the owner alone
        mode = file.stat().st_mode
        safetensors.numpy.save_file(shard, file, metadata={"format": "pt"})
        file.chmod(mode)
        names.append((file, list(shard)))

    for name, x in tensors:
        if shard and size + x.nbytes > SHARD_BYTES:
            flush()
            shard, size = {}, 0
        shard[name] = x
        size, total = size + x.nbytes, total + x.nbytes
    flush()
    if len(names) == 1:
        names[0][0].rename(folder / "model.safetensors")
        return
    index = {"metadata": {"total_size": total}, "weight_map": {}}
    for i, (file, keys) in enumerate(names, 1):
        final = f"model-{i:05d}-of-{len(names):05d}.safetensors"
        file.rename(folder / final)
        index["weight_map"] |= dict.fromkeys(keys, final)
    (folder / INDEX).write_text(json.dumps(index, indent=2))
