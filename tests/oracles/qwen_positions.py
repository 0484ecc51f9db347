# /// script
# requires-python = "==3.11.*"
# dependencies = ["torch==2.13.0", "transformers==4.57.6", "numpy==2.4.6"]
# ///
"""M-RoPE positions of Qwen2.5-VL by transformers 4: `Qwen2_5_VLModel.get_rope_index`.

It runs as it is, on a stub of the model that hands out token ids and sizes. Seconds go in as the
processor hands them over: float32.
"""

import json
import pathlib
import types

import numpy as np
import torch
import transformers
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

PROMPTS = 120
IDS = {"image_token_id": 4, "video_token_id": 5, "vision_start_token_id": 2}
END, MERGE = 3, 2
# Of a clip of 2, 4, 1.5 frames a second ...; the last two are whole only where float32 rounds.
SECONDS = (1.0, 0.5, 4 / 3, 2.0, 0.4, 1.001, 2.5, 1 - 1e-12, 2 - 1e-9)


def prompt(rng):
    """(tokens, media) of text, images and videos; a medium is (is video, t, h, w, seconds)."""
    text = lambda least: rng.integers(10, 64, rng.integers(least, 6)).tolist()
    tokens, media = text(1), []
    for video in rng.integers(0, 2, rng.integers(0, 5)):
        t, h, w = int(rng.integers(1, 9)), *(MERGE * rng.integers(1, 5, 2)).tolist()
        t = t if video else 1
        seconds = float(rng.choice([*SECONDS, rng.uniform(0, 3)])) if video else 0.0
        media.append((video, t, h, w, seconds))
        pads = [5 if video else 4] * (t * h * w // MERGE**2)
        tokens += [IDS["vision_start_token_id"], *pads, END, *text(0)]
    return np.array(tokens + text(1)), media


def positions(tokens, media, rate):
    """([3, n], the position after the prompt) as the peer has them."""
    tower = types.SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=rate)
    stub = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=tower, **IDS))
    grids = lambda video: torch.tensor([m[1:4] for m in media if m[0] == video]) if media else None
    seconds = torch.tensor([m[4] for m in media if m[0]], dtype=torch.float32)
    given = torch.tensor(tokens[None])
    get = modeling.Qwen2_5_VLModel.get_rope_index
    found, delta = get(stub, given, grids(0), grids(1), seconds, torch.ones_like(given))
    return found[:, 0].numpy(), int(delta) + len(tokens)


def main():
    rng = np.random.default_rng(2025)
    prompts = [prompt(rng) for _ in range(PROMPTS)]
    rates = rng.choice([2, 4, 25], PROMPTS)
    found = [positions(*p, int(rate)) for p, rate in zip(prompts, rates)]
    meta = {"peer": "transformers", "version": transformers.__version__, "ids": IDS, "end": END}
    np.savez_compressed(
        pathlib.Path(__file__).with_suffix(".npz"),
        meta=json.dumps(meta | {"torch": torch.__version__, "merge": MERGE}),
        tokens=np.concatenate([tokens for tokens, _ in prompts]).astype(np.int32),
        lengths=np.array([len(tokens) for tokens, _ in prompts]),
        counts=np.array([len(media) for _, media in prompts]),
        media=np.array([m for _, media in prompts for m in media]),
        tokens_per_second=rates,
        positions=np.concatenate([at for at, _ in found], 1).astype(np.int32),
        after=np.array([after for _, after in found]),
    )


if __name__ == "__main__":
    main()
