"""What all families share: features of media in place of their tokens, then a decoder.

A family is a subclass that adds its towers and says in `features` what they give.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxvid.batch import AudioBatch, TokenBatch, VisionBatch
from jaxvid.models import decoder
from jaxvid.models.decoder import KV


class Features(NamedTuple):
    """What the towers give for each row: what `TokenBatch.media` counts.

    `deep[i]`, where there is any, is added to the hidden states that leave decoder layer i, at the
    same places.
    """

    put: Float[Array, "B P D"]
    deep: Float[Array, "I B P D"] | None = None


class Multimodal(nnx.Module):
    """Hidden states and the unembedding; log-probs are `ops.logprob`'s, so no logits here."""

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.decoder = decoder.Decoder(cfg.text, cfg.compute, rngs=rngs)
        if cfg.tied:
            self.head = None
        else:
            shape = (cfg.text.vocab, cfg.text.width)
            w = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
            self.head = nnx.Param(w, axes=("vocab", "embed"))

    def features(self, vision: VisionBatch, audio: AudioBatch | None) -> Features | None:
        """The towers' features, vision's first; None for a batch without media, whose towers
        never run."""
        raise NotImplementedError

    def separator(self) -> Float[Array, "D"] | None:
        """The embedding where `media` is -1; None in a family without one."""
        return None

    @property
    def full(self) -> float:
        """The share of the vision tower's layers in which a patch sees its whole frame; in the
        others it sees its window."""
        return 1.0

    def unembedding(self) -> Float[Array, "V D"]:
        """float32 as stored: `ops.logprob` chooses the precision of the product."""
        return (self.decoder.table if self.head is None else self.head)[...]

    def hidden(
        self, tokens: TokenBatch, vision: VisionBatch, audio: AudioBatch | None = None
    ) -> Float[Array, "B T D"]:
        """After the final norm."""
        return self._run(tokens, vision, audio, keep=False)[0]

    def prefill(
        self, tokens: TokenBatch, vision: VisionBatch, audio: AudioBatch | None = None
    ) -> tuple[Float[Array, "B D"], KV]:
        """One prompt per row, from index 0. Its last hidden state (which predicts the first token
        of every branch) and its cache. A row of padding gives some finite state."""
        y, kv = self._run(tokens, vision, audio, keep=True)
        last = jnp.maximum((jnp.asarray(tokens.end) > 0).sum(axis=1) - 1, 0)
        return jnp.take_along_axis(y, last[:, None, None], axis=1)[:, 0], kv

    def _run(self, tokens, vision, audio, *, keep):
        tokens = TokenBatch(*map(jnp.asarray, tokens))
        x, deep = self.decoder.embed(tokens.tokens), None
        features = self.features(vision, audio)
        if features is not None:
            at = jnp.maximum(tokens.media - 1, 0)[..., None]
            taken = lambda f: jnp.take_along_axis(f, at, axis=1)
            x = jnp.where(tokens.media[..., None] > 0, taken(features.put), x)
            deep = _deep(features.deep, tokens.media, taken)
        if (separator := self.separator()) is not None:
            here = tokens.media[..., None] < 0
            x = jnp.where(here, separator.astype(x.dtype).reshape(1, 1, -1), x)
        return self.decoder(x, tokens.positions, tokens.end, tokens.depth, keep=keep, deep=deep)

    def decode(
        self,
        token: Int[Array, "B G"],
        positions: Int[Array, "B G"],  # the same on the three axes, as on all text
        prompt: KV,
        length: Int[Array, "B"],
        branch: KV,
        step: int | Int[Array, ""] | Int[Array, "B"],
        at: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B G D"], KV]:
        """One new token per branch, its `step`-th; `branch` comes back with it written in column
        `at` (None: `step`)."""
        x = self.decoder.embed(token)
        return self.decoder.step(x, positions, prompt, length, branch, step, at)


def _deep(deep, media, taken):
    """`decoder`'s `deep`: the i-th layer's share, gathered as the layer is reached."""
    if deep is None:
        return None
    count = len(deep)

    def share(i):
        here = (media[..., None] > 0) & (i < count)
        return jnp.where(here, taken(deep[jnp.minimum(i, count - 1)]), 0)

    return share
