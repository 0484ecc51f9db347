"""The thinker of Qwen2.5-Omni (https://arxiv.org/abs/2503.20215): Qwen2.5-VL with ears. Frames and
sound become features in place of their tokens, interleaved in time, and a decoder writes text.

Full checkpoints are read too; their speaking parts (talker, token2wav) are left where they are, and
what is saved is a thinker.
Left out: speech, dropout (the published models have none).
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxvid.batch import AudioBatch, VisionBatch
from jaxvid.models import audio, decoder, encoder, qwen25vl, vision
from jaxvid.models.family import Family, Place, Places, Reader, decoder_places, refuse
from jaxvid.models.layers import Compute
from jaxvid.models.multimodal import Features, Multimodal
from jaxvid.models.text_config import COMMON
from jaxvid.prompting import Medium, Placed, Sound, Vision

FULL = "qwen2_5_omni"  # model_type of a checkpoint with all parts
FRAMES_PER_SECOND = 100  # log-mel frames

IGNORED = {
    "full": (
        "talker_config token2wav_config enable_audio_output enable_talker hidden_size eos_token_id "
        "bos_token_id pad_token_id tie_word_embeddings"
    ).split(),
    "thinker": "user_token_id vision_token_id ignore_index hidden_size".split(),
    "text": ["tie_word_embeddings"],  # the thinker's own is what counts
    "vision": "embed_dim tokens_per_second bos_token_id eos_token_id pad_token_id".split(),
    "audio": (
        "model_type num_hidden_layers encoder_layerdrop tie_word_embeddings "
        "bos_token_id eos_token_id pad_token_id"
    ).split(),
}
AUDIO_NAMES = {
    "layers": "encoder_layers",
    "width": "d_model",
    "ffn": "encoder_ffn_dim",
    "heads": "encoder_attention_heads",
}
TOKEN_NAMES = {  # field -> the names it has in files, the one we write first
    "image_token_id": ("image_token_index", "image_token_id"),
    "video_token_id": ("video_token_index", "video_token_id"),
    "audio_token_id": ("audio_token_index", "audio_token_id"),
    "vision_start_token_id": ("vision_start_token_id",),
    "vision_end_token_id": ("vision_end_token_id",),
    "audio_start_token_id": ("audio_start_token_id",),
    "audio_end_token_id": ("audio_end_token_id",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
    "pad_token_id": ("pad_token_id",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    text: decoder.Config
    vision: vision.Config  # its tokens_per_second are those of sound too
    audio: audio.Config
    image_token_id: int = 151655
    video_token_id: int = 151656
    audio_token_id: int = 151646
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    audio_start_token_id: int = 151647
    audio_end_token_id: int = 151648
    bos_token_id: int | None = None
    eos_token_id: int | None = 151645
    pad_token_id: int | None = None
    tied: bool = False  # the unembedding is the embedding table
    seconds_per_chunk: int = 2  # of frames and sound that stand together
    longest_sound: int = 300  # seconds; the published extractor cuts off what is longer
    compute: Compute = Compute()

    def __post_init__(self):
        for name, out in (("vision", self.vision.out), ("audio", self.audio.out)):
            if out != self.text.width:
                raise ValueError(
                    f"the {name} tower gives width {out}; the decoder has {self.text.width}. Set "
                    f"{name}.out to the decoder's width."
                )

    @property
    def prompting(self) -> "Prompting":
        return Prompting(self)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read the `config.json` of a thinker or of a full checkpoint. Every attribute is read or
        named as ignored; raises one ValueError with everything that is missing or not known."""
        problems: list[str] = []
        if (kind := config.get("model_type")) not in FAMILY.model_types:
            problems.append(f"model_type is {kind!r}; wanted is {FAMILY.name!r}")
        where, thinker = "", config
        if kind == FULL:
            full = Reader(config, "", problems)
            full.take("model_type")
            where, thinker = "thinker_config.", full.take("thinker_config", {})
            full.done([*COMMON, *IGNORED["full"]])
        read = Reader(thinker, where, problems)
        read.take("model_type", None)
        policy = read.take("jaxvid", {})
        towers = {k: dict(read.take(f"{k}_config") or {}) for k in ("text", "vision", "audio")}
        tokens = {}
        for field, names in TOKEN_NAMES.items():
            for name in names:
                if (token := read.take(name, towers["text"].pop(name, None))) is not None:
                    tokens[field] = token
        per_second = read.take("position_id_per_seconds", 25)
        seconds = read.take("seconds_per_chunk", 2)
        tied = read.take("tie_word_embeddings", False)
        read.done([*COMMON, *IGNORED["thinker"]])
        for section in ("text", "vision"):
            for name in (*COMMON, *IGNORED[section]):
                towers[section].pop(name, None)
        text = qwen25vl.read_text(towers["text"], problems)
        seen = qwen25vl.read_vision(towers["vision"] | {"tokens_per_second": per_second}, problems)
        heard = _audio(towers["audio"], problems)
        refuse(problems)
        return cls(
            text=text(),
            vision=seen(),
            audio=heard(),
            tied=bool(tied),
            seconds_per_chunk=seconds,
            **tokens,
            **policy,
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of a thinker, which transformers reads."""
        tokens = {names[0]: getattr(self, field) for field, names in TOKEN_NAMES.items()}
        text = qwen25vl.write_text(self.text) | {
            "model_type": "qwen2_5_omni_text",
            "tie_word_embeddings": self.tied,
        }
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            text[name] = tokens[name]  # transformers looks for them in the text section
        tower = qwen25vl.write_vision(self.vision) | {"model_type": "qwen2_5_omni_vision_encoder"}
        ears = self.audio
        sound = {hf: getattr(ears.encoder, ours) for ours, hf in AUDIO_NAMES.items()} | {
            "model_type": "qwen2_5_omni_audio_encoder",
            "activation_function": "gelu",
            "num_mel_bins": ears.mels,
            "output_dim": ears.out,
            "n_window": ears.chunk // 2,
            "max_source_positions": ears.max_positions,
        }
        return tokens | {
            "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
            "model_type": FAMILY.name,
            "text_config": text,
            "vision_config": tower,
            "audio_config": sound,
            "position_id_per_seconds": self.vision.tokens_per_second,
            "seconds_per_chunk": self.seconds_per_chunk,
            "tie_word_embeddings": self.tied,
            "jaxvid": {"longest_sound": self.longest_sound},
        }


def _audio(section, problems):
    read = Reader(section, "audio_config.", problems)
    found = {ours: read.take(hf) for ours, hf in AUDIO_NAMES.items()}
    read.must("activation_function", "gelu")
    read.must("scale_embedding", False)
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        read.must(name, 0.0)
    around = {
        "out": read.take("output_dim"),
        "mels": read.take("num_mel_bins"),
        "chunk": 2 * read.take("n_window"),
        "max_positions": read.take("max_source_positions"),
    }
    read.done([*COMMON, *IGNORED["audio"]])
    return lambda: audio.Config(encoder=encoder.Config(key_bias=False, **found), **around)


class Omni(Multimodal):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.tower = vision.Tower(cfg.vision, cfg.compute, rngs=rngs)
        self.ears = audio.Tower(cfg.audio, cfg.compute, rngs=rngs)

    @property
    def full(self) -> float:
        return len(self.cfg.vision.full) / self.cfg.vision.layers

    def features(self, vision: VisionBatch, audio: AudioBatch | None) -> Features | None:
        found = [self.tower(vision)] if vision.patches.shape[1] else []
        if audio is not None and audio.features.shape[1]:
            found.append(self.ears(audio))
        return Features(jnp.concatenate(found, axis=1)) if found else None


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How media stand in a prompt, and where: the time-aligned M-RoPE of section 2.2.

    Positions count `tokens_per_second` on the time axis. A video with its sound is cut into chunks
    of `seconds_per_chunk`: the features of the frames of a chunk, then those of its sound, then the
    next chunk. Both start at the position after the two tokens that open them (these two share one
    position, and so do the two that close them). A video without sound stands alone.
    """

    cfg: Config

    @property
    def vision(self) -> Vision:
        v = self.cfg.vision
        return Vision(patch=v.patch, temporal=v.temporal, merge=v.merge, window=v.window)

    @property
    def sound(self) -> Sound:
        a = self.cfg.audio
        return Sound(chunk=a.chunk, slots=a.slots, mels=a.mels)

    @property
    def markers(self) -> dict[str, str]:
        return {
            "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
            "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
            "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
        }

    def expand(self, medium: Medium, encode: Callable[[str], list[int]]) -> Placed:
        """All tokens of a medium; `encode` is not needed, no text stands among them.

        Raises ValueError for a sound that is missing, too long or too short to have a feature.
        """
        c, seen = self.cfg, self._features(medium)[0]
        pad = c.image_token_id if medium.kind == "image" else c.video_token_id
        # in float64, as the published processor counts
        times = np.arange(medium.grid[0]) * float(medium.seconds) * c.vision.tokens_per_second
        order = np.concatenate(self._pieces(medium, times))
        pads = np.where(order < seen, pad, c.audio_token_id)
        opening, closing = self._around(medium)
        wide = lambda x: np.pad(x, (len(opening), len(closing))).astype(np.int32)
        ids = np.concatenate([opening, pads, closing]).astype(np.int32)
        vision = np.where(order < seen, order + 1, 0)
        sound = np.where(order < seen, 0, order - seen + 1)
        return Placed(ids, wide(vision), wide(sound))

    def positions(
        self, tokens: Int[np.ndarray, "n"], media: Sequence[Medium]
    ) -> Int[np.ndarray, "3 n"]:
        """M-RoPE positions (time, height, width) of one sequence; the text after a medium goes on
        from the largest position of its last piece.

        Raises ValueError where the tokens are not those that `expand` gives for the media.
        """
        pads = [self.cfg.image_token_id, self.cfg.video_token_id, self.cfg.audio_token_id]
        out = np.zeros((3, len(tokens)), np.int32)
        i = start = 0
        for medium in media:
            here = np.flatnonzero(np.isin(tokens[i:], pads))
            first = i + int(here[0]) if len(here) else len(tokens)
            at, last = self._places(medium)
            stop = first + at.shape[1]
            opening, closing = self._around(medium)
            before, after = first - len(opening), stop + len(closing)
            around = [*tokens[max(before, i) : first], *tokens[stop:after]]
            run = np.isin(tokens[first:stop], pads)
            if len(run) < at.shape[1] or not run.all() or around != opening + closing:
                raise ValueError(
                    f"a medium of kind {medium.kind!r} wants {opening}, {at.shape[1]} pads and "
                    f"{closing} from token {before}; the sequence of {len(tokens)} has something "
                    "else there. Build it with `expand`."
                )
            out[:, i:before] = start + np.arange(before - i)[None]
            start += before - i
            out[:, before:first] = start  # two tokens that open share a position
            out[:, first:stop] = start + 1 + at
            out[:, stop:after] = start + last + 2
            start, i = start + last + 3, after
        if np.isin(tokens[i:], pads).any():
            raise ValueError(
                f"placeholder tokens after the last of {len(media)} media; give every medium"
            )
        out[:, i:] = start + np.arange(len(tokens) - i)[None]
        return out

    def _around(self, medium: Medium) -> tuple[list[int], list[int]]:
        """The tokens that open and close a medium."""
        c = self.cfg
        frames = [c.vision_start_token_id], [c.vision_end_token_id]
        sound = [c.audio_start_token_id], [c.audio_end_token_id]
        if medium.kind == "audio":
            return sound
        if not self._features(medium)[1]:
            return frames
        return frames[0] + sound[0], sound[1] + frames[1]

    def _features(self, medium: Medium) -> tuple[int, int]:
        """Features of the frames, and of the sound, that a medium has."""
        t, h, w = medium.grid
        seen = 0 if medium.kind == "audio" else t * h * w // self.cfg.vision.merge**2
        if medium.kind == "image" or (medium.kind == "video" and not medium.sound):
            return seen, 0
        seconds = medium.sound / FRAMES_PER_SECOND
        heard = audio.features(medium.sound) if medium.sound else 0
        if not heard:
            raise ValueError(
                f"a medium of kind {medium.kind!r} has a sound of {seconds:g} s, which gives no "
                "feature; give a clip that has sound, or leave its sound out"
            )
        if seconds > self.cfg.longest_sound:
            raise ValueError(
                f"a sound of {seconds:g} s; this model hears at most {self.cfg.longest_sound} s. "
                "Cut the clip"
            )
        return seen, heard

    def _pieces(self, medium: Medium, times: np.ndarray) -> list[Int[np.ndarray, "n"]]:
        """Indices of a medium's features (those of the frames, then those of the sound) in the
        order in which they stand, chunk by chunk; `times` are the frames' positions."""
        seen, heard = self._features(medium)
        if not seen or not heard:
            return [np.arange(seen + heard)]
        size = self.cfg.vision.tokens_per_second * self.cfg.seconds_per_chunk
        frames = _runs(np.repeat(times, seen // len(times)), size)
        sounds = _runs(np.arange(heard), size)
        pieces = []
        for of_frames, of_sound in itertools.zip_longest(frames, sounds):
            pieces += [np.arange(*of_frames)] if of_frames else []
            pieces += [seen + np.arange(*of_sound)] if of_sound else []
        return pieces

    def _places(self, medium: Medium) -> tuple[Int[np.ndarray, "3 n"], int]:
        """Positions of a medium's tokens counted from its first, and the largest of its last
        piece."""
        seen, heard = self._features(medium)
        t, h, w = medium.grid
        step = np.float32(medium.seconds) if medium.kind == "video" else np.float32(1)
        # in float32 and then truncated, as the reference does it
        times = (
            np.arange(t, dtype=np.float32) * step * np.float32(self.cfg.vision.tokens_per_second)
        )
        times, merge = times.astype(np.int32), self.cfg.vision.merge
        grid = np.meshgrid(times, np.arange(h // merge), np.arange(w // merge), indexing="ij")
        at = np.stack(grid).reshape(3, -1)[:, :seen]
        at = np.concatenate([at, np.tile(np.arange(heard), (3, 1))], axis=1)
        pieces = self._pieces(medium, times)
        return at[:, np.concatenate(pieces)], int(at[:, pieces[-1]].max())


def _runs(values: np.ndarray, size: int) -> list[tuple[int, int]]:
    """(start, end) of the runs into which the sorted `values` are cut: run k ends where they reach
    k * size. A value that reaches several of these at once cuts at each of its copies in turn."""
    cuts, at, limit = [0], -1, size
    while (at := max(at + 1, int(np.searchsorted(values, limit)))) < len(values):
        cuts.append(at)
        limit += size
    return list(zip(cuts, [*cuts[1:], len(values)]))


def places(cfg: Config) -> Places:
    """Path in the parameters -> place in the files, for every weight of the family."""
    out = Places()
    qwen25vl.tower_places(out, cfg.vision)
    for which in "qkv":  # three tensors here
        out.linear(
            ("tower", "blocks", "attention", which), f"visual.blocks.{{}}.attn.{which}", bias=True
        )
    _audio_places(out, cfg.audio)
    decoder_places(out, "model.", qkv_bias=True)
    if not cfg.tied:
        out[("head",)] = Place("lm_head.weight")
    return out


def _audio_places(out: Places, cfg: audio.Config) -> None:
    name = "audio_tower."
    for at, wide in (("first", cfg.mels), ("second", cfg.encoder.width)):
        path = ("ears", "convolutions", at, "linear")
        conv = f"{name}conv{1 if at == 'first' else 2}"
        out[*path, "w"] = Place(f"{conv}.weight", 2, stored=(wide, audio.KERNEL))
        out[*path, "b"] = Place(f"{conv}.bias")
    out["ears", "marks"] = Place(f"{name}audio_bos_eos_token.weight")
    out.norm(("ears", "norm"), f"{name}ln_post", bias=True)
    out.linear(("ears", "out"), f"{name}proj", bias=True)
    at, block = ("ears", "encoder", "blocks"), f"{name}layers.{{}}"
    out.norm((*at, "attention_norm"), f"{block}.self_attn_layer_norm", bias=True)
    out.norm((*at, "mlp_norm"), f"{block}.final_layer_norm", bias=True)
    out.linear((*at, "mlp", "hidden"), f"{block}.fc1", bias=True)
    out.linear((*at, "mlp", "out"), f"{block}.fc2", bias=True)
    for which in "qkv":
        out.linear((*at, "attention", which), f"{block}.self_attn.{which}_proj", bias=which != "k")
    out.linear((*at, "attention", "out"), f"{block}.self_attn.out_proj", bias=True, inputs=2)


def hub_name(name: str) -> str:
    """A tensor's name as a thinker's folder spells it, from any spelling."""
    name = re.sub(r"^thinker\.", "", name)
    name = re.sub(r"^model\.(visual|audio_tower)\.", r"\1.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def module_name(name: str) -> str:
    """A tensor's name as transformers' thinker has it, from the folder's."""
    name = re.sub(r"^model\.", "model.language_model.", name)
    return re.sub(r"^(visual|audio_tower)\.", r"model.\1.", name)


def tiny(vocab: int, ids: dict[str, int]) -> Config:
    """The same classes at laptop size (about 4M parameters), for frames of 48 x 48 pixels."""
    like = qwen25vl.tiny(vocab, {})
    blocks = encoder.Config(layers=2, width=128, ffn=384, heads=4, key_bias=False)
    return Config(
        text=like.text,
        vision=dataclasses.replace(like.vision, tokens_per_second=25),
        audio=audio.Config(encoder=blocks, out=like.text.width),
        tied=True,
        compute=like.compute,
        **ids,
    )


def preprocessor(cfg: Config) -> dict[str, Any]:
    """preprocessor_config.json, for a folder that has none."""
    return qwen25vl.image_processor(cfg.vision) | {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": cfg.audio.mels,
        "sampling_rate": 16_000,
        "n_fft": 400,
        "hop_length": 160,
        "chunk_length": cfg.longest_sound,
        "n_samples": 16_000 * cfg.longest_sound,
        "nb_max_frames": FRAMES_PER_SECOND * cfg.longest_sound,
        "return_attention_mask": True,
    }


FAMILY = Family(
    name="qwen2_5_omni_thinker",
    model_types=("qwen2_5_omni_thinker", FULL),
    config=Config,
    model=Omni,
    places=places,
    hub_name=hub_name,
    module_name=module_name,
    ignored=(r"talker\..*", r"token2wav\..*"),  # the speaking parts of a full checkpoint
    special={
        "bos_token_id": "<|endoftext|>",
        "pad_token_id": "<|endoftext|>",
        "eos_token_id": "<|im_end|>",
        "vision_start_token_id": "<|vision_bos|>",
        "vision_end_token_id": "<|vision_eos|>",
        "audio_start_token_id": "<|audio_bos|>",
        "audio_end_token_id": "<|audio_eos|>",
        "image_token_id": "<|IMAGE|>",
        "video_token_id": "<|VIDEO|>",
        "audio_token_id": "<|AUDIO|>",
    },
    tiny=tiny,
    preprocessor=preprocessor,
)
