"""Scene and outcome -> where everything is in every frame, and when things hit each other.

Lengths are shares of the frame, times are shares of the clip, y points down. One function a family;
each sets the actors' tracks and appends the impacts. Until `scene.start` the tracks do not depend
on the outcome, except under `reversal`, where the whole clip runs the other way.
"""

import dataclasses

import numpy as np

from data_gen.procedural.scene import Scene, Thing

FLOOR, CEILING = 0.9, 0.24


@dataclasses.dataclass
class Actor:
    """One thing and its track. float arrays [F]."""

    name: str
    thing: Thing
    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    wide: np.ndarray  # stretch of the width
    tall: np.ndarray
    shown: np.ndarray  # bool


@dataclasses.dataclass
class Plan:
    """Everything that `draw` needs. `impacts` are (time as a share of the clip, strength)."""

    scene: Scene
    outcome: str
    u: np.ndarray  # [F] time of each frame as a share of the clip
    actors: list[Actor]
    impacts: list[tuple[float, float]]
    start: float  # when the outcome begins to show
    stop: float

    def actor(self, name: str, thing: Thing, x: float, y: float) -> Actor:
        full = lambda v: np.full(len(self.u), v, np.float64)
        actor = Actor(name, thing, full(x), full(y), full(0), full(1), full(1), full(1) > 0)
        self.actors.append(actor)
        return actor


def _on_floor(thing: Thing) -> float:
    return FLOOR - thing.radius


def _drop(plan: Plan, actor: Actor, start: float, bounce: float, gravity: float = 8.0) -> float:
    """Let an actor fall from `start`; returns the time of the first impact."""
    top, floor = actor.y[0], _on_floor(actor.thing)
    t, v, y = start, 0.0, top
    first = start + np.sqrt(2 * max(floor - top, 1e-3) / gravity)
    rest = np.ones(len(plan.u), bool)
    while True:
        dt = (v + np.sqrt(v * v + 2 * gravity * (floor - y))) / gravity  # v points up
        here = (plan.u >= t) & (plan.u < t + dt)
        s = plan.u[here] - t
        actor.y[here] = y - v * s + gravity * s * s / 2
        rest &= ~here & (plan.u >= t)
        hit = gravity * dt - v
        t, y, v = t + dt, floor, bounce * hit
        if t < 1:
            plan.impacts.append((t, min(1.0, hit / 3)))
        if v < 0.4 or t >= 1:
            break
    actor.y[plan.u >= t] = floor
    return float(first)


def gravity(plan: Plan, scene: Scene) -> None:
    subject = plan.actor("subject", scene.subject, scene.x, scene.y)
    s = np.clip(plan.u - scene.start, 0, None)
    if plan.outcome == "it falls and bounces":
        _drop(plan, subject, scene.start, 0.75)
    elif plan.outcome == "it falls and stays down":
        _drop(plan, subject, scene.start, 0.0)
    elif plan.outcome == "it rises to the top":
        subject.y = np.maximum(scene.y - 2.0 * s**2 - 0.1 * s, CEILING)
    else:  # floats in place
        subject.x = scene.x + 0.02 * np.sin(6 * np.pi * s)


def collision(plan: Plan, scene: Scene) -> None:
    d, speed = scene.direction, 0.95
    target = plan.actor("subject", scene.subject, 0.5 + 0.1 * d, _on_floor(scene.subject))
    mover = plan.actor("other", scene.other, 0.5 - 0.42 * d, _on_floor(scene.other))
    s = np.clip(plan.u - scene.start / 2, 0, None)
    touch = scene.subject.radius + scene.other.radius
    apart = 0.52
    far = {"it moves off before any touch": touch + 0.16, "it is pulled in before any touch": 0.42}
    travel = apart - far.get(plan.outcome, touch)
    hit = travel / speed
    after = np.clip(s - hit, 0, None)
    mover.x = mover.x + d * np.minimum(speed * s, travel)
    when = scene.start / 2 + hit
    if plan.outcome == "it stays still when hit":
        mover.x = mover.x - d * 0.8 * after
    elif plan.outcome == "it is pulled in before any touch":
        gap = apart - travel - touch
        target.x = target.x - d * np.minimum(4.0 * after**2, gap)
        when += np.sqrt(gap / 4.0)
    else:
        target.x = target.x + d * speed * after
    if plan.outcome != "it moves off before any touch" and when < 1:
        plan.impacts.append((when, 0.9))


def wall(plan: Plan, scene: Scene) -> None:
    d, speed, width = scene.direction, 1.25, 0.15
    subject = plan.actor("subject", scene.subject, 0.5 - 0.4 * d, _on_floor(scene.subject))
    s = np.clip(plan.u - scene.start / 2, 0, None)
    reach = 0.4 - width - scene.subject.radius
    hit = reach / speed
    if plan.outcome == "it bounces back":
        step = np.where(s < hit, speed * s, np.maximum(reach - speed * 0.8 * (s - hit), 0.0))
    elif plan.outcome == "it stops in front":
        step = np.minimum(speed * s, reach)
    elif plan.outcome == "it stays hidden behind":
        step = np.minimum(speed * s, 0.4)
    else:  # comes out on the far side
        step = np.minimum(speed * s, 0.8)
    subject.x = subject.x + d * step
    if plan.outcome in ("it bounces back", "it stops in front"):
        plan.impacts.append((scene.start / 2 + hit, 0.8))


BREAKS = {"it breaks in two parts": 2, "it breaks in many parts": 6}
JOINS = {"parts join on the left": -1, "parts join on the right": 1}


def reversal(plan: Plan, scene: Scene) -> None:
    told = (plan.outcome, scene.ordinary[0], scene.odd[0])
    parts = next((BREAKS[t] for t in told if t in BREAKS), scene.parts)
    side = next((JOINS[t] for t in told if t in JOINS), scene.direction)
    backward = plan.outcome in JOINS
    x, y, crack = 0.5 + 0.2 * side, 0.5, 0.3 + scene.start / 2
    u = 1 - plan.u if backward else plan.u
    s = np.clip(u - crack, 0, None)
    whole = plan.actor("subject", scene.subject, x, y)
    whole.shown = u < crack
    floor = FLOOR - 0.04
    for i in range(parts):
        spread = (i - (parts - 1) / 2) / max(parts - 1, 1)
        size = scene.subject.radius * (0.7 if parts == 2 else 0.42)
        piece = plan.actor(f"part {i}", dataclasses.replace(scene.subject, radius=size), x, y)
        slide = np.minimum(s, 0.35)
        piece.x = x + 1.6 * spread * slide * (1 if parts > 2 else 0.9)
        lift = 0.9 * (1 - abs(spread)) if parts > 2 else 0.2
        piece.y = np.minimum(y - lift * s + 6 * s**2, floor - size)
        piece.angle = 120 * spread * slide
        piece.shown = u >= crack
    plan.impacts.append((1 - crack if backward else crack, 1.0))


def cause(plan: Plan, scene: Scene) -> None:
    d = scene.direction
    subject = plan.actor("subject", scene.subject, 0.5, _on_floor(scene.subject))
    start = 0.15 + scene.start
    s = np.clip(plan.u - start, 0, None)
    if plan.outcome == "it moves after a push":
        touch = scene.subject.radius + scene.other.radius
        pusher = plan.actor("other", scene.other, 0.5, _on_floor(scene.other))
        pusher.x = 0.5 - d * (touch + 1.4 * np.clip(start - plan.u, 0, None))
        pusher.shown = np.abs(pusher.x - 0.5) < 0.75
        subject.x = 0.5 + d * 0.9 * s
        plan.impacts.append((start, 0.8))
    elif plan.outcome == "it slides off by itself":
        subject.x = 0.5 + d * 0.9 * s
    elif plan.outcome == "it jumps up by itself":
        period = 0.42
        hop = np.mod(s, period)
        subject.y = subject.y - 9.0 * hop * (period - hop)
        plan.impacts += [(t, 0.5) for t in (start + period, start + 2 * period) if t < 1]


def material(plan: Plan, scene: Scene) -> None:
    subject = plan.actor("subject", scene.subject, 0.5, 0.4)
    hit = _drop(plan, subject, scene.start, 0.0)
    s = np.clip(plan.u - hit, 0, None)
    bend = np.minimum(s / 0.1, 1.0)
    if plan.outcome == "it lands and rolls away":
        subject.x = 0.5 + scene.direction * 0.75 * s
        subject.angle = scene.direction * 220 * s
    elif plan.outcome == "it squashes flat":
        subject.wide, subject.tall = 1 + 0.7 * bend, 1 - 0.6 * bend
    elif plan.outcome == "it stretches tall":
        subject.wide, subject.tall = 1 - 0.45 * bend, 1 + 1.0 * bend
    subject.y = np.where(s > 0, FLOOR - scene.subject.radius * subject.tall, subject.y)


def presence(plan: Plan, scene: Scene) -> None:
    d, start = scene.direction, 0.1 + scene.start
    subject = plan.actor("subject", scene.subject, 0.5 - 0.2 * d, 0.62)
    s = np.clip(plan.u - start, 0, None)
    came = plan.u >= start
    if plan.outcome == "a shape slides out":
        subject.x = subject.x - d * 1.1 * s
    elif plan.outcome == "a shape vanishes":
        subject.shown = ~came
    elif plan.outcome != "a shape turns into another":
        other = plan.actor("other", scene.other, 0.5 + 0.25 * d, 0.62)
        if plan.outcome == "a shape pops up":
            other.shown = came
        else:
            stop = 0.37 if plan.outcome == "a shape slides in" else 2.0
            other.x = 0.5 + d * (0.62 - np.minimum(1.1 * s, stop))
            if plan.outcome == "a shape slides across":
                other.x, other.y = 0.5 + d * (0.62 - 2.0 * s), np.full_like(s, 0.38)
    else:
        subject.shown = ~came
        plan.actor("other", scene.other, 0.5 - 0.2 * d, 0.62).shown = came


def picture(plan: Plan, scene: Scene) -> None:
    subject = plan.actor("subject", scene.subject, 0.5, 0.62)
    wave = np.mod(plan.u * 1.5 + scene.x, 1.0)
    subject.x = 0.5 + scene.direction * (1.2 * np.abs(wave - 0.5) - 0.3)
    plan.start, plan.stop = scene.start, scene.effect_stop


FAMILY = {
    f.__name__: f for f in (gravity, collision, wall, reversal, cause, material, presence, picture)
}


def plan(scene: Scene, outcome: str, frames: int) -> Plan:
    """Tracks [F] of every actor under `outcome`, and the impact times."""
    result = Plan(scene, outcome, np.arange(frames) / (frames - 1), [], [], scene.start, 1.0)
    for i, (thing, y, direction) in enumerate(scene.clutter):
        actor = result.actor(f"clutter {i}", thing, 0.5, y)
        actor.x = 0.5 + direction * (result.u - 0.5) * 0.8
    FAMILY[scene.family](result, scene)
    return result
