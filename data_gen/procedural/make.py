"""Scenes -> records: both sides rendered and encoded once, told, and set against false words."""

import dataclasses
from collections.abc import Iterator

from data_gen.procedural import draw, tell
from data_gen.procedural.motion import plan
from data_gen.procedural.outcomes import CATEGORIES, EDITS, MIRRORED, level
from data_gen.procedural.scene import Scene, Settings, generator, held_out, sample
from jaxvid.data import media
from jaxvid.data.records import Example, Media, Record, Response

LICENCE = "CC0-1.0"  # rendered from nothing; no footage of anyone
CHUNK = 32  # pairs told together: a false statement is a true one of the same chunk


@dataclasses.dataclass(frozen=True)
class Mix:
    """Which clips and which labels. Defaults make duality pairs with true labels."""

    pairs: bool = True  # False: one clip a record, as in the base mix
    rare: float = 0.0  # base mix: share of clips that show an odd outcome
    mislabelled: float = 0.0  # base mix: share of those told as if the ordinary had happened

    def __post_init__(self):
        for name in ("rare", "mislabelled"):
            if not 0.0 <= vars(self)[name] <= 1.0:
                raise ValueError(f"Mix.{name}={vars(self)[name]}: a share is between 0 and 1")


def scenes(seed: int, split: str, start: int, stop: int, settings: Settings) -> Iterator[Scene]:
    """Scenes start..stop of a split; training and validation skip the held-out combinations.

    A scene is redrawn under the same id with a new attempt number until it is allowed, so the
    scene of an index depends on seed, split and index alone.
    """
    for i in range(start, stop):
        attempt = 0
        while True:
            name = f"{split}/{i:06d}" + (f".{attempt}" if attempt else "")
            scene = sample(seed, name, settings)
            reserved = [
                held_out(scene.subject, o, settings.held_out)
                for o in (scene.ordinary[0], scene.odd[0])
            ]
            if split == "test" or not any(reserved):
                yield scene
                break
            attempt += 1


def _encode(scene: Scene, outcome: str, settings: Settings) -> bytes:
    shown = plan(scene, outcome, round(scene.seconds * settings.fps))
    # A visual edit touches the picture alone; its sound is that of the scene, which no outcome of
    # the picture family changes.
    return media.encode(draw.frames(shown, settings), settings.fps, draw.sound(shown), draw.RATE)


def _open(name: str, side: int, question: str, answer: str, task: str = "sft") -> Example:
    return Example(f"{name} {side}", task, side, question, (), answer, (Response(answer),))


def _choice(name: str, side: int, prompt: str, options: tuple[str, ...], truth: str) -> Example:
    letter = tell.LETTERS[options.index(truth)]
    reply = Response(tell.reasoned(truth, letter))
    return Example(f"{name} {side}", "choice", side, prompt, options, letter, (reply,))


def _side(scene: Scene, side: int, outcome: str, told: str, settings: Settings):
    """The examples of one clip but its preferences (8 open, 2 of choice), and its true facts."""
    frames = round(scene.seconds * settings.fps)
    truth, seen = plan(scene, told, frames), plan(scene, outcome, frames)
    options, places = tell.options(scene), tell.place_options(seen)
    start = tell.places(seen)[0]
    examples = [
        Example(
            f"policy {side}",
            "policy",
            side,
            tell.choice_prompt(tell.question(scene), options),
            options,
            tell.LETTERS[options.index(told)],
        ),
        _open("open", side, tell.question(scene), told),
        _open("caption", side, "Describe the clip.", tell.caption(truth), "caption"),
        *(_open(name, side, q, answer) for name, q, answer in tell.small_questions(seen)),
        _choice("choice", side, tell.choice_prompt(tell.question(scene), options), options, told),
        _choice("place", side, tell.choice_prompt("Where does it start?", places), places, start),
    ]
    return examples, tell.facts(seen)


def _preferences(
    clips: list[tuple[Scene, int, dict[str, str]]],
) -> dict[tuple[str, int], list[Example]]:
    """Chosen and rejected statements, by (scene id, side).

    Two clips whose facts differ on an axis swap them: each one's rejected sentence is the other's
    chosen one. So over a chunk both sides of an axis hold exactly the same sentences.
    """
    found = {(scene.id, side): [] for scene, side, _ in clips}
    for axis in ("spatial", "temporal", "crossframe"):
        rng = generator(clips[0][0].seed, f"{clips[0][0].id}/{axis}")
        waiting: list[int] = []
        partner = {}
        for i in rng.permutation(len(clips)):
            mate = next((j for j in waiting if clips[j][2][axis] != clips[i][2][axis]), None)
            if mate is None:
                waiting.append(i)
            else:
                waiting.remove(mate)
                partner[i], partner[mate] = mate, i
        for i, j in partner.items():
            scene, side, facts = clips[i]
            found[scene.id, side].append((axis, facts[axis], clips[j][2][axis]))
    result = {}
    for (scene_id, side), axes in found.items():
        result[scene_id, side] = [
            Example(
                f"{axis} {side}",
                "preference",
                side,
                PREFERENCE_QUESTIONS[axis],
                (),
                chosen,
                (Response(chosen, "chosen", axis), Response(rejected, "rejected", axis)),
            )
            for axis, chosen, rejected in axes
        ]
    return result


PREFERENCE_QUESTIONS = {
    "spatial": "Describe the place it starts at.",
    "temporal": "Describe its path in order.",
    "crossframe": "Describe the small shape from start to end.",
}


def _meta(scene: Scene, outcomes: list[str], told: list[str], settings: Settings) -> dict:
    edit = EDITS[scene.odd[0]]
    frames = round(scene.seconds * settings.fps)
    plans = [plan(scene, o, frames) for o in outcomes]
    return {
        "pair": scene.id,
        "family": scene.family,
        "premise": scene.premise,
        "edit": edit,
        "inverse": scene.premise in MIRRORED,
        "level": level(edit),
        "category": CATEGORIES[edit],
        "effect_level": scene.effect_level,
        "outcomes": outcomes,
        "told": told,
        "held_out": any(held_out(scene.subject, o, settings.held_out) for o in outcomes),
        "trajectories": [tell.trajectory(p) for p in plans],
        "impacts": [[round(t * scene.seconds, 4) for t, _ in p.impacts] for p in plans],
        "scene": dataclasses.asdict(scene),
    }


def chunk(
    seed: int, split: str, start: int, stop: int, settings: Settings, mix: Mix
) -> list[Record]:
    """Records start..stop of a split: a function of its arguments alone."""
    found, clips = [], []
    for scene in scenes(seed, split, start, stop, settings):
        outcomes = [scene.ordinary[0], scene.odd[0]]
        told = list(outcomes)
        if not mix.pairs:
            rng = generator(seed, f"{scene.id}/mix")
            odd, wrong = rng.random() < mix.rare, rng.random() < mix.mislabelled
            outcomes = [scene.odd[0] if odd else scene.ordinary[0]]
            told = [scene.ordinary[0]] if wrong else list(outcomes)
        sides = []
        for side, (outcome, words) in enumerate(zip(outcomes, told)):
            examples, facts = _side(scene, side, outcome, words, settings)
            clips.append((scene, side, facts))
            sides.append(examples)
        found.append((scene, outcomes, told, sides))
    preferences = _preferences(clips)
    records = []
    for scene, outcomes, told, sides in found:
        names = ("real", "counterfactual")
        if not mix.pairs:
            names = ("counterfactual" if outcomes[0] in scene.odd else "real",)
        examples = [e for i, s in enumerate(sides) for e in (*s, *preferences[scene.id, i])]
        records.append(
            Record(
                id=scene.id,
                split=split,
                media=tuple(
                    Media(n, "video", _encode(scene, o, settings), scene.seconds)
                    for n, o in zip(names, outcomes)
                ),
                examples=tuple(examples),
                meta=_meta(scene, outcomes, told, settings),
                provenance={
                    "tool": "data_gen.procedural",
                    "seed": seed,
                    "settings": dataclasses.asdict(settings),
                    "mix": dataclasses.asdict(mix),
                },
                licence=LICENCE,
            )
        )
    return records
