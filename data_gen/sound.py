"""Interventions on the sound of a clip (THUD, arXiv 2605.16403), and records of them.

    shift   the sound comes D seconds after the picture (D > 0), or before it (D < 0)
    mute    nothing is heard
    swap    the sound of another clip, plausible here and still not what is seen

`shifted`, `muted` and `swapped` take the bytes of any MP4 clip. What is stated of a shift is true
of the file: the offset is measured again after encoding and decoding. Sound that leaves the clip is
lost, and where it is missing comes silence; the world's clips are made so that no event is lost.
"""

import numpy as np

from jaxvid.data import media

RATE = 16_000  # samples a second
EXACT = 0.002  # seconds that the measured offset may differ from the stated


def shifted(data: bytes, offset: float) -> bytes:
    """The clip with its sound `offset` seconds later (earlier, below 0), encoded again.

    Raises ValueError if it is silent, if the offset is not shorter than it, or if the offset
    measured in the new file is another.
    """
    frames, fps, sound = _opened(data)
    made = media.encode(frames, fps, moved(sound, offset), RATE)
    found = measured(media.decode_sound(data, RATE), media.decode_sound(made, RATE), offset)
    if abs(found - offset) > EXACT:
        raise ValueError(
            f"a shift of {offset:g} s measures {found:g} s in the file; the sound may be periodic "
            "or leave the clip: take a smaller shift or another clip"
        )
    return made


def muted(data: bytes) -> bytes:
    """The clip with silence for its sound."""
    frames, fps, sound = _opened(data)
    return media.encode(frames, fps, np.zeros_like(sound), RATE)


def swapped(data: bytes, other: bytes) -> bytes:
    """The clip with the sound of another, cut to its length or followed by silence.

    Raises ValueError where the two sound alike, so that nobody could tell.
    """
    frames, fps, sound = _opened(data)
    foreign = _opened(other)[2]
    foreign = np.pad(foreign, (0, max(0, len(sound) - len(foreign))))[: len(sound)]
    if (alike := likeness(sound, foreign)) > 0.8:
        raise ValueError(f"the sounds are alike ({alike:.2f}); swap with another clip")
    return media.encode(frames, fps, foreign, RATE)


def encoded_again(data: bytes) -> bytes:
    """The clip as it is, encoded as the intervened ones are: its files tell nothing."""
    frames, fps, sound = _opened(data)
    return media.encode(frames, fps, sound, RATE)


def _opened(data: bytes) -> tuple[np.ndarray, float, np.ndarray]:
    """All frames, their rate, and the sound. Raises ValueError for a clip without sound."""
    clip, sound = media.decode_whole(data), media.decode_sound(data, RATE)
    if sound is None or not np.abs(sound).max() > 0:
        raise ValueError("the clip has no sound, or silence alone; an intervention needs sound")
    return clip.frames, 1 / clip.seconds_per_frame, sound


def moved(sound: np.ndarray, offset: float, fill: np.ndarray | None = None) -> np.ndarray:
    """The sound `offset` seconds later, in as many samples; `fill` (default silence) is heard where
    none is left."""
    steps = round(offset * RATE)
    if abs(steps) >= len(sound):
        raise ValueError(
            f"a shift of {offset:g} s of a sound of {len(sound) / RATE:g} s leaves nothing of it"
        )
    out = np.zeros_like(sound) if fill is None else fill[: len(sound)].copy()
    if steps >= 0:
        out[steps:] = sound[: len(sound) - steps]
    else:
        out[:steps] = sound[-steps:]
    return out


def measured(before: np.ndarray, after: np.ndarray, near: float, within: float = 0.3) -> float:
    """Seconds by which `after` is later, from the peak of their correlation around `near`."""
    n = 2 * max(len(before), len(after))
    spectrum = np.fft.rfft(after, n) * np.conj(np.fft.rfft(before, n))
    correlation = np.fft.irfft(spectrum, n)
    lags = np.arange(round((near - within) * RATE), round((near + within) * RATE) + 1)
    return float(lags[np.argmax(correlation[lags])] / RATE)


def likeness(a: np.ndarray, b: np.ndarray, step: int = RATE // 50) -> float:
    """Correlation of the two sounds' loudness over time, in steps of 20 ms."""
    n = min(len(a), len(b)) // step
    loud = [np.sqrt((x[: n * step].reshape(n, step) ** 2).mean(1)) for x in (a, b)]
    centred = [x - x.mean() for x in loud]
    norm = float(np.linalg.norm(centred[0]) * np.linalg.norm(centred[1]))
    return float(centred[0] @ centred[1]) / norm if norm else 0.0
