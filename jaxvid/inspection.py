"""What a model folder holds, what a clip costs it in tokens, and what a chip must hold to train it.

Memory is counted, not compiled: what the step keeps by design, in bytes. The compiler's own figure
for a slice is `jaxvid-launch preflight`'s; the two are held together by a test.
"""

import pathlib
from fractions import Fraction
from typing import Any, NamedTuple

import jax

from jaxvid.data import chat, frames, media, pipeline
from jaxvid.models import hf

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
    medium = pipeline.measured(told, family, heard=heard, where=str(folder))
    words = chat.Chat(folder, family.markers)
    placed = family.expand(medium, words.encode)
    count = len(told.indices)
    return Cost(told.kind, count, told.size, told.grid, medium.sound, len(placed.ids))


def imagined(
    seconds: float, height: int, width: int, sampling: frames.Sampling, cfg: Any
) -> media.Plan:
    """The plan of a clip that is not there: 30 frames a second, with sound."""
    total, told = max(1, round(30 * seconds)), Fraction(seconds).limit_denominator(1000)
    return media.planned(total, 30.0, (height, width), told, sampling, cfg.prompting.vision)


def memory(
    cfg: Any, *, chips: int, tokens: int, moments: int = 2, trained: int | None = None
) -> dict[str, float]:
    """GiB of each chip in a training step over `chips`, with rows of `tokens` on each.

    `moments` are the optimizer's numbers for a weight (AdamW 2, Adafactor about 0), `trained` the
    weights that are trained (None: all). Counted for remat "full": the inputs of all layers are
    kept, the inside of one. The vision tower's inside, smaller at a time, is not added.
    """
    if chips < 1 or tokens < 1:
        raise ValueError(f"{chips} chips and {tokens} tokens on each; give at least one of both")
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
