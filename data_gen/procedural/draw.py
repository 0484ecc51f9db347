"""Plan -> frames and sound. OpenCV draws; effects of the `picture` family are applied to pixels."""

import zlib

import cv2
import numpy as np

from data_gen.procedural.motion import FLOOR, Actor, Plan
from data_gen.procedural.scene import COLOURS, Settings, generator

SHIFT = 6  # OpenCV draws with 1/64 of a pixel
RATE = 16_000  # sound, samples per second


def _outline(shape: str) -> np.ndarray:
    """Corners of a shape of radius 1, [n, 2]."""
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.9
    if shape == "triangle":
        return np.array([[0, -1.1], [1.1, 0.9], [-1.1, 0.9]])
    if shape == "cross":
        a = 0.36
        corners = [[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a], [a, 1], [-a, 1]]
        return np.array([*corners, [-a, a], [-1, a], [-1, -a], [-a, -a]])
    turn = np.arange(20) * (2 * np.pi / 20)
    return np.stack([np.cos(turn), np.sin(turn)], 1)


OUTLINES = {s: _outline(s) for s in ("square", "circle", "triangle", "cross")}


def _corners(points: np.ndarray, actor: Actor, f: int) -> np.ndarray:
    """Corners in the actor's own frame -> shares of the picture."""
    turn = np.deg2rad(actor.angle[f])
    scaled = points * (actor.wide[f], actor.tall[f])
    spin = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return (actor.x[f], actor.y[f]) + actor.thing.radius * scaled @ spin.T


def _place(points: np.ndarray, actor: Actor, f: int, side: int) -> np.ndarray:
    """Corners in the actor's own frame -> fixed-point pixels."""
    return np.round(_corners(points, actor, f) * side * (1 << SHIFT)).astype(np.int32)


def box(actor: Actor, f: int) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) around an actor's shape, as shares of the picture; marks stand out of it."""
    corners = _corners(OUTLINES[actor.thing.shape], actor, f)
    return (*corners.min(0).tolist(), *corners.max(0).tolist())


BARRIER = (0.35, 0.3, 0.65, FLOOR)  # x0, y0, x1, y1 of the wall or the curtain


def covered(box: tuple[float, float, float, float]) -> bool:
    """Whether a box lies wholly behind the barrier."""
    x0, y0, x1, y1 = BARRIER
    return x0 <= box[0] and y0 <= box[1] and box[2] <= x1 and box[3] <= y1 + 1e-6


def _fill(image, points, colour):
    cv2.fillPoly(image, [points], colour, cv2.LINE_AA, SHIFT)


# Marks inside or beside a shape that tell the premises apart; corners for a shape of radius 1.
MARKS = {
    "weight": [(np.array([[-0.5, -0.15], [0.5, -0.15], [0.5, 0.15], [-0.5, 0.15]]), (20, 20, 20))],
    "balloon": [(np.array([[-0.08, 1], [0.08, 1], [0.08, 2.4], [-0.08, 2.4]]), (230, 230, 230))],
    "magnet": [(np.array([[-0.9, -0.9], [-0.3, -0.9], [-0.3, 0.9], [-0.9, 0.9]]), (20, 20, 20))],
    "glass": [(np.array([[-0.6, 0.2], [0.2, -0.6], [0.45, -0.6], [-0.6, 0.45]]), (255, 255, 255))],
    "puzzle": [(np.array([[-0.3, -0.3], [0.3, -0.3], [0.3, 0.3], [-0.3, 0.3]]), (20, 20, 20))],
    "bug": [
        (np.array([[-0.5, -0.4], [-0.15, -0.4], [-0.15, 0.0], [-0.5, 0.0]]), (255, 255, 255)),
        (np.array([[0.15, -0.4], [0.5, -0.4], [0.5, 0.0], [0.15, 0.0]]), (255, 255, 255)),
    ],
    "stone": [(np.array([[-0.4, 0.1], [0, -0.3], [0.4, 0.1], [0, 0.4]]), (110, 110, 110))],
    "jelly": [(np.array([[-0.7, 0.3], [0.7, 0.3], [0.7, 0.5], [-0.7, 0.5]]), (255, 255, 255))],
}


def _actor(image: np.ndarray, actor: Actor, f: int) -> None:
    if not actor.shown[f]:
        return
    side = image.shape[0]
    _fill(image, _place(OUTLINES[actor.thing.shape], actor, f, side), COLOURS[actor.thing.colour])
    for mark, colour in MARKS.get(actor.thing.look, ()):
        _fill(image, _place(mark, actor, f, side), colour)


def _barrier(image: np.ndarray, premise: str) -> None:
    """A brick wall or a curtain, in front of everything."""
    side = image.shape[0]
    x0, y0, x1, y1 = (int(v * side) for v in BARRIER)
    image[y0:y1, x0:x1] = (150, 75, 60) if premise == "wall" else (120, 60, 140)
    if premise == "wall":
        image[y0 : y1 : side // 12, x0:x1] = (215, 205, 195)
    else:
        image[y0:y1, x0 : x1 : side // 16] = (210, 160, 225)


DEVICES = {"lamp": (255, 235, 120), "filter": (255, 90, 200), "lens": (140, 220, 255)}


def _device(image: np.ndarray, premise: str) -> None:
    """The lamp, filter, lens or antenna that stands under the ceiling."""
    side = image.shape[0]
    at = lambda x, y: (int(x * side), int(y * side))
    if premise == "antenna":
        cv2.line(image, at(0.5, 0.2), at(0.5, 0.4), (230, 230, 230), 2)
        cv2.line(image, at(0.4, 0.22), at(0.6, 0.22), (230, 230, 230), 2)
    elif premise == "filter":
        cv2.rectangle(image, at(0.42, 0.2), at(0.58, 0.36), DEVICES[premise], -1)
    else:
        cv2.circle(
            image, at(0.5, 0.28), int(0.08 * side), DEVICES[premise], -1 if premise == "lamp" else 3
        )


def _stage(plan: Plan, settings: Settings) -> np.ndarray:
    """Everything that stands still, uint8 [side, side, 3]."""
    scene, side = plan.scene, settings.side
    image = np.empty((side, side, 3), np.uint8)
    image[:] = scene.background
    image[int(FLOOR * side) :] = np.array(scene.background) * 6 // 10
    if scene.family == "presence" and scene.premise == "screen":
        image[int(0.22 * side) : int(0.82 * side), int(0.04 * side) : int(0.96 * side)] = (
            12,
            14,
            18,
        )
    elif scene.family == "presence":
        image[int(0.74 * side) : int(0.8 * side), int(0.04 * side) : int(0.96 * side)] = (
            170,
            130,
            90,
        )
    elif scene.family == "picture":
        _device(image, scene.premise)
    return image


def _effect(frame: np.ndarray, edit: str, amount: float, rng: np.random.Generator) -> np.ndarray:
    """One visual effect at `amount` in [0, 1] on float32 [h, w, 3]."""
    if edit == "things get darker":
        return frame * (1 - 0.72 * amount)
    if edit == "things get harsh":
        return (frame - 90) * (1 + 2.2 * amount) + 90
    if edit == "colours shift":
        turned = frame[..., [1, 2, 0]]
        return frame + amount * (turned - frame)
    if edit == "colours fade to grey":
        grey = frame.mean(-1, keepdims=True)
        return frame + amount * (grey - frame)
    if edit == "things get blurry":
        size = frame.shape[1] / 96
        return cv2.GaussianBlur(frame, (0, 0), max(4.5 * amount * size, 0.01))
    if edit == "things warp":
        h, w = frame.shape[:2]
        yy, xx = np.mgrid[0:h, 0:w].astype(np.float32)
        swing = 0.07 * 96 * (max(h, w) / 96) * amount
        shift = np.float32(swing) * np.sin(2 * np.pi * yy / (0.3 * h)).astype(np.float32)
        return cv2.remap(frame, xx + shift, yy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    coarse = rng.normal(0, 75 * amount, (-(-frame.shape[0] // 3), -(-frame.shape[1] // 3), 3))
    noise = np.kron(coarse, np.ones((3, 3, 1)))[: frame.shape[0], : frame.shape[1]]
    return frame + noise.astype(np.float32)


def _box(plan: Plan, f: int) -> tuple[float, float, float, float]:
    scene = plan.scene
    if scene.effect_level == "frame":
        return 0.0, 0.0, 1.0, 1.0
    if scene.effect_level == "region":
        return scene.effect_box
    subject, reach = plan.actors[-1], 2.0 * scene.subject.radius
    return subject.x[f] - reach, subject.y[f] - reach, subject.x[f] + reach, subject.y[f] + reach


def _picture_effect(frames: np.ndarray, plan: Plan, rng: np.random.Generator) -> None:
    """Apply the outcome of a `picture` scene in place, on its level and segment."""
    side, count = frames.shape[1], len(frames)
    first = int(np.ceil(plan.start * (count - 1)))
    last = int(plan.stop * (count - 1)) + 1
    original = frames.copy() if plan.outcome == "things freeze" else None
    for f in range(first, last):
        fade = min(1.0, (f - first + 1) / (0.15 * count)) if plan.scene.effect_ramp else 1.0
        clip = lambda v: int(np.clip(round(v * side), 0, side))
        if original is not None:
            x0, y0, x1, y1 = map(clip, _box(plan, first))
            frames[f, y0:y1, x0:x1] = original[first, y0:y1, x0:x1]
            continue
        x0, y0, x1, y1 = map(clip, _box(plan, f))
        if x1 > x0 and y1 > y0:
            part = frames[f, y0:y1, x0:x1].astype(np.float32)
            frames[f, y0:y1, x0:x1] = np.clip(_effect(part, plan.outcome, fade, rng), 0, 255)


def frames(plan: Plan, settings: Settings) -> np.ndarray:
    """uint8 [F, side, side, 3]."""
    scene, stage = plan.scene, _stage(plan, settings)
    out = np.repeat(stage[None], len(plan.u), 0)
    for f in range(len(plan.u)):
        for actor in plan.actors:
            _actor(out[f], actor, f)
        if scene.family == "wall":
            _barrier(out[f], scene.premise)
    stream = lambda name: generator(scene.seed, f"{scene.id}/{name}")
    if scene.family == "picture" and plan.outcome.startswith(("things", "colours")):
        _picture_effect(out, plan, stream("effect"))
    if settings.grain:
        grain = stream("grain").normal(0, settings.grain, out.shape[1:3]).astype(np.float32)
        out = np.clip(out + grain[None, :, :, None], 0, 255).astype(np.uint8)
    return out


def sound(plan: Plan) -> np.ndarray:
    """float32 [n] at 16 kHz: a decaying knock at every impact, over a faint room tone."""
    scene = plan.scene
    n = int(round(scene.seconds * RATE))
    rng = generator(scene.seed, f"{scene.id}/sound")
    out = rng.normal(0, 0.002, n)
    pitch = 300 + zlib.crc32(scene.subject.shape.encode()) % 500
    t = np.arange(RATE // 4) / RATE
    knock = np.exp(-t * 28) * np.sin(2 * np.pi * pitch * t)
    for when, strength in plan.impacts:
        at = int(when * scene.seconds * RATE)
        piece = knock[: max(0, n - at)]
        out[at : at + len(piece)] += 0.6 * strength * piece
    return np.clip(out, -1, 1).astype(np.float32)
