"""Media: exact frames, exact samples, Hugging Face's patches, clear errors, one decode a clip."""

import io
import pathlib
import pickle
from fractions import Fraction

import av
import numpy as np
import processors
import pytest
from PIL import Image

from jaxvid.data import media
from jaxvid.data.media import FrameCache, MediaError, Sampling, Vision

CLIPS = pathlib.Path(__file__).parent / "clips"
TINY = Vision(patch=8, temporal=2, merge=2, window=32)


def film(count=12, height=32, width=48):
    """Frame i is grey 20 * i, so a frame can be told from its brightness."""
    levels = 20 * np.arange(count, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def click(at, seconds=1.5, rate=16000):
    """Silence, then a tone from `at` seconds on."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * 440 * t) * (t >= at)).astype(np.float32)


def onset(sound, rate=16000):
    return float(np.argmax(np.abs(sound) > 0.1)) / rate


def level(clip):
    return np.round(clip.frames.mean(axis=(1, 2, 3)) / 20).astype(int).tolist()


# ---- video


def test_frames_are_the_uniform_ones():
    clip = media.decode(media.encode(film(), 8.0), Sampling(4, 16, 16))
    assert level(clip) == [0, 4, 7, 11]  # linspace(0, 11, 4) rounded
    assert clip.seconds_per_frame == pytest.approx(12 / 8 / 4)
    short = media.decode(media.encode(film(2), 8.0), Sampling(4, 16, 16))
    assert level(short) == [0, 0, 1, 1]


def test_frames_by_rate():
    data = media.encode(film(), 8.0)  # 1.5 s
    assert len(media.decode(data, Sampling(8, 16, 16, fps=4.0)).frames) == 6
    assert len(media.decode(data, Sampling(4, 16, 16, fps=4.0)).frames) == 4  # at most `frames`
    assert len(media.decode(data, Sampling(8, 16, 16, fps=0.5)).frames) == 2  # at least 2


def test_colours_and_shapes_survive_encoding():
    y, x = np.mgrid[:64, :64]
    picture = np.stack([x * 4, y * 4, 255 - x * 4], axis=-1).astype(np.uint8)
    frames = np.repeat(picture[None], 8, axis=0)
    back = media.decode(media.encode(frames, 8.0), Sampling(8, 64, 64)).frames
    assert np.abs(back.astype(int) - frames).mean() < 3
    for colour in ([230, 30, 30], [30, 60, 220], [250, 220, 40]):
        flat = np.broadcast_to(np.array(colour, np.uint8), (2, 32, 32, 3))
        got = media.decode(media.encode(flat, 8.0), Sampling(2, 32, 32)).frames
        assert np.abs(got.astype(int) - colour).max() <= 4


def test_encoding_is_deterministic():
    assert media.encode(film(), 8.0, click(0.5)) == media.encode(film(), 8.0, click(0.5))


def test_resize_is_pil_bicubic():
    """The antialiased filter of Hugging Face's processors; a filter without it misses by far."""
    source = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(source).save(file, "png")
    got = media.decode(file.getvalue(), Sampling(2, 16, 24))
    want = Image.fromarray(source).resize((24, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(got.frames, np.asarray(want)[None])
    assert got.seconds_per_frame == 0.0


def test_smart_resize_is_hugging_face_s():
    pil = processors.images("qwen2_vl")
    sampling = Sampling(2, 0, 0, max_pixels=28 * 28 * 40, multiple=28)
    for height, width in [(720, 1280), (100, 900), (160, 160), (64, 90), (331, 77)]:
        want = pil.smart_resize(height, width, 28, 1, sampling.max_pixels)
        assert media.frame_size(height, width, sampling) == want
    with (CLIPS / "dog.mp4").open("rb") as file:
        assert media.decode(file.read(), sampling).frames.shape[1:] == (112, 224, 3)


def test_a_clip_filmed_sideways_is_turned_upright():
    frames = film(4, 32, 48)
    frames[:, :, 24:] = 255 - frames[:, :, 24:]  # the right half differs
    data = bytearray(media.encode(frames, 8.0))
    # The track header's matrix says how to show the frames; 90 degrees clockwise, as phones write.
    at = data.find(b"tkhd") + 4 + 40
    words = [0, 0x10000, 0, 0xFFFF0000, 0, 0, 0, 0, 0x40000000]
    data[at : at + 36] = b"".join(w.to_bytes(4, "big") for w in words)
    turned = media.decode(bytes(data), Sampling(4, 48, 32)).frames
    plain = media.decode(media.encode(frames, 8.0), Sampling(4, 32, 48)).frames
    np.testing.assert_array_equal(turned, np.rot90(plain, -1, axes=(1, 2)))


def test_a_clip_decodes_whole():
    clip = media.decode_whole(media.encode(film(), 8.0))
    assert clip.frames.shape == (12, 32, 48, 3) and clip.seconds_per_frame == 1 / 8
    assert level(clip) == list(range(12))
    dog = (CLIPS / "dog.mp4").read_bytes()
    small = media.decode_whole(dog, max_pixels=64 * 100)
    assert small.frames.shape[1] * small.frames.shape[2] <= 6400
    assert small.frames.shape[2] / small.frames.shape[1] == pytest.approx(16 / 9, rel=0.03)
    assert len(media.encode(small.frames, 1 / small.seconds_per_frame)) < len(dog)


def test_a_header_that_does_not_count_or_counts_wrong():
    """WebM does not say how many frames it has; an edit list hides frames that MP4 counts."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for picture in film():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    assert level(media.decode(file.getvalue(), Sampling(4, 16, 16))) == [0, 4, 7, 11]
    data = bytearray(media.encode(film(), 8.0))
    at = data.find(b"elst") + 12
    half = int.from_bytes(data[at : at + 4], "big") // 2
    data[at : at + 4] = half.to_bytes(4, "big")
    clip = media.decode(bytes(data), Sampling(4, 16, 16))
    shown = len(media.decode_whole(bytes(data)).frames)
    assert 6 <= shown < 12 and level(clip)[-1] == shown - 1


def test_errors_say_what_is_wrong():
    data, seen = media.encode(film(), 8.0, click(0.5)), Sampling(4, 16, 16)
    with pytest.raises(MediaError, match="clip is cut off"):
        media.decode(data[:-100], seen)
    with pytest.raises(MediaError, match="6 bytes are not a readable clip"):
        media.decode(b"hello!", seen)
    with pytest.raises(MediaError, match="0 bytes are not a readable clip"):
        media.decode(b"", seen)
    with pytest.raises(MediaError, match="not a readable image"):
        media.decode(b"\x89PNG and no more", seen)
    with pytest.raises(MediaError, match=r"no video in the clip; its streams are \['audio'\]"):
        media.decode(sound_only(), seen)
    with pytest.raises(MediaError, match="even sides"):
        media.encode(np.zeros((2, 33, 32, 3), np.uint8), 8.0)
    with pytest.raises(MediaError, match="at least one"):
        media.encode(np.zeros((0, 32, 32, 3), np.uint8), 8.0)
    with pytest.raises(ValueError, match="want an even number"):
        Sampling(frames=3)
    with pytest.raises(ValueError, match="give both sides"):
        Sampling(height=0)
    with pytest.raises(ValueError, match="max_pixels=0 with sides of 0"):
        Sampling(height=0, width=0)


def test_a_stream_of_broken_pictures_is_an_error():
    data = bytearray(media.encode(film(), 8.0))
    at = data.find(b"mdat") + 4
    end = at - 8 + int.from_bytes(data[at - 8 : at - 4], "big")
    data[at:end] = bytes(end - at)
    with pytest.raises(MediaError, match="decode"):
        media.decode(bytes(data), Sampling(4, 16, 16))


# ---- sound


def sound_only():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.codec_context.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("rate", [16000, 24000, 48000])
def test_sound_comes_back_in_place_and_as_long_as_the_video(rate):
    data = media.encode(film(), 8.0, click(0.5, 1.5, rate), rate)
    sound = media.decode_sound(data)
    assert sound.dtype == np.float32 and len(sound) == 24000
    assert onset(sound) == pytest.approx(0.5, abs=0.004)
    assert np.abs(sound - click(0.5)).mean() < 0.01


def test_sound_is_cut_or_padded_to_the_video():
    for seconds in (0.6, 3.0):
        assert len(media.decode_sound(media.encode(film(), 8.0, click(0.2, seconds)))) == 24000
    assert media.decode_sound(media.encode(film(), 8.0)) is None


def test_a_shifted_track_stays_shifted():
    """Remuxed, its packets untouched: only their time stamps say that it is late or early."""
    data = media.encode(film(), 8.0, click(0.5))
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
        sound = media.decode_sound(file.getvalue())
        assert onset(sound) == pytest.approx(0.5 + shift, abs=0.004)
        assert len(sound) == 24000


# ---- patches


def test_patches_equal_hugging_face_s():
    pil = processors.images("qwen2_vl")
    frame = np.random.default_rng(0).integers(0, 256, (1, 48, 32, 3)).astype(np.uint8)
    patches, grid = media.patchify(frame, TINY)
    process = pil.Qwen2VLImageProcessorPil()
    want, rows, columns = process.patchify(frame[0].transpose(2, 0, 1), 8, 2, 2)
    assert grid == (1, rows, columns) == (1, 6, 4)
    np.testing.assert_array_equal(patches[0], want)


def test_every_pixel_lands_where_the_order_says():
    frames = np.random.default_rng(0).integers(0, 256, (4, 48, 32, 3)).astype(np.uint8)
    patches, (e, rows, columns) = media.patchify(frames, TINY)
    assert patches.shape == (2, 24, 3 * 2 * 8 * 8) and (e, rows, columns) == (2, 6, 4)
    q = 0
    for r in range(0, rows, 2):
        for c in range(0, columns, 2):
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                y, x = (r + i) * 8, (c + j) * 8
                box = frames[2:4, y : y + 8, x : x + 8]  # the second temporal patch
                np.testing.assert_array_equal(patches[1, q], box.transpose(3, 0, 1, 2).reshape(-1))
                q += 1


def test_patchify_pads_time_and_refuses_other_sizes():
    frames = film(3, 16, 16)
    patches, grid = media.patchify(frames, TINY)
    assert grid == (2, 2, 2)
    again, _ = media.patchify(np.concatenate([frames, frames[-1:]]), TINY)
    np.testing.assert_array_equal(patches, again)
    with pytest.raises(MediaError, match="tokens of 16 x 16 pixels"):
        media.patchify(film(2, 24, 32), TINY)


# ---- cache


def test_cache_decodes_once(tmp_path, monkeypatch):
    data, sampling = media.encode(film(), 8.0), Sampling(4, 16, 16)
    cache = pickle.loads(pickle.dumps(FrameCache(str(tmp_path / "cache"))))
    first = cache.decode(data, sampling)
    other = cache.decode(data, Sampling(2, 16, 16))

    def refuse(data, sampling, vision):
        raise AssertionError("decoded again")

    monkeypatch.setattr(media, "decode", refuse)
    again = cache.decode(data, sampling)
    np.testing.assert_array_equal(again.frames, first.frames)
    assert again.seconds_per_frame == first.seconds_per_frame
    assert isinstance(again.frames, np.memmap) and len(other.frames) == 2
    patches, _ = media.patchify(again.frames, TINY)
    assert patches.shape == (2, 4, 384)
    with pytest.raises(AssertionError, match="decoded again"):
        FrameCache(None).decode(data, sampling)


def test_a_broken_cache_file_is_written_again(tmp_path):
    data, sampling = media.encode(film(), 8.0), Sampling(4, 16, 16)
    cache = FrameCache(str(tmp_path))
    first = np.array(cache.decode(data, sampling).frames)
    (file,) = tmp_path.rglob("*.npy")
    for content in (file.read_bytes()[:-10], b""):
        file.write_bytes(content)
        np.testing.assert_array_equal(cache.decode(data, sampling).frames, first)
    assert not list(tmp_path.rglob("*.part"))


# ---- real footage


@pytest.mark.parametrize("name, seconds", [("dog", 1.517), ("bunny", 4.0)])
def test_real_clips_decode_and_encode(name, seconds):
    data = (CLIPS / f"{name}.mp4").read_bytes()
    clip = media.decode(data, Sampling(8, 144, 256))
    sound = media.decode_sound(data)
    assert clip.frames.shape == (8, 144, 256, 3) and clip.frames.std() > 20
    assert len(sound) / 16000 == pytest.approx(seconds, abs=0.001) and np.abs(sound).max() > 0.01
    back = media.encode(clip.frames, 1 / clip.seconds_per_frame, sound)
    again = media.decode(back, Sampling(8, 144, 256))
    assert np.abs(again.frames.astype(int) - clip.frames).mean() < 4
    assert len(media.decode_sound(back)) == pytest.approx(len(sound), abs=16)
