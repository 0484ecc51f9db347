"""Qwen3-VL, the dense sizes (https://arxiv.org/abs/2511.21631): vision tower, merged features in
place of the placeholder tokens and added to the decoder's first layers, decoder with interleaved
M-RoPE. And its prompts: time stands in them as text, before each temporal patch.

Left out: the mixture-of-experts sizes; dropout (the published models have none).
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxvid.batch import AudioBatch, VisionBatch
from jaxvid.models import decoder, qwen3_vision, text_config
from jaxvid.models.family import Family, Place, Places, Reader, decoder_places, refuse
from jaxvid.models.layers import Compute
from jaxvid.models.multimodal import Features, Multimodal
from jaxvid.models.qwen25vl import TOKEN_NAMES
from jaxvid.prompting import Medium, Placed, Vision

TEXT_NAMES = text_config.NAMES | {"kv_heads": "num_key_value_heads"}
VISION_NAMES = {
    "layers": "depth",
    "width": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_heads",
    "out": "out_hidden_size",
    "patch": "patch_size",
    "temporal": "temporal_patch_size",
    "merge": "spatial_merge_size",
    "channels": "in_channels",
    "positions": "num_position_embeddings",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    text: decoder.Config
    vision: qwen3_vision.Config
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    pad_token_id: int | None = None
    tied: bool = False  # the unembedding is the embedding table
    compute: Compute = Compute()

    def __post_init__(self):
        text, tower = self.text, self.vision
        if tower.out != text.width:
            raise ValueError(
                f"the vision tower gives width {tower.out}; the decoder has {text.width}. Set "
                "vision.out to the decoder's width."
            )
        if text.qkv_bias or not text.qk_norm or not text.interleaved or text.window:
            raise ValueError(
                f"the decoder has qkv_bias={text.qkv_bias}, qk_norm={text.qk_norm}, "
                f"interleaved={text.interleaved}, window={text.window}; Qwen3-VL's has False, "
                "True, True, 0"
            )
        if len(tower.deep) > text.layers:
            raise ValueError(
                f"vision.deep={tower.deep} is for {len(tower.deep)} layers of the decoder, which "
                f"has {text.layers}"
            )

    @property
    def prompting(self) -> "Prompting":
        return Prompting(self)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read a `config.json`. Every attribute is read or named as ignored; raises one ValueError
        with everything that is missing or not known."""
        problems: list[str] = []
        read = Reader(config, "", problems)
        if (kind := read.take("model_type", None)) not in FAMILY.model_types:
            problems.append(f"model_type is {kind!r}; wanted is {FAMILY.name!r}")
        text = dict(read.take("text_config", {}))
        # transformers 4 asks the text section, transformers 5 the whole
        tied = [d.pop("tie_word_embeddings", False) for d in (read.left, text)]
        tokens = {}
        for name in TOKEN_NAMES:  # at the top, in the text section, or in both
            found = [d.pop(name) for d in (read.left, text) if name in d]
            if found := [token for token in found if token is not None]:
                tokens[name] = found[0]
            if found and not isinstance(found[0], int):
                problems.append(f"{name} is {found[0]!r}; give one id")
        text_fields = _text(text, problems)
        vision_fields = _vision(read.take("vision_config", {}), problems)
        read.done(text_config.COMMON)
        refuse(problems)
        return cls(
            text=decoder.Config(**text_fields),
            vision=qwen3_vision.Config(**vision_fields),
            tied=any(tied),
            **tokens,
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads, 4.57 and 5 alike."""
        text, tower = self.text, self.vision
        text_section = {hf: getattr(text, ours) for ours, hf in TEXT_NAMES.items()} | {
            "model_type": "qwen3_vl_text",
            "head_dim": text.head,
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_theta": text.rope_theta,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": list(text.rope_sections),
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": self.tied,
        }
        for name in text_config.TOKENS:  # transformers looks for them in the text section
            text_section[name] = getattr(self, name)
        vision_section = {hf: getattr(tower, ours) for ours, hf in VISION_NAMES.items()} | {
            "model_type": "qwen3_vl_vision",
            "hidden_act": "gelu_pytorch_tanh",
            "deepstack_visual_indexes": list(tower.deep),
            "rope_parameters": {"rope_type": "axial", "rope_theta": tower.rope_theta},
        }
        return {name: getattr(self, name) for name in TOKEN_NAMES} | {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": FAMILY.name,
            "text_config": text_section,
            "vision_config": vision_section,
            "tie_word_embeddings": self.tied,
        }


def _text(section, problems):
    """The fields of the decoder's config."""
    read = Reader(section, "text_config.", problems)
    read.must("model_type", "qwen3_vl_text")
    found = {ours: read.take(hf) for ours, hf in TEXT_NAMES.items()}
    head = read.take("head_dim", 128)  # what transformers takes where it is missing
    found["head_dim"] = head if head * found["heads"] != found["width"] else 0
    found |= {"qkv_bias": False, "qk_norm": True}
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):  # of transformers 5 and 4
        for key, value in (read.take(name, None) or {}).items():
            if rope.setdefault(key, value) != value:
                problems.append(f"text_config.{name}: {key} is {value!r}, and {rope[key]!r} too")
    theta = rope.pop("rope_theta", None)
    other = read.take("rope_theta", theta)
    if other is None or (theta is not None and theta != other):
        problems.append(
            f"text_config.rope_theta is {other} and {theta} among the rope's settings; give it "
            "once (transformers 4 and 5 do not agree on what it is where it is missing)"
        )
    found |= {"rope_theta": float(other or 0), "interleaved": rope.pop("mrope_interleaved", True)}
    found["rope_sections"] = tuple(rope.pop("mrope_section", (24, 20, 20)))
    if not found["interleaved"]:
        problems.append("text_config: mrope_interleaved is False; Qwen3-VL's rope is interleaved")
    for name in ("type", "rope_type"):
        if (kind := rope.pop(name, "default")) != "default":
            problems.append(f"text_config: rope {name} is {kind!r}; only plain rope is known")
            rope.clear()  # its factors come with it
    problems += [f"rope attribute {name}={value!r} is not known" for name, value in rope.items()]
    read.must("hidden_act", "silu")
    read.must("attention_bias", False)
    read.must("attention_dropout", 0.0)
    read.done(text_config.COMMON)
    return found


def _vision(section, problems):
    """The fields of the tower's config."""
    read = Reader(section, "vision_config.", problems)
    read.must("model_type", "qwen3_vl_vision", "qwen3_vl")  # early files have the second
    found = {ours: read.take(hf) for ours, hf in VISION_NAMES.items()}
    for name in ("patch", "temporal"):
        if not isinstance(found[name], int):
            problems.append(
                f"vision_config.{VISION_NAMES[name]} is {found[name]!r}; only one number is "
                "supported"
            )
    found["deep"] = tuple(read.take("deepstack_visual_indexes") or ())
    rope = dict(read.take("rope_parameters", None) or {})
    found["rope_theta"] = float(rope.pop("rope_theta", 1e4))
    if (kind := rope.pop("rope_type", "axial")) != "axial" or rope:
        problems.append(
            f"vision_config.rope_parameters has rope_type={kind!r}, {rope}; only 'axial' is known"
        )
    read.must("hidden_act", "gelu_pytorch_tanh")
    read.done([*text_config.COMMON, "tie_word_embeddings"])
    return found


class Qwen3VL(Multimodal):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.tower = qwen3_vision.Tower(cfg.vision, cfg.compute, rngs=rngs)
        super().__init__(cfg, rngs=rngs)

    def features(self, vision: VisionBatch, audio: AudioBatch | None) -> Features | None:
        return Features(*self.tower(vision)) if vision.patches.shape[1] else None


@dataclasses.dataclass(frozen=True)
class Prompting:
    """Each temporal patch of a video is its time in words, then its placeholders between
    <|vision_start|> and <|vision_end|>; an image is its placeholders between the two."""

    cfg: Config
    sound: None = None

    @property
    def vision(self) -> Vision:
        v = self.cfg.vision
        return Vision(patch=v.patch, temporal=v.temporal, merge=v.merge, window=0)

    @property
    def markers(self) -> dict[str, str]:
        return {
            "video": "<|vision_start|><|video_pad|><|vision_end|>",
            "image": "<|vision_start|><|image_pad|><|vision_end|>",
        }

    def expand(self, medium: Medium, encode: Callable[[str], list[int]]) -> Placed:
        """Raises ValueError for a sound, which this family does not hear, and for another number
        of times than of temporal patches."""
        if medium.kind not in self.markers:
            raise ValueError(f"a medium is {medium.kind!r}; {FAMILY.name} takes videos and images")
        c, (h, w) = self.cfg, medium.grid[1:]
        n = h * w // c.vision.merge**2
        video = medium.kind == "video"
        pads = [c.video_token_id if video else c.image_token_id] * n
        ids, seen = [], []
        for i, time in enumerate(self._times(medium)):
            stamp = encode(f"<{time:.1f} seconds>") if video else []
            ids += [*stamp, c.vision_start_token_id, *pads, c.vision_end_token_id]
            seen += [*[0] * len(stamp), 0, *range(i * n + 1, (i + 1) * n + 1), 0]
        seen = np.array(seen, np.int32)
        return Placed(np.array(ids, np.int32), seen, np.zeros_like(seen))

    def _times(self, medium: Medium) -> Sequence[float]:
        """The middle of each temporal patch: the mean of its first and last frame's times."""
        frames, temporal = medium.grid[0], self.cfg.vision.temporal
        if not medium.times:
            middle = (temporal - 1) / temporal / 2
            return [(i + middle) * medium.seconds for i in range(frames)]
        if len(medium.times) != frames:
            raise ValueError(
                f"a medium of {frames} temporal patches has {len(medium.times)} times; give one "
                "for each, or none where they are evenly spaced"
            )
        return medium.times

    def positions(
        self, tokens: Int[np.ndarray, "n"], media: Sequence[Medium]
    ) -> Int[np.ndarray, "3 n"]:
        return positions(tokens, [m.grid for m in media], self.cfg)


def positions(
    tokens: Int[np.ndarray, "n"], grids: Sequence[tuple[int, int, int]], cfg: Config
) -> Int[np.ndarray, "3 n"]:
    """M-RoPE positions (time, height, width) of one sequence.

    `grids` are the (t, h, w) in patches of the media in their order. Each temporal patch stands at
    one time and has a grid of its own: what follows it goes on from the larger of its sides, which
    is also one more than the largest position before (so transformers 4.57 and 5 agree).

    Raises ValueError unless the placeholder tokens are those of the grids.
    """
    at = np.flatnonzero(np.isin(tokens, [cfg.image_token_id, cfg.video_token_id]))
    merge = cfg.vision.merge
    frames = [(h // merge, w // merge) for t, h, w in grids for _ in range(t)]
    ends = np.cumsum([0, *(h * w for h, w in frames)])
    if ends[-1] != len(at):
        raise ValueError(
            f"{len(at)} placeholder tokens, and {len(grids)} grids that want {ends[-1]}; give a "
            "grid for every medium, and a placeholder for each of its merged features"
        )
    out = np.zeros((3, len(tokens)), np.int32)
    i = start = 0
    for (h, w), a, b in zip(frames, ends, ends[1:]):
        first = int(at[a])
        if at[b - 1] - first != h * w - 1:
            raise ValueError(
                f"a frame of {h} x {w} merged features wants {h * w} placeholder tokens side by "
                f"side from token {first}; something stands between them"
            )
        out[:, i:first] = start + np.arange(first - i)[None]
        start += first - i
        i = first + h * w
        rows, columns = np.indices((h, w)).reshape(2, -1)
        out[:, first:i] = start + np.stack([np.zeros_like(rows), rows, columns])
        start += max(h, w)
    out[:, i:] = start + np.arange(len(tokens) - i)[None]
    return out


def places(cfg: Config) -> Places:
    """Path in the parameters -> place in the files, for every weight of the family."""
    out = Places()
    qwen3_vision.places(out, cfg.vision, "model.visual")
    decoder_places(out, "model.language_model.", qkv_bias=False, qk_norm=True)
    if not cfg.tied:
        out[("head",)] = Place("lm_head.weight")
    return out


def hub_name(name: str) -> str:
    """A tensor's name as the hub spells it, from the spelling of Qwen2.5-VL's files or of the
    model without its head too."""
    name = re.sub(r"^(model\.)?(visual|language_model)\.", r"model.\2.", name)
    return re.sub(r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1.", name)


def tiny(vocab: int, ids: dict[str, int]) -> Config:
    """The same classes at laptop size (about 3M parameters), for frames of 48 x 48 pixels."""
    text = decoder.Config(
        layers=4,
        width=192,
        ffn=512,
        heads=6,
        kv_heads=2,
        vocab=vocab,
        qkv_bias=False,
        qk_norm=True,
        interleaved=True,
        rope_sections=(6, 5, 5),
        rope_theta=1e4,
        max_positions=4096,
    )
    tower = qwen3_vision.Config(
        layers=4, width=128, ffn=384, heads=4, out=192, deep=(1, 2), positions=36, patch=8
    )
    return Config(
        text=text, vision=tower, tied=True, compute=Compute(remat="none", unroll=4), **ids
    )


def preprocessor(cfg: Config) -> dict[str, Any]:
    """preprocessor_config.json, for a folder that has none."""
    v = cfg.vision
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": list(v.image_mean),
        "image_std": list(v.image_std),
        "patch_size": v.patch,
        "temporal_patch_size": v.temporal,
        "merge_size": v.merge,
    }


FAMILY = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    config=Config,
    model=Qwen3VL,
    places=places,
    hub_name=hub_name,
    module_name=hub_name,  # the files have the module's own names
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
