"""What is true of a clip, in words: questions, options, captions, preference statements.

Everything is read off the plan, so every text is exactly true; a false text is a text that is true
of another scene. Styles are therefore the same on both sides of every choice.
"""

import numpy as np

from data_gen.procedural.motion import Actor, Plan
from data_gen.procedural.outcomes import FAMILIES
from data_gen.procedural.scene import Scene, generator

COLUMNS, ROWS = ("left", "middle", "right"), ("top", "centre", "bottom")
LETTERS = "ABCDE"
MOMENTS = 4  # how many places a track names


def question(scene: Scene) -> str:
    return FAMILIES[scene.family].question.format(look=scene.look, premise=scene.premise)


def options(scene: Scene) -> tuple[str, ...]:
    """The four outcomes in the pair's one order; the order is uniform over records."""
    listed = [*scene.ordinary, *scene.odd]
    order = generator(scene.seed, f"{scene.id}/options").permutation(4)
    return tuple(listed[i] for i in order)


def choice_prompt(question: str, options: tuple[str, ...]) -> str:
    listed = "\n".join(f"{a}. {o}" for a, o in zip(LETTERS, options))
    return f"{question}\n{listed}"


def place_options(plan: Plan) -> tuple[str, ...]:
    """Where the subject starts among three places where it does not, in a seeded order."""
    rng = generator(plan.scene.seed, f"{plan.scene.id}/{plan.outcome}/places")
    truth = places(plan)[0]
    others = [f"{r} {c}" for r in ROWS for c in COLUMNS if f"{r} {c}" != truth]
    listed = [truth, *rng.choice(others, 3, replace=False)]
    return tuple(str(listed[i]) for i in rng.permutation(4))


def reasoned(thought: str, answer: str) -> str:
    return f"<think>{thought}</think> <answer>{answer}</answer>"


def places(plan: Plan) -> list[str]:
    """Place of the subject (of its visible parts) at MOMENTS times, 'gone' where not in sight."""
    found = []
    for f in np.linspace(0.06, 0.97, MOMENTS) * (len(plan.u) - 1):
        f = int(round(f))
        seen = [a for a in plan.actors if a.name.startswith(("subject", "part")) and a.shown[f]]
        seen = [a for a in seen if -0.05 < a.x[f] < 1.05]
        if not seen:
            found.append("gone")
            continue
        x, y = (float(np.mean([vars(a)[k][f] for a in seen])) for k in "xy")
        column, row = COLUMNS[min(int(max(x, 0) * 3), 2)], ROWS[min(int(max(y, 0) * 3), 2)]
        found.append(f"{row} {column}")
    return found


def _crossing(plan: Plan) -> str:
    clutter = next(a for a in plan.actors if a.name == "clutter 0")
    return "left to right" if clutter.x[-1] > clutter.x[0] else "right to left"


def movement(plan: Plan, actors: list[Actor]) -> str:
    """The order in which they move, one actor after the other: 'still, then down, then up'."""
    names = []
    for a in actors:
        steps = np.linspace(0, len(plan.u) - 1, 9).astype(int)
        for i, j in zip(steps, steps[1:]):
            if not (a.shown[i] and a.shown[j]):
                continue
            dx, dy = a.x[j] - a.x[i], a.y[j] - a.y[i]
            if max(abs(dx), abs(dy)) < 0.03:
                name = "still"
            elif abs(dx) >= abs(dy):
                name = "right" if dx > 0 else "left"
            else:
                name = "down" if dy > 0 else "up"
            if not names or names[-1] != name:
                names.append(name)
    return ", then ".join(names[:3])


def _subject_moves(plan: Plan) -> str:
    actors = [a for a in plan.actors if a.name.startswith(("subject", "part 0"))]
    return movement(plan, actors)


def facts(plan: Plan) -> dict[str, str]:
    """One true sentence per preference axis; none names the subject, so any fits any scene."""
    return {
        "spatial": f"It starts at the {places(plan)[0]}.",
        "temporal": f"Its path is {_subject_moves(plan)}.",
        "crossframe": f"The small shape goes from {_crossing(plan)}.",
    }


def caption(plan: Plan) -> str:
    told = facts(plan)
    return f"A {plan.scene.look}: {plan.outcome}. " + " ".join(told.values())


def small_questions(plan: Plan) -> list[tuple[str, str, str]]:
    """(name, question, answer): what a clip shows besides its outcome."""
    scene = plan.scene
    return [
        ("look", "What is the large shape?", f"{scene.subject.colour} {scene.subject.shape}"),
        ("track", "Where is it over time?", ", ".join(places(plan))),
        ("path", "Which way does it move?", _subject_moves(plan)),
        ("crossing", "Which way does the small shape go?", _crossing(plan)),
        ("start", "Where does it start?", places(plan)[0]),
        ("end", "Where does it end?", places(plan)[-1]),
    ]


def trajectory(plan: Plan, moments: int = 8) -> dict[str, list[list[float]]]:
    """Centre [x, y] of every actor at `moments` even times, as shares of the frame."""
    at = np.linspace(0, len(plan.u) - 1, moments).astype(int)
    point = lambda a, f: [round(float(a.x[f]), 3), round(float(a.y[f]), 3)] if a.shown[f] else []
    return {a.name: [point(a, f) for f in at] for a in plan.actors}
