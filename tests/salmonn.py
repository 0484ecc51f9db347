"""The smallest video-SALMONN-o1 of the real classes, its media and rows, and the same model put
together from transformers' modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from prompts import filled
from towers import pixels

from jaxvid.data import layout
from jaxvid.data.packing import Budget
from jaxvid.models import decoder, encoder, hf, qformer, salmonn, vit, whisper
from jaxvid.models.layers import Compute
from jaxvid.prompting import Medium

TEXT = decoder.Config(
    layers=2, width=32, ffn=48, heads=4, kv_heads=2, vocab=64, rope_sections=(4, 0, 0)
)
TOWER = vit.Config(
    layers=3,
    width=24,
    ffn=40,
    heads=2,
    image=28,  # 7 patches a side: the last row and column are left over
    patch=4,
    unused=1,
    kind="siglip",
    activation="gelu_tanh",
    norm_eps=1e-6,
    image_mean=vit.SIGLIP_MEAN,
    image_std=vit.SIGLIP_STD,
)
EARS = whisper.Config(
    encoder=encoder.Config(layers=2, width=24, ffn=40, heads=3, key_bias=False),
    mels=16,
    positions=20,
)
ASKED = qformer.Config(layers=2, width=16, ffn=40, heads=2, source=24, window=5, queries=2)
CFG = salmonn.Config(
    text=TEXT,
    vision=TOWER,
    audio=EARS,
    qformer=ASKED,
    image_token_id=4,
    video_token_id=5,
    audio_token_id=6,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=0,
    segments=4,
    time_stamp="{seconds:.1f}",
    compute=Compute(remat="none"),
)
QUICK = {"xla_backend_optimization_level": 0}  # for programs that run once

IMAGE = Medium("image", (1, 7, 7))
MUTE = Medium("video", (2, 7, 7), 0.5)
FILM = Medium("video", (3, 7, 7), 0.25, 70)  # windows of 10 mel frames: 3, 2 and 2; 2 segments
SOUND = Medium("audio", sound=85)  # 9 windows of 3 segments
BUDGET = Budget(rows=2, tokens=88, scored=2, branches=2, frames=4, patches=49, chunks=5)


def encode(text):
    """A token a character."""
    return [10 + ord(x) % 50 for x in text]


@functools.cache
def fresh():
    graph, shapes = hf.abstract(CFG)
    return hf.Loaded(CFG, graph, filled(shapes, 0.5))


def model():
    return nnx.merge(*fresh()[1:])


def compiled(run):
    """`run(model, *inputs)` on the fresh weights, compiled quickly."""
    whole = lambda params, *inputs: run(nnx.merge(fresh().graph, params), *inputs)
    quick = jax.jit(whole, compiler_options=QUICK)
    return lambda *inputs: quick(fresh().params, *inputs)


@compiled
def run(model, tokens, vision, audio):
    """(hidden states, the frames' features, the sound's features), in one program for all tests."""
    return model.hidden(tokens, vision, audio), model.seen(vision), model.heard(audio)


def clip(medium, seed, cfg=CFG):
    """Random pixels and log-mel frames of a medium; the silence that fills a segment is heard."""
    r, (t, h, w) = np.random.default_rng(seed), medium.grid
    patches = r.integers(0, 256, (t, h * w, cfg.vision.patch_values)).astype(np.uint8)
    patches = patches if t else None
    if not medium.sound:
        return layout.Clip(patches, medium.grid)
    chunks = -(-medium.sound // cfg.audio.chunk)
    features = r.standard_normal((chunks, cfg.audio.chunk, cfg.audio.mels)).astype(np.float32)
    return layout.Clip(patches, medium.grid, features, np.full(chunks, cfg.audio.chunk, np.int32))


def tree(*media, text=3, seed=0, cfg=CFG):
    """A prompt of some text, then each medium with some text after it."""
    words = lambda n: np.random.default_rng([seed, n]).integers(9, 64, n).astype(np.int32)
    ids, seen, heard = [words(2)], [np.zeros(2, np.int32)], [np.zeros(2, np.int32)]
    clips = [clip(m, [seed, i], cfg) for i, m in enumerate(media)]
    prompting, features, slots = cfg.prompting, 0, 0
    for medium, found in zip(media, clips):
        placed, after = prompting.expand(medium, encode), np.zeros(text, np.int32)
        ids += [placed.ids, words(text)]
        seen += [np.where(placed.vision, placed.vision + features, 0), after]
        heard += [np.where(placed.sound, placed.sound + slots, 0), after]
        features += int(placed.vision.max())
        slots += 0 if found.sound is None else len(found.sound) * cfg.slots
    ids, seen, heard = (np.concatenate(x).astype(np.int32) for x in (ids, seen, heard))
    positions = prompting.positions(ids, media)
    geometry = prompting.vision, prompting.sound
    return layout.tree("t", ids, positions, *geometry, clips=clips, seen=seen, heard=heard)


def rows(*trees, budget=BUDGET):
    """Batches of one prompt a row, the last copied where there are too few."""
    return layout.prompts([*trees, *trees[-1:] * (budget.rows - len(trees))], budget)


def generate(ours, prompt, inputs, tokens):
    """Greedy tokens of a prompt alone in its rows, through the cache."""
    length = jnp.full(len(inputs[0].tokens), len(prompt.prompt))

    def one(carry, i):
        state, branch = carry
        token = (state @ ours.unembedding().T).argmax(-1).astype(jnp.int32)
        at = (length + i)[:, None]
        return ours.decode(token, at, kv, length, branch, i), token[0, 0]

    state, kv = ours.prefill(*inputs)
    start = state[:, None], decoder.empty_branches(kv, 1, tokens)
    return jax.lax.scan(one, start, jnp.arange(tokens))[1]


def modules(cfg):
    """transformers' modules of the parts, by the prefix of their tensors in our folders."""
    import transformers as hub
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = cfg.to_hf()
    section = lambda name: config[f"{name}_config"]
    return {
        "vision_tower": hub.SiglipVisionModel(hub.SiglipVisionConfig(**section("vision"))),
        "speech_encoder": WhisperEncoder(hub.WhisperConfig(**section("speech"))),
        "qformer": Blip2QFormerModel(hub.Blip2QFormerConfig(**section("qformer"))),
        "language_model": hub.Qwen2ForCausalLM(hub.Qwen2Config(**section("text"))),
    }


class Theirs:
    """The whole, of transformers' modules and torch's layers, with the tensors of a folder."""

    def __init__(self, cfg, tensors):
        import torch
        from torch import nn

        self.torch, self.cfg = torch, cfg
        V, W, Q, D = cfg.vision.width, cfg.audio.encoder.width, cfg.qformer.width, cfg.text.width
        self.parts = nn.ModuleDict(modules(cfg))
        projector = {"linear_1": nn.Linear(V, D), "linear_2": nn.Linear(D, D)}
        self.parts["multi_modal_projector"] = nn.ModuleDict(projector)
        self.parts["segment_embedding"] = nn.Embedding(cfg.segments, W)
        self.parts["language_projection"] = nn.Linear(Q, D)
        self.parts.register_parameter("query_tokens", nn.Parameter(torch.zeros(1, 2, Q)))
        self.parts.eval().requires_grad_(True)
        self.parts.load_state_dict({self.name(k): torch.tensor(x) for k, x in tensors.items()})

    def name(self, hub):
        return hub.replace("vision_tower.vision_model.", "vision_tower.")

    def gradients(self):
        found = {salmonn.hub_name(k): p.grad for k, p in self.parts.named_parameters()}
        return {k: None if g is None else g.numpy() for k, g in found.items()}

    def seen(self, patches):
        """Features of frames [n, 49, C]."""
        cfg, p = self.cfg.vision, self.parts
        images = self.torch.tensor(pixels(cfg, patches))
        states = p["vision_tower"](images, output_hidden_states=True).hidden_states
        x = states[-1 - cfg.unused].unflatten(1, (cfg.side, cfg.side)).permute(0, 3, 1, 2)
        x = self.torch.nn.functional.max_pool2d(x, 2).flatten(2).transpose(1, 2)
        project = p["multi_modal_projector"]
        return project["linear_2"](self.torch.nn.functional.gelu(project["linear_1"](x))).flatten(
            0, 1
        )

    def heard(self, sound, order):
        """Features of segments [n, F, Z], window by window."""
        p, size, out = self.parts, self.cfg.qformer.window, []
        x = p["speech_encoder"](self.torch.tensor(sound).transpose(1, 2)).last_hidden_state
        x = x + p["segment_embedding"](self.torch.tensor(order))[:, None]
        for states in x:
            for at in range(0, len(states), size):
                window = states[None, at : at + size]
                asked = p["qformer"](p.query_tokens, encoder_hidden_states=window)
                out.append(p["language_projection"](asked.last_hidden_state[0]))
        return self.torch.cat(out)

    def embedded(self, tree):
        table = self.parts["language_model"].get_input_embeddings()
        x = [*table(self.torch.tensor(tree.prompt))]
        if tree.clips:
            features = self.seen(np.concatenate([c.patches for c in tree.clips]))
            for i in np.flatnonzero(tree.seen):
                x[i] = features[tree.seen[i] - 1]
        if len(tree.sound):
            features = self.heard(tree.sound, tree.order)
            for i in np.flatnonzero(tree.heard):
                x[i] = features[tree.heard[i] - 1]
        return self.torch.stack(x)[None]

    def run(self, embedded):
        """(hidden states, logits) of one prompt."""
        out = self.parts["language_model"](inputs_embeds=embedded, output_hidden_states=True)
        return out.hidden_states[-1][0], out.logits[0]
