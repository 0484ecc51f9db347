"""How a model family tells data preparation what its media become: geometry, tokens, positions.

Read without JAX, as all of data preparation is that does not make batches.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Vision:
    """The vision tower's geometry, in pixels and frames."""

    patch: int = 14
    temporal: int = 2  # frames of one temporal patch
    merge: int = 2  # side, in patches, of what becomes one feature
    window: int = 112  # side of an attention window in pixels; 0 is the whole frame
    size: int = 0  # side of the square every frame is brought to; 0 keeps the aspect
    # How: "smart" rounds the sides to whole tokens (size 0), "exact" resizes to the square whatever
    # the aspect, "crop" brings the shorter side to it and cuts the middle out.
    fit: Literal["smart", "exact", "crop"] = "smart"
    # Canvases (height, width) on which an image is laid and cut into tiles of `size`; () cuts none.
    pinpoints: tuple[tuple[int, int], ...] = ()
    pooled: int = 0  # features of a frame where the model pools them; 0 is one per merged patch

    def slots(self, patches: int) -> int:
        """Features that a frame of so many patches gives."""
        return self.pooled or patches // self.merge**2


@dataclasses.dataclass(frozen=True)
class Sound:
    """The audio tower's geometry, in samples and log-mel frames."""

    chunk: int  # log-mel frames encoded together
    slots: int  # features of a full chunk
    mels: int = 128
    rate: int = 16_000  # samples a second
    pad: bool = False  # the last chunk is filled with silence, and heard to its end


class Medium(NamedTuple):
    """One medium of a prompt, measured: all that its tokens and their positions depend on."""

    kind: str  # image, video or audio
    grid: tuple[int, int, int] = (0, 0, 0)  # (time, height, width) in patches
    seconds: float = 0.0  # from one temporal patch to the next
    sound: int = 0  # log-mel frames of its sound; 0 is none
    size: tuple[int, int] = (0, 0)  # (height, width) in pixels before it was resized
    # The middle of each temporal patch in seconds: (first + last frame) / 2. () is evenly spaced.
    times: tuple[float, ...] = ()


class Placed(NamedTuple):
    """The tokens that stand for one medium in a prompt, and which feature each of them takes."""

    ids: Int[np.ndarray, "n"]
    vision: Int[np.ndarray, "n"]  # 1 + index of the medium's vision feature; -1 separator; 0 none
    sound: Int[np.ndarray, "n"]  # 1 + index of the medium's sound slot; 0 none


@runtime_checkable
class Prompting(Protocol):
    """How media become tokens and positions. Numpy alone; pickled into data workers."""

    vision: Vision
    sound: Sound | None  # None: the family does not hear
    markers: Mapping[str, str]  # kind of medium -> what the chat template writes for it

    def expand(self, medium: Medium, encode: Callable[[str], list[int]]) -> Placed:
        """The tokens that replace the whole marker. `encode` tokenises plain text."""
        ...

    def positions(
        self, tokens: Int[np.ndarray, "n"], media: Sequence[Medium]
    ) -> Int[np.ndarray, "3 n"]:
        """(time, height, width) of each token; three equal rows where the family has one axis."""
        ...


# Tiles: how LLaVA cuts an image ------------------------------------------------------------------

Size = tuple[int, int]


class Tiles(NamedTuple):
    """How to cut an image: resize it to `resized`, lay it at `at` (top, left) on black of `canvas`,
    cut `grid` (rows, columns) tiles in reading order. Before them goes the whole image, stretched
    to a tile."""

    grid: Size
    canvas: Size
    resized: Size
    at: Size


def best(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint that keeps most of the image's pixels; of several, the one that wastes least."""

    def merit(point):
        scale = min(point[1] / size[1], point[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - point[0] * point[1]

    return max(pinpoints, key=merit)  # the first of equals, as transformers takes it


def tiles(size: Size, vision: Vision) -> Tiles:
    """The tiles of an image of `size` pixels."""
    canvas, side = best(size, vision.pinpoints), vision.size
    across, down = canvas[1] / size[1], canvas[0] / size[0]
    if across < down:
        resized = min(math.ceil(size[0] * across), canvas[0]), canvas[1]
    else:
        resized = canvas[0], min(math.ceil(size[1] * down), canvas[1])
    at = (canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2
    return Tiles((canvas[0] // side, canvas[1] // side), canvas, resized, at)
