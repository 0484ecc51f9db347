"""What the laptop recipes share: the world's shards and the static shapes of the tiny model.

A clip is 8 frames of 48 x 48 pixels: 4 temporal patches of 36 patches, 36 tokens of the decoder.
"""

from jaxvid.data import layout, media, pipeline

WORLD = "runs/world"  # jaxvid-forge procedural --out runs/world
STEPS = "runs/steps"  # jaxvid-forge steps --shards runs/world --out runs/steps
PASTA = "runs/pasta"  # jaxvid-forge pasta --shards runs/world --out runs/pasta
BASE = "@checkpoints/tiny_base"
REPLY = 16  # tokens a reply may have; the longest right one has 14
STEPWISE = 56  # tokens of a reply in steps; the longest right one has 46
SAMPLING = media.Sampling(frames=8, height=48, width=48)


def supervised(pairs: int, split: str = "train", shards: str = WORLD) -> pipeline.Data:
    """Open questions and questions of choice, 8 : 2; both sides of `pairs` records an update."""
    return pipeline.Data(
        shards=(shards,),
        split=split,
        tasks=("sft", "choice", "caption"),
        budget=layout.Budget(
            rows=pairs + 2, tokens=384, scored=192, branches=12, frames=8, patches=36
        ),
        pairs=pairs,
        questions=4,
        sampling=SAMPLING,
    )


def preferences(pairs: int, split: str = "train") -> pipeline.Data:
    """Chosen and rejected statements on up to three axes; both sides of `pairs` records."""
    return pipeline.Data(
        shards=(WORLD,),
        split=split,
        tasks=("preference",),
        budget=layout.Budget(
            rows=pairs + 2, tokens=288, scored=144, branches=20, frames=8, patches=36
        ),
        pairs=pairs,
        sampling=SAMPLING,
    )


def adversaries(pairs: int, split: str = "train") -> pipeline.Data:
    """One description against three, and a question on each axis; both sides of `pairs` records.

    A clip with its questions and replies has at most 427 tokens, 230 of them scored.
    """
    return pipeline.Data(
        shards=(PASTA,),
        split=split,
        tasks=("preference",),
        budget=layout.Budget(
            rows=2 * pairs, tokens=464, scored=256, branches=16, frames=4, patches=36
        ),
        pairs=pairs,
        sampling=SAMPLING,
    )


def questions(pairs: int, split: str = "train", shards: str = WORLD) -> pipeline.Data:
    """The pairs' shared question of choice; a row holds one prompt and its group of replies.

    A prompt has at most 98 tokens, and a group is 8 replies of at most REPLY tokens.
    """
    return pipeline.Data(
        shards=(shards,),
        split=split,
        tasks=("policy",),
        budget=layout.Budget(
            rows=2 * pairs, tokens=224, scored=128, branches=8, frames=4, patches=36
        ),
        pairs=pairs,
        sampling=SAMPLING,
    )


def steps(pairs: int, split: str = "train") -> pipeline.Data:
    """Replies in steps to the question of choice; a row holds both sides of a record."""
    return pipeline.Data(
        shards=(STEPS,),
        split=split,
        tasks=("sft",),
        budget=layout.Budget(rows=pairs, tokens=288, scored=96, branches=2, frames=8, patches=36),
        pairs=pairs,
        sampling=SAMPLING,
    )


def step_pairs(pairs: int) -> pipeline.Data:
    """Steps behind their prefixes and whole replies; a row holds a question with all of its pairs.

    Those of seed 0 have some 350 tokens and 13 branches at most.
    """
    return pipeline.Data(
        shards=("runs/step_pairs/shards",),
        tasks=("preference",),
        budget=layout.Budget(
            rows=pairs + 2, tokens=448, scored=320, branches=20, frames=8, patches=36
        ),
        pairs=pairs,
        sampling=SAMPLING,
    )
