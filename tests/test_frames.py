"""Frames, sizes and patches equal those of the libraries that the models were trained with."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import peers
import processors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxvid.data import frames
from jaxvid.data.frames import MediaError, Sampling, Vision

QWEN3 = Vision(patch=16)
RATES = (1.0, 8.0, 23.976, 25.0, 29.97, 60.0)


def pixels(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def free(policy="qwen_vl_utils", **limits):
    """A sampling that keeps the aspect."""
    return Sampling(8, 0, 0, policy=policy, **limits)


# ---- which frames


@pytest.mark.parametrize("n", [2, 4, 8, 16, 30, 64])
def test_frames_by_count_are_qwen_vl_utils_s(n):
    """fetch_video: torch.linspace(0, total_frames - 1, nframes).round().long()."""
    torch = processors.torch()
    for total in [*range(n, 300), 1000, 2999]:
        want = torch.linspace(0, total - 1, n).round().long().numpy()
        np.testing.assert_array_equal(frames.frame_indices(total, 25.0, Sampling(n)), want)


def test_long_clips_round_as_float32_does():
    """float64 takes frame 4159 here; torch, in float32, its neighbour."""
    torch = processors.torch()
    want = torch.linspace(0, 12706, 768).round().long().numpy()
    np.testing.assert_array_equal(frames.frame_indices(12707, 25.0, Sampling(768)), want)
    assert (np.linspace(0, 12706, 768).round().astype(int) != want).any()


def test_frames_by_rate_are_qwen_vl_utils_s():
    """smart_nframes and the indices of its readers, as they ran on 300 clips."""
    arrays, _ = peers.load("qwen_frames")
    ends = np.cumsum(arrays["counts"])
    for row, count, end in zip(arrays["clips"], arrays["counts"], ends):
        total, rate, fps, least, most = row
        sampling = Sampling(int(most), fps=float(fps), min_frames=int(least))
        got = frames.frame_indices(int(total), float(rate), sampling)
        np.testing.assert_array_equal(got, arrays["indices"][end - count : end], err_msg=str(row))


def test_frames_by_count_are_qwen2_vl_s():
    """transformers' sample_frames: torch.arange(0, total_num_frames, total / num_frames).int()."""
    torch = processors.torch()
    for n in (2, 4, 14, 16, 28, 64):
        sampling = Sampling(n, policy="qwen2_vl")
        for total in [*range(n, 300), 2999]:
            got = frames.frame_indices(total, 25.0, sampling)
            want = torch.arange(0, total, total / n).int().numpy()
            np.testing.assert_array_equal(got, want[:n])  # a 15th of 14 would lie after the clip
            assert len(want) == n or want[n] == total


def test_frames_by_rate_are_qwen2_vl_s():
    process = processors.videos("qwen2_vl").Qwen2VLVideoProcessor
    here = SimpleNamespace(num_frames=None, fps=None)
    for fps, least, most in [(2.0, 4, 768), (1.0, 5, 16), (3.0, 4, 8)]:
        sampling = Sampling(most, policy="qwen2_vl", fps=fps, min_frames=least)
        for rate in RATES:
            for total in [*range(2, 200), 1234]:
                told = processors.metadata(total, rate)
                want = process.sample_frames(here, told, 2, least, most, None, fps).numpy()
                got = frames.frame_indices(total, rate, sampling)
                np.testing.assert_array_equal(got, want[: len(got)])
                assert len(got) == len(want) or want[-1] == total


def test_frames_are_qwen3_vl_s():
    """fps, 4 to 768 frames, odd numbers too."""
    process = processors.videos("qwen3_vl").Qwen3VLVideoProcessor
    odd = 0
    for fps, least, most in [(2.0, 4, 768), (1.0, 5, 16), (0.7, 2, 7)]:
        sampling = Sampling(most, policy="qwen3_vl", fps=fps, min_frames=least)
        here = SimpleNamespace(fps=2, min_frames=least, max_frames=most)
        for rate in RATES:
            for total in [*range(2, 200), 1234]:
                want = process.sample_frames(here, processors.metadata(total, rate), fps=fps)
                got = frames.frame_indices(total, rate, sampling)
                np.testing.assert_array_equal(got, want)
                odd += len(want) % 2
    assert odd > 100
    for total in (1, 5, 300):  # a count is taken as it is, frames repeating
        want = process.sample_frames(
            SimpleNamespace(fps=2), processors.metadata(total, 25.0), 7, None
        )
        got = frames.frame_indices(total, 25.0, Sampling(7, policy="qwen3_vl"))
        np.testing.assert_array_equal(got, want)


def test_frames_are_the_uniform_ones_of_other_families():
    processors.torch()
    processors.metadata(1, 1.0)  # declares what torchvision may miss
    from transformers.video_utils import default_sample_indices_fn

    for n in (1, 7, 8, 32):
        for total in range(n, 200):
            want = default_sample_indices_fn(processors.metadata(total, 25.0), num_frames=n)
            got = frames.frame_indices(total, 25.0, Sampling(n, policy="uniform"))
            np.testing.assert_array_equal(got, want)
    sampling = Sampling(1000, policy="uniform", fps=0.9)
    for rate in RATES:
        for total in range(1, 200):
            want = default_sample_indices_fn(processors.metadata(total, rate), fps=0.9)
            np.testing.assert_array_equal(frames.frame_indices(total, rate, sampling), want)


@pytest.mark.parametrize("policy", ["qwen_vl_utils", "qwen2_vl", "qwen3_vl", "uniform"])
def test_a_short_clip_repeats_frames(policy):
    """The libraries stop there; a temporal patch is filled all the same."""
    assert frames.frame_indices(2, 8.0, Sampling(4, policy=policy)).tolist() == [0, 0, 1, 1]
    one = frames.frame_indices(1, 8.0, Sampling(4, policy=policy, fps=2.0))
    assert one.tolist() == ([0] if policy == "uniform" else [0, 0])


# ---- how large


def test_sizes_of_images_are_transformers_s():
    """Every size up to 230 pixels in steps, three factors, limits that bind below and above."""
    want = processors.images("qwen2_vl").smart_resize
    sides = [*range(4, 60, 5), *range(60, 231, 17), 640, 1280]
    bound = [0, 0]
    for factor, least, most in [(28, 3136, 40000), (32, 4096, 10**7), (4, 16, 400), (28, 1, 10**7)]:
        for h in sides:
            for w in sides:
                if max(h, w) > 200 * min(h, w):
                    continue
                got = frames.smart_resize(h, w, factor, least, most)
                assert got == want(h, w, factor, least, most), (h, w, factor)
                bound[0] += got[0] * got[1] < h * w
                bound[1] += got[0] * got[1] > h * w
    assert min(bound) > 100


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([4, 28, 32]),
    st.integers(1, 10**6),
    st.integers(1, 10**7),
)
@settings(max_examples=300, deadline=None)
def test_any_size_is_transformers_s_and_within_limits(h, w, factor, least, more):
    want, most = processors.images("qwen2_vl").smart_resize, least + more
    if max(h, w) > 200 * min(h, w):
        with pytest.raises(ValueError, match="aspect ratio"):
            want(h, w, factor, least, most)
        with pytest.raises(
            MediaError, match=f"picture of {h} x {w} pixels; one side may be at most"
        ):
            frames.smart_resize(h, w, factor, least, most)
        return
    got = frames.smart_resize(h, w, factor, least, most)
    assert got == want(h, w, factor, least, most)
    assert got[0] % factor == got[1] % factor == 0
    assert got[0] * got[1] <= max(most, factor * max(got), (least**0.5 + 2 * factor) ** 2 * 200)


def test_no_smallest_size_still_gives_a_token():
    assert frames.smart_resize(10, 400, 28, 0, 10**6) == (28, 392)
    assert frames.smart_resize(3, 3, 28, 0, 10**6) == (28, 28)


@given(
    st.integers(2, 800),
    st.integers(8, 2500),
    st.integers(8, 2500),
    st.integers(1, 2**17),
    st.integers(2**17, 2**25),
)
@settings(max_examples=300, deadline=None)
def test_sizes_of_clips_are_qwen3_vl_s(count, h, w, least, most):
    try:
        want = processors.videos("qwen3_vl").smart_resize(count, h, w, 2, 32, least, most)
    except ValueError:
        with pytest.raises(MediaError, match="one side may be at most 200 times the other"):
            frames.smart_resize_clip((count, h, w), 32, least, most)
        return
    assert frames.smart_resize_clip((count, h, w), 32, least, most) == want
    sampling = free("qwen3_vl", min_pixels=least, total_pixels=most)
    assert frames.frame_size(h, w, sampling, QWEN3, count) == want


def test_the_budget_of_a_clip_is_shared_by_its_frames(monkeypatch):
    """transformers' `cap_pixels_per_frame`: the size that the processors' own `resize` asks for."""
    torch = processors.torch()
    two, three = processors.videos("qwen2_vl"), processors.videos("qwen3_vl")
    shape = lambda self, image, size, resample: (size.height, size.width)
    monkeypatch.setattr(two.BaseVideoProcessor, "resize", shape)
    cases = [
        (two.Qwen2VLVideoProcessor(), "qwen2_vl", frames.QWEN, int(128000 * 28**2 * 0.9)),
        (three.Qwen3VLVideoProcessor(max_video_tokens=300), "qwen3_vl", QWEN3, 32 * 32 * 20000),
    ]
    for process, policy, vision, total in cases:
        side = vision.patch * vision.merge
        if policy == "qwen2_vl":
            least, most = process.size["shortest_edge"], process.size["longest_edge"]
        else:
            least, most = 4096, 300 * side**2
            process.size.shortest_edge, process.size.longest_edge = least, total
        sampling = free(policy, min_pixels=least, max_pixels=most, total_pixels=total)
        sizes = set()
        for count in (2, 16, 300, 768):
            for h, w in [(480, 640), (1080, 1920), (90, 500)]:
                video = torch.zeros(1, 1, 1, 1, 1).expand(1, count, 1, h, w)  # a shape, no memory
                want = process.resize(video, process.size, None, side, 2, cap_pixels_per_frame=True)
                assert frames.frame_size(h, w, sampling, vision, count) == want, (count, h, w)
                sizes.add(want)
        assert len(sizes) > 4  # 3, were the budget not to bind


def test_sizes_are_qwen_vl_utils_s():
    """fetch_video: `total_pixels` over pairs of frames, as it ran on 300 clips, patch 14 and 16."""
    arrays, _ = peers.load("qwen_frames")
    bound = 0
    for row, want in zip(arrays["sizes"].tolist(), arrays["found"].tolist()):
        count, h, w, patch, least, most, total = row
        sampling = free(min_pixels=least, max_pixels=most, total_pixels=total)
        got = frames.frame_size(h, w, sampling, Vision(patch=patch), count)
        unbound = dataclasses.replace(sampling, total_pixels=0)
        bound += got != frames.frame_size(h, w, unbound, Vision(patch=patch), count)
        assert list(got) == want, row
    assert bound > 30
    sampling = free(min_pixels=3136, max_pixels=10**6, total_pixels=3136)
    want = processors.images("qwen2_vl").smart_resize(480, 640, 28, 3136, 10**6)
    assert frames.frame_size(480, 640, sampling) == want  # an image has no budget


def test_a_size_is_asked_for_that_the_model_can_see():
    square = Vision(patch=14, merge=1, temporal=1, size=384, fit="exact")
    assert frames.frame_size(720, 1280, Sampling(8, 384, 384), square) == (384, 384)
    with pytest.raises(ValueError, match="asks for 48 x 48 pixels, but this model sees 384 x 384"):
        frames.frame_size(720, 1280, Sampling(8), square)
    with pytest.raises(ValueError, match="less than one token of 28 x 28"):
        frames.frame_size(720, 1280, free(max_pixels=700))
    assert frames.frame_size(64, 64, Sampling(8, 0, 0, max_pixels=700, multiple=2)) == (26, 26)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"frames": 3}, "want an even number"),
        ({"min_frames": 4}, "read with fps alone"),
        ({"min_frames": 9, "fps": 1.0}, "at most `frames`"),
        ({"frames": 1, "fps": 1.0}, "1 is for images"),
        ({"height": 0}, "give both sides"),
        ({"height": 0, "width": 0}, "max_pixels=0 with sides of 0"),
        ({"height": 0, "width": 0, "max_pixels": 9, "min_pixels": 10}, "is above max_pixels=9"),
        (
            {"height": 0, "width": 0, "max_pixels": 9, "total_pixels": 10, "policy": "uniform"},
            "a rule of the Qwen policies",
        ),
    ],
)
def test_settings_that_contradict_are_errors(settings, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**settings)
    with pytest.raises(ValueError, match="'qwen'; want one of"):  # as a file may have it
        Sampling.__post_init__(SimpleNamespace(policy="qwen"))
    assert Sampling(3, policy="uniform").frames == Sampling(3, policy="qwen3_vl").frames == 3


# ---- pixels


def pil_processor(family, name, **settings):
    return vars(processors.images(family))[name](do_rescale=False, do_normalize=False, **settings)


def test_frames_brought_to_a_square_are_siglip_s():
    """LLaVA-OneVision's 384 x 384, whatever the aspect."""
    process = pil_processor("siglip", "SiglipImageProcessorPil", size={"height": 40, "width": 40})
    process.resample = Image.Resampling.BICUBIC
    vision = Vision(patch=14, merge=1, temporal=1, size=40, fit="exact")
    for height, width in [(30, 90), (100, 61), (40, 40)]:
        video = pixels(2, height, width)
        want = process(list(video), return_tensors="np")["pixel_values"]
        got = frames.fit([Image.fromarray(p) for p in video], (40, 40), vision)
        np.testing.assert_array_equal(got, want.transpose(0, 2, 3, 1))


def test_frames_cropped_are_clip_s():
    """LLaVA-NeXT-Video: the shorter side to the size, then the middle."""
    process = pil_processor(
        "clip",
        "CLIPImageProcessorPil",
        size={"shortest_edge": 42},
        crop_size={"height": 42, "width": 42},
    )
    vision = Vision(patch=14, merge=1, temporal=1, size=42, fit="crop")
    for height, width in [(30, 90), (100, 61), (42, 42), (55, 43), (43, 55)]:
        video = pixels(2, height, width)
        want = process(list(video), return_tensors="np")["pixel_values"]
        got = frames.fit([Image.fromarray(p) for p in video], (42, 42), vision)
        np.testing.assert_array_equal(got, want.transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    "family, name",
    [
        ("llava_next", "LlavaNextImageProcessorPil"),
        ("llava_onevision", "LlavaOnevisionImageProcessorPil"),
    ],
)
def test_tiles_of_an_image_are_llava_s(family, name):
    """The whole image stretched to a square, then the tiles of its black-edged canvas."""
    points = ((42, 84), (84, 42), (84, 84), (42, 126))
    square, fit = {"height": 42, "width": 42}, "exact"
    how = {"size": square, "image_grid_pinpoints": [list(p) for p in points]}
    if family == "llava_next":
        how, fit = how | {"size": {"shortest_edge": 42}, "crop_size": square}, "crop"
    process = pil_processor(family, name, **how)
    vision = Vision(patch=14, merge=1, temporal=1, size=42, fit=fit, pinpoints=points)
    for height, width in [(30, 90), (100, 61), (42, 42), (55, 43), (20, 150)]:
        (picture,) = pixels(1, height, width)
        want = process(picture, return_tensors="np")["pixel_values"][0]
        cut = frames.cut(Image.fromarray(picture), vision)
        got = frames.fit(cut, (42, 42), vision)
        assert len(got) == frames.shown(height, width, vision) == len(want)
        np.testing.assert_array_equal(got, want.transpose(0, 2, 3, 1))


# ---- patches


@pytest.mark.parametrize("patch, temporal", [(14, 2), (16, 2), (14, 1)])
def test_an_image_s_patches_are_transformers_s(patch, temporal):
    """From pixels to patches, bit for bit; both frames of a temporal patch are the image."""
    process = pil_processor(
        "qwen2_vl",
        "Qwen2VLImageProcessorPil",
        patch_size=patch,
        temporal_patch_size=temporal,
        size={"shortest_edge": 3136, "longest_edge": 40000},
    )
    vision = Vision(patch=patch, temporal=temporal)
    for height, width in [(100, 230), (300, 411), (30, 20)]:
        (picture,) = pixels(1, height, width)
        want = process(picture, return_tensors="np")
        sampling = free(min_pixels=3136, max_pixels=40000)
        size = frames.frame_size(height, width, sampling, vision)
        patches, grid = frames.patchify(
            frames.fit([Image.fromarray(picture)], size, vision), vision
        )
        assert [list(grid)] == want["image_grid_thw"].tolist()
        np.testing.assert_array_equal(patches[0], want["pixel_values"])


@pytest.mark.parametrize("family, vision", [("qwen2_vl", frames.QWEN), ("qwen3_vl", QWEN3)])
def test_a_clip_s_patches_are_transformers_s(family, vision):
    """The processor's patches of the same pixels bit for bit, an odd frame repeated at the end."""
    torch, module = processors.torch(), processors.videos(family)
    process = {
        "qwen2_vl": lambda: module.Qwen2VLVideoProcessor(),
        "qwen3_vl": lambda: module.Qwen3VLVideoProcessor(),
    }[family]()
    side = vision.patch * vision.merge
    for count in (4, 5):
        video = pixels(count, 2 * side, 3 * side)
        tensor = torch.from_numpy(video).permute(0, 3, 1, 2)[None]
        if count % 2 and family == "qwen3_vl":
            tensor = tensor.clone()
        want, *grid = process.patchify(tensor.contiguous(), vision.patch, vision.merge, 2)
        got, mine = frames.patchify(video, vision)
        assert list(mine) == grid
        np.testing.assert_array_equal(got.reshape(want[0].shape), want[0].numpy())


def test_a_fixed_size_leaves_out_what_no_patch_covers():
    """384 pixels hold 27 patches of 14: a convolution without padding sees 378 of them."""
    vision = Vision(patch=14, merge=1, temporal=1, size=384, fit="exact")
    video = pixels(2, 384, 384)
    patches, grid = frames.patchify(video, vision)
    assert grid == (2, 27, 27) and patches.shape == (2, 729, 3 * 14 * 14)
    np.testing.assert_array_equal(
        patches[1, -1], video[1, 364:378, 364:378].transpose(2, 0, 1).reshape(-1)
    )
    with pytest.raises(MediaError, match="2 frames of 384 x 384 do not divide into tokens of 28"):
        frames.patchify(video, frames.QWEN)
