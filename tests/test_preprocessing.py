"""A plan is what decoding gives, and decoding what Hugging Face's processors give."""

import io
from fractions import Fraction

import av
import numpy as np
import processors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxvid.data import boxes, frames, media
from jaxvid.data.media import MediaError, Sampling, Vision

TINY = Vision(patch=8, temporal=2, merge=2, window=32)


def clip(
    container="mp4",
    codec="libx264",
    *,
    count=12,
    height=32,
    width=48,
    rate=Fraction(8),
    turn=0,
    sound="",
):
    """Frame i is of grey 60 + 5 i; `sound` is a codec for a second of silence."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if codec == "libx264":
            stream.codec_context.options = {"preset": "veryfast", "crf": "12"}
        if turn:
            stream.set_display_rotation(turn)
        track = out.add_stream(sound, rate=48000, layout="mono") if sound else None
        for i in range(count):
            grey = np.full((height, width, 3), 60 + 5 * i, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        out.mux(stream.encode(None))
        for at in range(0, 48000 if sound else 0, 960):
            silence = np.zeros((1, 960), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, at, Fraction(1, 48000)
            out.mux(track.encode(frame))
        if track:
            out.mux(track.encode(None))
    return file.getvalue()


def picture(height, width, kind="png", orientation=1, mode="RGB"):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (height, width, len(mode))).astype(np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(array, mode).save(file, kind, exif=exif)
    return file.getvalue()


def levels(got):
    return np.round((got.mean(axis=(1, 2, 3)) - 60) / 5).astype(int).tolist()


def same(data, sampling, vision=TINY, *, told=None):
    """The plan of a clip or an image, held against what decoding gives."""
    told = media.plan(data, sampling, vision) if told is None else told
    got = media.decode(data, sampling, vision)
    assert got.frames.shape == (len(told.indices), *told.size, 3)
    assert media.patchify(got.frames, vision)[1] == told.grid
    assert got.seconds_per_frame * vision.temporal == pytest.approx(told.seconds, rel=1e-12)
    sound = media.decode_sound(data)
    assert (0 if sound is None else len(sound)) == round(told.sound * 16000)
    assert len(told.times) == told.grid[0]
    return told, got.frames


# ---- the plan


@given(
    st.integers(1, 24),
    st.sampled_from([(32, 48), (48, 32), (16, 64), (64, 64)]),
    st.sampled_from([Fraction(1), Fraction(8), Fraction(30000, 1001), Fraction(25)]),
    st.sampled_from([0, 90, 180, 270]),
    st.sampled_from(
        [("mp4", "libx264", "aac"), ("mov", "libx264", None), ("webm", "libvpx", None)]
    ),
    st.sampled_from(["qwen_vl_utils", "qwen2_vl", "qwen3_vl", "uniform"]),
    st.sampled_from([0.0, 1.0, 2.0, 7.0]),
)
@settings(max_examples=40, deadline=None)
def test_a_plan_is_what_decoding_gives(count, size, rate, turn, kind, policy, fps):
    container, codec, sound = kind
    height, width = size
    data = clip(
        container,
        codec,
        count=count,
        height=height,
        width=width,
        rate=rate,
        turn=turn,
        sound=sound,
    )
    total = 16 * 16 * 40 if policy != "uniform" else 0
    sampling = Sampling(
        8, 0, 0, fps=fps, policy=policy, max_pixels=1024, min_pixels=256, total_pixels=total
    )
    told, got = same(data, sampling)
    assert told.kind == "video" and told.total == count
    assert told.original == ((width, height) if turn % 180 else (height, width))
    assert told.rate == pytest.approx(float(rate), rel=1e-3)
    want = [int(i) for i in told.indices]
    assert np.abs(np.subtract(levels(got), want)).max() <= (codec == "libvpx")  # VP8 is lossy


@pytest.mark.parametrize(
    "container, codec, sound",
    [
        ("matroska", "libx264", "aac"),
        ("webm", "libvpx-vp9", "libopus"),
        ("mpegts", "libx264", "aac"),
        ("avi", "mpeg4", "libmp3lame"),
        ("flv", "flv", ""),
        ("mpeg", "mpeg2video", ""),
    ],
)
def test_containers_that_count_differently(container, codec, sound):
    """WebM and MPEG-TS do not say how many frames they hold, nor WebM how long its sound is."""
    data = clip(container, codec, rate=Fraction(25), count=30, sound=sound)
    told, _ = same(data, Sampling(6, 16, 32))
    assert told.total == 30 and bool(told.sound) == bool(sound)
    assert told.indices.tolist() == [0, 6, 12, 17, 23, 29]
    assert told.seconds == pytest.approx(2 * 30 / 25 / 6, rel=1e-3)


@pytest.mark.parametrize("container, codec", [("matroska", "libx264"), ("mov", "libx264")])
@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_turned_clip_is_planned_upright(container, codec, turn):
    data = clip(container, codec, turn=turn, count=4)
    with av.open(io.BytesIO(data)) as file:
        track = file.streams.video[0].id
        assert boxes.quarter_turns(data, track) == round(next(file.decode()).rotation / 90) % 4
    told, _ = same(data, Sampling(4, 0, 0, max_pixels=2**14))
    assert told.size == told.original == ((48, 32) if turn % 180 else (32, 48))


def test_a_turn_of_the_whole_movie_counts():
    """The movie header has a matrix too; players apply both."""
    data = bytearray(clip(count=4))
    at = data.find(b"mvhd") + 4 + 36
    words = [0, 0x10000, 0, 0xFFFF0000, 0, 0, 0, 0, 0x40000000]
    data[at : at + 36] = b"".join(w.to_bytes(4, "big") for w in words)
    assert same(bytes(data), Sampling(4, 48, 32))[0].original == (48, 32)


@pytest.mark.parametrize("begin, seconds", [(0, 0.75), (0.5, 1.0), (0.3, 0.5)])
def test_frames_that_an_edit_list_hides_are_not_planned(begin, seconds):
    """The header still counts 12; the first or the last of them are decoded but never shown."""
    data = bytearray(
        media.encode(
            np.repeat(np.arange(12, dtype=np.uint8) * 20, 32 * 48 * 3).reshape(12, 32, 48, 3), 8.0
        )
    )
    at = data.find(b"elst") + 12
    unit = int.from_bytes(data[at : at + 4], "big") / 1.5  # of the movie, a second
    start = int.from_bytes(data[at + 4 : at + 8], "big") + round(begin * 16384)
    data[at : at + 8] = round(seconds * unit).to_bytes(4, "big") + start.to_bytes(4, "big")
    told, got = same(bytes(data), Sampling(4, 16, 16))
    shown = len(media.decode_whole(bytes(data)).frames)
    assert told.total == shown < 12
    first = round(got[0].mean() / 20)
    assert (first > 0) == (begin > 0)


def test_shifted_sound_is_planned_as_long_as_the_video():
    data = media.encode(np.zeros((12, 32, 48, 3), np.uint8), 8.0, np.ones(30000, np.float32) / 2)
    for shift in (0.25, -0.25):
        file = io.BytesIO()
        with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="mp4") as target:
            pairs = {s.index: target.add_stream_from_template(s) for s in source.streams}
            for packet in source.demux():
                if packet.dts is None:
                    continue
                if packet.stream.type == "audio":
                    offset = round(shift / packet.time_base)
                    packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                packet.stream = pairs[packet.stream.index]
                target.mux(packet)
        assert same(file.getvalue(), Sampling(4, 16, 16))[0].sound == 1.5


@pytest.mark.parametrize(
    "codec, container",
    [("aac", "mp4"), ("libmp3lame", "mp3"), ("libopus", "ogg"), ("pcm_s16le", "wav")],
)
def test_sound_alone_is_planned(codec, container):
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        track = out.add_stream(codec, rate=48000, layout="mono")
        for at in range(0, 48000, 960):
            tone = np.sin(np.arange(at, at + 960) / 20)[None].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, at, Fraction(1, 48000)
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    told = media.plan(file.getvalue(), Sampling(4, 16, 16), TINY)
    sound = media.decode_sound(file.getvalue())
    assert told.kind == "audio" and told.grid == (0, 0, 0) and not len(told.indices)
    assert len(sound) == round(told.sound * 16000)
    assert 1 <= told.sound < 1.1 and np.abs(sound[1000:15000]).max() > 0.5


def test_packets_that_hold_no_frame_change_no_count(monkeypatch):
    """Tokens are counted before: as many frames are taken, of those that there are."""
    data, sampling = clip(), Sampling(8, 16, 16, fps=4.0)
    real = media._header(data)
    monkeypatch.setattr(media, "_header", lambda _: real._replace(total=16))
    told, got = same(data, sampling)
    assert told.grid[0] == 4 and levels(got) == [0, 2, 3, 5, 6, 8, 9, 11]


def test_a_header_of_another_size_is_an_error(monkeypatch):
    monkeypatch.setattr(boxes, "quarter_turns", lambda data, track: 1)
    with pytest.raises(MediaError, match="frames are 32 x 48 pixels, and the header says 48 x 32"):
        media.decode(clip(), Sampling(4, 16, 16))


def test_a_cover_picture_is_no_video():
    """Music files carry their cover as a video stream of one picture."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        track, cover = out.add_stream("aac", rate=16000, layout="mono"), out.add_stream("png")
        cover.width, cover.height, cover.pix_fmt = 32, 32, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        art = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        out.mux(cover.encode(art))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate, silence.pts, silence.time_base = 16000, 0, Fraction(1, 16000)
        for packets in (track.encode(silence), track.encode(None), cover.encode(None)):
            out.mux(packets)
    told = media.plan(file.getvalue(), Sampling(4, 16, 16), TINY)
    assert told.kind == "audio" and len(media.decode_sound(file.getvalue())) < 16000


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_image_is_planned_upright(kind, orientation):
    data = picture(32, 80, kind, orientation)
    told, got = same(data, Sampling(8, 0, 0, max_pixels=2048))
    assert told.kind == "image" and told.grid[0] == 1 and told.seconds == 0 == told.sound
    assert told.original == ((80, 32) if orientation > 4 else (32, 80))


def test_nothing_is_decoded_for_a_plan(monkeypatch):
    data, still = clip(count=8, sound="aac"), picture(32, 32)

    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(media, "_decoded", refuse)
    monkeypatch.setattr(media, "_open_image", refuse)
    monkeypatch.setattr(media, "_mono", refuse)
    for item in (data, still):
        assert media.plan(item, Sampling(8, 16, 16), TINY).grid[1:] == (2, 2)
        with pytest.raises(AssertionError, match="decoded"):
            media.decode(item, Sampling(8, 16, 16), TINY)


def test_times_are_qwen3_vl_s():
    """The middle of the first and last frame of a temporal patch, the last frame repeating."""
    processing = processors.processing("qwen3_vl")
    stamp = processing.Qwen3VLProcessor._calculate_timestamps
    for count, fps in [(12, 2.0), (23, 3.0), (5, 8.0)]:
        sampling = Sampling(9, 16, 16, policy="qwen3_vl", fps=fps)
        told = media.plan(clip(count=count), sampling, TINY)
        want = stamp(None, told.indices, told.rate, TINY.temporal)
        np.testing.assert_allclose(told.times, want, rtol=1e-12)


# ---- what came and what was wanted


def test_another_kind_than_wanted_is_an_error():
    sampling = Sampling(4, 16, 16)
    silent, image = media.plan(clip(), sampling, TINY), media.plan(picture(32, 32), sampling, TINY)
    with pytest.raises(MediaError, match="an image came where a video is wanted"):
        media.require(image, "video")
    with pytest.raises(MediaError, match="a video came where an image is wanted"):
        media.require(silent, "image")
    with pytest.raises(MediaError, match="a video came where sound alone is wanted"):
        media.require(silent, "audio")
    with pytest.raises(MediaError, match="the video has no sound, and sound is wanted"):
        media.require(silent, "video", sound=True)
    media.require(silent, "video")
    media.require(image, "image")
    media.require(media.plan(clip(sound="aac"), sampling, TINY), "video", sound=True)


def test_plans_of_what_cannot_be_seen_are_errors():
    with pytest.raises(MediaError, match="divide into tokens of 16 x 16"):
        media.plan(clip(), Sampling(4, 24, 24), TINY)
    with pytest.raises(MediaError, match="clip is cut off"):
        media.plan(clip()[:-100], Sampling(4, 16, 16), TINY)
    with pytest.raises(MediaError, match="not a readable image"):
        media.plan(b"\x89PNG and no more", Sampling(4, 16, 16), TINY)
    with pytest.raises(MediaError, match="at most 200 times"):
        media.plan(picture(1, 300), Sampling(4, 0, 0, max_pixels=2**16), TINY)


# ---- pixels


def test_transparency_lies_on_white_as_in_transformers():
    processors.metadata(1, 1.0)
    from transformers.image_transforms import convert_to_rgb

    for mode in ("RGBA", "LA"):
        data = picture(32, 48, mode=mode)
        want = convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
        np.testing.assert_array_equal(media.decode(data, Sampling(2, 32, 48)).frames[0], want)
        assert want.std() > 20


def textured(count, height, width):
    """A clip of moving shapes with edges, as bytes, and its frames as they decode."""
    y, x = np.mgrid[:height, :width]
    video = [
        np.stack([(x * 5 + 9 * i) % 256, (y * 7 + x) % 256, ((x - 4 * i) // 9 % 2) * 200], axis=-1)
        for i in range(count)
    ]
    data = media.encode(np.array(video, np.uint8), 8.0)
    return data, media.decode_whole(data).frames


def close(got, want):
    """Within one grey level, and one value in 10,000 within two: torch rounds the weights of its
    filter to 16 bits and the pixels after each of its two passes."""
    gap = np.abs(got.astype(float) - want)
    assert gap.max() <= 2 and (gap > 1).mean() < 1e-4 and (gap > 0).mean() < 0.01


@pytest.mark.parametrize(
    "family, vision, size",
    [
        ("qwen2_vl", frames.QWEN, {"shortest_edge": 3136, "longest_edge": 12000}),
        ("qwen3_vl", Vision(patch=16), {"shortest_edge": 4096, "longest_edge": 90000}),
    ],
)
def test_a_video_is_what_transformers_makes_of_it(family, vision, size):
    """From bytes to patches: same frames, same grid, and pixels but for rounding."""
    module = processors.videos(family)
    name = {"qwen2_vl": "Qwen2VLVideoProcessor", "qwen3_vl": "Qwen3VLVideoProcessor"}[family]
    process = vars(module)[name](size=size, do_rescale=False, do_normalize=False)
    data, whole = textured(20, 90, 160)
    want = process(
        whole,
        do_sample_frames=True,
        fps=3.0,
        cap_pixels_per_frame=False,
        video_metadata=processors.metadata(20, 8.0),
        return_tensors="np",
    )
    limits = {"min_pixels": size["shortest_edge"]}
    limits["max_pixels" if family == "qwen2_vl" else "total_pixels"] = size["longest_edge"]
    sampling = Sampling(768, 0, 0, fps=3.0, policy=family, min_frames=4, **limits)
    told = media.plan(data, sampling, vision)
    assert [list(told.grid)] == want["video_grid_thw"].tolist()
    got, _ = media.patchify(media.decode(data, sampling, vision).frames, vision)
    close(got.reshape(-1, got.shape[-1]), want["pixel_values_videos"])
    assert told.size != told.original


@pytest.mark.parametrize(
    "family, name, fit, size",
    [
        ("llava_onevision", "LlavaOnevisionVideoProcessor", "exact", {"height": 70, "width": 70}),
        ("llava_next_video", "LlavaNextVideoVideoProcessor", "crop", {"shortest_edge": 70}),
    ],
)
def test_a_video_of_one_size_is_what_transformers_makes_of_it(family, name, fit, size):
    module = processors.videos(family)
    crop = {"crop_size": {"height": 70, "width": 70}} if fit == "crop" else {}
    process = vars(module)[name](size=size, do_rescale=False, do_normalize=False, **crop)
    data, whole = textured(20, 90, 160)
    want = process(
        whole,
        do_sample_frames=True,
        num_frames=7,
        video_metadata=processors.metadata(20, 8.0),
        return_tensors="np",
    )["pixel_values_videos"][0]
    vision = Vision(patch=14, merge=1, temporal=1, size=70, fit=fit)
    told, got = same(data, Sampling(7, 70, 70, policy="uniform"), vision)
    assert told.grid == (7, 5, 5)
    close(got.transpose(0, 3, 1, 2), want)
