"""Visual edits of real clips: the first level of DualityForge (arXiv 2512.24271), by OpenCV.

An edit changes the picture of a segment of a clip, over the entire frame, a region or an object,
and leaves every other pixel and the sound as they are; so the truth about it is known without any
check. The paper names contrast, saturation, brightness, blur and local distortion, "etc.", and
leaves parameters open: `strength` runs from -1 to 1 and each effect below says what 1 means.
Locating an object (the mask) is not done here.
"""

import dataclasses
import hashlib

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from jaxvid.data import media
from jaxvid.data.records import Example, Media, Record, Response

SIGNED = ("contrast", "saturation", "brightness", "hue")  # a negative strength is the other way
KINDS = (*SIGNED, "blur", "distortion", "noise", "freeze")
LEVELS = ("frame", "region", "object")
WHOLE = (0.0, 0.0, 1.0, 1.0)
VISIBLE = 4.0  # grey levels by which an edit must change its area to be called seen

Frames = UInt8[np.ndarray, "F h w 3"]
Picture = UInt8[np.ndarray, "h w 3"]
Mask = Bool[np.ndarray, "_ _ _"]  # F h w; `apply` checks it and says what it wants


@dataclasses.dataclass(frozen=True)
class Edit:
    """What is done to a clip, where, when and how strongly; all that is needed to do it again."""

    kind: str  # one of KINDS
    level: str = "frame"  # one of LEVELS
    box: tuple[float, float, float, float] = (
        0.0,
        0.0,
        1.0,
        1.0,
    )  # top, left, bottom, right: shares
    start: int = 0  # first frame touched
    stop: int = 0  # first frame no longer touched
    ramp: int = 0  # frames over which the strength grows from 0 and falls back; 0 is a hard cut
    strength: float = 1.0
    seed: int = 0  # of the noise

    def __post_init__(self):
        top, left, bottom, right = self.box
        low = -1.0 if self.kind in SIGNED else 0.0
        bad = []
        if self.kind not in KINDS:
            bad.append(f"kind {self.kind!r}, want one of {KINDS}")
        if self.level not in LEVELS:
            bad.append(f"level {self.level!r}, want one of {LEVELS}")
        if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
            bad.append(f"box {self.box}, want (top, left, bottom, right) as shares within 0 and 1")
        if not 0 <= self.start < self.stop:
            bad.append(f"frames {self.start} to {self.stop}, want 0 <= start < stop")
        if self.ramp < 0:
            bad.append(f"ramp {self.ramp}, want a number of frames")
        if not low <= self.strength <= 1 or self.strength == 0:
            bad.append(f"strength {self.strength}, want {low} to 1 and not 0")
        if self.level == "frame" and self.box != WHOLE:
            bad.append(f"box {self.box} at level 'frame', which is the whole of it")
        if bad:
            raise ValueError("Edit: " + "; ".join(bad))


# ---- drawing an edit


def sample(
    seed: int,
    record_id: str,
    frames: int,
    *,
    kinds: tuple[str, ...] = KINDS,
    levels: tuple[str, ...] = ("frame", "region"),
    box: tuple[float, float, float, float] | None = None,
    length: tuple[float, float] = (0.3, 0.7),
    strength: tuple[float, float] = (0.5, 1.0),
) -> Edit:
    """An edit of a clip of `frames` frames; a function of its arguments alone.

    `box` places the region or object; without it a region is drawn. `length` bounds the segment as
    a share of the clip, `strength` its size. Half of the edits are hard cuts.

    Raises ValueError if an object is asked for without a box.
    """
    if "object" in levels and box is None:
        raise ValueError("level 'object' needs the object's box; locate it, or leave the level out")
    rng = _generator(seed, record_id)
    kind, level = str(rng.choice(kinds)), str(rng.choice(levels))
    if level == "frame":
        box = WHOLE
    elif box is None:
        sides = rng.uniform(0.35, 0.6, 2)
        corner = rng.uniform(0.0, 1.0 - sides)
        box = tuple(float(v) for v in np.round([*corner, *(corner + sides)], 3))
    count = min(frames, max(2, round(frames * rng.uniform(*length))))
    start = int(rng.integers(0, frames - count + 1))
    if kind == "freeze" and start == 0 and count < frames:
        start = 1  # frozen from the first frame on looks like a clip that begins late
    size = 1.0 if kind == "freeze" else float(np.round(rng.uniform(*strength), 3))
    sign = -1.0 if kind in SIGNED and rng.random() < 0.5 else 1.0
    ramp = 0 if kind == "freeze" or rng.random() < 0.5 else max(1, count // 4)
    noise = int(rng.integers(2**31))
    return Edit(kind, level, box, start, start + count, ramp, sign * size, noise)


# ---- the effects: a picture and a strength (already ramped) -> the picture all over edited


def contrast(picture: Picture, strength: float) -> Picture:
    """Around the mean grey; 1 is four times the contrast, -1 a quarter."""
    x = picture.astype(np.float32)
    return _to_uint8((x - x.mean()) * 4.0**strength + x.mean())


def brightness(picture: Picture, strength: float) -> Picture:
    """1 adds 140 grey levels, -1 takes them away."""
    return _to_uint8(picture.astype(np.float32) + 140 * strength)


def saturation(picture: Picture, strength: float) -> Picture:
    """-1 is grey, 1 four times the distance from grey."""
    x = picture.astype(np.float32)
    grey = (x @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    return _to_uint8(grey + (x - grey) * (1 + max(3 * strength, strength)))


def hue(picture: Picture, strength: float) -> Picture:
    """1 and -1 turn the colour circle by half a turn, to the opposite colours."""
    hsv = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + 180 * strength) % 360
    return _to_uint8(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255)


def blur(picture: Picture, strength: float) -> Picture:
    """Gaussian; 1 is a sigma of 1/15 of the shorter side."""
    sigma = strength * min(picture.shape[:2]) / 15
    return cv2.GaussianBlur(picture, (0, 0), sigma) if sigma > 0 else picture


def noise(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    """1 has a standard deviation of 80 grey levels."""
    return _to_uint8(picture + rng.normal(0, 80 * strength, picture.shape).astype(np.float32))


def distortion(picture: Picture, strength: float, area: tuple[int, int, int, int]) -> Picture:
    """A whirl in the area; 1 turns its middle by 150 degrees; its rim is never turned."""
    top, left, bottom, right = area
    height, width = picture.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    y, x = y - (top + bottom - 1) / 2, x - (left + right - 1) / 2
    distance = np.hypot(y / ((bottom - top) / 2), x / ((right - left) / 2))
    turn = np.deg2rad(150) * strength * np.clip(1 - distance, 0, 1) ** 2
    from_x = np.cos(turn) * x - np.sin(turn) * y + (left + right - 1) / 2
    from_y = np.sin(turn) * x + np.cos(turn) * y + (top + bottom - 1) / 2
    maps = from_x.astype(np.float32), from_y.astype(np.float32)
    return cv2.remap(picture, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def _to_uint8(x: Float32[np.ndarray, "h w 3"]) -> Picture:
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


# ---- applying an edit


def weights(edit: Edit, frames: int) -> Float32[np.ndarray, " F"]:
    """How much of the strength each frame gets: 0 outside the segment, 1 inside, or a ramp.

    ramp 0: 0 0 1 1 1 1 0     ramp 2: 0 0 1/2 1 1 1/2 0     (segment from 2 to 6)
    """
    i = np.arange(frames)
    rise, fall = i - edit.start + 1, edit.stop - i
    grown = np.minimum(rise, fall) / max(edit.ramp, 1)
    return np.clip(grown, 0, 1).astype(np.float32)


def area(edit: Edit, height: int, width: int) -> tuple[int, int, int, int]:
    """The box in pixels: top, left, bottom, right."""
    top, left, bottom, right = edit.box
    t, l = int(top * height), int(left * width)
    return t, l, max(t + 1, round(bottom * height)), max(l + 1, round(right * width))


def apply(frames: Frames, edit: Edit, mask: Mask | None = None) -> Frames:
    """The edited clip. Pixels outside the segment, the box and (given one) the mask are equal.

    Raises ValueError if the segment does not lie in the clip or the mask does not fit it.
    """
    count, height, width, _ = frames.shape
    if edit.stop > count:
        raise ValueError(f"edit of frames {edit.start} to {edit.stop}; the clip has {count}")
    if mask is not None and mask.shape != (count, height, width):
        raise ValueError(
            f"mask {mask.shape} for frames {frames.shape}: want one a frame, same size"
        )
    box = area(edit, height, width)
    inside = np.zeros((height, width), bool)
    inside[box[0] : box[2], box[1] : box[3]] = True
    rng = np.random.default_rng(edit.seed)
    out = frames.copy()
    for i, weight in enumerate(weights(edit, count)):
        if weight:
            chosen = inside if mask is None else inside & mask[i]
            edited = _edited(frames, i, edit, float(weight) * edit.strength, box, rng)
            out[i][chosen] = edited[chosen]
    return out


def _edited(
    frames: Frames,
    i: int,
    edit: Edit,
    strength: float,
    box: tuple[int, int, int, int],
    rng: np.random.Generator,
) -> Picture:
    if edit.kind == "freeze":
        return frames[edit.start]
    if edit.kind == "noise":
        return noise(frames[i], strength, rng)
    if edit.kind == "distortion":
        return distortion(frames[i], strength, box)
    return PLAIN[edit.kind](frames[i], strength)


PLAIN = {
    "contrast": contrast,
    "brightness": brightness,
    "saturation": saturation,
    "hue": hue,
    "blur": blur,
}


def visibility(real: Frames, edited: Frames, edit: Edit) -> float:
    """Mean change, in grey levels, of the edit's area over its segment.

    Near 0 the edit shows nothing: a freeze of a still scene, a change of hue in a grey one.
    """
    top, left, bottom, right = area(edit, *real.shape[1:3])
    at = np.s_[edit.start : edit.stop, top:bottom, left:right]
    return float(np.abs(real[at].astype(np.int16) - edited[at]).mean())


def pair(
    data: bytes, edit: Edit, mask: Mask | None = None, *, max_pixels: int = 0
) -> tuple[bytes, bytes]:
    """(real, counterfactual) clips made of the bytes of one, each with its sound, in step with it.

    Both are encoded again in the same way: else the marks of the encoder would tell them apart.
    """
    clip, sound = media.decode_whole(data, max_pixels), media.decode_sound(data)
    return _encoded(clip, apply(clip.frames, edit, mask), sound)


def _encoded(
    clip: media.Clip, edited: Frames, sound: Float[np.ndarray, " n"] | None
) -> tuple[bytes, bytes]:
    fps = 1 / clip.seconds_per_frame
    return media.encode(clip.frames, fps, sound), media.encode(edited, fps, sound)


# ---- words


def describe(edit: Edit) -> str:
    """What is seen, in words."""
    where = {"frame": "The picture", "region": "A part of the picture", "object": "An object"}
    up = edit.strength > 0
    does = {
        "contrast": "gains much contrast" if up else "loses its contrast",
        "saturation": "becomes too colourful" if up else "loses its colours",
        "brightness": "becomes too bright" if up else "becomes too dark",
        "hue": "changes its colours",
        "blur": "becomes blurred",
        "distortion": "is twisted out of shape",
        "noise": "is covered by noise",
        "freeze": "stands still for a while",
    }
    return f"{where[edit.level]} {does[edit.kind]}."


NOTHING = "Nothing unusual happens to the picture."
QUESTION = "What happens to the picture in this video?"
CATEGORIES = {  # of DualityVidQA-Test's four
    "contrast": "attribute change",
    "saturation": "attribute change",
    "brightness": "attribute change",
    "hue": "attribute change",
    "blur": "object/scene deformation",
    "distortion": "object/scene deformation",
    "noise": "object/scene deformation",
    "freeze": "causal reversal",
}


def record(
    seed: int, record_id: str, data: bytes, *, split: str, licence: str, max_pixels: int = 0
) -> Record:
    """A duality pair of one real clip: the same question and options for both sides.

    An edit that would not be seen is drawn again. `licence` is the clip's.

    Raises ValueError if no edit of 20 can be seen.
    """
    clip = media.decode_whole(data, max_pixels)
    for i in range(20):
        edit = sample(seed, f"{record_id}/{i}", len(clip.frames))
        edited = apply(clip.frames, edit)
        if visibility(clip.frames, edited, edit) >= VISIBLE:
            break
    else:
        raise ValueError(f"record {record_id!r}: no edit changes the picture by {VISIBLE} levels")
    names = ("real", "counterfactual")
    clips = _encoded(clip, edited, media.decode_sound(data))
    seconds = len(clip.frames) * clip.seconds_per_frame
    return Record(
        id=record_id,
        split=split,
        media=tuple(Media(n, "video", c, seconds) for n, c in zip(names, clips)),
        examples=_examples(seed, record_id, edit, len(clip.frames)),
        meta={
            "level": "visual",
            "edit": edit.kind,
            "category": CATEGORIES[edit.kind],
            "parameters": dataclasses.asdict(edit),
        },
        provenance={
            "tool": "data_gen.visual",
            "seed": seed,
            "source": hashlib.sha256(data).hexdigest(),
            "max_pixels": max_pixels,
        },
        licence=licence,
    )


def _examples(seed: int, record_id: str, edit: Edit, frames: int) -> tuple[Example, ...]:
    """The wrong options are other edits at the same level: only the clip tells which is right."""
    texts, attempt = [NOTHING, describe(edit)], 0
    while len(texts) < 4:
        name = f"{record_id}/other/{attempt}"
        other = sample(seed, name, frames, levels=(edit.level,), box=edit.box)
        if other.kind != edit.kind and describe(other) not in texts:
            texts.append(describe(other))
        attempt += 1
    options = tuple(texts[i] for i in _generator(seed, f"{record_id}/options").permutation(4))
    prompt = "\n".join([QUESTION, *(f"{a}. {o}" for a, o in zip("ABCD", options))])
    examples = []
    for side, truth in enumerate((NOTHING, describe(edit))):
        letter = "ABCD"[options.index(truth)]
        reply = Response(f"<think>{truth}</think> <answer>{letter}</answer>")
        examples += [
            Example(f"policy {side}", "policy", side, prompt, options, letter),
            Example(f"choice {side}", "choice", side, prompt, options, letter, (reply,)),
            Example(f"open {side}", "sft", side, QUESTION, (), truth, (Response(truth),)),
        ]
    return tuple(examples)


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"visual/{seed}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
