"""A tiny model that ends its replies now and then, prompts for it, and their replies."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxvid.data import chat, layout, media
from jaxvid.models import decoder, qwen25vl, vision
from jaxvid.models.layers import Compute
from jaxvid.rollout import sampler
from jaxvid.rollout.sampler import Sampling

GROUP, LIMIT, PAD_ID = 2, 12, 6
VISION = media.Vision(patch=4, temporal=2, merge=2, window=16)
CONFIG = qwen25vl.Config(
    text=decoder.Config(
        layers=2, width=32, ffn=48, heads=4, kv_heads=2, vocab=320, rope_sections=(1, 1, 2)
    ),
    vision=vision.Config(
        layers=1, width=16, ffn=24, heads=2, out=32, full=(0,), patch=4, temporal=2, window=16
    ),
    video_token_id=PAD_ID,
    compute=Compute(remat="none"),
)
HOW = Sampling(max_tokens=LIMIT, temperature=0.8)


@functools.cache
def talker() -> chat.Chat:
    with tempfile.TemporaryDirectory() as folder:
        chat.build_tokenizer(["the ball bounces off the wall and is gone."] * 3, 300, folder)
        return chat.Chat(folder)


@functools.cache
def model():
    """Logits far apart; what ends a reply comes up about every eighth time."""
    net = qwen25vl.Qwen25VL(CONFIG, rngs=nnx.Rngs(0))
    stronger = jnp.full((320, 1), 10.0).at[jnp.array(talker().stop_ids)].set(32.0)
    net.head[...] = net.head[...] * stronger
    return net


def tree(seed: int) -> layout.Tree:
    """Text of some length, every other one after a clip."""
    rng = np.random.default_rng(seed)
    words, grid = rng.integers(20, 300, 40 if seed == 5 else 4 + 2 * seed), (2, 4, 4)
    if seed % 2:
        return layout.tree("text", words, np.tile(np.arange(len(words)), (3, 1)), VISION)
    tokens = np.concatenate([[9], np.full(8, PAD_ID), words])
    return layout.tree(
        f"clip {seed}",
        tokens,
        qwen25vl.positions(tokens, [grid], [1.0], CONFIG),
        VISION,
        clips=[layout.Clip(rng.integers(0, 256, (2, 16, 3 * 2 * 16), np.uint8), grid)],
        seen=layout.in_order(tokens == PAD_ID),
    )


TREES = [tree(seed) for seed in range(7)]
KEYS = jax.random.split(jax.random.key(5), len(TREES))


def run(rows, sampling=HOW):
    """Replies and how many decode steps they took."""
    desk = sampler.Desk(model(), TREES, talker(), sampling, GROUP, KEYS, rows, None)
    return desk.run(), desk.steps


def same(a, b, atol=1e-5):
    for name in ("tokens", "length", "ended"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_allclose(a.logp, b.logp, atol=atol)
