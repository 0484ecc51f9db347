"""Adapter folders of PEFT, out and in: adapter_config.json and adapter_model.safetensors.

Names inside are those of transformers' modules, so `peft` puts an adapter on the model that
transformers reads from the base folder. Layers that the files hold as one (q, k and v of a vision
tower) have one adapter there, of the ranks of all: their a below one another, their b on the
diagonal. Left out, and refused by `load`: DoRA, trained biases, modules saved whole, ranks or
scales that differ between layers.
"""

import json
import pathlib
import re
import tempfile
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxvid import paths
from jaxvid.models import hf, lora
from jaxvid.models.family import Place
from jaxvid.models.lora import LoRA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Tensors = dict[str, np.ndarray]
REFUSED = {  # settings of adapter_config.json -> the values that mean what is done here
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "target_parameters": (None, []),
}


def save(
    folder: str | pathlib.Path, cfg: Any, params: nnx.State, settings: LoRA, *, base: str = ""
) -> None:
    """Write the adapters among `params` as a folder that `peft` loads; `base` is where it says the
    model is. All or nothing. Raises FileExistsError on a folder that is something else."""
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise FileExistsError(f"{folder} exists and is no adapter; choose another name")
    tensors, modules, fused = _stored(cfg, params, settings)
    if jax.process_index():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        part = pathlib.Path(beside) / "new"
        part.mkdir()
        content = _config(settings, modules, fused, base)
        (part / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        (part / WEIGHTS).touch()  # with the rights of a new file, not of the owner alone
        mode = (part / WEIGHTS).stat().st_mode
        safetensors.numpy.save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        (part / WEIGHTS).chmod(mode)
        if folder.exists():
            folder.rename(pathlib.Path(beside) / "old")
        part.rename(folder)


def _stored(cfg: Any, params: nnx.State, settings: LoRA) -> tuple[Tensors, set[str], dict]:
    """(tensors by name, patterns of modules, those that are several layers -> how many)."""
    flat, tensors, modules, fused = dict(nnx.to_flat_state(params)), {}, set(), {}
    for name, parts in _modules(cfg).items():
        here = {n: path for n, (path, _) in parts.items() if (*path, "lora", "a") in flat}
        if not here:
            continue
        _, place = next(iter(parts.values()))
        pattern = re.escape(name).replace(r"\{\}", r"\d+")
        modules.add(pattern)
        if place.parts > 1:
            fused[pattern] = place.parts
        pairs = {n: [_whole(flat[*p, "lora", w][...]) for w in "ab"] for n, p in here.items()}
        layers = len(next(iter(pairs.values()))[0]) if "{}" in name else 1
        for i in range(layers):
            each = {n: [x[i] if "{}" in name else x for x in ab] for n, ab in pairs.items()}
            a, b = _joined(each, place, settings.rank)
            module = PREFIX + name.format(i)
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b)
    return tensors, modules, fused


def _modules(cfg: Any) -> dict[str, dict[int, tuple[tuple[str, ...], Place]]]:
    """Name of a module in transformers (`{}` is the layer) -> its parts: (path, place) of ours."""
    family = hf.family_of(cfg)
    if family.module_name is None:
        raise ValueError(
            f"family {family.name} does not say what transformers calls its modules; set "
            "Family.module_name, or export the merged model"
        )
    found: dict[str, dict[int, tuple[tuple[str, ...], Place]]] = {}
    for path, place in family.places(cfg).items():
        if path[-1] == "w":
            name = family.module_name(place.name).removesuffix(".weight")
            found.setdefault(name, {})[place.part] = (path[:-1], place)
    return found


def _whole(x: jax.Array) -> np.ndarray:
    if not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _joined(each: dict[int, list[np.ndarray]], place: Place, rank: int):
    """(lora_A [ranks, inputs], lora_B [outputs, ranks]) of one module; of a convolution, with its
    axes. A part without an adapter has zeros."""
    flat = {n: (a.reshape(-1, rank).T, b.reshape(rank, -1).T) for n, (a, b) in each.items()}
    a, b = next(iter(flat.values()))
    none = np.zeros_like(a), np.zeros_like(b)
    parts = [flat.get(n, none) for n in range(place.parts)]
    out, total = len(b), rank * place.parts
    joined = np.zeros((out * place.parts, total), b.dtype)
    for n, (_, b) in enumerate(parts):
        joined[n * out : (n + 1) * out, n * rank : (n + 1) * rank] = b
    a = np.concatenate([a for a, _ in parts])
    if place.stored:
        points = (1,) * (len(place.stored) - 1)  # the second matrix is a convolution of one point
        return a.reshape(total, *place.stored), joined.reshape(*joined.shape, *points)
    return a, joined


def _config(settings: LoRA, modules: set[str], fused: dict[str, int], base: str) -> dict[str, Any]:
    root = 0.5 if settings.rank_stabilised else 1.0  # the scale is alpha / rank ** root
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rank_stabilised,
        "lora_dropout": settings.dropout,
        "target_modules": "|".join(sorted(modules)),
        "rank_pattern": {name: settings.rank * n for name, n in fused.items()},
        "alpha_pattern": {name: settings.alpha * n**root for name, n in fused.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }


def load(
    folder: str | pathlib.Path,
    cfg: Any,
    graph: nnx.GraphDef,
    params: nnx.State,
    *,
    mesh: Mesh | None = None,
) -> tuple[LoRA, nnx.GraphDef, nnx.State]:
    """An adapter folder put on the model (graph, params): its settings, and the model with it.

    Raises FileNotFoundError without the folder's files, and one ValueError with all that is not
    understood.
    """
    folder = pathlib.Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG} and {WEIGHTS}; give a folder of PEFT")
    content = json.loads((folder / CONFIG).read_text())
    problems = [
        f"{name} is {content[name]!r}; only {known[0]!r} is supported"
        for name, known in REFUSED.items()
        if name in content and content[name] not in known
    ]
    rename = lambda key: re.sub(r"lora_([AB])\.default\.", r"lora_\1.", key).removeprefix(PREFIX)
    left = {rename(k): x for k, x in safetensors.numpy.load_file(folder / WEIGHTS).items()}
    rank, found = content["r"], {}
    for name, parts in _modules(cfg).items():
        found |= _taken(left, name, parts, rank, problems)
    problems += _other_scales(content)
    problems += [f"{key}: this model has no such layer" for key in sorted(left)]
    if not found:
        problems.append("it has no layer of this model")
    if problems:
        raise ValueError(f"{folder} cannot be loaded:\n  " + "\n  ".join(problems[:20]))
    settings = LoRA(
        rank=rank,
        alpha=float(content["lora_alpha"]),
        dropout=float(content.get("lora_dropout", 0.0)),
        targets=tuple(sorted({re.escape(paths.join(path[:-2])) for path in found})),
        rank_stabilised=bool(content.get("use_rslora", False)),
    )
    graph, params = lora.attach(graph, params, settings, 0, mesh=mesh)
    flat = dict(nnx.to_flat_state(params))
    for path, x in found.items():
        v, name = flat[path], paths.join(path)
        if x.size != v.size:
            raise ValueError(f"{folder}: {name} has {x.size} numbers and this model's has {v.size}")
        x = np.asarray(x, np.float32).reshape(v.shape)
        placed = jax.make_array_from_callback(x.shape, v[...].sharding, x.__getitem__)
        flat[path] = v.replace(placed)
    return settings, graph, nnx.from_flat_state(flat)


def _other_scales(content: dict[str, Any]) -> list[str]:
    """What of the patterns gives some modules another scale than the rest."""
    ranks, alphas = content.get("rank_pattern") or {}, content.get("alpha_pattern") or {}
    root = 0.5 if content.get("use_rslora") else 1.0
    scale = lambda rank, alpha: alpha / rank**root
    wanted = scale(content["r"], content["lora_alpha"])
    return [
        f"{name}: scale {found}, and {wanted} elsewhere"
        for name in sorted(ranks.keys() | alphas.keys())
        for found in [scale(ranks.get(name, content["r"]), alphas.get(name, content["lora_alpha"]))]
        if abs(found - wanted) > 1e-6 * wanted
    ]


def _taken(left: Tensors, name: str, parts: dict, rank: int, problems: list[str]) -> dict:
    """The adapters of one module, by path in the parameters, taken out of `left`."""
    pattern = re.escape(name).replace(r"\{\}", r"(\d+)")
    tensors: dict[tuple[str, int], np.ndarray] = {}
    for key in list(left):
        if match := re.fullmatch(rf"{pattern}\.lora_([AB])\.weight", key):
            layer = int(match[1]) if "{}" in name else 0
            tensors[match[match.lastindex], layer] = left.pop(key)
    layers = sorted({layer for _, layer in tensors})
    if not layers:
        return {}
    if layers != list(range(len(layers))) or len(tensors) != 2 * len(layers):
        problems.append(f"{name}: not every layer has its pair of matrices; there are {layers}")
        return {}
    out: dict[tuple[str, ...], list[np.ndarray]] = {}
    count = next(place.parts for _, place in parts.values())
    for layer in layers:
        a, b = tensors["A", layer], tensors["B", layer]
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        size = len(b) // count
        if len(a) not in (rank, count * rank):
            problems.append(f"{name.format(layer)}: rank {len(a)}, and {rank} elsewhere")
            return {}
        apart = len(a) > rank  # every part has ranks of its own, or all share them
        for n, (path, _) in parts.items():
            own = np.arange(n * rank, (n + 1) * rank) if apart else np.arange(rank)
            rows = b[n * size : (n + 1) * size]
            if np.delete(rows, own, axis=1).any():
                problems.append(f"{name.format(layer)}: its parts share ranks of another layout")
                return {}
            if a[own].any():
                out.setdefault((*path, "lora", "a"), []).append(a[own].T)
                out.setdefault((*path, "lora", "b"), []).append(rows[:, own].T)
    return {path: np.stack(each) for path, each in out.items()}
