"""Video, images and sound: encoded bytes in, uint8 pixels or float32 samples out, and back.

Pixels stay uint8 up to the device, where the model normalises them: shipping float32 costs four
times the bytes and, on the host, as much time as decoding. Which frames are taken, how they are
resized and cut into patches is in `frames`, whose names are also found here; `plan` says what comes
out before anything is decoded.
What this leaves out: streaming; a clip is decoded whole.
"""

import dataclasses
import hashlib
import io
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from jaxtyping import Float, Int, UInt8
from PIL import ExifTags, Image, ImageOps

from jaxvid.data import boxes
from jaxvid.data.frames import QWEN as QWEN
from jaxvid.data.frames import MediaError as MediaError
from jaxvid.data.frames import Sampling as Sampling
from jaxvid.data.frames import cut, fit, frame_indices, frame_size, grid, shown, smart_resize
from jaxvid.data.frames import patchify as patchify
from jaxvid.prompting import Vision as Vision


class Clip(NamedTuple):
    """Sampled frames, and the time from one to the next."""

    frames: UInt8[np.ndarray, "F h w 3"]
    seconds_per_frame: float


# ---- decoding

_IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff")


class Plan(NamedTuple):
    """What decoding gives, known before a frame is decoded: tokens are counted from it."""

    kind: Literal["video", "image", "audio"]  # "audio" is sound alone: no frames, a grid of 0
    indices: Int[np.ndarray, "n"]  # of the frames taken, among all `total` frames
    total: int
    rate: float  # frames a second; 0 for an image
    original: tuple[int, int]  # (height, width) as it is shown: turned upright
    size: tuple[int, int]  # (height, width) that frames are brought to
    grid: tuple[int, int, int]  # (time, rows, columns) in patches
    seconds: float  # from one temporal patch to the next; 0 for an image
    times: Float[np.ndarray, "t"]  # of the middle of each temporal patch, as Qwen3-VL states them
    sound: Fraction  # seconds of sound, as `decode_sound` gives it; 0 is none


def plan(data: bytes, sampling: Sampling, vision: Vision = QWEN) -> Plan:
    """Frames, size, grid and seconds of a clip or an image, from its header; no frame is decoded.

    Packets are counted, because headers do not say how many frames they hold (WebM) or count those
    that an edit list hides (MP4).

    Raises MediaError for bytes that hold neither picture nor sound, are cut off, or whose pictures
    the sampling does not bring to whole tokens.
    """
    if _is_image(data):
        original = _image_size(data)
        size = frame_size(*original, sampling, vision)
        patches = grid(shown(*original, vision), *size, vision)
        once = np.zeros(1, np.int64)
        return Plan("image", once, 1, 0.0, original, size, patches, 0.0, once / 1, Fraction(0))
    told, heard = _header(data), _seconds_of_sound(data)
    if told is None:
        none = np.zeros(0, np.int64)
        flat = (0, 0)
        return Plan("audio", none, 0, 0.0, flat, flat, (0, 0, 0), 0.0, none / 1, heard)
    return planned(told.total, told.rate, told.original, heard, sampling, vision)


def planned(
    total: int,
    rate: float,
    original: tuple[int, int],
    heard: Fraction,
    sampling: Sampling,
    vision: Vision,
) -> Plan:
    """The plan of a video of `total` frames at `rate` a second, `original` pixels (height, width)
    and so many seconds of sound."""
    indices = frame_indices(total, rate, sampling)
    n, t = len(indices), vision.temporal
    size = frame_size(*original, sampling, vision, n)
    patches = grid(n, *size, vision)
    last = np.minimum(np.arange(1, patches[0] + 1) * t, n) - 1
    return Plan(
        kind="video",
        indices=indices,
        total=total,
        rate=rate,
        original=original,
        size=size,
        grid=patches,
        seconds=total / rate / n * t,
        times=(indices[::t] / rate + indices[last] / rate) / 2,  # as transformers rounds
        sound=heard,
    )


def require(told: Plan, kind: Literal["video", "image", "audio"], *, sound: bool = False) -> None:
    """Raises MediaError if the media is not of this kind, or has no sound where it is wanted."""
    if told.kind != kind:
        words = {"video": "a video", "image": "an image", "audio": "sound alone"}
        raise MediaError(
            f"{words[told.kind]} came where {words[kind]} is wanted: correct the record's kind, or "
            f"give it the other media"
        )
    if sound and not told.sound:
        raise MediaError(
            f"the {kind} has no sound, and sound is wanted: leave it out, or add a track of silence"
        )


def decode(data: bytes, sampling: Sampling, vision: Vision = QWEN) -> Clip:
    """Sampled and resized frames of a clip, or the one frame of an image, as `plan` says.

    `seconds_per_frame` is the clip's duration over the frames taken, as Qwen's processors have it.

    Raises MediaError for bytes that hold no picture, are cut off, or do not decode.
    """
    if _is_image(data):
        image = _open_image(data)
        size = frame_size(image.height, image.width, sampling, vision)
        return Clip(fit(cut(image, vision), size, vision), 0.0)
    told, video = _header(data), lambda container: _stream(container, "video")
    with _open(data) as container:
        stream = video(container)
        indices = frame_indices(told.total, told.rate, sampling)
        pictures, total = _pictures(stream, indices)
    if total != told.total:  # packets without a frame, or with two; as many frames are taken
        indices = np.linspace(0, total - 1, len(indices)).round().astype(np.int64)
        with _open(data) as container:
            pictures, total = _pictures(video(container), indices)
    first = pictures[int(indices[0])]
    if (first.height, first.width) != told.original:
        raise MediaError(
            f"frames are {first.height} x {first.width} pixels, and the header says "
            f"{told.original[0]} x {told.original[1]}: write the clip again"
        )
    size = frame_size(*told.original, sampling, vision, len(indices))
    frames = fit([pictures[i] for i in indices], size, vision)
    return Clip(frames, told.total / told.rate / len(indices))


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
        frames = fit(pictures, smart_resize(height, width, 2, 0, max_pixels))
    else:
        frames = np.stack([np.asarray(p)[: height // 2 * 2, : width // 2 * 2] for p in pictures])
    return Clip(frames, 1 / rate)


class _Header(NamedTuple):
    total: int  # frames that are shown
    rate: float  # a second
    original: tuple[int, int]  # (height, width), upright


def _header(data: bytes) -> _Header | None:
    """What the container says of its pictures; None where it holds sound alone."""
    with _open(data) as container:
        stream = _find(container, "video")
        if stream is None:
            _stream(container, "audio")  # an error where there is neither
            return None
        rate = _frame_rate(stream)
        shown = stream.codec_context.height, stream.codec_context.width
        if boxes.quarter_turns(data, stream.id) % 2:  # phones film sideways
            shown = shown[::-1]
        # An edit list has frames decoded that are thrown away: their packets say so.
        packets = container.demux(stream)
        total = sum(p.size > 0 and not p.is_discard for p in packets)
    if not total or not min(shown):
        raise MediaError(f"video of {total} frames of {shown[0]} x {shown[1]}; want at least one")
    return _Header(total, rate, shown)


def _frame_rate(stream: av.VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise MediaError("the video states no frame rate; write it to MP4 with one")
    return float(rate)


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
            upright = np.rot90(rgb, round(frame.rotation / 90))  # phones film sideways
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


def decode_sound(data: bytes, rate: int = 16000) -> Float[np.ndarray, " n"] | None:
    """The sound as mono float32 at `rate`, or None for a clip without sound.

    Samples lie where their time stamps put them (a shifted track stays shifted), and where there is
    video the result is as long as the video: `Plan.sound` seconds.
    """
    if _is_image(data):
        return None
    with _open(data) as container:
        stream = _find(container, "audio")
        if stream is None:
            return None
        native, chunks, end = stream.codec_context.sample_rate, [], 0
        try:
            for frame in container.decode(stream):
                start = 0 if frame.pts is None else round(frame.pts * frame.time_base * native)
                chunks.append((start, _mono(frame)))
                end = max(end, start + frame.samples)
        except av.error.FFmpegError as error:
            raise MediaError(f"sound does not decode after {end} samples: {error}") from error
    seconds = _seconds_of_sound(data)
    placed = np.zeros(max(round(seconds * native), 1), np.float32)
    for start, samples in chunks:
        a, b = max(start, 0), min(start + len(samples), len(placed))
        if a < b:
            placed[a:b] = samples[a - start : b - start]
    return _resample(placed, native, rate, round(seconds * rate))


def _seconds_of_sound(data: bytes) -> Fraction:
    """As long as the video or, without one, to the end of the last packet of sound; 0: none."""
    with _open(data) as container:
        sound, video = _find(container, "audio"), _find(container, "video")
        if sound is None:
            return Fraction(0)
        if video is not None and video.duration:
            return video.duration * video.time_base
        if video is None:
            times = [(p.pts or 0) + (p.duration or 0) for p in container.demux(sound)]
            return max([*times, 0]) * sound.time_base
    told = _header(data)  # WebM does not say how long its tracks are
    return told.total / Fraction(told.rate).limit_denominator(100_000)


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


def _is_image(data: bytes) -> bool:
    webp = data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    return webp or data.startswith(_IMAGE_MAGIC)


def _open_image(data: bytes) -> Image.Image:
    """Upright, and what is transparent on white, as transformers has it."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if not image.has_transparency_data:
            return image.convert("RGB")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{len(data)} bytes are not a readable image: {error}") from error


def _image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an image as it is shown, from its header."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            sideways = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size if sideways else image.size[::-1]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{len(data)} bytes are not a readable image: {error}") from error


def _open(data: bytes) -> av.container.InputContainer:
    needed = boxes.length(data)
    if needed > len(data):  # it would decode, shorter
        raise MediaError(f"clip is cut off: {len(data)} bytes, its boxes need {needed}")
    try:
        return av.open(io.BytesIO(data), mode="r", metadata_errors="ignore")
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(f"{len(data)} bytes are not a readable clip: {error}") from error


def _find(container: av.container.InputContainer, kind: str):
    """The first stream of a kind, or None. A cover picture of a sound file is no video."""
    cover = av.stream.Disposition.attached_pic
    found = (s for s in container.streams if s.type == kind and cover not in s.disposition)
    return next(found, None)


def _stream(container: av.container.InputContainer, kind: str):
    stream = _find(container, kind)
    if stream is None:
        kinds = [s.type for s in container.streams]
        raise MediaError(f"no {kind} in the clip; its streams are {kinds}")
    return stream


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


# ---- cache


@dataclasses.dataclass(frozen=True)
class FrameCache:
    """Decoded clips on disk, so that a data set is decoded once and not once an epoch.

    A file is named by the hash of the clip's bytes, the sampling and the model's geometry, and read
    by memory map; it is written under another name and renamed, so processes may share the folder.
    None keeps nothing.
    """

    folder: str | None

    def decode(self, data: bytes, sampling: Sampling, vision: Vision = QWEN) -> Clip:
        """`decode`, or what it gave before."""
        if not self.folder:
            return decode(data, sampling, vision)
        key = hashlib.sha256(data + repr((sampling, vision)).encode()).hexdigest()
        path = pathlib.Path(self.folder, key[:2], f"{key[2:]}.npy")
        try:
            row = np.load(path, mmap_mode="r")
            return Clip(row["frames"][0], float(row["seconds"][0]))
        except FileNotFoundError:
            clip = decode(data, sampling, vision)
        except (ValueError, EOFError):  # a file of a full disk
            clip = decode(data, sampling, vision)
        frames = ("frames", np.uint8, clip.frames.shape)
        row = np.zeros(1, [("seconds", np.float64), frames])
        row["frames"][0], row["seconds"][0] = clip.frames, clip.seconds_per_frame
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.save(file, row)
        os.replace(file.name, path)
        return clip
