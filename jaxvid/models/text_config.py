"""The text section of config.json where the decoder is a plain language model: Llama, Mistral or
Qwen2 as their own classes in transformers have it. In and out.

Left out: scaled rope, biases of Llama's layers.
"""

from collections.abc import Mapping
from typing import Any

from jaxvid.models import decoder
from jaxvid.models.family import Reader

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
NAMES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL = LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
QWEN2 = LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
# What a file leaves out is the default of transformers' class.
DEFAULTS = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2}
# What every section of a config.json written by transformers 4 may hold: the defaults of its base
# class, which say nothing about what is computed here.
COMMON = (
    "_attn_implementation_autoset _name_or_path add_cross_attention architectures bad_words_ids "
    "begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size "
    "decoder_start_token_id diversity_penalty do_sample dtype early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task "
    "forced_bos_token_id forced_eos_token_id id2label init_std initializer_range is_decoder "
    "is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size "
    "num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states "
    "output_scores prefix problem_type pruned_heads remove_invalid_values repetition_penalty "
    "return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params "
    "temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype "
    "torchscript transformers_version typical_p use_bfloat16 use_cache"
).split()
FULL, SLIDING = "full_attention", "sliding_attention"


def read(
    section: Mapping[str, Any], default: str, problems: list[str]
) -> tuple[str, dict[str, Any], dict[str, int | None]]:
    """(kind of decoder, its Config's fields, token ids) of a text section; `default` is the kind of
    one that does not say. What is wrong is added to `problems`."""
    kind = section.get("model_type", default)
    if kind not in DEFAULTS:
        problems.append(f"text_config.model_type is {kind!r}; supported are {', '.join(DEFAULTS)}")
        return default, {}, {}
    take = Reader(DEFAULTS[kind] | section, "text_config.", problems)
    found = {ours: take.take(hf) for ours, hf in NAMES.items()}
    found["kv_heads"] = take.take("num_key_value_heads", None) or found["heads"]
    head = take.take("head_dim", None) or found["width"] // max(found["heads"], 1)
    found["head_dim"] = head if head * found["heads"] != found["width"] else 0
    found["rope_sections"] = (head // 2, 0, 0)  # three equal rows of positions: any one serves
    found["rope_theta"] = _theta(take)
    found["qkv_bias"] = kind == "qwen2"
    if kind == "qwen2":
        found["window"] = sliding_window(take, found["layers"])
    elif kind == "mistral":
        found["window"] = take.take("sliding_window") or 0
    else:
        take.must("attention_bias", False)
        take.must("mlp_bias", False)
    take.must("hidden_act", "silu")
    take.must("attention_dropout", 0.0)
    tokens = {name: take.take(name, None) for name in TOKENS}
    for name, token in tokens.items():
        if isinstance(token, list):
            problems.append(f"text_config.{name} is {token}; give the one that ends a reply")
    take.done([*COMMON, "model_type", "pretraining_tp", "tie_word_embeddings"])
    return kind, found, tokens


def _theta(take):
    rope = dict(take.take("rope_parameters", None) or take.take("rope_scaling", None) or {})
    take.take("rope_scaling", None)
    theta = float(rope.pop("rope_theta", take.take("rope_theta", 1e4)))
    for name in ("type", "rope_type"):
        if (kind := rope.pop(name, "default")) != "default":
            take.problems.append(f"text_config: rope {name} is {kind!r}; only plain rope is known")
            rope.clear()  # its factors come with it
    take.problems += [
        f"rope attribute {name}={value!r} is not known" for name, value in rope.items()
    ]
    return theta


def sliding_window(read: Reader, layers: int) -> int:
    """The sliding window of all layers, or 0. By transformers' rule `layer_types` says which layers
    have one; without it, those from `max_window_layers` on. Both count the token itself, as here.
    """
    on, size = read.take("use_sliding_window", False), read.take("sliding_window", 4096)
    first, kinds = read.take("max_window_layers", 80), read.take("layer_types", None)
    if kinds is None:
        slides = on and size is not None
        kinds = [SLIDING if slides and i >= (first or 0) else FULL for i in range(layers)]
    if set(kinds) <= {FULL}:
        return 0
    if set(kinds) != {SLIDING}:
        read.problems.append(
            f"{read.where}layer_types has {sorted(set(kinds))} (use_sliding_window={on}, "
            f"max_window_layers={first} of {layers}); supported is {FULL!r} on all layers or "
            f"{SLIDING!r} on all"
        )
    elif not on or not size or size < 1:
        read.problems.append(
            f"{read.where}layer_types is {SLIDING!r} with use_sliding_window={on} and "
            f"sliding_window={size}; give use_sliding_window=true and a window of at least 1"
        )
    return max(size or 0, 0)


def write(cfg: decoder.Config, kind: str, tokens: Mapping[str, int | None]) -> dict[str, Any]:
    """The text section that transformers reads."""
    out = {hf: getattr(cfg, ours) for ours, hf in NAMES.items()} | {
        "model_type": kind,
        "num_key_value_heads": cfg.kv_heads,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "rope_theta": cfg.rope_theta,  # where transformers 4 looks
    }
    if kind != "qwen2":
        out["head_dim"] = cfg.head
    if kind == "mistral":
        out["sliding_window"] = cfg.window or None
    if kind == "qwen2" and cfg.window:
        out |= {
            "use_sliding_window": True,
            "sliding_window": cfg.window,
            "max_window_layers": 0,
            "layer_types": [SLIDING] * cfg.layers,
        }
    return out | dict(tokens)
