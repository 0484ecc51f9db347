"""The smallest Qwen3-VL of the real classes, and prompts in one shape, for us and transformers."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxvid.data import layout
from jaxvid.data.packing import Budget
from jaxvid.models import decoder, hf, qwen3_vision, qwen3vl
from jaxvid.models.layers import Compute
from jaxvid.prompting import Medium

IMAGE, VIDEO = 4, 5
TEXT = decoder.Config(
    layers=3,
    width=32,
    ffn=48,
    heads=4,
    kv_heads=2,
    head_dim=16,  # not width / heads
    vocab=64,
    qkv_bias=False,
    qk_norm=True,
    interleaved=True,
    rope_sections=(4, 2, 2),
)
TOWER = qwen3_vision.Config(
    layers=3, width=32, ffn=48, heads=2, out=32, deep=(0, 1), positions=25, patch=4
)
CFG = qwen3vl.Config(
    text=TEXT,
    vision=TOWER,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=2,
    vision_end_token_id=3,
    bos_token_id=0,
    eos_token_id=1,
    compute=Compute(remat="none"),
)
B, T, G, R = 4, 72, 2, 32  # one shape for all tests: each compiles once
BUDGET = Budget(rows=B, tokens=T, scored=1, branches=1, frames=3, patches=24)

PICTURE = Medium("image", (1, 4, 4))
FILM = Medium("video", (2, 4, 6), 0.5)
STILL = Medium("video", (1, 6, 4), 0.5, times=(2.35,))  # one temporal patch, at its own time
MEDIA = ((PICTURE,), (FILM,), (FILM, STILL), (PICTURE, FILM))


def encode(text):
    """Plain text as tokens that tell different times apart."""
    return [6 + sum(map(ord, word)) % 58 for word in text.split()]


class Prompt(NamedTuple):
    ids: np.ndarray
    media: tuple[Medium, ...]
    patches: tuple[np.ndarray, ...]  # of each medium: [t, q, C] uint8
    tree: layout.Tree


def prompt(media, seed=0, after=()):
    """Text around the media; `after` continues it."""
    r, ask = np.random.default_rng(seed), CFG.prompting
    text = lambda n: r.integers(6, 64, n).tolist()
    ids, seen, patches, given = text(4), [0] * 4, [], 0
    for m in media:
        placed = ask.expand(m, encode)
        ids += placed.ids.tolist()
        seen += np.where(placed.vision > 0, placed.vision + given, 0).tolist()
        given += int(placed.vision.max())
        t, h, w = m.grid
        patches.append(r.integers(0, 256, (t, h * w, TOWER.patch_values)).astype(np.uint8))
    ids = np.array([*ids, *text(4)], np.int32)
    at = ask.positions(ids, media)
    turned = np.tile(at.max() + 1 + np.arange(len(after)), (3, 1))  # placeholders there are text
    ids = np.concatenate([ids, np.array(after, np.int32)])
    tree = layout.tree(
        f"prompt {seed}",
        ids,
        np.concatenate([at, turned], 1),
        ask.vision,
        clips=[layout.Clip(p, m.grid) for p, m in zip(patches, media)],
        seen=np.pad(np.array(seen, np.int32), (0, len(ids) - len(seen))),
    )
    return Prompt(ids, media, tuple(patches), tree)


@functools.cache
def fresh(tied=False):
    cfg = dataclasses.replace(CFG, tied=tied)
    graph, _ = hf.abstract(cfg)
    r = np.random.default_rng(7)  # biases and norms too, so that a lost one shows
    noisy = lambda x: x + 0.2 * r.standard_normal(x.shape).astype(np.float32)
    return hf.Loaded(cfg, graph, jax.tree.map(noisy, hf.initialise(cfg, 0).params))


def model(loaded):
    return nnx.merge(loaded.graph, loaded.params)


QUICK = {"xla_backend_optimization_level": 0}  # for programs that run once
hidden = nnx.jit(lambda model, *inputs: model.hidden(*inputs))
prefill = nnx.jit(lambda model, *inputs: model.prefill(*inputs))
decode = nnx.jit(lambda model, *inputs: model.decode(*inputs))
tower = nnx.jit(lambda model, seen: model.tower(seen))


def run_once(loaded, params, *inputs):
    """`hidden`, compiled with less care than it runs with."""
    run = lambda params, *inputs: nnx.merge(loaded.graph, params).hidden(*inputs)
    return jax.jit(run, compiler_options=QUICK)(params, *inputs)


def padded(prompts):
    """Ids of several prompts, padded on the left as transformers' batches are, and the mask."""
    n = max(len(p.ids) for p in prompts)
    left = lambda x: np.pad(x, (n - len(x), 0))
    return (
        np.stack([left(p.ids) for p in prompts]).astype(np.int64),
        np.stack([left(np.ones_like(p.ids)) for p in prompts]).astype(np.int64),
    )


def their_inputs(torch, prompts):
    """What transformers' model takes for a batch of prompts."""
    ids, mask = padded(prompts)
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "mm_token_type_ids": torch.tensor(np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))),
    }
    shown = [(m, x) for p in prompts for m, x in zip(p.media, p.patches)]
    names = {"image": ("pixel_values", "image_grid_thw")}
    names["video"] = ("pixel_values_videos", "video_grid_thw")
    for kind, (values, grids) in names.items():
        if some := [(m, x) for m, x in shown if m.kind == kind]:
            flat = np.concatenate([x.reshape(-1, x.shape[-1]) for _, x in some])
            inputs[values] = torch.tensor((flat.astype(np.float32) / 255 - 0.5) / 0.5)
            inputs[grids] = torch.tensor([m.grid for m, _ in some])
    return inputs


def published(size):
    """config.json of Qwen3-VL-<size>-Instruct as the hub has it."""
    layers, width, ffn, heads, tied = {
        "2B": (28, 2048, 6144, 16, True),
        "4B": (36, 2560, 9728, 32, True),
        "8B": (36, 4096, 12288, 32, False),
        "32B": (64, 5120, 25600, 64, False),
    }[size]
    small = size in ("2B", "4B")
    depth, inside, wide, deep = (
        (24, 1024, 4096, [5, 11, 17]) if small else (27, 1152, 4304, [8, 16, 24])
    )
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": width,
            "initializer_range": 0.02,
            "intermediate_size": ffn,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
            },
            "rope_theta": 5000000,
            "tie_word_embeddings": tied,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": deep,
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": inside,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": wide,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": width,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }
