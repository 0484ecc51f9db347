"""How LLaVA's media become tokens. A video is its frames, each a square with pooled features; an
image is cut into squares, "tiles" (https://llava-vl.github.io/blog/2024-01-30-llava-next/): the
whole image as one, then a grid of them, whose features make one map. Of the map what was padding is
left out, and each row ends with a newline.

Sizes are (height, width), in pixels or, where said so, in features.
Left out: maps made smaller where an image has too many tiles (`Prompting.expand` refuses them).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from jaxvid.prompting import Medium, Placed, Size, Tiles, Vision, tiles


def feature_map(grid: Size, side: int) -> Int[np.ndarray, "rows columns"]:
    """Of the features of a grid of tiles, one tile after the other, the index that stands at each
    place of the map they make together; a tile has side x side."""
    index = np.arange(grid[0] * grid[1] * side**2, dtype=np.int32)
    each = index.reshape(*grid, side, side).swapaxes(1, 2)
    return each.reshape(grid[0] * side, grid[1] * side)


def unpad(
    features: Int[np.ndarray, "rows columns"], size: Size
) -> Int[np.ndarray, "kept_rows kept_columns"]:
    """The part of a map of features that an image of `size` pixels covers."""
    (rows, columns), (height, width) = features.shape, size
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return features[cut : rows - cut]
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return features[:, cut : columns - cut]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompting:
    """A medium is its placeholders alone; the chat template writes <video> or <image>.

    An image is one square like a video's frame, or what `tiles` says, the whole image first. A
    frame has the features of its patches and then the pooled ones (`vision.slots`).
    """

    vision: Vision
    newline: bool  # after a video
    most: int  # tiles whose features an image's map may hold; 0: as many as there are
    image_token_id: int
    video_token_id: int
    sound: None = None

    @property
    def side(self) -> int:
        """Patches along a side of a frame."""
        return self.vision.size // self.vision.patch

    @property
    def markers(self) -> dict[str, str]:
        return {"video": "<video>", "image": "<image>"}

    def tiles(self, size: Size) -> Tiles:
        """How to cut an image of `size`."""
        return tiles(size, self.vision)

    def expand(self, medium: Medium, encode: Callable[[str], list[int]]) -> Placed:
        """Raises ValueError for a sound, for frames of another size than the tower's, for another
        number of tiles than `tiles` says, and for an image of too many tiles."""
        if medium.kind not in self.markers:
            raise ValueError(f"a medium is {medium.kind!r}; this family takes videos and images")
        if medium.grid[1:] != (self.side, self.side):
            raise ValueError(
                f"a {medium.kind} has {medium.grid[1]} x {medium.grid[2]} patches a frame; this "
                f"tower takes {self.side} x {self.side}. Bring frames to {self.vision.size} pixels "
                "a side."
            )
        if medium.kind == "video":
            seen, token = self._video(medium.grid[0]), self.video_token_id
        else:
            seen, token = self._image(medium), self.image_token_id
        return Placed(np.full_like(seen, token), seen, np.zeros_like(seen))

    def _video(self, frames):
        slots = self.vision.pooled
        seen = 1 + np.arange(frames * slots, dtype=np.int32).reshape(frames, slots)
        seen = seen[:, self.side**2 :].reshape(-1)
        return np.append(seen, np.int32(-1)) if self.newline else seen

    def _image(self, medium):
        side = self.side
        base = np.arange(1, side**2 + 1, dtype=np.int32)
        if medium.grid[0] == 1:
            return np.append(base, np.int32(-1))
        (height, width), grid = medium.size, self.tiles(medium.size).grid
        if medium.grid[0] != 1 + math.prod(grid):
            raise ValueError(
                f"an image of {height} x {width} pixels came as {medium.grid[0]} tiles; wanted is "
                f"one, or the whole and a grid of {grid[0]} x {grid[1]}"
            )
        at = unpad(feature_map(grid, side), medium.size)
        if self.most and math.sqrt(at.size / (self.most * side**2)) > 1.1:
            raise ValueError(
                f"an image of {height} x {width} pixels has {at.shape[0]} x {at.shape[1]} "
                f"features; beyond those of {self.most} tiles they would have to be made fewer, "
                "which is not done here. Turn down the image size, to about "
                f"{self.most} x {self.vision.size}^2 pixels."
            )
        tile, place = np.divmod(at, side**2)
        seen = 1 + (1 + tile) * self.vision.pooled + place
        lines = np.concatenate([seen, np.full((len(seen), 1), -1)], axis=1)
        return np.concatenate([base, lines.reshape(-1)]).astype(np.int32)

    def positions(
        self, tokens: Int[np.ndarray, "n"], media: Sequence[Medium]
    ) -> Int[np.ndarray, "3 n"]:
        """Counted along the row, whatever the media."""
        return np.tile(np.arange(len(tokens), dtype=np.int32), (3, 1))
