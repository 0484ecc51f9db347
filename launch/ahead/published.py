"""config.json of the published models that recipes start from, by their names on the hub.

Preflight needs shapes alone, so it works before any weight is downloaded. A folder that is there
is always read instead. Attributes that say nothing about shapes are left out.
"""

import difflib
import pathlib
from typing import Any

from jaxvid.models import assemble, hf

QWEN_TOKENS = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
VICUNA = {  # its padding token and the two of media make the table longer
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32064,
}
QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "vocab_size": 152064,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SIGLIP = {  # google/siglip-so400m-patch14-384
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
WHISPER = {  # openai/whisper-large-v3, its encoder
    "model_type": "whisper",
    "num_mel_bins": 128,
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "activation_function": "gelu",
    "max_source_positions": 1500,
}


def _tower(width: int, ffn: int) -> dict[str, Any]:
    """Qwen2.5-VL's vision tower for a decoder of this width."""
    return {
        "depth": 32,
        "hidden_size": 1280,
        "hidden_act": "silu",
        "intermediate_size": ffn,
        "num_heads": 16,
        "in_channels": 3,
        "out_hidden_size": width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }


def _text(layers: int, width: int, ffn: int, heads: int, kv: int, vocab: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }


def _qwen25vl(text: tuple[int, ...], ffn: int, tied: bool = False) -> dict[str, Any]:
    told = {"model_type": "qwen2_5_vl", "tie_word_embeddings": tied}
    tower = _tower(text[1], ffn) | {"tokens_per_second": 2}
    positions = {"max_position_embeddings": 128_000}
    return told | QWEN_TOKENS | _text(*text) | positions | {"vision_config": tower}


def _omni(*text: int) -> dict[str, Any]:
    ears = {
        "model_type": "qwen2_5_omni_audio_encoder",
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "activation_function": "gelu",
        "num_mel_bins": 128,
        "max_source_positions": 1500,
        "n_window": 100,
        "output_dim": text[1],
    }
    return {
        "model_type": "qwen2_5_omni_thinker",
        "text_config": _text(*text) | {"max_position_embeddings": 32_768},
        "vision_config": _tower(text[1], 3420),
        "audio_config": ears,
    }


def _qwen3vl(layers: int, width: int, ffn: int, heads: int) -> dict[str, Any]:
    text = {
        "model_type": "qwen3_vl_text",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-06,
        "rope_theta": 5e6,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
        "vocab_size": 151_936,
    }
    tower = {
        "model_type": "qwen3_vl",
        "depth": 27,
        "hidden_size": 1152,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 4304,
        "num_heads": 16,
        "in_channels": 3,
        "num_position_embeddings": 2304,
        "out_hidden_size": width,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    told = {"model_type": "qwen3_vl", "tie_word_embeddings": False}
    return told | QWEN_TOKENS | {"text_config": text, "vision_config": tower}


def _salmonn() -> dict[str, Any]:
    """What `assemble.video_salmonn_o1` writes for the paper's three parts."""
    media = {"image_token_index": 151_646, "video_token_index": 151_647}
    return assemble.config(SIGLIP, WHISPER, QWEN2_7B) | media | {"audio_token_index": 151_648}


CONFIGS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen25vl((36, 2048, 11008, 16, 2, 151936), 3420, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen25vl((28, 3584, 18944, 28, 4, 152064), 3420),
    "Qwen/Qwen2.5-VL-32B-Instruct": _qwen25vl((64, 5120, 27648, 40, 8, 152064), 3456),
    "Qwen/Qwen2.5-VL-72B-Instruct": _qwen25vl((80, 8192, 29568, 64, 8, 152064), 3456),
    "Qwen/Qwen2.5-Omni-7B": _omni(28, 3584, 18944, 28, 4, 152064),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3vl(36, 4096, 12288, 32),
    "llava-hf/LLaVA-NeXT-Video-7B-hf": {
        "model_type": "llava_next_video",
        "text_config": VICUNA,
    },
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": {
        "model_type": "llava_onevision",
        "text_config": QWEN2_7B,
    },
    "video-salmonn-o1-7b": _salmonn(),
}


def read(folder: str, base: str) -> Any:
    """The config of a run's model: of `folder` where it holds one, else of the published model
    `base`. Raises ValueError naming those known."""
    if (pathlib.Path(folder) / "config.json").is_file():
        return hf.read_config(folder)
    if base not in CONFIGS:
        near = difflib.get_close_matches(base, CONFIGS, 1, cutoff=0.3)
        asked = f"{base!r} is not known here" if base else "the recipe names no BASE"
        raise ValueError(
            f"{folder} has no config.json, and {asked}. Give --base one of "
            f"{', '.join(CONFIGS)}{f' (nearest: {near[0]})' if near else ''}, or the folder"
        )
    config = CONFIGS[base]
    (family,) = [f for f in hf.FAMILIES if config["model_type"] in f.model_types]
    return family.config.from_hf(config)
