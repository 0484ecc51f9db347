"""A few pairs of 16 x 16 clips for the tests of evaluation and of the policy loop.

The real clip is bright and gets brighter, the counterfactual one is dark and gets darker.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxvid.data import chat, layout, media, pipeline, records, shards
from jaxvid.models import decoder, hf, qwen25vl, vision
from jaxvid.models.decoder import KV
from jaxvid.models.layers import Compute

OPTIONS = ("gets brighter", "gets darker", "stays grey", "turns red")
ASKED = "What happens? A gets brighter B gets darker C stays grey D turns red"
REPLIES = [f"<think>it {text}</think> <answer>{x}</answer>" for x, text in zip("ABCD", OPTIONS)]
VISION = media.Vision(patch=4, temporal=2, merge=2, window=16)
SAMPLING = media.Sampling(frames=4, height=16, width=16)


def clip(start: int, step: int) -> bytes:
    """Eight plain frames from `start` grey, `step` a frame."""
    levels = np.arange(8) * step + start
    return media.encode(np.tile(levels.astype(np.uint8)[:, None, None, None], (1, 16, 16, 3)), 8.0)


@functools.cache
def clips() -> tuple[records.Media, records.Media]:
    return tuple(
        records.Media(name, "video", clip(*levels), 1.0)
        for name, levels in (("real", (160, 10)), ("counterfactual", (90, -10)))
    )


def record(i: int, *, questions: int = 1, sides=(0, 1), split: str = "test") -> records.Record:
    examples = [
        records.Example(f"q{k} of {side}", "policy", side, ASKED, OPTIONS, "AB"[side])
        for side in sides
        for k in range(questions)
    ]
    meta = {"category": ["light", "dark"][i % 2]}
    return records.Record(
        f"pair {i}", split, clips(), tuple(examples), meta, {"tool": "tests"}, "CC0-1.0"
    )


def write(folder, found, split: str = "test") -> None:
    shards.write(folder / "shards", found, split=split)
    chat.build_tokenizer([ASKED, *REPLIES], 320, folder / "model")


def config(folder) -> qwen25vl.Config:
    """The tiny family with the tokenizer's own ids, smaller still."""
    ids = hf.tiny_config("qwen2_5_vl", folder / "model")
    text = decoder.Config(
        layers=1,
        width=32,
        ffn=48,
        heads=4,
        kv_heads=2,
        vocab=ids.text.vocab,
        rope_sections=(1, 1, 2),
    )
    tower = vision.Config(
        layers=1, width=16, ffn=24, heads=2, out=32, full=(0,), patch=4, temporal=2, window=16
    )
    return qwen25vl.Config(
        text=text,
        vision=tower,
        video_token_id=ids.video_token_id,
        image_token_id=ids.image_token_id,
        vision_start_token_id=ids.vision_start_token_id,
        vision_end_token_id=ids.vision_end_token_id,
        fractional_seconds=True,
        compute=Compute(remat="none"),
        tied=True,
    )


def builder(folder, split: str = "test") -> pipeline.Builder:
    data = pipeline.Data(
        shards=(str(folder / "shards"),),
        tasks=("policy",),
        split=split,
        pairs=3,
        sampling=SAMPLING,
        budget=layout.Budget(rows=8, tokens=192, scored=96, branches=16, frames=4, patches=16),
    )
    return pipeline.Builder(chat.Chat(folder / "model"), config(folder).prompting, data)


class Watcher(nnx.Module):
    """Answers by what it sees, in the model's place: A of a clip that gets brighter, B of one that
    gets darker, C of a still one, and only by comparing the first temporal patch with the last.

    Hidden states are one-hot tokens; the branch's cache counts the tokens said.
    """

    def __init__(self, words: chat.Chat):
        said = [words.response(reply) for reply in REPLIES]
        longest = max(len(ids) for ids in said)
        rows = [np.pad(ids, (0, longest - len(ids)), mode="edge") for ids in said]
        self.said = nnx.Param(jnp.array(rows))
        self.rows = words.size + 5

    def unembedding(self):
        return jnp.eye(self.rows)

    def _state(self, reply, step):
        token = self.said[...][reply, jnp.minimum(step, self.said.shape[1] - 1)]
        return jax.nn.one_hot(token, self.rows) * 50.0

    def prefill(self, tokens, seen, audio=None):
        light = seen.patches.astype(jnp.float32).mean((2, 3))
        change = light[:, -1] - light[:, 0]
        reply = jnp.where(change > 2, 0, jnp.where(change < -2, 1, 2))
        # The reply is remembered in every entry of the prompt's cache, where `decode` finds it.
        shape = (1, *tokens.tokens.shape, 1, 1)
        memory = jnp.broadcast_to(reply[None, :, None, None, None], shape).astype(jnp.float32)
        return self._state(reply, jnp.zeros_like(reply)), KV(memory, memory)

    def decode(self, token, positions, prompt, length, branch, step, at=None):
        reply = jnp.broadcast_to(prompt.k[0, :, 0, 0].astype(jnp.int32), token.shape)
        said = jnp.broadcast_to(jnp.reshape(step + 1, (-1, 1)), reply.shape)
        return self._state(reply, said), branch
