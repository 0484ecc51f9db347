"""Scenes for sound: two or three things fall one after the other, each lands with its own sound.

When a thing lands can be seen to a frame and heard to a sample, the gaps between landings are
never equal, and no gap equals an offset that a clip is shifted by. So a shifted sound matches no
other landing, and its offset has one answer. A bar that fills along the top is the picture's clock:
a small model can tell when something is seen.
"""

import dataclasses

import numpy as np

from data_gen.procedural import draw
from data_gen.procedural.motion import FLOOR, Plan
from data_gen.procedural.scene import Settings, Thing, generator, sample

FALL = 0.45  # seconds from the top to the floor
EARLIEST, LATEST = 0.3, 0.3  # seconds between a landing and the start and the end of the clip
APART = (0.45, 0.95)  # seconds between two landings
CLEAR = 0.12  # a gap differs from other gaps and from offsets by at least so much
THIRD = 0.2  # share of scenes with a third landing
COLUMNS = {"left": 0.2, "middle": 0.5, "right": 0.8}
RADIUS = 0.13
# What falls: shape, colour. The names are words that the laptop world has too.
KINDS = {
    "stone": ("square", "purple"),
    "glass": ("triangle", "white"),
    "bug": ("circle", "green"),
    "balloon": ("circle", "red"),
}


@dataclasses.dataclass(frozen=True)
class Landing:
    kind: str  # one of KINDS
    place: str  # one of COLUMNS
    time: float  # seconds


@dataclasses.dataclass(frozen=True)
class Strikes:
    """A scene. `landings` are in the order of their times; no two share a kind or a place."""

    id: str
    seed: int
    landings: tuple[Landing, ...]
    seconds: float


def strikes(
    seed: int, name: str, seconds: float, offset: float, offsets: tuple[float, ...]
) -> Strikes:
    """The scene called `name`, whose landings stay inside the clip when they move by `offset`.

    `offsets` are all that clips are shifted by; gaps keep clear of them. Raises ValueError for a
    clip too short for two landings and the offset.
    """
    rng = generator(seed, f"{name}/strikes")
    room = seconds - EARLIEST - LATEST - abs(offset)
    if room < APART[0]:
        raise ValueError(
            f"a clip of {seconds:g} s has no room for two landings {APART[0]} s apart that move "
            f"by {offset:g} s; give at least {EARLIEST + LATEST + abs(offset) + APART[0]:g} s"
        )
    while True:
        gaps = rng.uniform(*APART, size=2 if rng.random() < THIRD else 1)
        between = [*gaps, gaps.sum()] if len(gaps) > 1 else [*gaps]
        near = [abs(g - abs(o)) for g in between for o in offsets if o]
        near += [abs(gaps[0] - gaps[-1])] if len(gaps) > 1 else []
        if gaps.sum() <= room and min(near, default=1.0) >= CLEAR:
            break
    first = EARLIEST + max(-offset, 0.0) + rng.uniform(0, room - gaps.sum())
    times = first + np.concatenate([[0.0], np.cumsum(gaps)])
    kinds = rng.choice(list(KINDS), len(times), replace=False)
    places = rng.choice(list(COLUMNS), len(times), replace=False)
    landed = [Landing(str(k), str(p), float(t)) for k, p, t in zip(kinds, places, times)]
    return Strikes(name, seed, tuple(landed), seconds)


def frames(scene: Strikes, side: int, fps: float, *, dark: bool = False) -> np.ndarray:
    """uint8 [F, side, side, 3]; `dark`: the lights are out."""
    count = round(scene.seconds * fps)
    settings = Settings(side=side, fps=fps)
    around = sample(scene.seed, scene.id, settings, family="gravity")
    time = np.arange(count) / fps
    plan = Plan(around, "", time / scene.seconds, [], [], 0.0, 1.0)
    for landing in scene.landings:
        shape, colour = KINDS[landing.kind]
        thing = Thing(shape, colour, RADIUS)
        actor = plan.actor(landing.kind, thing, COLUMNS[landing.place], FLOOR - RADIUS)
        before = np.clip(landing.time - time, 0.0, FALL) / FALL
        fallen = 1 - (1 - before) ** 2  # 1 at the top, 0 on the floor
        actor.y = actor.y - fallen * (FLOOR - 2 * RADIUS)
        actor.shown = time >= landing.time - FALL
    drawn = draw.frames(plan, settings)
    bar = side // 8
    drawn[:, :bar] = 20
    for f in range(count):
        drawn[f, :bar, : round((f + 1) / count * side)] = 220
    return (drawn // 16) if dark else drawn


def sound(scene: Strikes) -> np.ndarray:
    """float32 [n] at draw.RATE: each landing's sound over a faint room tone."""
    out = room_tone(scene.seed, scene.id, round(scene.seconds * draw.RATE))
    for landing in scene.landings:
        at = round(landing.time * draw.RATE)
        piece = _struck(landing.kind)[: max(0, len(out) - at)]
        out[at : at + len(piece)] += piece
    return np.clip(out, -1, 1).astype(np.float32)


def room_tone(seed: int, name: str, samples: int) -> np.ndarray:
    """What is heard where nothing sounds."""
    return generator(seed, f"{name}/room").normal(0, 0.002, samples).astype(np.float32)


def _struck(kind: str) -> np.ndarray:
    """Quarter of a second of what a kind sounds like."""
    t = np.arange(draw.RATE // 4) / draw.RATE
    tone = lambda hertz: np.sin(2 * np.pi * hertz * t)
    if kind == "stone":
        return 0.8 * np.exp(-t * 20) * tone(140)
    if kind == "glass":
        return 0.4 * np.exp(-t * 14) * (tone(2600) + tone(3900))
    if kind == "bug":
        return 0.5 * np.exp(-t * 10) * tone(650) * np.sign(tone(45))
    noise = np.random.default_rng(0).normal(0, 0.4, len(t))
    return np.exp(-t * 24) * noise
