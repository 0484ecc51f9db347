"""What a model folder holds, what a clip costs it in tokens, and what a chip must hold to train it.

Memory is counted, not compiled: what the step keeps by design, in bytes. The compiler's own figure
for a slice is `jaxvid-launch preflight`'s; the two are held together by a test.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxvid.data import chat, frames, media, sound
from jaxvid.models import hf
from jaxvid.prompting import Medium

GIB = 2**30


class Cost(NamedTuple):
    """What one clip is to a model."""

    kind: str
    frames: int
    size: tuple[int, int]  # (height, width) in pixels
    grid: tuple[int, int, int]  # (time, rows, columns) in patches
    sound: int  # log-mel frames
    tokens: int


def parts(cfg: Any) -> dict[str, int]:
    """Parameters of each part of the model, by its name in the parameters."""
    counts: dict[str, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(hf.abstract(cfg)[1]):
        name = jax.tree_util.keystr(path[:1], simple=True)
        counts[name] = counts.get(name, 0) + x.size
    return counts


def cost(folder: pathlib.Path, cfg: Any, told: media.Plan, *, heard: bool) -> Cost:
    """Tokens of a planned clip, its start and end tokens and time stamps included."""
    family = cfg.prompting
    hears = heard and family.sound is not None
    mels = sound.mel_frames(round(told.sound * family.sound.rate)) if hears else 0
    times = tuple(told.times.tolist())
    medium = Medium(told.kind, told.grid, told.seconds, mels, told.original, times)
    words = chat.Chat(folder, family.markers)
    placed = family.expand(medium, words.encode)
    return Cost(told.kind, len(told.indices), told.size, told.grid, mels, len(placed.ids))


def imagined(
    seconds: float, height: int, width: int, sampling: frames.Sampling, cfg: Any
) -> media.Plan:
    """The plan of a clip that is not there: 30 frames a second, with sound."""
    rate, vision = 30.0, cfg.prompting.vision
    total = max(1, round(seconds * rate))
    indices = frames.frame_indices(total, rate, sampling)
    size = frames.frame_size(height, width, sampling, vision, len(indices))
    patches = frames.grid(len(indices), *size, vision)
    each = total / rate / len(indices) * vision.temporal
    last = np.minimum(np.arange(1, patches[0] + 1) * vision.temporal, len(indices)) - 1
    times = (indices[:: vision.temporal] / rate + indices[last] / rate) / 2
    return media.Plan(
        "video", indices, total, rate, (height, width), size, patches, each, times, seconds
    )


def memory(
    cfg: Any, *, chips: int, tokens: int, moments: int = 2, trained: int | None = None
) -> dict[str, float]:
    """GiB of each chip in a training step over `chips`, with rows of `tokens` on each.

    `moments` are the optimizer's numbers for a weight (AdamW 2, Adafactor about 0), `trained` the
    weights that are trained (None: all). Counted for remat "full": the inputs of all layers are
    kept, the inside of one. The vision tower's inside, smaller at a time, is not added.
    """
    text = cfg.text
    every = sum(parts(cfg).values())
    learnt = every if trained is None else trained
    half = 2 if cfg.compute.dtype == "bfloat16" else 4
    heads = (2 * text.heads + 2 * text.kv_heads) * text.head
    inside = tokens * (6 * text.width + 2 * heads + 3 * text.ffn / cfg.compute.ffn_parts)
    layer = text.width * (heads + 3 * text.ffn / cfg.compute.ffn_parts)
    table = text.vocab * text.width
    each = {
        "weights": 4 * every / chips,
        "moments": 4 * moments * learnt / chips,
        "gradient": 4 * learnt / chips,
        "inputs of the layers": half * text.layers * tokens * text.width,
        "inside of a layer": half * inside,
        "a layer's weights, gathered": half * layer,
        "token table at work": 4 * table / chips,
    }
    return {name: size / GIB for name, size in each.items()}
