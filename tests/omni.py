"""The smallest Qwen2.5-Omni thinker of the real classes, its media and its rows in one shape."""

import functools

from prompts import filled

from jaxvid.data.packing import Budget
from jaxvid.models import audio, decoder, encoder, hf, omni, vision
from jaxvid.models.layers import Compute
from jaxvid.prompting import Medium

TEXT = decoder.Config(
    layers=2, width=32, ffn=48, heads=4, kv_heads=2, vocab=64, rope_sections=(1, 1, 2)
)
TOWER = vision.Config(
    layers=3, width=32, ffn=48, heads=2, out=32, full=(1,), patch=4, window=16, tokens_per_second=4
)
EARS = audio.Config(
    encoder=encoder.Config(layers=2, width=24, ffn=40, heads=3, key_bias=False),
    out=32,
    mels=16,
    chunk=12,
    max_positions=64,
)
CFG = omni.Config(
    text=TEXT,
    vision=TOWER,
    audio=EARS,
    image_token_id=4,
    video_token_id=5,
    audio_token_id=6,
    vision_start_token_id=2,
    vision_end_token_id=3,
    audio_start_token_id=7,
    audio_end_token_id=8,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=None,
    compute=Compute(remat="none"),
)
FILM = Medium("video", (3, 4, 4), 1.5, 70)  # frames at 0, 6 and 12; sound up to 16; chunks of 8
SOUND = Medium("audio", sound=31)  # chunks of 12, 12 and 7 mel frames
BUDGET = Budget(rows=2, tokens=72, scored=0, branches=0, frames=4, patches=36, chunks=9)


@functools.cache
def fresh():
    graph, shapes = hf.abstract(CFG)
    return hf.Loaded(CFG, graph, filled(shapes, 0.5))


def published(size="7B", **changes):
    """config.json of Qwen2.5-Omni as the hub has it, in the parts that are read."""
    width, ffn, layers, heads, kv, vocab = {
        "7B": (3584, 18944, 28, 28, 4, 152064),
        "3B": (2048, 11008, 36, 16, 2, 151936),
    }[size]
    legacy = {"chunk_size_feed_forward": 0, "top_k": 50, "num_beams": 1, "id2label": {"0": "a"}}
    sound = {
        "model_type": "qwen2_5_omni_audio_encoder",
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "num_hidden_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "encoder_layerdrop": 0.0,
        "d_model": 1280,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "scale_embedding": False,
        "init_std": 0.02,
        "max_source_positions": 1500,
        "n_window": 100,
        "output_dim": width,
        "tie_word_embeddings": True,
    }
    frames = {
        "model_type": "qwen2_5_omni_vision_encoder",
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1280,
        "hidden_act": "silu",
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "in_chans": 3,
        "out_hidden_size": width,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 25,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    text = {
        "model_type": "qwen2_5_omni_text",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }
    thinker = {
        "architectures": ["Qwen2OmniNaViTThinkerForConditionalGeneration"],
        "model_type": "qwen2_5_omni_thinker",
        "audio_config": sound | legacy,
        "vision_config": frames | legacy,
        "text_config": text | legacy,
        "audio_start_token_id": 151647,
        "audio_end_token_id": 151648,
        "audio_token_index": 151646,
        "image_token_index": 151655,
        "video_token_index": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "user_token_id": 872,
        "ignore_index": -100,
        "bos_token_id": 151644,
        "eos_token_id": 151645,
        "pad_token_id": 151643,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "init_std": 0.02,
        "torch_dtype": "bfloat16",
    }
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "enable_talker": True,
        "thinker_config": thinker | changes,
        "talker_config": {"model_type": "qwen2_5_omni_talker", "hidden_size": 896},
        "token2wav_config": {"model_type": "qwen2_5_omni_token2wav"},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
    }
