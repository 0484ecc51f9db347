"""What the recipes with sound share: static shapes of the tiny model that hears.

A clip is 20 frames of 32 x 32 pixels over 3.2 s: 10 temporal patches of 16 patches, 40 tokens of
the decoder. Its sound has a token every 40 ms: 80, from two chunks of two seconds.
"""

import dataclasses

from jaxvid.data import layout, media, pipeline

BASE = "@checkpoints/tiny_omni"
SOUND = "runs/sound/intervened"  # jaxvid-forge sound --out runs/sound/intervened
GENERAL = "runs/sound/general"  # jaxvid-forge sound --out runs/sound/general --mix.show general
CACHE = "runs/sound/cache"  # of decoded frames
REPLY = 32  # tokens a reply may have; the longest right one has 30
SAMPLING = media.Sampling(frames=20, height=32, width=32)


def budget(rows: int, clips: int = 2) -> layout.Budget:
    """Rows of `clips` clips: 132 tokens of prompt each, and at most 3 questions with answers."""
    return layout.Budget(
        rows=rows,
        tokens=288 * clips,
        scored=80 * clips,
        branches=4 * clips,
        frames=10 * clips,
        patches=16,
        chunks=2 * clips,
    )


def supervised(
    clips: int, pairs: int, shards: tuple[str, ...], *, split: str = "train", questions: int = 3
) -> pipeline.Data:
    """Answers to questions about `clips` clips of `pairs` records an update.

    With `questions` 0 all are asked, and every probe as often of the original as of its twin. A row
    then holds an original (440 tokens at most) and a mute clip, or the other two.
    """
    room = budget(-(-clips // 2))
    if not questions:
        room = dataclasses.replace(room, tokens=704, scored=192, branches=10)
    return pipeline.Data(
        shards=shards,
        split=split,
        tasks=("sft", "choice"),
        budget=room,
        pairs=pairs,
        sampling=SAMPLING,
        sound=True,
        cache=CACHE,
        questions=questions,
    )


def preferences(records: int, shards: tuple[str, ...], *, split: str = "train") -> pipeline.Data:
    """Chosen and rejected replies to up to four questions a clip; as many records of each part.

    An original has 546 tokens at most, 205 of them scored, in 25 branches. The clips of two
    intervened and two general records fit six rows.
    """
    room = layout.Budget(
        rows=3 * records // 2, tokens=640, scored=320, branches=48, frames=20, patches=16, chunks=4
    )
    return pipeline.Data(
        shards=shards,
        weights=(1.0,) * len(shards),
        split=split,
        tasks=("preference",),
        budget=room,
        pairs=records,
        sampling=SAMPLING,
        sound=True,
        cache=CACHE,
    )


def questions(shards: tuple[str, ...], split: str) -> pipeline.Data:
    """The probes of a split, asked one by one."""
    return pipeline.Data(
        shards=shards,
        split=split,
        tasks=("policy",),
        budget=budget(1),
        sampling=SAMPLING,
        sound=True,
        cache=CACHE,
    )
