"""Qwen2.5-VL (https://arxiv.org/abs/2502.13923): vision tower, merged features in place of the
placeholder tokens, decoder with M-RoPE. And its numpy `positions`, which data preparation uses.

Left out: dropout (the published models have none), sliding windows on some layers and not on
others (published configs switch them off).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxvid.batch import AudioBatch, VisionBatch
from jaxvid.models import decoder, vision
from jaxvid.models.family import Family, Place, Places, Reader, decoder_places, refuse
from jaxvid.models.layers import Compute
from jaxvid.models.multimodal import Features, Multimodal
from jaxvid.models.text_config import SLIDING, sliding_window
from jaxvid.prompting import Medium, Placed, Vision

# Attributes of a Hugging Face config that say nothing about what is computed here, or that are
# checked to be what they must be (MUST).
IGNORED = {
    "": (
        "architectures transformers_version torch_dtype dtype use_cache vision_token_id "
        "attn_implementation _attn_implementation_autoset _name_or_path"
    ).split(),
    "text": (
        "model_type architectures torch_dtype dtype use_cache initializer_range "
        "vision_start_token_id vision_end_token_id vision_token_id image_token_id "
        "video_token_id transformers_version tie_word_embeddings _name_or_path"
    ).split(),
    "vision": (
        "model_type torch_dtype dtype initializer_range spatial_patch_size in_chans "
        "_name_or_path transformers_version tie_word_embeddings"
    ).split(),
}
TEXT_NAMES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
    "norm_eps": "rms_norm_eps",
}
VISION_NAMES = {
    "layers": "depth",
    "width": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_heads",
    "out": "out_hidden_size",
    "patch": "patch_size",
    "temporal": "temporal_patch_size",
    "merge": "spatial_merge_size",
    "window": "window_size",
    "tokens_per_second": "tokens_per_second",
}
TOKEN_NAMES = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    text: decoder.Config
    vision: vision.Config
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    pad_token_id: int | None = None
    tied: bool = False  # the unembedding is the embedding table
    # Position policy. transformers 4.x (and vLLM), which the published models were made with,
    # is "max" and truncated seconds; transformers 5.x is "hf5" and fractional seconds.
    text_after_video: str = "max"
    fractional_seconds: bool = False
    compute: Compute = Compute()

    def __post_init__(self):
        if self.text_after_video not in ("max", "hf5"):
            raise ValueError(f"text_after_video={self.text_after_video!r}; choose 'max' or 'hf5'")
        if self.vision.out != self.text.width:
            raise ValueError(
                f"the vision tower gives width {self.vision.out}; the decoder has "
                f"{self.text.width}. Set vision.out to the decoder's width."
            )

    @property
    def prompting(self) -> "Prompting":
        return Prompting(self)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read a `config.json`, flat (hub) or nested (transformers 5). Every attribute is read or
        named as ignored; raises one ValueError with everything that is missing or not known."""
        problems: list[str] = []
        top = dict(config)
        if (family := top.pop("model_type", None)) not in FAMILY.model_types:
            problems.append(f"model_type is {family!r}; wanted is {FAMILY.name!r}")
        policy = top.pop("jaxvid", {})
        vision_cfg = read_vision(top.pop("vision_config", {}), problems)
        text = dict(top.pop("text_config", {}))
        tied = top.pop("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
        tokens = {}
        for name in TOKEN_NAMES:  # at the top, in the text section, or in both
            found = [d.pop(name) for d in (top, text) if name in d]
            if found := [token for token in found if token is not None]:
                tokens[name] = found[0]
        for name in IGNORED[""]:
            top.pop(name, None)
        text_cfg = read_text({**top, **text}, problems)
        refuse(problems)
        return cls(text=text_cfg(), vision=vision_cfg(), tied=bool(tied), **tokens, **policy)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        tokens = {
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }
        text_config = write_text(self.text) | {
            "model_type": "qwen2_5_vl_text",
            "tie_word_embeddings": self.tied,
        }
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            text_config[name] = tokens[name]  # transformers looks for them in the text section
        vision_config = write_vision(self.vision) | {"model_type": "qwen2_5_vl_vision"}
        policy = {
            "text_after_video": self.text_after_video,
            "fractional_seconds": self.fractional_seconds,
        }
        return tokens | {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": FAMILY.name,
            "text_config": text_config,
            "vision_config": vision_config,
            "tie_word_embeddings": self.tied,
            "jaxvid": policy,
        }


def read_text(section: Mapping[str, Any], problems: list[str]) -> Callable[[], decoder.Config]:
    """The decoder that a text section describes, made when called; `problems` grows."""
    read = Reader(section, "", problems)
    found = {ours: read.take(hf) for ours, hf in TEXT_NAMES.items()}
    found["max_positions"] = read.take("max_position_embeddings")
    rope = dict(read.take("rope_parameters", None) or read.take("rope_scaling", None) or {})
    read.take("rope_scaling", None)
    found["rope_theta"] = float(rope.pop("rope_theta", read.take("rope_theta", 1e6)))
    for name in ("type", "rope_type"):
        if (kind := rope.pop(name, "mrope")) not in ("mrope", "default"):
            problems.append(f"rope {name} is {kind!r}; only M-RoPE is supported")
    found["rope_sections"] = tuple(rope.pop("mrope_section", (16, 24, 24)))
    problems += [f"rope attribute {name}={value!r} is not known" for name, value in rope.items()]
    found["window"] = sliding_window(read, found["layers"])
    read.must("hidden_act", "silu")
    read.must("attention_dropout", 0.0)
    read.done(IGNORED["text"])
    return lambda: decoder.Config(**found)


def read_vision(section: Mapping[str, Any], problems: list[str]) -> Callable[[], vision.Config]:
    """The vision tower that a vision_config describes, made when called; `problems` grows."""
    read = Reader(section, "vision_config.", problems)
    found = {ours: read.take(hf) for ours, hf in VISION_NAMES.items()}
    found["channels"] = read.take("in_channels", read.left.get("in_chans", 3))
    found["full"] = tuple(read.take("fullatt_block_indexes", ()))
    rope = read.take("rope_parameters", None) or {}
    found["rope_theta"] = float(rope.get("rope_theta", 1e4))
    read.must("hidden_act", "silu")
    read.done(IGNORED["vision"])
    return lambda: vision.Config(**found)


def write_text(text: decoder.Config) -> dict[str, Any]:
    """The text section that `read_text` reads, without its model_type."""
    out = {hf: getattr(text, ours) for ours, hf in TEXT_NAMES.items()} | {
        "hidden_act": "silu",
        "max_position_embeddings": text.max_positions,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": text.rope_theta,
            "mrope_section": list(text.rope_sections),
        },
    }
    if not text.window:
        return out
    return out | {
        "use_sliding_window": True,
        "sliding_window": text.window,
        "max_window_layers": 0,
        "layer_types": [SLIDING] * text.layers,
    }


def write_vision(tower: vision.Config) -> dict[str, Any]:
    """The vision_config that `read_vision` reads, without its model_type."""
    return {hf: getattr(tower, ours) for ours, hf in VISION_NAMES.items()} | {
        "hidden_act": "silu",
        "in_channels": tower.channels,
        "fullatt_block_indexes": list(tower.full),
        "rope_parameters": {"rope_type": "axial", "rope_theta": tower.rope_theta},
    }


class Qwen25VL(Multimodal):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.tower = vision.Tower(cfg.vision, cfg.compute, rngs=rngs)
        super().__init__(cfg, rngs=rngs)

    @property
    def full(self) -> float:
        return len(self.cfg.vision.full) / self.cfg.vision.layers

    def features(self, vision: VisionBatch, audio: AudioBatch | None) -> Features | None:
        return Features(self.tower(vision)) if vision.patches.shape[1] else None


@dataclasses.dataclass(frozen=True)
class Prompting:
    """A clip is its placeholders between <|vision_start|> and <|vision_end|>."""

    cfg: Config
    sound: None = None

    @property
    def vision(self) -> Vision:
        v = self.cfg.vision
        return Vision(patch=v.patch, temporal=v.temporal, merge=v.merge, window=v.window)

    @property
    def markers(self) -> dict[str, str]:
        return {
            "video": "<|vision_start|><|video_pad|><|vision_end|>",
            "image": "<|vision_start|><|image_pad|><|vision_end|>",
        }

    def expand(self, medium: Medium, encode: Callable[[str], list[int]]) -> Placed:
        """Raises ValueError for a sound, which this family does not hear."""
        if medium.kind not in self.markers:
            raise ValueError(f"a medium is {medium.kind!r}; {FAMILY.name} takes videos and images")
        c = self.cfg
        pad = c.video_token_id if medium.kind == "video" else c.image_token_id
        n = math.prod(medium.grid) // c.vision.merge**2
        ids = np.array([c.vision_start_token_id, *[pad] * n, c.vision_end_token_id], np.int32)
        seen = np.array([0, *range(1, n + 1), 0], np.int32)
        return Placed(ids, seen, np.zeros_like(seen))

    def positions(
        self, tokens: Int[np.ndarray, "n"], media: Sequence[Medium]
    ) -> Int[np.ndarray, "3 n"]:
        return positions(tokens, [m.grid for m in media], [m.seconds for m in media], self.cfg)


def positions(
    tokens: Int[np.ndarray, "n"],
    grids: list[tuple[int, int, int]],
    seconds_per_grid: list[float],
    cfg: Config,
    *,
    text_after_video: str | None = None,
    fractional_seconds: bool | None = None,
) -> Int[np.ndarray, "3 n"]:
    """M-RoPE positions (time, height, width) of one sequence.

    `grids` are the (t, h, w) in patches of the media in their order, `seconds_per_grid` the time
    from one temporal patch to the next (not read for images). Text after a medium goes on from the
    largest position before it ("max"), or from the medium's start plus the larger side of its
    merged grid ("hf5"). The two policies default to the config's.
    """
    after = cfg.text_after_video if text_after_video is None else text_after_video
    fractional = cfg.fractional_seconds if fractional_seconds is None else fractional_seconds
    if len(grids) != len(seconds_per_grid):
        raise ValueError(
            f"{len(grids)} grids but {len(seconds_per_grid)} seconds_per_grid; give one per medium"
        )
    media = [cfg.image_token_id, cfg.video_token_id]
    out = np.zeros((3, len(tokens)), np.int32)
    i = start = 0
    for (t, h, w), seconds in zip(grids, seconds_per_grid):
        here = np.flatnonzero(np.isin(tokens[i:], media))
        h, w = h // cfg.vision.merge, w // cfg.vision.merge
        first = i + int(here[0]) if len(here) else len(tokens)
        run = tokens[first : first + t * h * w]
        if len(run) < t * h * w or (run != run[0]).any():
            raise ValueError(
                f"a grid of {t} x {h} x {w} merged features wants {t * h * w} equal placeholder "
                f"tokens from token {first}; the sequence of {len(tokens)} has fewer there"
            )
        out[:, i:first] = start + np.arange(first - i)[None]
        start += first - i
        # float32 and then truncated, as the reference does it: its processor hands over float32
        step = np.float32(seconds) if fractional else np.trunc(np.float32(seconds))
        step = step * np.float32(cfg.vision.tokens_per_second)
        interval = step if run[0] == cfg.video_token_id else np.float32(1)
        time = (np.arange(t, dtype=np.float32) * interval).astype(np.int32)
        grid = np.stack(np.meshgrid(time, np.arange(h), np.arange(w), indexing="ij"))
        i = first + t * h * w
        out[:, first:i] = start + grid.reshape(3, -1)
        start = int(out[:, first:i].max()) + 1 if after == "max" else start + max(h, w)
    if np.isin(tokens[i:], media).any():
        raise ValueError(
            f"placeholder tokens after the last of {len(grids)} grids; give a grid for every medium"
        )
    out[:, i:] = start + np.arange(len(tokens) - i)[None]
    return out


def places(cfg: Config) -> Places:
    """Path in the parameters -> place in the files, for every weight of the family."""
    out = Places()
    tower_places(out, cfg.vision)
    decoder_places(out, "model.", qkv_bias=True)
    if not cfg.tied:
        out[("head",)] = Place("lm_head.weight")
    return out


def tower_places(out: Places, cfg: vision.Config) -> None:
    """Those of the vision tower."""
    values = (cfg.channels, cfg.temporal, cfg.patch, cfg.patch)  # a 3-D convolution in the files
    out["tower", "embed", "w"] = Place("visual.patch_embed.proj.weight", 1, stored=values)
    out.norm(("tower", "merger", "norm"), "visual.merger.ln_q")
    out.linear(("tower", "merger", "hidden"), "visual.merger.mlp.0", bias=True)
    out.linear(("tower", "merger", "out"), "visual.merger.mlp.2", bias=True)
    at, block = ("tower", "blocks"), "visual.blocks.{}"
    out.norm((*at, "attention_norm"), f"{block}.norm1")
    out.norm((*at, "mlp_norm"), f"{block}.norm2")
    for which in ("gate", "up", "down"):
        out.linear((*at, "mlp", which), f"{block}.mlp.{which}_proj", bias=True)
    for part, which in enumerate("qkv"):
        out.linear((*at, "attention", which), f"{block}.attn.qkv", bias=True, part=part, parts=3)
    out.linear((*at, "attention", "out"), f"{block}.attn.proj", bias=True, inputs=2)


def hub_name(name: str) -> str:
    """A tensor's name as the hub spells it, from either spelling."""
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def module_name(name: str) -> str:
    """A tensor's name as transformers' module has it, from the hub's."""
    name = re.sub(r"^model\.", "model.language_model.", name)
    return re.sub(r"^visual\.", "model.visual.", name)


def tiny(vocab: int, ids: dict[str, int]) -> Config:
    """The same classes at laptop size (about 3M parameters), for frames of 48 x 48 pixels."""
    text = decoder.Config(
        layers=4,
        width=192,
        ffn=512,
        heads=6,
        kv_heads=2,
        vocab=vocab,
        rope_sections=(4, 6, 6),
        rope_theta=1e4,
        max_positions=4096,
    )
    tower = vision.Config(
        layers=4, width=128, ffn=384, heads=4, out=192, full=(1, 3), patch=8, window=32
    )
    return Config(
        text=text,
        vision=tower,
        tied=True,
        fractional_seconds=True,  # short clips: whole seconds would put all frames at one time
        compute=Compute(remat="none", unroll=4),
        **ids,
    )


def preprocessor(cfg: Config) -> dict[str, Any]:
    """preprocessor_config.json, for a folder that has none."""
    return image_processor(cfg.vision)


def image_processor(tower: vision.Config) -> dict[str, Any]:
    """What it says of images and frames."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": list(tower.image_mean),
        "image_std": list(tower.image_std),
        "patch_size": tower.patch,
        "temporal_patch_size": tower.temporal,
        "merge_size": tower.merge,
    }


FAMILY = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    config=Config,
    model=Qwen25VL,
    places=places,
    hub_name=hub_name,
    module_name=module_name,
    special={
        "bos_token_id": "<|endoftext|>",
        "pad_token_id": "<|endoftext|>",
        "eos_token_id": "<|im_end|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    },
    tiny=tiny,
    preprocessor=preprocessor,
)
