"""How a token is drawn: the settings, the cuts of the distribution, and the draw itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxvid import sharding


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 cut nothing.

    A reply ends with a stop token of the chat, or with the token in which its text first holds one
    of the `stop` strings.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        bad = [
            f"{name} = {value!r}, wanted {wanted}"
            for name, value, ok, wanted in (
                ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
                ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]; 1 cuts nothing"),
                ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
                ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]; 0 cuts nothing"),
                ("stop", self.stop, all(self.stop), "texts of at least one character"),
            )
            if not ok
        ]
        if isinstance(self.stop, str):
            bad.append(f"stop = {self.stop!r}, wanted a tuple of texts: ({self.stop!r},)")
        if bad:
            raise ValueError("sampling: " + "; ".join(bad))


def truncate(
    logits: Float[Array, "*n V"], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Array, "*n V"]:
    """-inf on all but the top_k largest, then on all outside the smallest set of what is left that
    holds top_p, then on all less likely than min_p times the most likely.

    Ties with the last one kept are kept; the largest is always kept. Nucleus: arXiv 1904.09751,
    equation 3; min-p: arXiv 2407.01082, equation 3.
    """
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        chance = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(chance, axis=-1) - chance  # mass of those ahead of each
        least = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + np.log(min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(
    keys: Key[Array, "B G"],
    hidden: Float[Array, "B G D"],
    unembed: Float[Array, "V D"],
    sampling: Sampling,
    banned: tuple[int, ...],
) -> tuple[Int[Array, "B G"], Float[Array, "B G"]]:
    """Token and log-prob of each branch. float32, as `ops.logprob` is.

    On a mesh the table of words stays where it lies; the hidden states, which are small, travel.
    """
    unembed = sharding.fit(unembed.astype(hidden.dtype), "vocab", "embed")
    logits = sharding.sent(hidden, unembed.T, "vocab", jnp.float32)
    logits = sharding.fit(logits, "rows", None, None)
    logits = logits.astype(jnp.float32) / (sampling.temperature or 1.0)
    allowed = logits
    if banned:
        never = np.isin(np.arange(logits.shape[-1]), banned)
        allowed = jnp.where(never[None, None], -jnp.inf, logits)
    if sampling.temperature == 0:
        token = allowed.argmax(-1)
    else:
        cuts = {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
        token = jax.vmap(jax.vmap(jax.random.categorical))(keys, truncate(allowed, **cuts))
    logp = jnp.take_along_axis(logits, token[..., None], -1)[..., 0]
    return token.astype(jnp.int32), logp - jax.nn.logsumexp(logits, axis=-1)
