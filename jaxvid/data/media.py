"""Video, images and sound: encoded bytes in, uint8 pixels or float32 samples out, and back.

Pixels stay uint8 up to the device, where the model normalises them: shipping float32 costs four
times the bytes and, on the host, as much time as decoding. Frames are picked uniformly over the
clip and resized by PIL's antialiased bicubic, as the Hugging Face processors do.
What this leaves out: streaming; a clip is decoded whole.
"""

import dataclasses
import hashlib
import io
import math
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from jaxvid.batch import Vision


class MediaError(ValueError):
    """Bytes that cannot be decoded, or pixels and samples that cannot be encoded."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which frames of a clip are seen, and how large."""

    frames: int = 8  # an even number; with fps, the most that are taken
    height: int = 48  # exact size in pixels; 0 keeps the aspect (`max_pixels`, `multiple`)
    width: int = 48
    fps: float = 0.0  # 0 takes `frames` of any clip; else about fps frames a second, even
    max_pixels: int = 0  # only where height and width are 0: most pixels of a frame
    multiple: int = 28  # ... and what the sides are rounded to (patch * merge)

    def __post_init__(self):
        if self.frames < 1 or (self.frames % 2 and self.frames != 1):
            raise ValueError(
                f"Sampling.frames={self.frames}; want an even number (two frames make a temporal "
                "patch), or 1 for images."
            )
        if (self.height == 0) != (self.width == 0):
            raise ValueError(
                f"Sampling size {self.height} x {self.width}: give both sides, or 0 for both."
            )
        if self.height == 0 and self.max_pixels < self.multiple**2:
            raise ValueError(
                f"Sampling.max_pixels={self.max_pixels} with sides of 0; want at least "
                f"{self.multiple**2}, one token of {self.multiple} x {self.multiple}."
            )


class Clip(NamedTuple):
    """Sampled frames, and the time from one to the next."""

    frames: UInt8[np.ndarray, "F h w 3"]
    seconds_per_frame: float
    times: tuple[float, ...] = ()  # of each frame, in seconds from the clip's start; () not known


# ---- decoding

_IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")  # RIFF: WebP (AVI is told apart below)


def decode(data: bytes, sampling: Sampling) -> Clip:
    """Sampled and resized frames of a clip, or the one frame of an image.

    Frames lie at `linspace(0, frames - 1)` of the clip, a short clip's repeating;
    `seconds_per_frame` is the clip's duration over the frames taken, as Qwen's processors have it.

    Raises MediaError for bytes that hold no picture, are cut off, or do not decode.
    """
    if data.startswith(_IMAGE_MAGIC) and data[8:12] != b"AVI ":
        return Clip(_resize([_open_image(data)], sampling), 0.0)
    with _open(data) as container:
        stream = _stream(container, "video")
        rate = _frame_rate(stream)
        wanted = frame_indices(stream.frames or _count(data), rate, sampling)
        pictures, total = _pictures(stream, wanted)
    if total <= wanted[-1]:  # the header counts frames that an edit list cuts
        wanted = frame_indices(total, rate, sampling)
        with _open(data) as container:
            pictures, total = _pictures(_stream(container, "video"), wanted)
    frames = _resize([pictures[i] for i in wanted], sampling)
    return Clip(frames, total / rate / len(wanted), tuple((wanted / rate).tolist()))


def decode_whole(data: bytes, max_pixels: int = 0) -> Clip:
    """Every frame, for editing: at its native size (less an odd row or column, which `encode`
    cannot hold), or reduced to `max_pixels` with its aspect kept.
    """
    with _open(data) as container:
        stream = _stream(container, "video")
        rate, pictures = _frame_rate(stream), list(_decoded(stream, None))
    if not pictures:
        raise MediaError("no frame of the video decodes")
    width, height = pictures[0].size
    if max_pixels and width * height > max_pixels:
        sampling = Sampling(2, 0, 0, max_pixels=max_pixels, multiple=2)
        frames = _resize(pictures, sampling)
    else:
        frames = np.stack([np.asarray(p)[: height // 2 * 2, : width // 2 * 2] for p in pictures])
    return Clip(frames, 1 / rate)


def frame_indices(total: int, rate: float, sampling: Sampling) -> np.ndarray:
    """Indices of the frames seen, of a clip of `total` frames at `rate` frames a second."""
    n = sampling.frames
    if sampling.fps > 0:
        n = max(2, min(n, math.floor(total / rate * sampling.fps), total) // 2 * 2)
    return np.linspace(0, total - 1, n).round().astype(np.int64)


def _frame_rate(stream: av.VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise MediaError("the video states no frame rate; write it to MP4 with one")
    return float(rate)


def _count(data: bytes) -> int:
    """Frames of a container whose header does not count them (WebM, MPEG-TS)."""
    with _open(data) as container:
        count = sum(p.size > 0 for p in container.demux(_stream(container, "video")))
    if not count:
        raise MediaError("video of 0 frames; want at least one")
    return count


def _pictures(stream: av.VideoStream, wanted: np.ndarray) -> tuple[dict[int, Image.Image], int]:
    """The wanted frames as PIL images at their native size, and how many frames there are."""
    total, pictures = 0, {}
    for total, picture in enumerate(_decoded(stream, set(wanted.tolist())), start=1):
        if picture is not None:
            pictures[total - 1] = picture
    if not total:
        raise MediaError("no frame of the video decodes")
    return pictures, total


def _decoded(stream: av.VideoStream, keep: set[int] | None) -> Iterator[Image.Image | None]:
    """Each frame of the stream, as an image if it is in `keep` (None: all are)."""
    stream.codec_context.thread_count = 1  # workers are processes; threads only fight them
    index = 0
    try:
        for index, frame in enumerate(stream.container.decode(stream)):
            if keep is not None and index not in keep:
                yield None
                continue
            rgb = _reformatter().reformat(frame, format="rgb24", threads=1).to_ndarray()
            upright = np.rot90(rgb, frame.rotation // 90)  # phones film sideways
            yield Image.fromarray(np.ascontiguousarray(upright))
    except av.error.FFmpegError as error:
        raise MediaError(f"video does not decode after frame {index}: {error}") from error


_LOCAL = threading.local()


def _reformatter() -> VideoReformatter:
    """One colour converter a thread: making one costs more than using it, sharing one is unsafe.

    Use it with threads=1: on small frames its own threads cost thirty times the conversion.
    """
    try:
        return _LOCAL.reformatter
    except AttributeError:
        _LOCAL.reformatter = VideoReformatter()
        return _LOCAL.reformatter


def _resize(pictures: list[Image.Image], sampling: Sampling) -> np.ndarray:
    width, height = pictures[0].size
    to = frame_size(height, width, sampling)
    size = (to[1], to[0])
    same = [p if p.size == size else p.resize(size, Image.Resampling.BICUBIC) for p in pictures]
    return np.stack([np.asarray(p) for p in same])


def frame_size(height: int, width: int, sampling: Sampling) -> tuple[int, int]:
    """(height, width) that a frame is resized to: the exact size asked for, or `smart_resize`.

    `smart_resize` (Qwen's): sides rounded to `multiple`, at most `max_pixels`, aspect kept.
    """
    if sampling.height:
        return sampling.height, sampling.width
    m = sampling.multiple
    h, w = max(m, round(height / m) * m), max(m, round(width / m) * m)
    if h * w > sampling.max_pixels:
        shrink = math.sqrt(height * width / sampling.max_pixels)
        h = max(m, math.floor(height / shrink / m) * m)
        w = max(m, math.floor(width / shrink / m) * m)
    return h, w


def decode_sound(data: bytes, rate: int = 16000) -> Float[np.ndarray, " n"] | None:
    """The sound as mono float32 at `rate`, or None for a clip without sound.

    Samples lie where their time stamps put them (a shifted track stays shifted), and where there is
    video the result is as long as the video.
    """
    with _open(data) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        native, chunks, end = stream.codec_context.sample_rate, [], 0
        try:
            for frame in container.decode(stream):
                start = 0 if frame.pts is None else round(frame.pts * frame.time_base * native)
                chunks.append((start, _mono(frame)))
                end = max(end, start + frame.samples)
        except av.error.FFmpegError as error:
            raise MediaError(f"sound does not decode after {end} samples: {error}") from error
        seconds = Fraction(end, native)
        if container.streams.video:
            video = container.streams.video[0]
            if video.duration:
                seconds = video.duration * video.time_base
    placed = np.zeros(max(round(seconds * native), 1), np.float32)
    for start, samples in chunks:
        a, b = max(start, 0), min(start + len(samples), len(placed))
        if a < b:
            placed[a:b] = samples[a - start : b - start]
    return _resample(placed, native, rate, round(seconds * rate))


def _mono(frame: av.AudioFrame) -> np.ndarray:
    x = frame.to_ndarray()
    if not frame.format.is_planar:
        x = x.reshape(-1, frame.layout.nb_channels).T
    if np.issubdtype(x.dtype, np.integer):
        x = x.astype(np.float32) / np.iinfo(x.dtype).max
    return x.astype(np.float32).mean(axis=0)


def _resample(x: np.ndarray, native: int, rate: int, length: int) -> np.ndarray:
    if native != rate:
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
        frames = resampler.resample(_audio_frame(x, native)) + resampler.resample(None)
        x = np.concatenate([f.to_ndarray()[0] for f in frames])
    return np.pad(x[:length], (0, max(0, length - len(x))))


def _open_image(data: bytes) -> Image.Image:
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{len(data)} bytes are not a readable image: {error}") from error


def _open(data: bytes) -> av.container.InputContainer:
    _check_whole(data)
    try:
        return av.open(io.BytesIO(data), mode="r", metadata_errors="ignore")
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(f"{len(data)} bytes are not a readable clip: {error}") from error


def _stream(container: av.container.InputContainer, kind: str):
    streams = [s for s in container.streams if s.type == kind]
    if not streams:
        kinds = [s.type for s in container.streams]
        raise MediaError(f"no {kind} in the clip; its streams are {kinds}")
    return streams[0]


def _check_whole(data: bytes) -> None:
    """An MP4 that was cut off would decode, shorter: its boxes say how long it should be."""
    at = 0
    while data[4:8] == b"ftyp" and at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:  # a 64-bit size follows the name
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        at += size or len(data) - at  # 0: to the end of the file
        if at > len(data) or 0 < size < 8:
            raise MediaError(f"clip is cut off: {len(data)} bytes, its boxes need {at}")


# ---- encoding


def encode(
    frames: UInt8[np.ndarray, "F h w 3"],
    fps: float,
    sound: Float[np.ndarray, " n"] | None = None,
    rate: int = 16000,
) -> bytes:
    """MP4 bytes (H.264, AAC mono), equal for equal input. Sound is cut or padded to the video.

    Key frames come every half second, so that a frame is found quickly.

    Raises MediaError for odd sides (4:2:0 colour has half of them) or no frames.
    """
    count, height, width, _ = frames.shape
    if not count or height % 2 or width % 2 or height < 16 or width < 16:
        raise MediaError(
            f"frames {frames.shape}: want at least one, with even sides of at least 16; crop them"
        )
    fraction = Fraction(fps).limit_denominator(1001)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=fraction)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.colorspace = Colorspace.ITU601  # said, so that no player guesses
        video.codec_context.color_range = ColorRange.MPEG
        video.codec_context.thread_count = 1  # the bitstream depends on the number of threads
        video.codec_context.gop_size = max(1, round(fps / 2))
        video.codec_context.options = {"crf": "18", "preset": "veryfast", "flags": "+bitexact"}
        audio = None
        if sound is not None:
            audio = container.add_stream("aac", rate=rate)
            audio.codec_context.layout = "mono"
            audio.codec_context.bit_rate = 2 * rate
            audio.codec_context.options = {"flags": "+bitexact"}
        for i, picture in enumerate(frames):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = _reformatter().reformat(
                rgb, format="yuv420p", dst_colorspace=Colorspace.ITU601, threads=1
            )
            frame.pts, frame.time_base = i, 1 / fraction
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            length = round(count / fraction * rate)
            track = np.pad(sound[:length], (0, max(0, length - len(sound)))).astype(np.float32)
            for at in range(0, length, 1024):
                frame = _audio_frame(track[at : at + 1024], rate)
                frame.pts, frame.time_base = at, Fraction(1, rate)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return file.getvalue()


def _audio_frame(samples: np.ndarray, rate: int) -> av.AudioFrame:
    planes = np.ascontiguousarray(samples, np.float32)[None]
    frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout="mono")
    frame.sample_rate = rate
    return frame


# ---- patches


def patchify(
    frames: UInt8[np.ndarray, "F h w 3"], vision: Vision
) -> tuple[UInt8[np.ndarray, "E Q C"], tuple[int, int, int]]:
    """Patches of each temporal patch in merge order, and the grid (time, rows, columns) of patches.

    A patch's numbers lie in the order channel, frame, row, column; both orders are Hugging Face's.
    A clip that does not fill its last temporal patch repeats its last frame.

    Raises MediaError if the frames do not divide into merged patches.
    """
    count, height, width, _ = frames.shape
    side = vision.patch * vision.merge
    if height % side or width % side or not count:
        raise MediaError(
            f"frames {frames.shape} do not divide into tokens of {side} x {side} pixels (patch "
            f"{vision.patch}, merge {vision.merge}): set Sampling.height and width to multiples"
        )
    short = -count % vision.temporal
    if short:
        frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
    t, m, p = vision.temporal, vision.merge, vision.patch
    e, r, c = len(frames) // t, height // side, width // side
    x = frames.reshape(e, t, r, m, p, c, m, p, 3)
    # E time, row, row in merge, y, column, column in merge, x, channel
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return x.reshape(e, r * m * c * m, 3 * t * p * p), (e, r * m, c * m)


# ---- cache


@dataclasses.dataclass(frozen=True)
class FrameCache:
    """Decoded clips on disk, so that a data set is decoded once and not once an epoch.

    A file is named by the hash of the clip's bytes and the sampling, and read by memory map; it is
    written under another name and renamed, so processes may share the folder. None keeps nothing.
    """

    folder: str | None

    def decode(self, data: bytes, sampling: Sampling) -> Clip:
        """`decode`, or what it gave before."""
        if not self.folder:
            return decode(data, sampling)
        key = hashlib.sha256(data + repr(sampling).encode()).hexdigest()
        path = pathlib.Path(self.folder, key[:2], f"{key[2:]}.npy")
        try:
            row = np.load(path, mmap_mode="r")
            times = tuple(row["times"][0].tolist())
            return Clip(row["frames"][0], float(row["seconds"][0]), times)
        except FileNotFoundError:
            clip = decode(data, sampling)
        except (ValueError, EOFError):  # a file of a full disk, or without times
            clip = decode(data, sampling)
        frames = ("frames", np.uint8, clip.frames.shape)
        times = ("times", np.float64, (len(clip.times),))
        row = np.zeros(1, [("seconds", np.float64), times, frames])
        row["frames"][0], row["seconds"][0] = clip.frames, clip.seconds_per_frame
        row["times"][0] = clip.times
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.save(file, row)
        os.replace(file.name, path)
        return clip
