"""Log-mel features against transformers' extractor, and their number against the samples'.

The extractor in numpy keeps its spectrum in float32: 1.2e-7 at most lies between it and ours. With
torch it computes in float32, which shows where a band is silent beside a loud one: 4.4e-5.
"""

import functools

import numpy as np
import pytest

from jaxvid.data import sound
from jaxvid.prompting import Sound

MELS = (80, 128)


def noise(n, seed=0):
    """Tones that come and go, over noise: quiet and loud bands and frames."""
    r, t = np.random.default_rng(seed), np.arange(n) / sound.RATE
    tones = sum(np.sin(2 * np.pi * f * t) for f in (220, 1900, 6000))
    return (0.1 * tones * np.sin(3 * t) ** 2 + 0.02 * r.standard_normal(n)).astype(np.float32)


@functools.cache
def extractor(mels, seconds):
    transformers = pytest.importorskip("transformers", reason="the oracle: jaxvid[oracle]")
    return transformers.WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds)


def exact(x, mels):
    """Their numpy path, of samples as they are."""
    return extractor(mels, 30)._np_extract_fbank_features(x[None], "cpu")[0].T


def theirs(x, mels, seconds, padding="max_length"):
    """What a processor calls: features, and how many frames the attention mask leaves."""
    pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    settings = {"sampling_rate": sound.RATE, "padding": padding, "return_attention_mask": True}
    out = extractor(mels, seconds)(x, **settings)
    return out["input_features"][0].T, int(out["attention_mask"][0].sum())


# a sample, less than half a window, a frame, not whole frames, a second, nearly three
LENGTHS = (1, 150, 160, 161, 4321, 16_000, 47_930)


@pytest.mark.parametrize("mels", MELS)
def test_padded_features_equal_the_extractors(mels):
    padded = 3 * sound.RATE
    for n in LENGTHS:
        want = exact(np.pad(noise(n), (0, padded - n)), mels)
        got = sound.log_mel(noise(n), mels, padded=padded)
        assert got.dtype == np.float32 and len(got) == sound.mel_frames(n)
        np.testing.assert_allclose(got, want[: len(got)], atol=1e-6, rtol=0)
    silence = sound.log_mel(np.zeros(500, np.float32), mels, padded=padded)
    np.testing.assert_array_equal(silence, np.full((4, mels), -1.5, np.float32))


@pytest.mark.parametrize("mels", MELS)
def test_features_that_are_not_padded_equal_the_extractors(mels):
    for n in (201, 400, 16_001, 480_000):
        got = sound.log_mel(noise(n), mels)
        np.testing.assert_allclose(got, exact(noise(n), mels), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("mels", "seconds", "n"),
    [(80, 30, 70_001), (128, 30, 479_950), (128, 300, 800_001), (128, 300, 4_799_950)],
)
def test_frames_are_those_the_attention_mask_leaves(mels, seconds, n):
    """30 s is Whisper's limit, 300 s Qwen2.5-Omni's; just below, the mirrored end counts."""
    want, count = theirs(noise(n), mels, seconds)
    got = sound.log_mel(noise(n), mels, padded=seconds * sound.RATE)
    assert count == sound.mel_frames(n) == len(got)
    np.testing.assert_allclose(got, want[:count], atol=5e-5, rtol=0)


def test_a_bang_at_the_very_end_is_the_loudest():
    """It is heard most in a frame after the sound's last, which sets the floor of all."""
    x = np.zeros(1600, np.float32)
    x[100], x[-1] = 1e-3, 1.0
    got = sound.log_mel(x, 80, padded=4800)
    np.testing.assert_allclose(got, exact(np.pad(x, (0, 3200)), 80)[:10], atol=1e-6, rtol=0)


def test_sounds_that_have_no_features_are_refused():
    with pytest.raises(ValueError, match="a sound of 0 samples"):
        sound.log_mel(np.zeros(0, np.float32), 80, padded=4800)
    with pytest.raises(ValueError, match="a sound of 4801 samples; give .* at most 4800"):
        sound.log_mel(np.zeros(4801, np.float32), 80, padded=4800)
    with pytest.raises(ValueError, match="cannot be mirrored"):
        sound.log_mel(np.zeros(200, np.float32), 80)


@pytest.mark.parametrize(("frames", "length"), [(1, [1]), (200, [200]), (450, [200, 200, 50])])
def test_chunks_hold_every_frame_once(frames, length):
    features = np.random.default_rng(0).standard_normal((frames, 4)).astype(np.float32)
    chunks, got = sound.cut(features, 200)
    assert chunks.shape == (len(length), 200, 4) and got.tolist() == length
    np.testing.assert_array_equal(np.concatenate([c[:n] for c, n in zip(chunks, got)]), features)
    assert not chunks[-1, length[-1] :].any()


def test_chunks_of_qwen_are_cut_from_the_whole_and_whispers_are_sounds_of_their_own():
    x = np.concatenate([noise(30_000), 1e-3 * noise(3_000)])
    omni, whisper = Sound(200, 50), Sound(100, 50, mels=80, pad=True)
    features, length = sound.chunks(x, omni)
    assert features.shape == (2, 200, 128) and length.tolist() == [200, 7]
    want = sound.log_mel(x, 128, padded=30 * sound.RATE)
    np.testing.assert_array_equal(np.concatenate([features[0], features[1, :7]]), want)
    features, length = sound.chunks(x, whisper)
    assert features.shape == (3, 100, 80) and length.tolist() == [100] * 3
    last = np.pad(x[32_000:], (0, 15_000))
    np.testing.assert_allclose(features[2], exact(last, 80), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="sound is asked of a clip that has none"):
        sound.chunks(None, omni)
    with pytest.raises(ValueError, match="sound at 8000 samples a second; features want 16000"):
        sound.chunks(x, Sound(200, 50, rate=8000))
