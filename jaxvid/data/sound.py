"""Sound as log-mel features: what Whisper's and Qwen2.5-Omni's audio encoders see. Numpy only.

The features of Whisper (https://arxiv.org/abs/2212.04356, section 2.2): magnitudes of a Fourier
transform of 25 ms every 10 ms, mel bands, log10, the lowest 8 decades below the loudest cut off.
They are computed in float64: a silent band beside a loud one lies below float32's rounding.

How many frames a sound has depends on its number of samples alone (`mel_frames`), so that token
budgets are known before anything is decoded.
What this leaves out: dither, and windows of other lengths than Whisper's.
"""

import functools

import numpy as np
from jaxtyping import Float, Int

from jaxvid.prompting import Sound

RATE, HOP, WINDOW = 16_000, 160, 400  # samples: a second, a step, a transform
BLOCK = 3000  # frames transformed at a time: five minutes would take 100 MB at once
FLOOR, DECADES = 1e-10, 8.0


def mel_frames(samples: int) -> int:
    """Mel frames of a sound of so many samples: every frame whose centre lies in it."""
    return -(-samples // HOP)


@functools.cache
def mel_bands(mels: int) -> Float[np.ndarray, "201 Z"]:
    """Triangles of equal area on Slaney's mel scale (linear to 1 kHz, then logarithmic) to 8 kHz,
    as librosa and Whisper have them."""
    step = np.log(6.4) / 27  # natural log of the ratio of two neighbours above 1 kHz
    mel = np.linspace(0, 15 + np.log(RATE / 2 / 1000) / step, mels + 2)
    hertz = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(step * (mel - 15)))
    away = hertz[None] - np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    width = np.diff(hertz)[None]
    triangles = np.maximum(0, np.minimum(-away[:, :-2] / width[:, :-1], away[:, 2:] / width[:, 1:]))
    return triangles * (2 / (hertz[2:] - hertz[:-2]))[None]


def log_mel(
    samples: Float[np.ndarray, "n"], mels: int, *, padded: int | None = None
) -> Float[np.ndarray, "T Z"]:
    """Features [T, Z] in float32 of mono sound at RATE.

    With `padded`, silence follows the sound up to so many samples, and the result has the
    `mel_frames` of the sound alone: what transformers' extractor gives under its attention mask.
    Without, the sound's ends are mirrored and the last frame that is not whole is left off.

    Raises ValueError for a sound of no samples, one longer than `padded`, and one of less than half
    a window that is not padded.
    """
    n = len(samples)
    total = n if padded is None else padded
    if not 0 < n <= total:
        raise ValueError(f"a sound of {n} samples; give at least 1 and at most {total}")
    if total <= WINDOW // 2:
        raise ValueError(
            f"{total} samples cannot be mirrored at their ends; pad to more than {WINDOW // 2}"
        )
    wanted = total // HOP if padded is None else min(mel_frames(n), total // HOP)
    # the two frames after the sound see its end, and may be the loudest
    count = min(wanted + 2, total // HOP)
    x = _mirrored(samples, total, (count - 1) * HOP + WINDOW)
    frames = np.lib.stride_tricks.sliding_window_view(x, WINDOW)[::HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    out = np.empty((count, mels))
    for at in range(0, count, BLOCK):
        spectrum = np.fft.rfft(frames[at : at + BLOCK] * hann[None])
        out[at : at + BLOCK] = (spectrum.real**2 + spectrum.imag**2) @ mel_bands(mels)
    out = np.log10(np.maximum(out, FLOOR))
    out = np.maximum(out[:wanted], out.max() - DECADES)
    return ((out + 4) / 4).astype(np.float32)


def _mirrored(samples, total, length) -> Float[np.ndarray, "l"]:
    """Half a window mirrored, the sound, silence to `total`, mirrored again: the first `length`."""
    half = WINDOW // 2
    x = np.zeros(length)
    at = np.abs(np.arange(length) - half)
    at = np.where(at < total, at, 2 * total - 2 - at)
    inside = at < len(samples)
    x[inside] = samples[at[inside]]
    return x


def cut(
    features: Float[np.ndarray, "T Z"], chunk: int
) -> tuple[Float[np.ndarray, "A F Z"], Int[np.ndarray, "A"]]:
    """Chunks of `chunk` frames, the last filled with zeros, and how many of each are sound."""
    frames, mels = features.shape
    count = -(-frames // chunk)
    out = np.zeros((count * chunk, mels), np.float32)
    out[:frames] = features
    length = np.minimum(frames - chunk * np.arange(count), chunk).astype(np.int32)
    return out.reshape(count, chunk, mels), length


def chunks(
    samples: Float[np.ndarray, "n"] | None, geometry: Sound
) -> tuple[Float[np.ndarray, "A F Z"], Int[np.ndarray, "A"]]:
    """What an audio tower takes of a clip's sound (`media.decode_sound`'s): chunks and, of each,
    the frames that are sound.

    Where chunks are padded each is a sound of its own, filled with silence that is heard; else the
    features are made of the whole, so that one loudest band sets the floor of all.

    Raises ValueError for a clip without sound, and for a rate other than RATE.
    """
    if samples is None:
        raise ValueError("sound is asked of a clip that has none; leave its sound out, or the clip")
    if geometry.rate != RATE:
        raise ValueError(f"sound at {geometry.rate} samples a second; features want {RATE}")
    if not geometry.pad:
        features = log_mel(samples, geometry.mels, padded=len(samples) + 2 * WINDOW)
        return cut(features, geometry.chunk)
    size = geometry.chunk * HOP
    count = -(-len(samples) // size)
    whole = np.pad(samples, (0, count * size - len(samples))).reshape(count, size)
    features = np.stack([log_mel(x, geometry.mels) for x in whole])
    return features, np.full(count, geometry.chunk, np.int32)
