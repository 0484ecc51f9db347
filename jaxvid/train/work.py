"""How much work an update is: the model's FLOPs, whatever computes them and however.

A product x w of matrices is made once forward, and backward once more for each of its sides that
depends on weights that are trained. So a weight that is trained counts three times its forward
product (PaLM's convention, https://arxiv.org/abs/2204.02311, appendix B), a frozen one that stands
behind trained ones twice (LoRA), and a frozen tower once. Counted are real tokens, patches and
chunks of sound and, in attention, the pairs of them that see one another. Not counted are padding,
what is computed again in the backward pass, and all that is no product.

    FLOPs = token #tokens + pair #(tokens that see one another) + scored #(scored tokens)
          + patch #patches + sight #(patches that see one another) + chunk #(chunks of sound)

The six factors are read from the model's own forward pass, traced once over a row of one small
frame and one chunk: every family has them, and no batch shape is traced for them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jaxtyping import Array, Float, Int

from jaxvid import flops
from jaxvid.batch import AudioBatch, Batch, TokenBatch, VisionBatch
from jaxvid.sharding import AXES
from jaxvid.train.state import NONE

TOKENS, PATCHES = 64, 16  # of the row that is traced; so short that attention is one product
DATA = frozenset(("tokens", "vision", "audio"))
NOWHERE = AbstractMesh((), ())
# Where kernels are not chosen, and nothing is split.
ONE = AbstractMesh(
    (1,) * len(AXES),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    abstract_device=AbstractDevice("cpu", None, "cpu"),
)


class Work(NamedTuple):
    """FLOPs of a training step by what is in its batch; `measure` finds them."""

    token: float
    pair: float
    scored: float
    patch: float
    sight: float
    chunk: float
    window: int  # of its own path that a token sees; 0 is all
    full: float  # share of the tower's layers whose patches see the whole frame, not a window

    def __call__(self, batch: Batch) -> Float[Array, ""]:
        """Of all rows of a batch, whatever axes stand before theirs."""
        tokens, window = batch.tokens, jnp.asarray(batch.vision.window)
        real, seen = jnp.asarray(tokens.end) > 0, jnp.asarray(tokens.depth) + 1
        seen = jnp.minimum(seen, self.window) if self.window else seen
        sights = _squares(jnp.minimum(window, 1))
        if self.full < 1:
            sights = self.full * sights + (1 - self.full) * _squares(window)
        counts = {
            "token": _total(real),
            "pair": _total(jnp.where(real, seen, 0)),
            "scored": _total(jnp.asarray(tokens.slot) > 0),
            "patch": _total(window > 0),
            "sight": sights,
            "chunk": _total(jnp.asarray(batch.audio.length) > 0),
        }
        return sum(getattr(self, name) * n for name, n in counts.items())


def measure(cfg: Any, graph: nnx.GraphDef, trained: nnx.State, frozen: nnx.State = NONE) -> Work:
    """The work of a step that trains `trained`; with nothing trained, of a forward pass.

    cfg: the config of the model's family. Nothing is computed: arrays may be shapes.
    """
    tokens, vision, audio = _row(cfg)
    shapes = lambda x: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
    models = []

    def forward(trained, frozen, tokens, vision, audio):
        model = nnx.merge(graph, trained, frozen)
        models.append(model)
        return model.hidden(tokens, vision, audio), model.unembedding()

    args = {"trained": shapes(trained), "frozen": shapes(frozen)}
    args |= {"tokens": tokens, "vision": vision, "audio": audio}
    leave, enter = map(jax.sharding.use_abstract_mesh, (NOWHERE, ONE))
    with leave, enter:  # a mesh in context may not change its size, but may be left
        found, (hidden, table) = flops.products(forward, args)
    per = _sums(found)
    pixels = vision.patches.shape[1] * vision.patches.shape[2]
    V, D = cfg.text.vocab, cfg.text.width
    return Work(
        token=per["tokens", False] / TOKENS,
        pair=per["tokens", True] / TOKENS**2,
        scored=2.0 * V * D * _passes(hidden, table),
        patch=per["vision", False] / pixels,
        sight=per["vision", True] / pixels**2,
        chunk=per["audio", False] + per["audio", True],
        window=cfg.text.window,
        full=models[0].full,
    )


def _row(cfg):
    """Shapes of a row of TOKENS tokens, a frame and, where the family hears, a chunk."""
    sees, hears = cfg.prompting.vision, cfg.prompting.sound
    leaf = lambda *shape, kind=jnp.int32: jax.ShapeDtypeStruct((1, *shape), kind)
    row = leaf(TOKENS)
    tokens = TokenBatch(row, leaf(3, TOKENS), row, row, row, row, row, row)
    size = (sees.size // sees.patch) ** 2 if sees.size else PATCHES * sees.merge**2
    pixels = leaf(1, size, 3 * sees.temporal * sees.patch**2, kind=jnp.uint8)
    vision = VisionBatch(pixels, leaf(1, size, 2), leaf(1, size))
    some = (1, hears.chunk, hears.mels) if hears else (0, 0, 0)
    sound = AudioBatch(leaf(*some, kind=jnp.float32), leaf(some[0]), leaf(some[0]))
    return tokens, vision, sound


def _sums(found):
    """FLOPs of all passes by (what they are of, whether both sides are data: attention)."""
    sums = {(of, both): 0.0 for of in DATA for both in (False, True)}
    for p in found:
        data = (p.left | p.right) & DATA
        # The decoder depends on the towers too, but no tower on the tokens.
        of = next((name for name in ("tokens", "vision", "audio") if name in data), None)
        if of and p.left and p.right:  # a side of constants turns by angles, or resizes
            both = bool(p.left & DATA and p.right & DATA)
            sums[of, both] += p.flops * _passes(p.left, p.right)
    return sums


def _passes(left, right):
    """How often a product is made, forward and backward."""
    return 1 + ("trained" in left) + ("trained" in right)


def _total(x):
    return jnp.sum(x, dtype=jnp.float32)  # a count of pairs is beyond int32


def _squares(ids: Int[Array, "*frames Q"]) -> Float[Array, ""]:
    """Sum over frames and over positive ids of the square of how many patches have that id."""
    ids = jnp.sort(ids, axis=-1)
    at = jnp.broadcast_to(jnp.arange(ids.shape[-1]), ids.shape)
    new = jnp.concatenate([ids[..., :1] >= 0, ids[..., 1:] != ids[..., :-1]], axis=-1)
    start = jax.lax.cummax(jnp.where(new, at, 0), axis=ids.ndim - 1)
    return _total(jnp.where(ids > 0, 2 * (at - start) + 1, 0))  # odd numbers sum to a square
