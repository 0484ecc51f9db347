"""Sample G branches from each prompt: the prompt is computed once and its cache kept once.

    prefill:  hidden of the prompt's last token [B, D] and its cache [L, B, P, K, H]
    decode:   one token for each of B x G branches at a time, until all of a slot's have stopped
    refill:   the slot takes the next prompt while the others go on

The prompt's cache is never copied per branch; the branches own a small cache [L, B, G, R, K, H], so
a prompt takes P + G R entries and not G (P + R). Randomness belongs to the branch, not to the
batch: branch g of a row draws from its row's key and g alone, so a prompt gives the same replies
whatever stands beside it, and however many rows there are.

`Local` is this as an `Engine`; remote.py has another. Left out: a slot is given on as a whole, so
the branches of a group that ended early wait for its longest one.
"""

import collections
import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key

from jaxvid import hosts, sharding
from jaxvid.batch import AudioBatch, TokenBatch, VisionBatch
from jaxvid.data import layout, records
from jaxvid.data.chat import Chat
from jaxvid.rollout import groups
from jaxvid.rollout.drawing import Sampling, truncate
from jaxvid.rollout.groups import Rollouts, Setup

__all__ = ["Rollouts", "Sampling", "truncate"]

STRIDE = 16  # tokens between two looks for stop strings; what comes out does not depend on it


class Prompt(NamedTuple):
    """A prompt as each engine takes it: the tree, and what it was made of."""

    tree: layout.Tree
    text: str = ""  # the user's turn, after the media
    media: tuple[records.Media, ...] = ()


class Engine(Protocol):
    """Draws `group` replies to each prompt. `keys[i]` is the randomness of prompt i."""

    def __call__(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, group: int, keys: Key[Array, "n"]
    ) -> Rollouts:
        """numpy, [n, G, R]."""
        ...


@dataclasses.dataclass(frozen=True)
class Local:
    """The engine in this process, `rows` prompts at a time (0: all at once)."""

    model: nnx.Module
    chat: Chat
    rows: int = 0
    mesh: Mesh | None = None

    def __call__(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, group: int, keys: Key[Array, "n"]
    ) -> Rollouts:
        return generate_all(
            self.model,
            [p.tree for p in prompts],
            self.chat,
            sampling,
            group=group,
            keys=keys,
            rows=self.rows,
            mesh=self.mesh,
        )


def generate(
    model: nnx.Module,
    tokens: TokenBatch,
    vision: VisionBatch,
    audio: AudioBatch | None = None,
    *,
    group: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    banned_ids: tuple[int, ...] = (),
    keys: Key[Array, "B"],
) -> Rollouts:
    """Draw `group` branches from the prompt in each row. A row of padding gives length 0.

    Compiled once for each static shape and setting. Rows hold one prompt and no branch.
    """
    if sampling.stop:
        raise ValueError(
            f"stop = {sampling.stop} are texts, and there is no tokenizer here to read replies "
            f"with; use generate_all, or name tokens in stop_ids"
        )
    graph, params = nnx.split(model)
    setup = _setup(graph, group, sampling, stop_ids, banned_ids)
    slots = groups.begin(setup, 0, params, (tokens, vision, audio), keys)
    most, waiting = np.int32(sampling.max_tokens), np.bool_(False)
    return groups.advance(setup, params, slots, most, waiting).out


def generate_all(
    model: nnx.Module,
    trees: Sequence[layout.Tree],
    chat: Chat,
    sampling: Sampling,
    *,
    group: int,
    keys: Key[Array, "n"],
    rows: int = 0,
    mesh: Mesh | None = None,
    done: Callable[[int, Rollouts], None] | None = None,
) -> Rollouts:
    """Draw from the prompts of `trees`, `rows` at a time (0: all at once). numpy, [n, G, R].

    A row whose branches have all ended takes the next prompt; `done` is told of it at once, with
    the prompt's index and its replies [1, G, R]. Lengths are rounded up, so that prompts of about
    one length compile once. In a run of several processes each brings prompts of its own, at least
    one, and gets their replies; `rows` are those of all.
    """
    desk = Desk(model, trees, chat, sampling, group, keys, rows, mesh, done)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return desk.run()


def named_keys(key: Key[Array, ""], names: Sequence[str]) -> Key[Array, "n"]:
    """A key for each name, that depends on the name and on nothing else of the list."""
    marks = jnp.asarray([zlib.crc32(name.encode()) for name in names], jnp.uint32)
    return jax.vmap(lambda mark: jax.random.fold_in(key, mark))(marks)


def _setup(graph, group, sampling, stop_ids, banned_ids) -> Setup:
    stop, banned = tuple(stop_ids), tuple(banned_ids)
    if not stop:
        raise ValueError("stop_ids is empty: name the tokens that end a reply (chat.stop_ids)")
    if set(stop) & set(banned):
        raise ValueError(
            f"ids {sorted(set(stop) & set(banned))} are both stop and banned; a reply could never "
            f"end. Take them out of banned_ids."
        )
    # stop strings are looked for by the host: no program depends on them
    return Setup(graph, group, dataclasses.replace(sampling, stop=()), stop, banned)


class Desk:
    """Which prompt is in which slot, which ones wait, and what has come out."""

    def __init__(self, model, trees, chat, sampling, group, keys, rows, mesh, done=None):
        self.done = done
        self.trees, self.chat, self.sampling, self.keys = trees, chat, sampling, keys
        self.needs = [layout.size(t._replace(branches=())) for t in trees]
        processes = jax.process_count()
        self.mesh, self.ways = mesh, 1 if mesh is None else sharding.data_shards(mesh) // processes
        # Rows and data shards are those of this process, which has its own prompts.
        count, least = hosts.most(len(trees), -len(trees))
        if count and not least:
            raise ValueError("every process must bring at least one prompt, and one brought none")
        most = -(-rows // processes) or count
        self.rows = -(-most // self.ways) * self.ways
        graph, self.params = nnx.split(model)
        stop, banned = chat.stop_ids, banned_ids(chat, model)
        self.setup = _setup(graph, group, sampling, stop, banned)
        needs, patches = [layout.Size(), *self.needs], [0, *map(layout.most_patches, trees)]
        *most, self.patches = hosts.most(*map(max, zip(*needs)), max(patches))
        self.most = layout.Size(*most)
        self.owner = np.full(self.rows, -1)  # the prompt in each slot
        self.read = np.zeros((self.rows, group), int)  # tokens that were searched for stop strings
        self.waiting = collections.deque(range(len(trees)))
        shape = (len(trees), group, sampling.max_tokens)
        self.found = Rollouts(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.zeros(shape[:2], np.int32),
            np.zeros(shape[:2], bool),
        )
        self.steps = 0  # decode steps that were run

    def run(self) -> Rollouts:
        if not self.trees:
            return self.found
        first = [self.waiting.popleft() for _ in range(min(self.rows, len(self.trees)))]
        self.owner[: len(first)] = first
        room = layout.bucket(self.most.tokens)
        inputs, keys = self.prompts(first, self.rows)
        slots = groups.begin(self.setup, room, self.params, inputs, keys)
        most = np.int32(STRIDE if self.sampling.stop else self.sampling.max_tokens)
        while True:
            busy, waiting = hosts.some(bool((self.owner >= 0).any()), len(self.waiting) > 0)
            if not busy:
                break
            slots = groups.advance(self.setup, self.params, slots, most, np.bool_(waiting))
            slots = self.take(slots)
            while hosts.some(bool(self.waiting and (self.owner < 0).any()))[0]:
                slots = self.refill(slots)
        self.steps = int(slots.steps)
        return self.found

    def take(self, slots: groups.Slots) -> groups.Slots:
        """The slots, cut at stop strings; what has ended is put down and its slot is free."""
        out = Rollouts(*(np.array(hosts.local(x)) for x in slots.out))
        if self.sampling.stop and hosts.some(self.cut(out))[0]:
            put = lambda new, old: hosts.place(new, old.sharding)
            cut = {n: put(getattr(out, n), getattr(slots.out, n)) for n in ("length", "ended")}
            slots = slots._replace(out=slots.out._replace(**cut))
        going = (~out.ended & (out.length < self.sampling.max_tokens)).any(1)
        for slot in np.flatnonzero((self.owner >= 0) & ~going):
            for all_found, leaf in zip(self.found, out):
                all_found[self.owner[slot]] = leaf[slot]
            past = np.arange(self.sampling.max_tokens) >= out.length[slot][:, None]
            self.found.tokens[self.owner[slot]][past] = 0
            self.found.logp[self.owner[slot]][past] = 0
            if self.done is not None:
                at = slice(self.owner[slot], self.owner[slot] + 1)
                self.done(int(self.owner[slot]), Rollouts(*(leaf[at] for leaf in self.found)))
            self.owner[slot] = -1
        return slots

    def cut(self, out: Rollouts) -> bool:
        """Ends in place the branches whose new tokens complete a stop string; whether any do.

        A text only grows with its tokens (but for a character whose bytes are not all there), so
        that only a text that holds a stop string need be searched for the token that completed it.
        """
        holds = lambda ids: _holds(self.chat.decode(ids), self.sampling.stop)
        some = False
        for slot in np.flatnonzero(self.owner >= 0):
            for g, n in enumerate(out.length[slot]):
                ids, read = out.tokens[slot, g, :n], self.read[slot, g]
                self.read[slot, g] = n
                if n > read and holds(ids):
                    n = next(i for i in range(read + 1, n + 1) if holds(ids[:i]))
                    out.length[slot, g], out.ended[slot, g], some = n, True, True
        return some

    def refill(self, slots: groups.Slots) -> groups.Slots:
        """The next prompts in free slots, at most one in each data shard."""
        per = self.rows // self.ways
        spare = self.waiting[0] if self.waiting else 0
        which, where = [spare] * self.ways, np.full(self.ways, -1, np.int32)
        for shard, owners in enumerate(self.owner.reshape(self.ways, per)):
            free = np.flatnonzero(owners < 0)
            if len(free) and self.waiting:
                where[shard] = free[0]
                owners[free[0]] = which[shard] = self.waiting.popleft()
                self.read[shard * per + free[0]] = 0
        # a row that goes nowhere is a copy of one that may
        inputs, keys = self.prompts(which, self.ways)
        where = where if self.mesh is None else hosts.place(where, self.placed(self.ways))
        return groups.refill(self.setup, self.params, slots, inputs, keys, where)

    def prompts(self, which: Sequence[int], rows: int):
        """(tokens, vision, audio) and keys of these trees, one a row, on the mesh."""
        here, needs = [self.trees[i] for i in which], [self.needs[i] for i in which]
        tokens = max(len(t.prompt) for t in here)
        tokens, frames, chunks = hosts.most(
            tokens, max(n.frames for n in needs), max(n.chunks for n in needs)
        )
        # none, or as many as any prompt has: two shapes and not one for each number of them
        budget = layout.Budget(
            rows=rows,
            tokens=layout.bucket(tokens),
            scored=0,
            branches=0,
            frames=self.most.frames if frames else 0,
            patches=self.patches if frames else 0,
            chunks=self.most.chunks if chunks else 0,
        )
        inputs = layout.prompts(here, budget)
        keys = self.keys[np.asarray(which)[np.minimum(np.arange(rows), len(here) - 1)]]
        if self.mesh is None:
            return inputs, keys
        return hosts.place((inputs, keys), self.placed(rows))

    def placed(self, rows: int):
        return sharding.row_sharding(self.mesh, rows * jax.process_count())


def _holds(text: str, stops: tuple[str, ...]) -> bool:
    return any(stop in text for stop in stops)


def banned_ids(chat: Chat, model: nnx.Module) -> tuple[int, ...]:
    """What a reply never holds: the chat's control tokens, and rows of the model's table that are
    no token of the tokenizer."""
    rows = jax.eval_shape(model.unembedding).shape[0]
    return chat.banned_ids + tuple(range(chat.size, rows))
