"""`transformers`' side of the comparisons: its Qwen2.5-VL of our config, our weights, our tokens.

Needs torch and transformers, and peft for a model with adapters. Everything lies on `device()`.
"""

import numpy as np
import torch
import transformers

from benchmarks import weights
from benchmarks.rollout import Job
from jaxvid.data import layout
from jaxvid.models import qwen25vl
from jaxvid.models.lora import LoRA

ROWS = 8192  # of a matrix, filled at a time
LINEAR = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # what gets an adapter
ADAPTER = ".lora_A.default.weight"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(cfg: qwen25vl.Config, dtype: str, attention: str = "sdpa") -> torch.nn.Module:
    """Fresh weights, in `dtype`."""
    config = transformers.Qwen2_5_VLConfig(**cfg.to_hf())
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = cfg.tied
    with device():
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model.eval()


def adapted(model: torch.nn.Module, settings: LoRA) -> torch.nn.Module:
    """With adapters of float32 on every linear layer of the decoder; they alone are trained."""
    import peft  # a model that is trained whole needs none

    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=LINEAR, lora_dropout=0.0
    )
    return peft.get_peft_model(model, config)


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """The numbers of benchmarks/weights.py in place of its own; an adapter's b stays 0."""
    for name, p in model.named_parameters():
        name = qwen25vl.hub_name(
            name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        )
        name = name.replace(ADAPTER, weights.ADAPTER)
        if p.ndim == 1:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
        elif "lora_B" not in name:
            _fill(p.view(len(p), -1), name)


def _fill(matrix, name):
    count = lambda a, b: torch.arange(a, b, dtype=torch.int32, device=matrix.device)
    column, scale = count(0, matrix.shape[1])[None], weights.scale(name, matrix.shape[1])
    for start in range(0, len(matrix), ROWS):
        some = matrix[start : start + ROWS]
        row = count(start, start + len(some))[:, None]
        bits = weights.mixed(row, column, weights.seed(name))
        some.copy_((bits.float() * 2**-24 - 0.5) * scale)


# ---- inputs


def pixels(clip: layout.Frames, cfg: qwen25vl.Config) -> torch.Tensor:
    """A clip's patches as the tower takes them, [patches, values]: normalised, float32."""
    flat = torch.tensor(clip.patches.reshape(-1, cfg.vision.patch_values), device=device())
    each = cfg.vision.patch_values // cfg.vision.channels
    spread = lambda x: torch.tensor(np.repeat(np.float32(x), each), device=device())
    mean, std = spread(cfg.vision.image_mean), spread(cfg.vision.image_std)
    return flat.float() / (255 * std) - mean / std


def media(ids: torch.Tensor, clips: list[layout.Frames], grid, cfg: qwen25vl.Config):
    """What belongs to the clips of `ids` [n, T], each of `grid` patches, among the inputs."""
    return {
        "mm_token_type_ids": torch.where(ids == cfg.video_token_id, 2, 0),
        "pixel_values_videos": torch.cat([pixels(clip, cfg) for clip in clips]),
        "video_grid_thw": torch.tensor([grid] * len(clips), device=device()),
    }


# ---- rollouts


def sampled(job: Job, model: torch.nn.Module, cfg: qwen25vl.Config, tree: layout.Tree):
    """(run with a kind of cache, bytes of each kind's cache once it has run)."""
    ids = torch.tensor(tree.prompt[None], dtype=torch.int64, device=device())
    inputs = media(ids, list(tree.clips), job.grid, cfg)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["second_per_grid_ts"] = torch.tensor([1.0], device=device())

    @torch.no_grad()
    def run(cache: str, group: int = job.group, reply: int = job.reply) -> None:
        out = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=group,
            min_new_tokens=reply,
            max_new_tokens=reply,
            cache_implementation=cache,
            return_dict_in_generate=True,
        )
        assert out.sequences.shape == (group, len(tree.prompt) + reply)
        kept = [x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)]
        held[cache] = sum(x.numel() * x.element_size() for x in kept)

    held: dict[str, int] = {}
    return run, held


def finished(_=None) -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
