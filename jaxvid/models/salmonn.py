"""video-SALMONN-o1 (https://arxiv.org/abs/2502.11775, section 3.1): frames through SigLIP, sound
through Whisper and a window Q-Former, both in the order of time before a Qwen2 decoder.

    frame           SigLIP, max over 2 x 2 patches, two layers                 13 x 13 tokens
    30 s of sound   Whisper + the segment's vector, Q-Former per 0.2 s, linear     150 tokens
    prompt          V_t1 A_t1:t2 V_t2 A_t2:t3 ...    the sound between two frames after the first

The published frames are 2 a second and at most 60 (`media.Sampling` has both).

From the script the authors published (github.com/BriansIDP/video-SALMONN-o1): the maximum comes
before the projector, the last row of 27 is left over, and SigLIP's last layer is not run. What
neither says is ours: the Q-Former's two layers, as wide as Whisper, with Whisper's heads and four
times its width inside, and no positions of its own (Whisper's are in what it sees); segment vectors
that begin as zeros, `segments` of them; no tokens around a medium; a window belongs to the frame
before its start; silence that only fills the last segment is heard, and has no token.

No such class is in transformers: config.json is ours, its sections and the names of tensors are
those of transformers' parts (assemble.py makes a folder out of them).
Left out: images in tiles, windows that overlap, other poolings.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxvid.batch import AudioBatch, VisionBatch
from jaxvid.models import decoder, encoder, llava, qformer, text_config, vit, whisper
from jaxvid.models.family import Family, Place, Places, Reader, decoder_places, refuse
from jaxvid.models.layers import MLP, Compute, Linear
from jaxvid.models.multimodal import Features, Multimodal
from jaxvid.prompting import Medium, Placed, Sound, Vision

FRAMES_PER_SECOND = 100  # log-mel frames
SEGMENTS = 120  # of 30 s: an hour
TOKENS = ("image", "video", "audio")  # kinds of media, each with a token
SPEECH_NAMES = {
    "layers": "encoder_layers",
    "width": "d_model",
    "ffn": "encoder_ffn_dim",
    "heads": "encoder_attention_heads",
}
QFORMER_NAMES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "source": "encoder_hidden_size",
    "norm_eps": "layer_norm_eps",
}
OWN_NAMES = {"window": "window_frames", "queries": "num_query_tokens"}  # of the Q-Former, on top
IGNORED = {  # of config.json: what says nothing about what is computed here
    "vision": llava.IGNORED["vision"],
    "speech": [
        *llava.IGNORED["vision"],
        *(
            "decoder_layers decoder_attention_heads decoder_ffn_dim decoder_layerdrop "
            "num_hidden_layers max_target_positions pad_token_id bos_token_id eos_token_id "
            "use_weighted_layer_sum classifier_proj_size apply_spec_augment mask_time_prob "
            "mask_time_length mask_time_min_masks mask_feature_prob mask_feature_length "
            "mask_feature_min_masks median_filter_width tie_word_embeddings forced_decoder_ids"
        ).split(),
    ],
    "qformer": [*llava.IGNORED["vision"], "max_position_embeddings", "pad_token_id"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    text: decoder.Config
    vision: vit.Config
    audio: whisper.Config
    qformer: qformer.Config
    image_token_id: int
    video_token_id: int
    audio_token_id: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tied: bool = False  # the unembedding is the embedding table
    segments: int = SEGMENTS  # chunks that the longest sound may have
    time_stamp: str = ""  # text before each frame of a video, such as "{seconds:.1f} s:"
    compute: Compute = Compute()

    def __post_init__(self):
        ears, source = self.audio, self.qformer.source
        if self.vision.kind != "siglip" or self.vision.side < 2:
            raise ValueError(
                f"a {self.vision.kind} tower of {self.vision.side} patches a side; this family has "
                "a siglip one of at least 2"
            )
        if source != ears.encoder.width:
            raise ValueError(
                f"the Q-Former asks for width {source}; Whisper gives {ears.encoder.width}. Set "
                "qformer.source to it"
            )
        if ears.positions % self.qformer.window:
            raise ValueError(
                f"a segment of {ears.positions} states does not divide into windows of "
                f"{self.qformer.window}; set qformer.window to a divisor"
            )
        if not self.text.qkv_bias or self.segments < 1:
            raise ValueError(
                f"qkv_bias={self.text.qkv_bias}, segments={self.segments}; Qwen2 has biases, and a "
                "sound at least one segment"
            )
        try:
            said = self.time_stamp.format(seconds=1.5)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"time_stamp={self.time_stamp!r} is no format: {error!r}") from error
        if self.time_stamp and said == self.time_stamp:
            raise ValueError(
                f"time_stamp={self.time_stamp!r} does not say the time; put {{seconds:.1f}} in it"
            )

    @property
    def prompting(self) -> "Prompting":
        return Prompting(self)

    @property
    def pooled(self) -> int:
        """Side of a frame's features; a last row and column that is alone is left over."""
        return self.vision.side // 2

    @property
    def slots(self) -> int:
        """Features of a segment of sound."""
        return self.audio.positions // self.qformer.window * self.qformer.queries

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read a `config.json` as `to_hf` writes it; what its sections leave out is what
        transformers' classes fill in. Every attribute is read or named as ignored; raises one
        ValueError with everything that is not known or not supported."""
        problems: list[str] = []
        read = Reader(config, "", problems)
        read.must("model_type", FAMILY.name)
        section = lambda name: read.take(f"{name}_config", None) or {}
        text = section("text")
        kind, found, ids = text_config.read(text, "qwen2", problems)
        if kind != "qwen2":
            problems.append(f"text_config.model_type is {kind!r}; only 'qwen2' is supported")
        layer = read.take("vision_feature_layer", -2)
        tower = _read_vision(section("vision"), layer, problems)
        ears = _read_speech(section("speech"), problems)
        own = {ours: read.take(name) for ours, name in OWN_NAMES.items()}
        asked = _read_qformer(section("qformer"), problems) | own
        ids |= {f"{which}_token_id": read.take(f"{which}_token_index") for which in TOKENS}
        for name in text_config.TOKENS:
            ids[name] = read.take(name, ids.get(name))
        read.must("spatial_pool_mode", "max")
        read.must("spatial_pool_stride", 2)
        read.must("projector_hidden_act", "gelu")
        more = {
            "tied": bool(read.take("tie_word_embeddings", text.get("tie_word_embeddings"))),
            "segments": read.take("max_segments"),
            "time_stamp": read.take("time_stamp", ""),
        }
        read.done(IGNORED["vision"])
        refuse(problems)
        parts = {
            "text": decoder.Config(**found),
            "vision": vit.Config(**tower),
            "audio": whisper.Config(encoder=encoder.Config(**ears.pop("encoder")), **ears),
            "qformer": qformer.Config(**asked),
        }
        return cls(**parts, **ids, **more)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json`; each section is one that transformers' class of the part reads."""
        names = {ours: hf for hf, ours in llava.ACTIVATIONS.items()}
        tower, ears, asked = self.vision, self.audio, self.qformer
        seen = {hf: getattr(tower, ours) for ours, hf in llava.VISION_NAMES.items()} | {
            "model_type": "siglip_vision_model",
            "hidden_act": names[tower.activation],
            "vision_use_head": False,
        }
        heard = {hf: getattr(ears.encoder, ours) for ours, hf in SPEECH_NAMES.items()} | {
            "model_type": "whisper",
            "activation_function": names[ears.encoder.activation],
            "num_mel_bins": ears.mels,
            "max_source_positions": ears.positions,
        }
        asks = {hf: getattr(asked, ours) for ours, hf in QFORMER_NAMES.items()} | {
            "model_type": "blip_2_qformer",
            "hidden_act": names[asked.activation],
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        tokens = {name: getattr(self, name) for name in text_config.TOKENS}
        text = text_config.write(self.text, "qwen2", tokens)
        return {
            "model_type": FAMILY.name,
            "text_config": text | {"tie_word_embeddings": self.tied},
            "vision_config": seen,
            "vision_feature_layer": -1 - tower.unused,
            "speech_config": heard,
            "qformer_config": asks,
            **{hf: getattr(asked, ours) for ours, hf in OWN_NAMES.items()},
            **{f"{which}_token_index": getattr(self, f"{which}_token_id") for which in TOKENS},
            "spatial_pool_mode": "max",
            "spatial_pool_stride": 2,
            "projector_hidden_act": "gelu",
            "max_segments": self.segments,
            "time_stamp": self.time_stamp,
            "tie_word_embeddings": self.tied,
        }


def _activation(read: Reader, name: str) -> str:
    known = llava.ACTIVATIONS
    if (found := read.take(name, "")) not in known:
        read.problems.append(f"{read.where}{name} is {found!r}; supported are {', '.join(known)}")
        return "gelu"
    return known[found]


def _read_vision(section: dict, layer: Any, problems: list[str]) -> dict[str, Any]:
    read = Reader(llava.TOWERS["siglip"] | section, "vision_config.", problems)
    read.must("model_type", "siglip_vision_model")
    found = {ours: read.take(hf) for ours, hf in llava.VISION_NAMES.items()}
    found |= {"kind": "siglip", "image_mean": vit.SIGLIP_MEAN, "image_std": vit.SIGLIP_STD}
    found["activation"] = _activation(read, "hidden_act")
    read.must("attention_dropout", 0.0)
    read.must("vision_use_head", False)
    read.done(IGNORED["vision"])
    layers = found["layers"]
    if not isinstance(layer, int) or not -layers <= layer < 0:
        problems.append(
            f"vision_feature_layer is {layer!r}; supported is one layer of {layers}, from the "
            f"last, -1, to the first, {-layers}"
        )
        return found
    return found | {"unused": -1 - layer}


def _read_speech(section: dict, problems: list[str]) -> dict[str, Any]:
    read = Reader(section, "speech_config.", problems)
    read.must("model_type", "whisper")
    inside = {ours: read.take(hf) for ours, hf in SPEECH_NAMES.items()}
    inside |= {"activation": _activation(read, "activation_function"), "key_bias": False}
    read.must("scale_embedding", False)
    for name in ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop"):
        read.must(name, 0.0)
    found = {"mels": read.take("num_mel_bins"), "positions": read.take("max_source_positions")}
    read.done(IGNORED["speech"])
    return found | {"encoder": inside}


def _read_qformer(section: dict, problems: list[str]) -> dict[str, Any]:
    defaults = {"cross_attention_frequency": 2} | {
        f"{which}_dropout_prob": 0.1 for which in ("hidden", "attention_probs")
    }
    read = Reader(defaults | section, "qformer_config.", problems)
    read.must("model_type", "blip_2_qformer")
    found = {ours: read.take(hf) for ours, hf in QFORMER_NAMES.items()}
    found["activation"] = _activation(read, "hidden_act")
    read.must("cross_attention_frequency", 1)
    read.must("use_qformer_text_input", False)
    read.must("hidden_dropout_prob", 0.0)
    read.must("attention_probs_dropout_prob", 0.0)
    read.done(IGNORED["qformer"])
    return found


class Salmonn(Multimodal):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.tower = vit.Tower(cfg.vision, cfg.compute, rngs=rngs)
        width, asked = cfg.text.width, cfg.qformer
        self.projector = MLP((cfg.vision.width, width, width), "gelu", rngs=rngs)
        self.ears = whisper.Tower(cfg.audio, cfg.compute, rngs=rngs)
        segments = jnp.zeros((cfg.segments, cfg.audio.encoder.width), jnp.float32)
        self.segments = nnx.Param(segments, axes=("patch", "embed"))
        self.qformer = qformer.QFormer(asked, cfg.compute, rngs=rngs)
        self.out = Linear((asked.width,), (width,), "ffn embed", bias=True, rngs=rngs)

    def features(self, vision: VisionBatch, audio: AudioBatch | None) -> Features | None:
        found = [self.seen(vision)] if vision.patches.shape[1] else []
        if audio is not None and audio.features.shape[1]:
            found.append(self.heard(audio))
        return Features(jnp.concatenate(found, axis=1)) if found else None

    def seen(self, vision: VisionBatch) -> Float[Array, "B P D"]:
        """The features of each row's frames, in raster order."""
        x, side, half = self.tower(vision), self.cfg.vision.side, self.cfg.pooled
        B, E, _, W = x.shape
        x = x.reshape(B, E, side, side, W)[:, :, : 2 * half, : 2 * half]
        x = x.reshape(B, E, half, 2, half, 2, W).max(axis=(3, 5))
        return self.projector(x).reshape(B, E * half**2, -1)

    def heard(self, audio: AudioBatch) -> Float[Array, "B P D"]:
        """The features of each row's sound, `Config.slots` a segment."""
        B, A = audio.length.shape
        x = self.ears(audio)
        at = self.segments[...][jnp.asarray(audio.order).reshape(-1)]
        x = self.qformer(x + at.astype(x.dtype)[:, None])
        return self.out(x).reshape(B, A * self.cfg.slots, -1)


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How media stand in a prompt: a video's frames and the windows of its sound as time goes, each
    frame after its time stamp where the config has one. A prompt's positions are its indices."""

    cfg: Config

    @property
    def vision(self) -> Vision:
        tower = self.cfg.vision
        return Vision(
            patch=tower.patch,
            temporal=1,
            merge=1,
            window=0,
            size=tower.image,
            fit="exact",
            pooled=self.cfg.pooled**2,
        )

    @property
    def sound(self) -> Sound:
        ears = self.cfg.audio
        return Sound(chunk=ears.chunk, slots=self.cfg.slots, mels=ears.mels, pad=True)

    @property
    def markers(self) -> dict[str, str]:
        return {which: f"<{which}>" for which in TOKENS}

    def expand(self, medium: Medium, encode: Callable[[str], list[int]]) -> Placed:
        """All tokens of a medium. Frames stand at `medium.times` or, where there are none, every
        `medium.seconds`; a window of sound stands after the last frame that is not later than its
        start, so sound beyond the last frame stands after that one. An image is a frame alone.

        Raises ValueError for frames of another size than the tower's, for audio without sound and
        for sound of more segments than the model has vectors for.
        """
        c, frames = self.cfg, 0 if medium.kind == "audio" else medium.grid[0]
        windows = self._windows(medium)
        if frames and medium.grid[1:] != (c.vision.side,) * 2:
            raise ValueError(
                f"a {medium.kind} has {medium.grid[1]} x {medium.grid[2]} patches a frame; this "
                f"tower takes {c.vision.side} x {c.vision.side}. Bring frames to {c.vision.image} "
                "pixels a side."
            )
        times = np.asarray(medium.times or np.arange(frames) * medium.seconds, np.float64)
        slots = self.vision.pooled
        pad = c.image_token_id if medium.kind == "image" else c.video_token_id
        cuts = self._cuts(times, windows) * c.qformer.queries
        heard = [(c.audio_token_id, 0, 1 + i) for i in range(cuts[-1])]
        pieces = heard[: cuts[0]]
        for i in range(frames):
            if c.time_stamp and medium.kind == "video":
                text = encode(c.time_stamp.format(seconds=float(times[i])))
                pieces += [(token, 0, 0) for token in text]
            pieces += [(pad, 1 + i * slots + j, 0) for j in range(slots)]
            pieces += heard[cuts[i] : cuts[i + 1]]
        return Placed(*np.array(pieces, np.int32).T)

    def _windows(self, medium: Medium) -> int:
        """Windows of the medium's sound, the last of them perhaps not full."""
        c = self.cfg
        heard = 0 if medium.kind == "image" else medium.sound
        if medium.kind == "audio" and not heard:
            raise ValueError(
                "an audio has a sound of 0 s; give a clip that has sound, or leave it out"
            )
        if heard > c.segments * c.audio.chunk:
            most = c.segments * c.audio.chunk / FRAMES_PER_SECOND
            raise ValueError(
                f"a sound of {heard / FRAMES_PER_SECOND:g} s; this model hears at most {most:g} s. "
                "Cut the clip"
            )
        return -(-heard // (2 * c.qformer.window))

    def _cuts(self, times: Float[np.ndarray, "t"], windows: int) -> Int[np.ndarray, "_"]:
        """How many windows start before each frame, and how many there are."""
        each = 2 * self.cfg.qformer.window / FRAMES_PER_SECOND
        first = np.ceil(times / each - 1e-6)  # a start that is the frame's time is not before
        return np.append(np.minimum(first, windows), windows).astype(np.int64)

    def positions(
        self, tokens: Int[np.ndarray, "n"], media: Sequence[Medium]
    ) -> Int[np.ndarray, "3 n"]:
        """Counted along the row, whatever the media."""
        return np.tile(np.arange(len(tokens), dtype=np.int32), (3, 1))


def places(cfg: Config) -> Places:
    """Path in the parameters -> place in the files, for every weight of the family."""
    out = Places()
    vit.places(out, cfg.vision, ("tower",), "vision_tower.vision_model")
    for ours, theirs in (("hidden", "linear_1"), ("out", "linear_2")):
        out.linear(("projector", ours), f"multi_modal_projector.{theirs}", bias=True)
    whisper.places(out, cfg.audio, ("ears",), "speech_encoder")
    out["segments",] = Place("segment_embedding.weight")
    qformer.places(out, ("qformer",), "qformer")
    out.linear(("out",), "language_projection", bias=True)
    decoder_places(out, "language_model.model.", qkv_bias=True)
    if not cfg.tied:
        out["head",] = Place("language_model.lm_head.weight")
    return out


def hub_name(name: str) -> str:
    """A tensor's name in our folders, from there or from transformers' tower in memory."""
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def tiny(vocab: int, ids: dict[str, int]) -> Config:
    """The same classes at laptop size (about 3M parameters), for frames of 48 x 48 pixels and
    segments of 4 seconds."""
    text = decoder.Config(
        layers=4,
        width=192,
        ffn=512,
        heads=6,
        kv_heads=2,
        vocab=vocab,
        rope_sections=(16, 0, 0),
        rope_theta=1e4,
        max_positions=4096,
    )
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
    blocks = encoder.Config(layers=2, width=128, ffn=384, heads=4, key_bias=False)
    return Config(
        text=text,
        vision=tower,
        audio=whisper.Config(encoder=blocks, positions=200),
        qformer=qformer.Config(layers=2, width=128, ffn=384, heads=4, source=128, window=10),
        segments=30,
        tied=True,
        compute=Compute(remat="none", unroll=4),
        **ids,
    )


def preprocessor(cfg: Config) -> dict[str, Any]:
    """preprocessor_config.json, for a folder that has none."""
    side, seconds = cfg.vision.image, cfg.audio.chunk // FRAMES_PER_SECOND
    return {
        "image_processor_type": "SiglipImageProcessor",
        "image_mean": list(cfg.vision.image_mean),
        "image_std": list(cfg.vision.image_std),
        "size": {"height": side, "width": side},
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": cfg.audio.mels,
        "sampling_rate": 16_000,
        "n_fft": 400,
        "hop_length": 160,
        "chunk_length": seconds,
    }


FAMILY = Family(
    name="video_salmonn_o1",
    model_types=("video_salmonn_o1",),
    config=Config,
    model=Salmonn,
    places=places,
    hub_name=hub_name,
    ignored=(r"vision_tower\.vision_model\.embeddings\.position_ids",),
    special={
        "bos_token_id": "<|endoftext|>",
        "eos_token_id": "<|im_end|>",
        "pad_token_id": "<|endoftext|>",
        **{f"{which}_token_id": f"<{which}>" for which in TOKENS},
    },
    tiny=tiny,
    preprocessor=preprocessor,
)
