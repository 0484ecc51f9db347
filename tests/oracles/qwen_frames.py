# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "torch==2.13.0", "torchvision==0.28.0", "qwen-vl-utils==0.0.14", "numpy==2.4.6",
# ]
# ///
"""Which frames qwen-vl-utils takes of a clip and how large: `_read_video_decord`, `fetch_video`.

Both run as they are, on a stub of decord that says how many frames a clip has and hands out
pictures of one pixel, and a stub of the resizing, which hands out zeros of the size asked for.
"""

import json
import pathlib
import sys
import types

import numpy as np
import torch
from qwen_vl_utils import vision_process

RATES = (1.0, 7.5, 23.976023976023978, 25.0, 29.97002997002997, 60.0)
CLIPS = 300
SIZES = 300


class Reader:
    """decord.VideoReader of a clip named "TOTAL RATE"."""

    def __init__(self, name):
        total, rate = name.split()
        self.total, self.rate = int(total), float(rate)

    def __len__(self):
        return self.total

    def get_avg_fps(self):
        return self.rate

    def get_batch(self, indices):
        return types.SimpleNamespace(asnumpy=lambda: np.zeros((len(indices), 1, 1, 3), np.uint8))


def clips(rng):
    """Rows of (total, rate, fps, min_frames, max_frames), and the indices taken of each."""
    rows, taken = [], []
    for _ in range(CLIPS):
        total = int(np.exp(rng.uniform(np.log(4), np.log(40000))))
        rate, fps = rng.choice(RATES), rng.choice([0.5, 1.0, 2.0, 4.0])
        least, most = int(rng.choice([2, 4, 5, 6])), int(rng.choice([8, 16, 64, 768]))
        asked = {"fps": float(fps), "min_frames": least, "max_frames": most}
        asked["video"] = f"{total} {rate}"
        rows.append((total, rate, fps, least, most))
        taken.append(vision_process._read_video_decord(asked)[1]["frames_indices"])
    return np.array(rows), taken


def sizes(rng):
    """Rows of (frames, height, width, patch, min_, max_, total_pixels), and the size of each."""
    rows, found = [], []
    for i in range(SIZES):
        count = 2 * int(np.exp(rng.uniform(0, np.log(384))))
        height, width = (int(np.exp(rng.uniform(np.log(30), np.log(2200)))) for _ in range(2))
        patch, side = (14, 28) if i % 2 else (16, 32)
        least = int(rng.choice([4, 16, 128])) * side**2
        most = int(rng.choice([256, 768, 5000])) * side**2
        total = int(rng.choice([3000, 24576, 115200])) * side**2
        clip = torch.zeros(1).expand(count, 3, height, width)
        vision_process.VIDEO_READER_BACKENDS["stub"] = lambda ele, clip=clip: (clip, {}, 2.0)
        asked = {"video": "a clip", "min_pixels": least, "max_pixels": most, "total_pixels": total}
        video = vision_process.fetch_video(asked, image_patch_size=patch)
        if min(video.shape):  # thin frames get a side of 0, where transformers gives one token
            rows.append((count, height, width, patch, least, most, total))
            found.append(video.shape)
    return np.array(rows), np.array(found)


def main():
    sys.modules["decord"] = types.SimpleNamespace(VideoReader=Reader)
    vision_process.get_video_reader_backend = lambda: "stub"
    zeros = lambda video, size, interpolation, antialias: torch.zeros(size)
    functional = types.SimpleNamespace(resize=zeros)
    vision_process.transforms = types.SimpleNamespace(functional=functional)
    rng = np.random.default_rng(2025)
    asked, taken = clips(rng)
    of_sizes, found = sizes(rng)
    meta = {"peer": "qwen-vl-utils", "version": "0.0.14", "torch": torch.__version__}
    np.savez_compressed(
        pathlib.Path(__file__).with_suffix(".npz"),
        meta=json.dumps(meta),
        clips=asked,
        counts=np.array([len(i) for i in taken]),
        indices=np.concatenate(taken).astype(np.int32),
        sizes=of_sizes,
        found=found,
    )


if __name__ == "__main__":
    main()
