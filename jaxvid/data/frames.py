"""Which frames a model sees, how large, and cut into which patches: numbers in, numbers out.

All of it equals what the Hugging Face processors (transformers 5.23) and qwen-vl-utils 0.0.14 do,
frame for frame and pixel for pixel where the resizing library is the same. They do not agree with
each other, so `Sampling.policy` says whose rules hold:

    policy          n by fps, min_frames .. frames    index of frame i of n, in a clip of N
    qwen_vl_utils   even, from below                  round(i (N - 1) / (n - 1))
    qwen2_vl        even, from below                  floor(i N / n)
    qwen3_vl        any, from below                   round(i (N - 1) / (n - 1))
    uniform         any, from below                   floor(i N / n)

`qwen_vl_utils` is what Qwen2.5-VL was trained and is served with; `qwen2_vl` is the video processor
of transformers 5 for Qwen2-VL, Qwen2.5-VL and Qwen2.5-Omni; `qwen3_vl` is that of Qwen3-VL;
`uniform` is that of every other family (LLaVA-OneVision, LLaVA-NeXT-Video). Where a clip has fewer
frames than are asked for, most of them stop; here frames repeat.
"""

import dataclasses
import math
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from jaxvid.prompting import Vision, tiles

Policy = Literal["qwen_vl_utils", "qwen2_vl", "qwen3_vl", "uniform"]
_EVEN = ("qwen_vl_utils", "qwen2_vl")  # policies that take an even number of frames
_MOST_TOKENS = 768  # qwen-vl-utils: of one frame
_MOST_ASPECT = 200


class MediaError(ValueError):
    """Bytes that cannot be decoded, or pixels and samples that cannot be encoded."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which frames of a clip are seen, and how large."""

    frames: int = 8  # how many; with fps, the most that are taken
    height: int = 48  # exact size in pixels; 0 keeps the aspect (the settings of pixels below)
    width: int = 48
    fps: float = 0.0  # 0 takes `frames` of any clip; else about fps frames a second
    max_pixels: int = 0  # most pixels of a frame or an image; qwen3_vl: 0 leaves it to total_pixels
    multiple: int = 0  # what sides are rounded to; 0 is the model's patch * merge
    policy: Policy = "qwen_vl_utils"  # whose rules these are; the module's table
    min_frames: int = 0  # only with fps: fewest that are taken; 0 is 2 (uniform: 1)
    min_pixels: int = 0  # fewest pixels of a frame or an image (qwen3_vl: of all frames together)
    total_pixels: int = 0  # most pixels of all frames together, see `frame_size`; 0 is no limit

    def __post_init__(self):
        if self.policy not in get_args(Policy):
            raise ValueError(f"Sampling.policy={self.policy!r}; want one of {get_args(Policy)}.")
        odd = self.frames % 2 and self.frames != 1 and self.policy in _EVEN
        if self.frames < 1 or odd:
            raise ValueError(
                f"Sampling.frames={self.frames}; want an even number (two frames make a temporal "
                "patch), or 1 for images."
            )
        if self.frames == 1 and self.fps > 0:
            raise ValueError(
                f"Sampling.frames=1 with fps={self.fps}; 1 is for images. Want the most frames of "
                f"a clip, or fps=0."
            )
        if self.min_frames and (self.fps <= 0 or not 0 < self.min_frames <= self.frames):
            raise ValueError(
                f"Sampling.min_frames={self.min_frames} with frames={self.frames}, fps={self.fps}; "
                "it is read with fps alone, and is at most `frames`, the most that are taken."
            )
        if (self.height == 0) != (self.width == 0):
            raise ValueError(
                f"Sampling size {self.height} x {self.width}: give both sides, or 0 for both."
            )
        if self.height == 0:
            self._check_pixels()

    def _check_pixels(self):
        flat = self.policy != "qwen3_vl"
        most = self.max_pixels if flat or self.max_pixels else self.total_pixels
        least = max(self.multiple, 1) ** 2
        if most < least:
            raise ValueError(
                f"Sampling.max_pixels={self.max_pixels} with sides of 0; want at least {least}, "
                f"one token of {self.multiple} x {self.multiple}."
            )
        if flat and self.min_pixels > most:
            raise ValueError(
                f"Sampling.min_pixels={self.min_pixels} is above max_pixels={most}; lower it."
            )
        if self.total_pixels and self.policy == "uniform":
            raise ValueError(
                "Sampling.total_pixels is a rule of the Qwen policies; with policy='uniform' set "
                "it to 0."
            )


QWEN = Vision()  # Qwen2.5-VL's, where no model is named


# ---- which frames


def frame_indices(total: int, rate: float, sampling: Sampling) -> Int[np.ndarray, "n"]:
    """Indices of the frames seen, of a clip of `total` frames at `rate` frames a second."""
    return _spread(total, _count(total, rate, sampling), sampling.policy)


def _count(total: int, rate: float, sampling: Sampling) -> int:
    """How many frames are taken. A clip of one frame still fills a temporal patch."""
    fewest = 1 if sampling.policy == "uniform" else 2
    if sampling.fps <= 0:
        return sampling.frames
    wanted = total / rate * sampling.fps
    least = sampling.min_frames or fewest
    if sampling.policy == "qwen_vl_utils":
        least = math.ceil(least / 2) * 2  # qwen2_vl takes 4 where 5 is the least, this 6
    n = math.floor(min(max(wanted, least), sampling.frames, total))
    if sampling.policy in _EVEN:
        n = n // 2 * 2
    return max(n, fewest)


def _spread(total: int, n: int, policy: Policy) -> Int[np.ndarray, "n"]:
    """n indices over a clip; where frames are fewer than n, some repeat."""
    i = np.arange(n)
    if policy == "uniform":
        at = i * total // n
    elif policy == "qwen2_vl":  # torch.arange(0, total, total / n).int(), in float32
        at = (i * (total / n)).astype(np.float32)
    elif policy == "qwen3_vl" or n == 1:
        at = np.linspace(0, total - 1, n).round()
    else:  # torch.linspace(0, total - 1, n).round(): float32, and the second half from the end
        last = np.float32(total - 1)
        step = np.float64(np.float32(last / np.float32(n - 1)))
        at = np.where(i < n // 2, i * step, last - (n - 1 - i) * step).astype(np.float32).round()
    return np.minimum(at.astype(np.int64), total - 1)


# ---- how large


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int | float
) -> tuple[int, int]:
    """(height, width) with sides that `factor` divides, pixels within limits, about the old aspect.

    transformers' function of the same name (Qwen2-VL, arXiv 2409.12191, 2.1), but for `min_pixels`
    of 0, where its sides may be 0: there a side is at least `factor`. A limit may be passed by what
    rounding to whole tokens needs.

    Raises MediaError if one side is more than 200 times the other.
    """
    _check_aspect(height, width)
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        return _floor(height, width, factor, math.sqrt(height * width / max_pixels))
    if h * w < min_pixels:
        return _ceil(height, width, factor, math.sqrt(min_pixels / (height * width)))
    return (h, w) if min_pixels else (max(factor, h), max(factor, w))


def smart_resize_clip(
    size: tuple[int, int, int],
    factor: int,
    min_pixels: int,
    max_pixels: int | float,
    temporal: int = 2,
) -> tuple[int, int]:
    """`smart_resize` of (frames, height, width), with limits on the pixels of all frames together.

    Qwen3-VL's function in transformers; a side below `factor` is first brought up to it.

    Raises MediaError if one side is more than 200 times the other.
    """
    count, height, width = size
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect(height, width)
    h, w = round(height / factor) * factor, round(width / factor) * factor
    t = round(count / temporal) * temporal
    if t * h * w > max_pixels:
        return _floor(height, width, factor, math.sqrt(count * height * width / max_pixels))
    if t * h * w < min_pixels:
        return _ceil(height, width, factor, math.sqrt(min_pixels / (count * height * width)))
    return h, w


def _floor(height: int, width: int, factor: int, shrink: float) -> tuple[int, int]:
    h, w = (max(factor, math.floor(x / shrink / factor) * factor) for x in (height, width))
    return h, w


def _ceil(height: int, width: int, factor: int, grow: float) -> tuple[int, int]:
    h, w = (math.ceil(x * grow / factor) * factor for x in (height, width))
    return h, w


def _check_aspect(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > _MOST_ASPECT:
        raise MediaError(
            f"a picture of {height} x {width} pixels; one side may be at most {_MOST_ASPECT} times "
            f"the other: crop it"
        )


def frame_size(
    height: int, width: int, sampling: Sampling, vision: Vision = QWEN, frames: int = 0
) -> tuple[int, int]:
    """(height, width) that a picture is brought to; `frames` is how many are taken, 0: an image.

    The exact size asked for, or of the largest and smallest frames that the policy allows:
    qwen_vl_utils and qwen2_vl give each pair of frames an even share of `total_pixels`, never less
    than 1.05 `min_pixels` (and qwen_vl_utils then never more than 768 tokens); qwen3_vl holds all
    frames together between `min_pixels` and `total_pixels`, each to `max_pixels` where that is set.

    Raises ValueError where the model takes one size and another is asked for, or limits are below
    one token; MediaError as `smart_resize`.
    """
    if vision.size:
        if (sampling.height, sampling.width) != (vision.size, vision.size):
            raise ValueError(
                f"Sampling asks for {sampling.height} x {sampling.width} pixels, but this model "
                f"sees {vision.size} x {vision.size}: set Sampling.height and width to that"
            )
        return vision.size, vision.size
    if sampling.height:
        return sampling.height, sampling.width
    factor = sampling.multiple or vision.patch * vision.merge
    most, least, total = sampling.max_pixels, sampling.min_pixels, sampling.total_pixels
    if (most or total) < factor**2:
        raise ValueError(
            f"Sampling.max_pixels={most}, total_pixels={total} is less than one token of {factor} "
            f"x {factor} pixels; want at least {factor**2}"
        )
    if sampling.policy == "qwen3_vl":
        if not frames:
            return smart_resize(height, width, factor, least, most or total)
        if most:
            share = total // frames if total else most
            total = max(min(most, share), int(least * 1.05)) * frames
        size = (frames, height, width)
        return smart_resize_clip(size, factor, least, total, vision.temporal)
    if frames and total:
        floor = int(least * 1.05)
        if sampling.policy == "qwen2_vl":
            most = max(min(most, total * vision.temporal // frames), floor)
        else:
            share = min(_MOST_TOKENS * factor**2, total / frames * vision.temporal)
            most = min(most, max(share, floor))
    return smart_resize(height, width, factor, least, most)


def fit(
    pictures: list[Image.Image], size: tuple[int, int], vision: Vision = QWEN
) -> UInt8[np.ndarray, "F h w 3"]:
    """Pictures brought to `size` (height, width) by PIL's antialiased bicubic, as processors do.

    With `vision.fit` "crop" the shorter side is brought to the size and the middle cut out (CLIP).
    """
    height, width = size
    if vision.fit != "crop" or not vision.size:
        return np.stack([np.asarray(_resized(p, width, height)) for p in pictures])
    out = []
    for picture in pictures:
        short, long = sorted(picture.size)
        other = int(vision.size * long / short)
        landscape = picture.size[0] == long
        w, h = (other, vision.size) if landscape else (vision.size, other)
        left, top = (w - width) // 2, (h - height) // 2
        whole = _resized(picture, w, h)
        out.append(np.asarray(whole.crop((left, top, left + width, top + height))))
    return np.stack(out)


def cut(picture: Image.Image, vision: Vision) -> list[Image.Image]:
    """The whole image as one tile, then its tiles in reading order, where the model cuts images."""
    if not vision.pinpoints:
        return [picture]
    grid, canvas, resized, (top, left) = tiles((picture.height, picture.width), vision)
    laid = Image.new("RGB", canvas[::-1])
    laid.paste(_resized(picture, resized[1], resized[0]), (left, top))
    side = vision.size
    corners = [(c * side, r * side) for r in range(grid[0]) for c in range(grid[1])]
    parts = [laid.crop((x, y, x + side, y + side)) for x, y in corners]
    return [_resized(picture, side, side), *parts]


def shown(height: int, width: int, vision: Vision) -> int:
    """Pictures that an image of this size becomes."""
    return 1 + math.prod(tiles((height, width), vision).grid) if vision.pinpoints else 1


def _resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.BICUBIC)


# ---- patches


def grid(frames: int, height: int, width: int, vision: Vision) -> tuple[int, int, int]:
    """(time, rows, columns) of patches. Of a fixed size (`Vision.size`) the rest is left out.

    Raises MediaError if the frames do not divide into merged patches.
    """
    side = vision.patch * vision.merge
    whole = not (height % side or width % side) or (vision.size and min(height, width) >= side)
    if not whole or not frames:
        raise MediaError(
            f"{frames} frames of {height} x {width} do not divide into tokens of {side} x {side} "
            f"pixels (patch {vision.patch}, merge {vision.merge}): set Sampling.height and width "
            f"to multiples"
        )
    time = -(-frames // vision.temporal)
    return time, height // side * vision.merge, width // side * vision.merge


def patchify(
    frames: UInt8[np.ndarray, "F h w 3"], vision: Vision
) -> tuple[UInt8[np.ndarray, "E Q C"], tuple[int, int, int]]:
    """Patches of each temporal patch in merge order, and the grid (time, rows, columns) of patches.

    A patch's numbers lie in the order channel, frame, row, column; both orders are Hugging Face's.
    A clip that does not fill its last temporal patch repeats its last frame, an image its only one.

    Raises MediaError if the frames do not divide into merged patches.
    """
    count, height, width, _ = frames.shape
    e, rows, columns = grid(count, height, width, vision)
    t, m, p = vision.temporal, vision.merge, vision.patch
    short = e * t - count
    if short:
        frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
    r, c = rows // m, columns // m
    x = frames[:, : rows * p, : columns * p].reshape(e, t, r, m, p, c, m, p, 3)
    # E time, row, row in merge, y, column, column in merge, x, channel
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return x.reshape(e, rows * columns, 3 * t * p * p), (e, rows, columns)
