"""LLaVA-NeXT-Video (https://llava-vl.github.io/blog/2024-04-30-llava-next-video/) and
LLaVA-OneVision (https://arxiv.org/abs/2408.03326): an image tower, a projector of two layers, a
plain decoder.

    family      tower                             frame of a video                 after a video
    NeXT-Video  CLIP, before its last layer       means of 2 x 2, then projected   nothing
    OneVision   SigLIP, last layer without norm   projected, then halved (bilinear) one newline

Images are tiles (anyres.py). A frame gives the features of all its patches, for images, and after
them the pooled ones, for videos; the index of a token says which of them it takes.

Left out: several hidden states of the tower side by side, other ways of pooling.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxvid.batch import AudioBatch, VisionBatch
from jaxvid.models import decoder, text_config, vit
from jaxvid.models.anyres import Prompting
from jaxvid.models.family import Family, Place, Places, Reader, decoder_places, refuse
from jaxvid.models.layers import MLP, Compute
from jaxvid.models.multimodal import Features, Multimodal
from jaxvid.prompting import Vision

IGNORED = {  # of config.json: for the processor, or of models that this is not
    "": [
        *text_config.COMMON,
        *("ignore_index image_seq_length video_seq_length use_image_newline_parameter").split(),
        "vocab_size",
    ],
    "vision": [
        *text_config.COMMON,
        "model_type",
        "projection_dim",
        "initializer_factor",
        "vocab_size",
    ],
}
VISION_NAMES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "image": "image_size",
    "patch": "patch_size",
    "channels": "num_channels",
    "norm_eps": "layer_norm_eps",
}
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}
# What a file leaves out is the default of transformers' class.
TOWERS = {
    "clip": TOWER | {"patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    "siglip": TOWER
    | {
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": True,
    },
}
BOTH = {
    "text_config": {},
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
NEXT_VIDEO = BOTH | {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "patch_size": 14,
        "image_size": 336,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "image_token_index": 32001,
    "video_token_index": 32000,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
ONEVISION = BOTH | {
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "patch_size": 14,
        "image_size": 384,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "vision_use_head": False,
    },
    "image_token_index": 151646,
    "video_token_index": 151647,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What both families have in common; use `NextVideo` or `OneVision`."""

    text: decoder.Config
    vision: vit.Config
    pinpoints: tuple[tuple[int, int], ...]  # (height, width) in pixels an image may be cut from
    decoder_kind: str  # a key of text_config.DEFAULTS
    image_token_id: int
    video_token_id: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tied: bool = False  # the unembedding is the embedding table
    projector_bias: bool = True
    compute: Compute = Compute()

    model_type: ClassVar[str]
    architecture: ClassVar[str]  # transformers' class
    tower: ClassVar[str]  # kind of tower
    plain: ClassVar[str]  # kind of decoder of a file that does not say
    fit: ClassVar[Literal["crop", "exact"]]  # how a frame becomes a square
    defaults: ClassVar[dict[str, Any]]

    def __post_init__(self):
        if self.vision.kind != self.tower:
            raise ValueError(
                f"a {self.vision.kind} tower; {self.model_type} has a {self.tower} one"
            )
        side = self.vision.image
        if bad := [p for p in self.pinpoints if p[0] % side or p[1] % side]:
            raise ValueError(f"pinpoints {bad} are no multiples of the tower's {side} pixels")
        if self.text.qkv_bias != (self.decoder_kind == "qwen2"):
            raise ValueError(
                f"qkv_bias={self.text.qkv_bias} in a decoder of kind {self.decoder_kind}: Qwen2 "
                "has one, others have none"
            )

    @property
    def pooled(self) -> int:
        """Side of a video frame's features."""
        raise NotImplementedError

    @property
    def prompting(self) -> Prompting:
        tower = self.vision
        return Prompting(
            vision=Vision(
                patch=tower.patch,
                temporal=1,
                merge=1,
                window=0,
                size=tower.image,
                fit=self.fit,
                pinpoints=self.pinpoints,
                pooled=tower.side**2 + self.pooled**2,
            ),
            newline=isinstance(self, OneVision),
            most=self.max_tiles if isinstance(self, OneVision) else 0,
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read a `config.json` of the hub or of transformers 5; what it leaves out is what
        transformers' classes fill in. Every attribute is read or named as ignored; raises one
        ValueError with everything that is not known or not supported."""
        problems: list[str] = []
        read = Reader(cls.defaults | config, "", problems)
        read.must("model_type", cls.model_type)
        text = read.take("text_config") or {}
        kind, found, ids = text_config.read(text, cls.plain, problems)
        tower = _tower(cls, read)
        for which in ("image", "video"):
            index = read.take(f"{which}_token_index")
            ids[f"{which}_token_id"] = read.take(f"{which}_token_id", index)
        for name, default in ids.items():
            ids[name] = read.take(name, default)
        read.must("vision_feature_select_strategy", cls.defaults["vision_feature_select_strategy"])
        read.must("projector_hidden_act", "gelu")
        own = cls.read_own(read) | {
            "tied": bool(read.take("tie_word_embeddings") or text.get("tie_word_embeddings")),
            "projector_bias": read.take("multimodal_projector_bias"),
            "pinpoints": tuple(tuple(point) for point in read.take("image_grid_pinpoints")),
        }
        read.done(IGNORED[""])
        refuse(problems)
        text_cfg, tower_cfg = decoder.Config(**found), vit.Config(**tower)
        return cls(text=text_cfg, vision=tower_cfg, decoder_kind=kind, **ids, **own)

    @classmethod
    def read_own(cls, read: Reader) -> dict[str, Any]:
        """The fields that this family alone has."""
        raise NotImplementedError

    def write_own(self) -> dict[str, Any]:
        """What `read_own` reads."""
        raise NotImplementedError

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        tower = self.vision
        names = {ours: hf for hf, ours in ACTIVATIONS.items()}
        vision_config = {hf: getattr(tower, ours) for ours, hf in VISION_NAMES.items()} | {
            "model_type": f"{self.tower}_vision_model",
            "hidden_act": names[tower.activation],
        }
        if self.tower == "siglip":
            vision_config["vision_use_head"] = False
        tokens = {name: getattr(self, name) for name in text_config.TOKENS}
        text = text_config.write(self.text, self.decoder_kind, tokens)
        return self.write_own() | {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "text_config": text | {"tie_word_embeddings": self.tied},
            "vision_config": vision_config,
            "image_token_index": self.image_token_id,
            "video_token_index": self.video_token_id,
            "vision_feature_layer": -1 - tower.unused,
            "vision_feature_select_strategy": self.defaults["vision_feature_select_strategy"],
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": self.projector_bias,
            "image_grid_pinpoints": [list(point) for point in self.pinpoints],
            "tie_word_embeddings": self.tied,
        }


def _tower(cls, top: Reader) -> dict[str, Any]:
    """The fields of the tower's config."""
    section = top.take("vision_config") or cls.defaults["vision_config"]
    read = Reader(TOWERS[cls.tower] | section, "vision_config.", top.problems)
    read.must("model_type", f"{cls.tower}_vision_model")
    found = {ours: read.take(hf) for ours, hf in VISION_NAMES.items()}
    for hf in ("image_size", "patch_size"):
        if not isinstance(size := found[hf.removesuffix("_size")], int):
            top.problems.append(
                f"vision_config.{hf} is {size!r}; only a square's side is supported"
            )
    if (name := read.take("hidden_act")) in ACTIVATIONS:
        found["activation"] = ACTIVATIONS[name]
    else:
        known = ", ".join(ACTIVATIONS)
        top.problems.append(f"vision_config.hidden_act is {name!r}; supported are {known}")
    read.must("attention_dropout", 0.0)
    if cls.tower == "siglip":
        read.must("vision_use_head", False)
        found |= {"image_mean": vit.SIGLIP_MEAN, "image_std": vit.SIGLIP_STD}
    read.done(IGNORED["vision"])
    layer, layers = top.take("vision_feature_layer"), found["layers"]
    if isinstance(layer, int) and 0 < layer % (layers + 1) and -layers <= layer <= layers:
        found["unused"] = layers - layer % (layers + 1)
    else:
        top.problems.append(
            f"vision_feature_layer is {layer!r}; supported is one layer of {layers}, from 1 or -1"
        )
    return found | {"kind": cls.tower}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextVideo(Config):
    model_type = "llava_next_video"
    architecture = "LlavaNextVideoForConditionalGeneration"
    tower = "clip"
    plain = "llama"
    fit = "crop"
    defaults = NEXT_VIDEO

    @property
    def pooled(self) -> int:
        return self.vision.side // 2

    @classmethod
    def read_own(cls, read: Reader) -> dict[str, Any]:
        read.must("spatial_pool_mode", "average")
        read.must("spatial_pool_stride", 2)
        return {}

    def write_own(self) -> dict[str, Any]:
        return {"spatial_pool_mode": "average", "spatial_pool_stride": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneVision(Config):
    max_tiles: int = 9  # whose features an image's map may hold before it would be made smaller

    model_type = "llava_onevision"
    architecture = "LlavaOnevisionForConditionalGeneration"
    tower = "siglip"
    plain = "qwen2"
    fit = "exact"
    defaults = ONEVISION

    @property
    def pooled(self) -> int:
        return math.ceil(self.vision.side / 2)

    @classmethod
    def read_own(cls, read: Reader) -> dict[str, Any]:
        ratio = read.take("vision_aspect_ratio")
        if found := re.fullmatch(r"anyres_max_([1-9]\d*)", str(ratio)):
            return {"max_tiles": int(found[1])}
        read.problems.append(f"vision_aspect_ratio is {ratio!r}; supported is anyres_max_N")
        return {}

    def write_own(self) -> dict[str, Any]:
        return {"vision_aspect_ratio": f"anyres_max_{self.max_tiles}"}


class LLaVA(Multimodal):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.tower = vit.Tower(cfg.vision, cfg.compute, rngs=rngs)
        width = cfg.text.width
        widths = cfg.vision.width, width, width
        self.projector = MLP(widths, "gelu", bias=cfg.projector_bias, rngs=rngs)
        newline = width**-0.5 * jax.random.normal(rngs.params(), (width,), jnp.float32)
        self.newline = nnx.Param(newline, axes=("embed",))

    def separator(self) -> Float[Array, "D"]:
        return self.newline[...]

    def features(self, vision: VisionBatch, audio: AudioBatch | None) -> Features | None:
        """Of each frame those of its patches, for images, then the pooled ones, for videos."""
        if not vision.patches.shape[1]:
            return None
        x = self.tower(vision)
        side, pooled = self.cfg.vision.side, self.cfg.pooled
        if isinstance(self.cfg, NextVideo):
            whole = x.reshape(*x.shape[:2], side, side, -1)[:, :, : 2 * pooled, : 2 * pooled]
            small = whole.reshape(*x.shape[:2], pooled, 2, pooled, 2, -1).mean(axis=(3, 5))
            y = self.projector(jnp.concatenate([x, _flat(small)], axis=2))
        else:
            y = self.projector(x)
            whole = y.reshape(*y.shape[:2], side, side, -1)
            small = (*y.shape[:2], pooled, pooled, y.shape[-1])
            small = jax.image.resize(whole, small, "bilinear", antialias=False)
            y = jnp.concatenate([y, _flat(small)], axis=2)
        return Features(y.reshape(y.shape[0], -1, y.shape[-1]))


def _flat(x: Float[Array, "B E h w D"]) -> Float[Array, "B E q D"]:
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def places(cfg: Config) -> Places:
    """Path in the parameters -> place in the files, for every weight of the family."""
    out = Places()
    vit.places(out, cfg.vision, ("tower",), "vision_tower.vision_model")
    decoder_places(out, "language_model.model.", qkv_bias=cfg.text.qkv_bias)
    for ours, theirs in (("hidden", "linear_1"), ("out", "linear_2")):
        out.linear(("projector", ours), f"multi_modal_projector.{theirs}", bias=cfg.projector_bias)
    out["newline",] = Place("image_newline")
    if not cfg.tied:
        out["head",] = Place("language_model.lm_head.weight")
    return out


def hub_name(name: str) -> str:
    """A tensor's name as the hub spells it, from either spelling."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^model\.(?=vision_tower|multi_modal_projector|image_newline)", "", name)
    name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def module_name(name: str) -> str:
    """A tensor's name as transformers' module has it, from the hub's."""
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    name = re.sub(r"^vision_tower\.vision_model\.", "model.vision_tower.", name)
    return re.sub(r"^(?=multi_modal_projector|image_newline)", "model.", name)


def _tiny(kind: str, vocab: int) -> decoder.Config:
    return decoder.Config(
        layers=4,
        width=192,
        ffn=512,
        heads=6,
        kv_heads=6 if kind == "llama" else 2,
        vocab=vocab,
        rope_sections=(16, 0, 0),
        qkv_bias=kind == "qwen2",
        rope_theta=1e4,
        max_positions=4096,
    )


def tiny_next_video(vocab: int, ids: dict[str, int]) -> NextVideo:
    """The same classes at laptop size (about 3M parameters), for frames of 48 x 48 pixels."""
    tower = vit.Config(layers=5, width=128, ffn=512, heads=4, image=48, patch=8, unused=1)
    return NextVideo(
        text=_tiny("llama", vocab),
        vision=tower,
        decoder_kind="llama",
        pinpoints=((48, 96), (96, 48), (96, 96)),
        compute=Compute(remat="none", unroll=4),
        **ids,
    )


def tiny_onevision(vocab: int, ids: dict[str, int]) -> OneVision:
    """The same classes at laptop size (about 3M parameters), for frames of 48 x 48 pixels."""
    tower = vit.Config(
        layers=4,
        width=128,
        ffn=512,
        heads=4,
        image=48,
        patch=8,
        kind="siglip",
        activation="gelu_tanh",
        norm_eps=1e-6,
        image_mean=vit.SIGLIP_MEAN,
        image_std=vit.SIGLIP_STD,
    )
    return OneVision(
        text=_tiny("qwen2", vocab),
        vision=tower,
        decoder_kind="qwen2",
        pinpoints=((48, 48), (48, 96), (96, 48), (96, 96)),
        tied=True,
        compute=Compute(remat="none", unroll=4),
        **ids,
    )


def preprocessor(cfg: Config) -> dict[str, Any]:
    """preprocessor_config.json, for a folder that has none."""
    side, crop = cfg.vision.image, isinstance(cfg, NextVideo)
    square = {"height": side, "width": side}
    return {
        "image_processor_type": f"Llava{'Next' if crop else 'Onevision'}ImageProcessor",
        "image_mean": list(cfg.vision.image_mean),
        "image_std": list(cfg.vision.image_std),
        "image_grid_pinpoints": [list(point) for point in cfg.pinpoints],
        "size": {"shortest_edge": side} if crop else square,
    } | ({"crop_size": square} if crop else {})


def _family(config: type[Config], special: dict[str, str], tiny: Callable[..., Config]) -> Family:
    return Family(
        name=config.model_type,
        model_types=(config.model_type,),
        config=config,
        model=LLaVA,
        places=places,
        hub_name=hub_name,
        module_name=module_name,
        ignored=(r"vision_tower\.vision_model\.embeddings\.position_ids",),
        special=special | {"image_token_id": "<image>", "video_token_id": "<video>"},
        tiny=tiny,
        preprocessor=preprocessor,
    )


FAMILIES = (
    _family(
        NextVideo,
        {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"},
        tiny_next_video,
    ),
    _family(
        OneVision,
        {
            "bos_token_id": "<|endoftext|>",
            "eos_token_id": "<|im_end|>",
            "pad_token_id": "<|endoftext|>",
        },
        tiny_onevision,
    ),
)
