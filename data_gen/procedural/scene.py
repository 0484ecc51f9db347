"""A scene description: everything a clip of the laptop world is rendered and told from.

`sample` draws one from a seed; `outcome` is not part of it, so that a real clip and its twin are
one scene rendered with two outcomes.
"""

import dataclasses
import hashlib
import zlib

import numpy as np

from data_gen.procedural.outcomes import FAMILIES, NOTHING, ODD_PREMISES

COLOURS = {
    "red": (220, 50, 47),
    "green": (60, 180, 75),
    "blue": (50, 90, 230),
    "yellow": (245, 205, 40),
    "purple": (160, 60, 200),
    "white": (240, 240, 240),
}
SHAPES = ("square", "circle", "triangle", "cross")
SIZES = {"small": 0.1, "large": 0.13}
BACKGROUNDS = ((58, 62, 70), (84, 70, 58), (52, 74, 62), (70, 60, 84))
EFFECT_LEVELS = ("frame", "region", "object")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size and difficulty of the world; the shipped checkpoint was made with the defaults."""

    side: int = 96  # pixels, height and width
    fps: float = 16.0
    seconds: tuple[float, float] = (2.0, 3.0)  # a pair's length is drawn from here; 2 to 4 s
    clutter: int = 1  # small shapes that cross in the background
    grain: float = 1.0  # standard deviation of the sensor noise, in grey levels
    effect_levels: tuple[float, float, float] = (0.6, 0.25, 0.15)  # frame, region, object
    ramps: float = 0.5  # share of visual edits that come in gradually
    held_out: float = 0.15  # share of colour-shape-outcome combinations kept from training

    def __post_init__(self):
        if self.side % 2 or self.side < 32:
            raise ValueError(f"side={self.side}: give an even number of pixels of at least 32")
        low, high = self.seconds
        if not 2.0 <= low <= high <= 4.0:
            raise ValueError(f"seconds={self.seconds}: clips last 2 to 4 s, shortest first")
        for name in ("ramps", "held_out"):
            if not 0.0 <= vars(self)[name] <= 1.0:
                raise ValueError(f"{name}={vars(self)[name]}: a share is between 0 and 1")
        if self.clutter < 1:
            raise ValueError(f"clutter={self.clutter}: at least one shape must move in every scene")


@dataclasses.dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    radius: float
    look: str = "plain"  # the premise it is drawn as


@dataclasses.dataclass(frozen=True)
class Scene:
    id: str
    seed: int
    family: str
    premise: str
    ordinary: tuple[str, str]
    odd: tuple[str, str]
    subject: Thing
    other: Thing  # pusher, mover, or the shape that comes and goes
    clutter: tuple[tuple[Thing, float, int], ...]  # thing, height, direction
    background: tuple[int, int, int]
    seconds: float
    x: float
    y: float
    direction: int  # +1 to the right, -1 to the left
    start: float  # when the event begins, as a share of the clip
    parts: int  # reversal: how many parts the thing has
    effect_level: str
    effect_box: tuple[float, float, float, float]  # region: x0, y0, x1, y1
    effect_stop: float
    effect_ramp: bool

    @property
    def look(self) -> str:
        return look(self.subject.colour, self.subject.shape, self.family, self.premise)


def look(colour: str, shape: str, family: str, premise: str) -> str:
    """How the subject is called: "red square weight". Some premises are not the subject's own."""
    noun = "" if family in ("wall", "picture", "presence") else f" {premise}"
    return f"{colour} {shape}{noun}"


def generator(seed: int, name: str) -> np.random.Generator:
    """The random stream of one record: a function of seed and record id alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def held_out(subject: Thing, outcome: str, share: float) -> bool:
    """Whether training must not see this colour-shape-outcome combination.

    Of every outcome the same number of colour-shape combinations is held out, so that no outcome
    becomes rarer than another.
    """
    kinds = len(COLOURS) * len(SHAPES)
    at = list(COLOURS).index(subject.colour) * len(SHAPES) + SHAPES.index(subject.shape)
    turn = zlib.crc32(outcome.encode())
    return (at * 7 + turn) % kinds < round(share * kinds)  # 7 shares no factor with kinds


def _premise(rng: np.random.Generator, family: str) -> tuple[str, tuple[str, str], tuple[str, str]]:
    premises = FAMILIES[family].premises
    premise = str(rng.choice(list(premises)))
    others = ODD_PREMISES[premise] if family == "picture" else [p for p in premises if p != premise]
    ordinary, odd = premises[premise], premises[str(rng.choice(others))]
    if family == "picture" and rng.random() < 1 / 3:
        ordinary = (NOTHING, str(rng.choice(ordinary)))
    pick = lambda names: tuple(str(n) for n in rng.choice(names, 2, replace=False))
    return premise, pick(ordinary), pick(odd)


def sample(seed: int, name: str, settings: Settings, family: str | None = None) -> Scene:
    """The scene called `name`. `family=None` draws one by the families' weights."""
    rng = generator(seed, name)
    if family is None:
        weights = np.array([f.weight for f in FAMILIES.values()])
        family = str(rng.choice(list(FAMILIES), p=weights / weights.sum()))
    premise, ordinary, odd = _premise(rng, family)
    colours = [str(c) for c in rng.choice(list(COLOURS), 3, replace=False)]
    shapes = [str(s) for s in rng.choice(SHAPES, 3)]
    radius = float(rng.choice(list(SIZES.values())))
    while shapes[1] == shapes[0]:
        shapes[1] = str(rng.choice(SHAPES))
    x0, y0 = rng.uniform(0.0, 0.4, 2)
    clutter = tuple(
        (Thing(str(rng.choice(SHAPES)), colours[2], 0.05), 0.08 + 0.1 * i, int(rng.choice((-1, 1))))
        for i in range(settings.clutter)
    )
    return Scene(
        id=name,
        seed=seed,
        family=family,
        premise=premise,
        ordinary=ordinary,
        odd=odd,
        subject=Thing(shapes[0], colours[0], radius, premise),
        other=Thing(shapes[1], colours[1], 0.1),
        clutter=clutter,
        background=BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))],
        seconds=float(np.round(rng.uniform(*settings.seconds) * settings.fps) / settings.fps),
        x=float(rng.uniform(0.3, 0.7)),
        y=float(rng.uniform(0.42, 0.55)),
        direction=int(rng.choice((-1, 1))),
        start=float(rng.uniform(0.12, 0.3)),
        parts=int(rng.choice((2, 6))),
        effect_level=str(rng.choice(EFFECT_LEVELS, p=settings.effect_levels)),
        effect_box=(float(x0), float(y0), float(x0 + 0.6), float(y0 + 0.6)),
        effect_stop=float(rng.choice((1.0, rng.uniform(0.85, 0.95)))),
        effect_ramp=bool(rng.random() < settings.ramps),
    )
