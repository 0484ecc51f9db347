"""The one scoring function: what the model thinks of the scored tokens of rows of trees.

Training, reference and old log-probs, and every objective use this one, so they cannot disagree.
"""

import jax.numpy as jnp

from jaxvid.batch import AudioBatch, Scores, TokenBatch, VisionBatch
from jaxvid.ops.logprob import logprob


def score(
    model,
    tokens: TokenBatch,
    vision: VisionBatch,
    audio: AudioBatch | None = None,
    *,
    temperature: float = 1.0,
) -> Scores:
    """Log-prob and entropy of each scored token, [B, S]; padding (slot 0) holds any finite number.

    `model` has `hidden(tokens, vision, audio) -> [B, T, D]` and `unembedding() -> [V, D]`. A token
    is predicted from the hidden state at its `sources`: the first token of every branch from the
    last token of the prompt. Only scored positions meet the vocabulary.
    """
    hidden = model.hidden(tokens, vision, audio)
    hidden = jnp.take_along_axis(hidden, tokens.sources[..., None], axis=1)
    logp, entropy = logprob(hidden, model.unembedding(), tokens.targets, temperature=temperature)
    return Scores(logp, entropy)
