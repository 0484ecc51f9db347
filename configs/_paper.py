"""What the recipes of paper size share: clips as each family takes them, data, and their twins.

A recipe names the slice it is meant for (TOPOLOGY, SLICES) and the published model whose shapes it
has (BASE): `jaxvid-launch preflight` reads both. Its `runlocal` variant is the same run, with the
same objective, optimizer, adapters and frozen parts, for two steps of a tiny twin on the laptop
world:

    jaxvid-forge procedural --out runs/world --train 8 --validation 2 --test 2
    jaxvid tiny FAMILY runs/twins/FAMILY --like configs/checkpoints/tiny_base

Shards of the other pipelines are those of the tiny recipes: runs/pasta, runs/utr, runs/sound and,
by `jaxvid steps configs/tiny_steps.py:runlocal --workdir runs/step_pairs`, runs/step_pairs.
"""

import dataclasses
from typing import NamedTuple

from configs import _omni, _tiny
from jaxvid.config import PolicyRun, PreferenceRun, Run, SFTRun
from jaxvid.data import layout, media, pipeline
from jaxvid.eval.run import Settings as Ask
from jaxvid.models.layers import Compute
from jaxvid.objectives.advantages import Duality
from jaxvid.objectives.policy import Policy
from jaxvid.rewards import Overlong
from jaxvid.rollout.sampler import Sampling
from jaxvid.train import groups
from jaxvid.train.optimizers import AdamW

DUALITY = "data/dualityvidqa"  # shards of DualityVidQA: sft, rl and test below it
REPLY = 512  # tokens of a reply with its thought
GROUP = 16


class Clip(NamedTuple):
    """Which frames of a clip a model sees, and what they take of a row."""

    sampling: media.Sampling
    frames: int  # temporal patches
    patches: int  # of one of them
    tokens: int  # of the decoder
    chunks: int = 0  # of sound


def _qwen(frames: int, side: int, policy: str, stamps: int = 0) -> Clip:
    """At most 256 tokens of `side` x `side` pixels a temporal patch of two frames."""
    half = frames // 2
    sampling = media.Sampling(
        frames=frames, height=0, width=0, max_pixels=256 * side**2, policy=policy
    )
    return Clip(sampling, half, 1024, half * (256 + stamps))


QWEN25 = _qwen(16, 28, "qwen_vl_utils")
QWEN25_LONG = _qwen(32, 28, "qwen_vl_utils")
QWEN3 = _qwen(16, 32, "qwen3_vl", stamps=12)
OMNI = _qwen(20, 28, "qwen_vl_utils")._replace(tokens=10 * 256 + 250, chunks=5)  # 10 s of sound
NEXT_VIDEO = Clip(media.Sampling(16, 336, 336, policy="uniform"), 16, 576, 16 * 144)
ONEVISION = Clip(media.Sampling(32, 384, 384, policy="uniform"), 32, 729, 32 * 196 + 1)
SALMONN = Clip(  # 2 frames a second, at most 60; a token every 0.2 s of at most 60 s of sound
    media.Sampling(60, 384, 384, fps=2.0, policy="uniform"), 60, 729, 60 * 169 + 300, 2
)
# Clips of the laptop world, as the families' tiny twins take them.
TINY = {
    "qwen2_5_vl": Clip(_tiny.SAMPLING, 4, 36, 36),
    "qwen2_5_omni_thinker": Clip(_omni.SAMPLING, 10, 16, 120, 2),
    "qwen3_vl": Clip(_tiny.SAMPLING, 4, 36, 100),
    "llava_next_video": Clip(_tiny.SAMPLING, 8, 36, 72),
    "llava_onevision": Clip(_tiny.SAMPLING, 8, 36, 73),
    "video_salmonn_o1": Clip(_tiny.SAMPLING, 8, 36, 100, 1),
}


def budget(clip: Clip, rows: int, room: int, scored: int, branches: int, clips: int = 1):
    """Rows of `clips` clips with `room` tokens of text to each."""
    return layout.Budget(
        rows=rows,
        tokens=clips * (clip.tokens + room),
        scored=clips * scored,
        branches=clips * branches,
        frames=clips * clip.frames,
        patches=clip.patches,
        chunks=clips * clip.chunks,
    )


# DNA-Train ----------------------------------------------------------------------------------------


def dna_sft(model: str, clip: Clip, tensor: int = 1) -> SFTRun:
    """A row holds both sides of a pair with two questions each, so that every batch has as many
    real as counterfactual samples: 64 of 16 pairs. The vision tower is frozen."""
    data = pipeline.Data(
        shards=(f"{DUALITY}/sft",),
        tasks=("sft", "choice"),
        budget=budget(clip, 16, 512, 320, 4, clips=2),
        pairs=16,
        microbatches=1,
        questions=2,
        sampling=clip.sampling,
        workers=16,
        cache="data/cache",
    )
    return SFTRun(
        model=model,
        compute=Compute(dtype="bfloat16", ffn_parts=4),
        data=data,
        tensor=tensor,
        freeze=("tower",),
        frozen_dtype="bfloat16",
        optimizer=AdamW(lr=1e-6, warmup=47, final=0.1),
        steps=1562,
        checkpoint_every=200,
    )


def dna_rl(
    model: str, clip: Clip, steps: int, rows: int = 64, tensor: int = 1, replica: int = 1
) -> PolicyRun:
    """64 prompts an update, as 32 pairs; a row holds one prompt and its 16 replies."""
    return PolicyRun(
        model=model,
        compute=Compute(dtype="bfloat16", ffn_parts=4),
        data=_asked(f"{DUALITY}/rl", clip, rows),
        validation=dataclasses.replace(_asked(f"{DUALITY}/test", clip, rows), split="test"),
        ask=Ask(max_tokens=REPLY, rows=rows),
        replica=replica,
        tensor=tensor,
        freeze=("tower",),
        frozen_dtype="bfloat16",
        objective=Policy(clip_low=0.2, clip_high=0.28, dual_clip=None, aggregation="batch_token"),
        advantages=Duality(),
        rollout=groups.Settings(
            group=GROUP,
            sampling=Sampling(max_tokens=REPLY, temperature=1.0),
            overlong=Overlong(buffer=128),
            rows=rows,
        ),
        optimizer=AdamW(lr=1e-6, warmup=max(steps // 60, 1), schedule="constant", b2=0.999),
        steps=steps,
        eval_every=max(steps // 6, 5),
        checkpoint_every=max(steps // 12, 5),
    )


def _asked(shards: str, clip: Clip, rows: int) -> pipeline.Data:
    room = layout.Budget(
        rows=rows,
        tokens=-(-(clip.tokens + 256 + GROUP * REPLY) // 512) * 512,
        scored=GROUP * REPLY,
        branches=GROUP,
        frames=clip.frames,
        patches=clip.patches,
        chunks=clip.chunks,
    )
    return pipeline.Data(
        shards=(shards,),
        tasks=("policy",),
        budget=room,
        pairs=32,
        microbatches=-(-64 // rows),
        sampling=clip.sampling,
        workers=16,
        cache="data/cache",
    )


# Twins --------------------------------------------------------------------------------------------


def twin(run: Run, family: str, data: pipeline.Data) -> Run:
    """The run with the family's tiny twin on `data`, for two steps and without validation."""
    shipped = {"qwen2_5_vl": _tiny.BASE, "qwen2_5_omni_thinker": _omni.BASE}
    return dataclasses.replace(
        run,
        model=shipped.get(family, f"runs/twins/{family}"),
        compute=dataclasses.replace(run.compute, dtype="float32"),
        data=data,
        validation=None,
        ask=None,
        replica=1,
        tensor=1,
        optimizer=dataclasses.replace(run.optimizer, warmup=0),
        steps=2,
        log_every=1,
        checkpoint_every=100,
        eval_every=0,
        best="eval_loss",
        best_mode="min",
    )


def twin_sft(run: SFTRun, family: str) -> Run:
    """Questions about both sides of two pairs of the world."""
    clip, old = TINY[family], _tiny.supervised(2)
    room = budget(clip, 2, 110, 80, 4, clips=2)
    data = dataclasses.replace(
        old, budget=room, questions=2, sampling=clip.sampling, sound=bool(clip.chunks)
    )
    return twin(run, family, data)


def twin_rl(run: PolicyRun, family: str) -> Run:
    """Four replies to both sides of two pairs. A fresh twin is never right, so that what counts as
    signal is the whole reward."""
    clip, old = TINY[family], _tiny.questions(2)
    room = budget(clip, 4, 64 + 4 * _tiny.REPLY, 4 * _tiny.REPLY, 4)
    data = dataclasses.replace(old, budget=room, sampling=clip.sampling)
    small = dataclasses.replace(
        run.rollout,
        group=4,
        sampling=Sampling(max_tokens=_tiny.REPLY),
        overlong=Overlong(buffer=8),
        filter_on="reward",
        rows=0,
        max_refills=0,
    )
    return dataclasses.replace(twin(run, family, data), rollout=small)


def twin_preferences(run: PreferenceRun, family: str, data: pipeline.Data, rows: int) -> Run:
    """Preferences of the world's shards that `data` reads, as this family's twin takes them."""
    clip = TINY[family]
    frames, old = 2 * clip.frames, data.budget
    room = dataclasses.replace(
        old,
        rows=rows,
        tokens=old.tokens + 2 * clip.tokens,
        frames=frames,
        patches=clip.patches,
        chunks=2 * clip.chunks,
    )
    seen = dataclasses.replace(data, budget=room, sampling=clip.sampling, sound=bool(clip.chunks))
    return twin(run, family, seen)
