"""What can happen in the laptop world: families, premises, outcomes, edits and test categories.

A family has two premises, each with its own look and its own ordinary outcomes; what is ordinary
under one premise is odd under the other (a weight falls, a balloon rises). So every outcome is as
often true of a real clip as of an edited one, and neither the words of an option nor the look of an
outcome says whether a clip was edited: only premise and picture together do.

    family     premise   ordinary                 odd (the other premise's ordinary)
    gravity    weight    falls and bounces ...    rises to the top, floats in place
    gravity    balloon   rises to the top ...     falls and bounces, falls and stays down

An edit replaces the ordinary outcome by an odd one. It keeps its name in both directions; on the
mirrored premise the record says `inverse`. Levels are DualityForge's (arXiv 2512.24271, section 3).
"""

import dataclasses

NOTHING = "nothing unusual happens"  # offered for visual edits only, never true of an edited clip


@dataclasses.dataclass(frozen=True)
class Family:
    name: str
    premises: dict[str, tuple[str, ...]]  # premise -> its ordinary outcomes
    question: str  # {look} is the subject: "red square weight"
    weight: float  # share of pairs


FAMILIES = {
    f.name: f
    for f in (
        Family(
            "gravity",
            {
                "weight": ("it falls and bounces", "it falls and stays down"),
                "balloon": ("it rises to the top", "it floats in place"),
            },
            "A {look} is let go. What happens?",
            0.1,
        ),
        Family(
            "collision",
            {
                "block": ("it moves off when hit", "it stays still when hit"),
                "magnet": ("it moves off before any touch", "it is pulled in before any touch"),
            },
            "Something comes towards a {look}. What happens?",
            0.1,
        ),
        Family(
            "wall",
            {
                "wall": ("it bounces back", "it stops in front"),
                "curtain": ("it comes out on the far side", "it stays hidden behind"),
            },
            "A {look} meets a {premise}. What happens?",
            0.1,
        ),
        Family(
            "reversal",
            {
                "glass": ("it breaks in two parts", "it breaks in many parts"),
                "puzzle": ("parts join on the left", "parts join on the right"),
            },
            "Watch the {look}. What happens?",
            0.1,
        ),
        Family(
            "cause",
            {
                "brick": ("it stays where it is", "it moves after a push"),
                "bug": ("it slides off by itself", "it jumps up by itself"),
            },
            "A {look} is on the floor. What happens?",
            0.1,
        ),
        Family(
            "material",
            {
                "stone": ("it lands and stays put", "it lands and rolls away"),
                "jelly": ("it squashes flat", "it stretches tall"),
            },
            "A {look} drops to the floor. What happens?",
            0.1,
        ),
        Family(
            "presence",
            {
                "table": ("a shape slides in", "a shape slides out", "a shape slides across"),
                "screen": ("a shape pops up", "a shape vanishes", "a shape turns into another"),
            },
            "A {look} is on the {premise}. What happens?",
            0.15,
        ),
        Family(
            "picture",
            {
                "lamp": ("things get darker", "things get harsh"),
                "filter": ("colours shift", "colours fade to grey"),
                "lens": ("things get blurry", "things warp"),
                "antenna": ("things get noisy", "things freeze"),
            },
            "A {look} moves under a {premise}. What happens to the picture?",
            0.25,
        ),
    )
}

# Whose outcomes are odd for a device. Lens and antenna are never offered together: blur and noise
# look alike once a clip is encoded. The table is symmetric, so every effect is as often odd as
# ordinary.
ODD_PREMISES = {
    "lamp": ("lens", "antenna"),
    "filter": ("lens", "antenna"),
    "lens": ("lamp", "filter"),
    "antenna": ("lamp", "filter"),
}

# outcome -> the edit that makes it where it is odd
EDITS = {
    **dict.fromkeys(sum(FAMILIES["gravity"].premises.values(), ()), "gravity_reversed"),
    **dict.fromkeys(sum(FAMILIES["collision"].premises.values(), ()), "collision_without_contact"),
    **dict.fromkeys(sum(FAMILIES["wall"].premises.values(), ()), "passing_through_wall"),
    **dict.fromkeys(sum(FAMILIES["reversal"].premises.values(), ()), "time_reversed"),
    **dict.fromkeys(sum(FAMILIES["cause"].premises.values(), ()), "motion_without_cause"),
    **dict.fromkeys(sum(FAMILIES["material"].premises.values(), ()), "material_change"),
    "a shape pops up": "appear",
    "a shape slides in": "appear",
    "a shape vanishes": "vanish",
    "a shape slides out": "vanish",
    "a shape turns into another": "substitute",
    "a shape slides across": "substitute",
    "things get darker": "brightness",
    "things get harsh": "contrast",
    "colours shift": "hue",
    "colours fade to grey": "saturation",
    "things get blurry": "blur",
    "things warp": "local_distortion",
    "things get noisy": "noise",
    "things freeze": "freeze",
}
VISUAL = (
    "brightness",
    "contrast",
    "hue",
    "saturation",
    "blur",
    "local_distortion",
    "noise",
    "freeze",
)
SEMANTIC = ("appear", "vanish", "substitute")
MIRRORED = ("balloon", "magnet", "curtain", "puzzle", "bug", "jelly", "screen")

# edit -> test category (the four of the DualityVidQA test, Table A.5)
CATEGORIES = {
    "gravity_reversed": "counter physical",
    "collision_without_contact": "counter physical",
    "passing_through_wall": "counter physical",
    "material_change": "object/scene deformation",
    "appear": "object/scene deformation",
    "vanish": "object/scene deformation",
    "substitute": "object/scene deformation",
    "blur": "object/scene deformation",
    "local_distortion": "object/scene deformation",
    "noise": "object/scene deformation",
    "time_reversed": "causal reversal",
    "motion_without_cause": "causal reversal",
    "freeze": "causal reversal",
    "brightness": "attribute change",
    "contrast": "attribute change",
    "hue": "attribute change",
    "saturation": "attribute change",
}


def level(edit: str) -> str:
    """DualityForge's level of an edit: visual, semantic or commonsense."""
    return "visual" if edit in VISUAL else "semantic" if edit in SEMANTIC else "commonsense"
