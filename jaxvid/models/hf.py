"""Model folders of Hugging Face, in and out: config.json and safetensors.

Import is total: every tensor of the files is mapped, every weight is filled with the right shape,
and all that is wrong is in one error. Each process reads only the slices its devices hold. Both
spellings of tensor names are read (the hub's and transformers' own); the hub's are written.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxvid import paths, sharding
from jaxvid.models import llava, omni, qwen3vl, qwen25vl, salmonn, weights
from jaxvid.models.family import Family

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
IGNORED_TENSORS = (r".*rotary_emb\.inv_freq", r".*rotary_pos_emb\.inv_freq")
COMPANIONS = (  # what stands beside the weights and is copied by `save`
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


FAMILIES = (
    qwen25vl.FAMILY,
    omni.FAMILY,
    *llava.FAMILIES,
    qwen3vl.FAMILY,
    salmonn.FAMILY,
)


class Loaded(NamedTuple):
    cfg: Any  # the family's Config
    graph: nnx.GraphDef
    params: nnx.State  # float32 masters; what is frozen may be bfloat16


def family_of(cfg: Any) -> Family:
    """The family a config belongs to."""
    return next(f for f in FAMILIES if isinstance(cfg, f.config))


def named(name: str) -> Family:
    """The family of that name. Raises ValueError naming those there are."""
    for f in FAMILIES:
        if f.name == name:
            return f
    raise ValueError(f"family {name!r} is not known; there are {[f.name for f in FAMILIES]}")


def abstract(cfg: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without its numbers: graph and shapes."""
    return nnx.split(nnx.eval_shape(lambda: family_of(cfg).model(cfg, rngs=nnx.Rngs(0))))


@functools.lru_cache
def _initialiser(cfg: Any, mesh: Mesh | None):
    """One compiled program per config and mesh, whatever the seed."""
    out = None if mesh is None else sharding.parameter_shardings(abstract(cfg)[1], mesh)
    build = lambda key: nnx.split(family_of(cfg).model(cfg, rngs=nnx.Rngs(key)))[1]
    return jax.jit(build, out_shardings=out, compiler_options=quick())


def quick() -> dict[str, int] | None:
    """Compiler options for what runs once: on CPU, compiling initial values with care would take
    five times as long as all the rest."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def initialise(cfg: Any, seed: int, *, mesh: Mesh | None = None) -> Loaded:
    """Fresh weights; on a mesh, each device makes only its own part."""
    return Loaded(cfg, abstract(cfg)[0], _initialiser(cfg, mesh)(jax.random.key(seed)))


def tiny_config(family: str, tokenizer: str | pathlib.Path | None = None) -> Any:
    """The config of a family's tiny twin: the same classes at laptop size.

    With a tokenizer folder, vocabulary and special token ids are that tokenizer's; without, the
    vocabulary is 640 and the special tokens come first in it.
    """
    special, vocab = named(family).special, 640
    ids = {content: i for i, content in enumerate(sorted(set(special.values())))}
    if tokenizer is not None:
        read = json.loads((pathlib.Path(tokenizer) / "tokenizer.json").read_text())
        ids = {t["content"]: t["id"] for t in read["added_tokens"]}
        if missing := sorted(set(special.values()) - set(ids)):
            raise ValueError(f"the tokenizer in {tokenizer} has no {', '.join(missing)}")
        largest = max(*ids.values(), *read["model"]["vocab"].values())
        vocab = -(-(largest + 1) // 64) * 64  # a multiple of 64 divides over any tensor axis
    return named(family).tiny(vocab, {field: ids[token] for field, token in special.items()})


def read_config(folder: str | pathlib.Path) -> Any:
    """The config of a model folder, with the image statistics of its preprocessor if it has one.

    Raises ValueError for an architecture that no family here reads.
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a saved model")
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("model_type")
    known = [f for f in FAMILIES if kind in f.model_types]
    if not known:
        kinds = sorted(k for f in FAMILIES for k in f.model_types)
        raise ValueError(
            f"{folder}/config.json has model_type {kind!r}, which no family here reads; they read "
            f"{', '.join(kinds)}"
        )
    cfg = known[0].config.from_hf(config)
    stats = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            read = json.loads((folder / name).read_text())
            read = read.get("image_processor", read)  # transformers 5 nests it
            stats |= {k: tuple(read[k]) for k in ("image_mean", "image_std") if k in read}
    return dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, **stats))


def _path(key_path) -> tuple[str, ...]:
    return tuple(str(k.key) for k in key_path)


def _leaves(params: nnx.State) -> list[tuple[tuple[str, ...], nnx.Variable]]:
    is_weight = lambda v: isinstance(v, nnx.Variable)
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_weight)
    return [(_path(key_path), v) for key_path, v in leaves]


def shapes(cfg: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of every weight, by its path in the parameters."""
    return _shapes(abstract(cfg)[1])


def _shapes(params: nnx.State) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {path: v.shape for path, v in _leaves(params)}


def load(
    folder: str | pathlib.Path,
    *,
    mesh: Mesh | None = None,
    dtype: str | Callable[[str], str] = "float32",
) -> Loaded:
    """Read a model folder. On a mesh the weights come sharded, and no host reads all of them.

    `dtype` is of all weights, or a function that gives it for a weight's path
    ("decoder.blocks.attention.q.w"). Raises ValueError naming all that is wrong: with config.json,
    or else with files and tensors.
    """
    cfg = read_config(folder)
    family, (graph, empty) = family_of(cfg), abstract(cfg)
    where, each = family.places(cfg), _shapes(empty)
    # A tied model's files may hold its table twice.
    ignored = IGNORED_TENSORS + family.ignored + ((r".*lm_head\.weight",) if cfg.tied else ())
    with contextlib.ExitStack() as stack:
        files = weights.Files(pathlib.Path(folder), family.hub_name, stack)
        weights.check(files, where, each, ignored)

        def read(path, shape, index):
            place = where[path]
            kind = DTYPES[dtype if isinstance(dtype, str) else dtype(paths.join(path))]
            if "{}" not in place.name:
                return files.weight(place, shape, index, 0).astype(kind)
            layers = range(*index[0].indices(shape[0]))
            sizes = (len(range(*s.indices(d))) for s, d in zip(index[1:], shape[1:]))
            out = np.empty((len(layers), *sizes), kind)
            for i, layer in enumerate(layers):  # one layer at a time in the files' own type
                out[i] = files.weight(place, shape[1:], index[1:], layer)
            return out

        def whole(key_path, v):
            index = tuple(slice(0, d) for d in v.shape)
            return v.replace(jax.numpy.asarray(read(_path(key_path), v.shape, index)))

        def sharded(key_path, v, s):
            # Piece by piece, each read once and gone from the host when its devices have it.
            holders: dict[tuple, list] = {}
            for device, index in s.get_value().addressable_devices_indices_map(v.shape).items():
                bounds = tuple(cut.indices(d)[:2] for cut, d in zip(index, v.shape))
                holders.setdefault(bounds, []).append(device)
            parts = []
            for bounds, devices in holders.items():
                piece = read(_path(key_path), v.shape, tuple(slice(*b) for b in bounds))
                parts += jax.block_until_ready([jax.device_put(piece, d) for d in devices])
            array = jax.make_array_from_single_device_arrays(v.shape, s.get_value(), parts)
            return v.replace(array)

        is_weight = lambda v: isinstance(v, nnx.Variable)
        if mesh is None:
            params = jax.tree.map_with_path(whole, empty, is_leaf=is_weight)
        else:
            wanted = sharding.parameter_shardings(empty, mesh)
            params = jax.tree.map_with_path(sharded, empty, wanted, is_leaf=is_weight)
    return Loaded(cfg, graph, params)


def _tensors(cfg: Any, params: nnx.State, dtype: str):
    """(hub name, array) one after the other; every process of a run must walk them all."""
    where = family_of(cfg).places(cfg)
    by_name: dict[str, list] = {}
    for path, v in _leaves(params):
        by_name.setdefault(where[path].name, []).append((where[path], v[...]))
    for name, pieces in by_name.items():
        pieces.sort(key=lambda piece: piece[0].part)
        for i in range(pieces[0][1].shape[0] if "{}" in name else 1):
            stored = []
            for place, x in pieces:
                x = x[i] if "{}" in name else x
                if not x.is_fully_addressable:
                    x = multihost_utils.process_allgather(x, tiled=True)
                stored.append(weights.to_stored(np.asarray(x).astype(DTYPES[dtype]), place))
            x = np.concatenate(stored)
            if pieces[0][0].stored:
                x = x.reshape(-1, *pieces[0][0].stored)
            yield name.format(i), np.ascontiguousarray(x)


def save(
    folder: str | pathlib.Path,
    cfg: Any,
    params: nnx.State,
    *,
    like: str | pathlib.Path | None = None,
    dtype: str = "bfloat16",
    copied: Iterable[tuple[str, np.ndarray]] = (),
) -> None:
    """Write a folder that transformers (and `load`) reads; `like` is a folder whose tokenizer,
    template and preprocessor files go along. All or nothing: it appears under its name when whole.

    `copied` are tensors that `params` has not, by their names in the files, written as they are.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} exists and is not a model folder; choose another name")
    tensors = itertools.chain(_tensors(cfg, params, dtype), copied)
    if jax.process_index():
        for _ in tensors:  # take part in gathering; the first process writes
            pass
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        part = pathlib.Path(beside) / "new"
        part.mkdir()
        _write_folder(part, cfg, tensors, like, dtype)
        if folder.exists():
            folder.rename(pathlib.Path(beside) / "old")
        part.rename(folder)


def _write_folder(part: pathlib.Path, cfg: Any, tensors, like, dtype: str) -> None:
    weights.write(part, tensors)
    config = cfg.to_hf() | {"dtype": dtype}
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COMPANIONS:
        if like is not None and (file := pathlib.Path(like) / name).is_file():
            shutil.copy(file, part / name)
    if not (part / "preprocessor_config.json").exists():
        text = json.dumps(family_of(cfg).preprocessor(cfg), indent=2) + "\n"
        (part / "preprocessor_config.json").write_text(text)
