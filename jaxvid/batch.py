"""The arrays that flow between parts. Everything here is a pytree; nothing here computes.

One letter per axis, everywhere (type hints, einsums, comments):
  B rows   T tokens of a row   S scored tokens of a row   M branches of a row   D width   F ffn
  V vocabulary   L layers   N query heads   K kv heads   H head dim   G branches per prompt
  E vision frames (temporal patches) of a row   Q patches of a frame   C numbers in a patch
  A sound chunks of a row   F log-mel frames of a chunk   Z mel bins

A row holds trees, depth first: a prompt once, then its branches (then the next tree).

    row    | prompt: video + question | branch 1 | branch 2 | next tree ... | pad |
    end    | e e e e ...          e   | b1 .. b1 | b2 .. b2 | ...           | 0 0 |
    depth  | 0 1 2 ...          p-1   | p ..     | p ..     | 0 ..          | 0 0 |

    token i sees token j   iff   j <= i < end[j]

`end[j]` is the first index after the subtree of token j; `depth` counts the tokens before it on its
own path. Every leaf has rows on its first axis, so one sharding and one micro-batch scan serve all.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int, UInt8


class TokenBatch(NamedTuple):
    """Rows of trees and the tokens scored in them. int32 throughout; numpy or jax arrays."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B 3 T"]  # (time, height, width) for M-RoPE; equal on text
    end: Int[Array, "B T"]  # 0 is padding
    depth: Int[Array, "B T"]
    media: Int[Array, "B T"]  # which of the row's media features is put here, see below; 0 is text
    sources: Int[Array, "B S"]  # index of the hidden state that predicts the scored token
    targets: Int[Array, "B S"]  # the scored token
    slot: Int[Array, "B S"]  # which branch it belongs to, 1 + column of Branches; 0 is padding


class VisionBatch(NamedTuple):
    """Patches of a row's videos, frame by frame: attention never crosses a temporal patch.

    The patches of a frame stand in merge order (the merge x merge patches of one token together).
    `TokenBatch.media` is 1 + an index into the row's features: first those of vision, frame by
    frame (`Vision.slots` each), then those of sound, chunk by chunk (`Sound.slots` each). -1 is the
    family's separator, an embedding of its own (LLaVA's newline).
    """

    patches: UInt8[Array, "B E Q C"]  # raw pixels; the model normalises
    coords: Int[Array, "B E Q 2"]  # (row, column) of each patch in its frame
    window: Int[Array, "B E Q"]  # attention window, from 1; 0 is padding


class AudioBatch(NamedTuple):
    """Log-mel frames of a row's sounds, chunk by chunk: attention never crosses a chunk."""

    features: Float[Array, "B A F Z"]
    length: Int[Array, "B A"]  # frames of the chunk that are sound; 0 is padding
    order: Int[Array, "B A"]  # place of the chunk in its own sound, from 0


class Branches(NamedTuple):
    """What each branch of a row is: column m is the branch that `slot` calls m + 1."""

    record: Int[Array, "B M"]  # index into the batch's list of records; -1 is padding
    pair: Int[Array, "B M"]  # index of its pair in the batch; -1 is padding
    side: Int[Array, "B M"]  # 0 real, 1 counterfactual
    branch: Int[Array, "B M"]  # index within its group
    mate: Int[Array, "B M"]  # preference: on a rejected branch, the slot of its chosen one; else 0;
    #   pDPO: on one alternative of a step, or on both, the slot of the other
    axis: Int[Array, "B M"]  # preference axis: 0 none, 1 spatial, 2 temporal, 3 cross-frame
    weight: Float[Array, "B M"]  # weight in the loss; 0 is padding or context only
    advantage: Float[Array, "B M"]  # policy objectives
    value: Float[Array, "B M"]  # pDPO: expected correctness in [0, 1]; a finished reply has 1 or 0


class Batch(NamedTuple):
    """One micro-batch (or, with a leading axis on every leaf, several) of any objective."""

    tokens: TokenBatch
    vision: VisionBatch
    audio: AudioBatch
    branches: Branches
    old: Float[Array, "B S"]  # trainer's log-prob at the update's start; NaN is the present one
    ref: Float[Array, "B S"]  # log-prob under the frozen reference; preference objectives and KL
    sampled: Float[Array, "B S"]  # the sampler's log-prob; only the importance weight reads it


class Scores(NamedTuple):
    """What `score.score` gives for the scored tokens. float32."""

    logp: Float[Array, "B S"]
    entropy: Float[Array, "B S"]


class Loss(NamedTuple):
    """A loss as numerator and denominator, so that accumulation over micro-batches is exact.

    `metrics` maps a name to its own (sum, count); one named .../max to (largest, 1).
    """

    numerator: Float[Array, ""]
    denominator: Float[Array, ""]
    metrics: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
