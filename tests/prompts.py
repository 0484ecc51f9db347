"""Prompts of several media as our models take them and as transformers' take them, and what is
compared of the two. For the families whose frames are Qwen2-VL's patches."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxvid.data import layout, sound
from jaxvid.models import hf, weights
from jaxvid.models.decoder import empty_branches
from jaxvid.prompting import Medium

QUICK = {"xla_backend_optimization_level": 0}  # for programs that run once

IMAGE = Medium("image", (1, 6, 6))  # windows of 2 x 2 merged tokens on 3 x 3
CLIP = Medium("video", (2, 6, 6), 1.5)
MUTE = ((IMAGE,), (CLIP,), (CLIP, CLIP), (IMAGE, CLIP))

# From a frame to the next; with 25 positions a second the last two are whole only in float64.
SECONDS = (0.5, 1.0, 0.4, 3.0, 0.13, 1 / 3, 2.5, 1.001, 2.1, 2.36)


def some_media(r, kinds, loud=False):
    """None to four media; `loud`: the videos have sound."""
    media = []
    for kind in r.choice(kinds, r.integers(0, 5)):
        grid = (int(r.integers(1, 9)), *(2 * r.integers(1, 5, 2)).tolist())
        sound, seconds = int(r.integers(3, 900)), float(r.choice(SECONDS))
        if kind == "image":
            media.append(Medium("image", (1, *grid[1:])))
        elif kind == "audio":
            media.append(Medium("audio", sound=sound))
        else:
            media.append(Medium("video", grid, seconds, sound if loud else 0))
    return media


# --- ours


def filled(shapes, spread, make=jnp.asarray):
    """Random weights, quickly; biases and norms are not 0 and 1, so that a lost one shows."""
    r = np.random.default_rng(7)

    def fill(path, v):
        x = r.random(v.shape, np.float32)
        x -= 0.5
        x *= spread
        x += "scale" in str(path)
        return make(x)

    return jax.tree.map_with_path(fill, shapes)


def model(loaded):
    return nnx.merge(loaded.graph, loaded.params)


def quick(call):
    """`call(model, *inputs)`, compiled in a third of the time that `nnx.jit` takes."""
    merged = lambda graph, params, *inputs: call(nnx.merge(graph, params), *inputs)
    run = jax.jit(merged, static_argnums=0, compiler_options=QUICK)
    return lambda model, *inputs: run(*nnx.split(model), *inputs)


hidden = quick(lambda model, *inputs: model.hidden(*inputs))
prefill = quick(lambda model, *inputs: model.prefill(*inputs))
decode = quick(lambda model, *inputs: model.decode(*inputs))


def clip(cfg, medium, seed):
    """Random pixels and log-mel frames of a medium."""
    r, (t, h, w) = np.random.default_rng(seed), medium.grid
    values = cfg.vision.patch_values
    patches = r.integers(0, 256, (t, h * w, values)).astype(np.uint8) if t else None
    if not medium.sound:
        return layout.Clip(patches, medium.grid)
    features = r.standard_normal((medium.sound, cfg.audio.mels)).astype(np.float32)
    return layout.Clip(patches, medium.grid, *sound.cut(features, cfg.audio.chunk))


def tree(cfg, *media, text=3, seed=0):
    """A prompt of some text, then each medium with some text after it."""
    words = lambda n: np.random.default_rng([seed, n]).integers(9, 64, n).astype(np.int32)
    ids, seen, heard = [words(2)], [np.zeros(2, np.int32)], [np.zeros(2, np.int32)]
    clips = [clip(cfg, m, [seed, i]) for i, m in enumerate(media)]
    prompting, frames, chunks = cfg.prompting, 0, 0
    slots = prompting.sound.slots if prompting.sound else 0
    for medium, found in zip(media, clips):
        placed = prompting.expand(medium, lambda text: [])
        after = np.zeros(text, np.int32)
        ids += [placed.ids, words(text)]
        seen += [np.where(placed.vision, placed.vision + frames, 0), after]
        heard += [np.where(placed.sound, placed.sound + chunks * slots, 0), after]
        frames += int(placed.vision.max())
        chunks += 0 if found.sound is None else len(found.sound)
    ids, seen, heard = (np.concatenate(x).astype(np.int32) for x in (ids, seen, heard))
    positions = prompting.positions(ids, media)
    geometry = prompting.vision, prompting.sound
    return layout.tree("t", ids, positions, *geometry, clips=clips, seen=seen, heard=heard)


def rows(budget, *trees):
    """Batches of one prompt a row, the last copied where there are too few."""
    return layout.prompts([*trees, *trees[-1:] * (budget.rows - len(trees))], budget)


def states(ours, budget, trees):
    """Hidden states of each tree's prompt, [n D]."""
    got = []
    for i in range(0, len(trees), budget.rows):
        got += [*hidden(ours, *rows(budget, *trees[i : i + budget.rows]))]
    return [np.asarray(x[: len(t.prompt)]) for x, t in zip(got, trees)]


def packed_states(ours, budget, trees):
    """Those of the trees in one row, one after the other; a tree's last token is a branch."""
    word = lambda t: layout.Branch(t.prompt[-1:], np.ones(1, bool))
    split = [t._replace(prompt=t.prompt[:-1], seen=t.seen[:-1], heard=t.heard[:-1]) for t in trees]
    split = [
        t._replace(positions=t.positions[:, :-1], branches=(word(o),)) for t, o in zip(split, trees)
    ]
    (batch,) = layout.pack([[t] for t in split], budget)
    assert (batch.tokens.end[1:] == 0).all()  # all in the first row
    got = np.asarray(hidden(ours, batch.tokens, batch.vision, batch.audio)[0])
    n = np.cumsum([len(t.prompt) for t in trees])
    return np.split(got[: n[-1]], n[:-1])


def greedy(ours, budget, trees, count):
    """The most probable tokens after each tree's prompt, one after the other."""
    first = rows(budget, *trees)
    state, prompt = prefill(ours, *first)
    state, branch, out = state[:, None], empty_branches(prompt, 1, count), []
    length = jnp.asarray((first[0].end > 0).sum(1), jnp.int32)
    starts = [layout.next_position(t) for t in trees]
    starts = jnp.asarray([*starts, *starts[-1:] * (budget.rows - len(trees))], jnp.int32)
    for i in range(count):
        token = (state @ ours.unembedding().T).argmax(-1).astype(jnp.int32)
        out.append(token[:, 0])
        at = starts[:, None] + i
        state, branch = decode(ours, token, at, prompt, length, branch, jnp.int32(i))
    return np.stack(out, 1)[: len(trees)].tolist()


# --- transformers'


def pixels(cfg, trees, media, kind):
    """Normalised patches of all media of a kind, and their grids."""
    import torch

    tower = cfg.vision
    each = tower.patch_values // 3
    mean, std = (np.repeat(np.float32(x), each) for x in (tower.image_mean, tower.image_std))
    found = []
    for t, ms in zip(trees, media):
        frames = iter(t.clips)
        for medium in ms:
            if medium.grid[0] and (clip := next(frames)) and medium.kind == kind:
                x = clip.patches.reshape(-1, 3 * each).astype(np.float32) / 255
                found.append((torch.tensor((x - mean) / std), medium.grid))
    return (torch.cat([x for x, _ in found]), torch.tensor([g for _, g in found])) if found else ()


def their_inputs(cfg, trees, media):
    """One left-padded batch of trees with the pixels of their media."""
    import torch

    width = max(len(t.prompt) for t in trees)
    pad = lambda x, by=0: np.pad(x, (width - len(x), 0), constant_values=by)
    out = {
        "input_ids": torch.tensor(np.stack([pad(t.prompt, 1) for t in trees]).astype(np.int64)),
        "attention_mask": torch.tensor(np.stack([pad(np.ones_like(t.prompt)) for t in trees])),
    }
    out |= dict(zip(("pixel_values", "image_grid_thw"), pixels(cfg, trees, media, "image")))
    videos = pixels(cfg, trees, media, "video")
    return out | dict(zip(("pixel_values_videos", "video_grid_thw"), videos))


def run_theirs(theirs, inputs, trees):
    """(hidden states, logits) of each tree's prompt."""
    import torch

    with torch.no_grad():
        out = theirs(**inputs, output_hidden_states=True)
    cut = lambda x: [y[-len(t.prompt) :].numpy() for t, y in zip(trees, x)]
    return cut(out.hidden_states[-1]), cut(out.logits)


def generate(theirs, inputs, count):
    """Greedily; [row][count] tokens."""
    settings = dict(do_sample=False, eos_token_id=None, pad_token_id=1)
    out = theirs.generate(**inputs, max_new_tokens=count, **settings)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def assigned(build, cfg, params):
    """The module that `build()` makes, with our weights in it: views of them, where it can be."""
    import torch

    family, pieces = hf.family_of(cfg), {}
    for path, v in hf._leaves(params):
        place = family.places(cfg)[path]
        x = weights.to_stored(np.asarray(v[0] if "{}" in place.name else v[...]), place)
        x = x.reshape(-1, *place.stored) if place.stored else x
        pieces.setdefault(place.name.format(0), []).append((place.part, x))
    stored = {}
    for name, found in pieces.items():
        each = [x for _, x in sorted(found, key=lambda piece: piece[0])]
        stored[name] = torch.from_numpy(np.concatenate(each) if len(each) > 1 else each[0])
    with torch.device("meta"):
        theirs = build()
    names = {k: stored.pop(family.hub_name(k)) for k in theirs.state_dict()}
    assert not stored
    theirs.load_state_dict(names, assign=True)
    for module in theirs.modules():  # what no file has was made on the meta device
        if hasattr(module, "inv_freq"):
            module.__init__(module.config)
    return theirs.eval()


# --- the two compared


def worst(got, want):
    return max(float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True))


def gradients_apart(theirs, inputs, loaded, one, budget, last=6):
    """Of the mean log-prob of the last tokens of a tree's prompt: how far apart a parameter's two
    gradients are at most, over the largest of it, by its name in the files. And the names of those
    that have none: None in theirs, 0 in ours."""
    import torch

    n, hub_name = len(one.prompt), hf.family_of(loaded.cfg).hub_name
    target = torch.tensor(one.prompt[n - last :].astype(np.int64))
    theirs.zero_grad()
    logits = theirs(**inputs).logits[0, -last - 1 : -1]
    torch.nn.functional.cross_entropy(logits, target).backward()
    want = {hub_name(k): p.grad for k, p in theirs.named_parameters()}

    def loss(params):
        ours = nnx.merge(loaded.graph, params)
        state = ours.hidden(*rows(budget, one))[0, n - last - 1 : n - 1]
        logp = jax.nn.log_softmax(state @ ours.unembedding().T)
        return -jnp.take_along_axis(logp, target.numpy()[:, None], 1).mean()

    got = jax.jit(jax.grad(loss), compiler_options=QUICK)(loaded.params)
    got = dict(hf._tensors(loaded.cfg, got, "float32"))
    assert set(got) == set(want)
    none = {k for k, x in want.items() if x is None}
    assert not any(got[k].any() for k in none)
    apart = lambda a, b: float(np.abs(a - b).max() / np.abs(b).max())
    return {k: apart(got[k], want[k].numpy()) for k in set(got) - none}, none
