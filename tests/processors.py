"""Hugging Face's processors as oracles, whether torchvision is there, works, or neither."""

import functools
import importlib
import sys

import pytest

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def _torchvision():
    """Whether torchvision is there. One built for another torch misses its compiled operators,
    which no processor calls: they are declared, so that the import passes."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return False
    except RuntimeError:
        import torch

        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _torchvision.library = torch.library.Library("torchvision", "DEF")  # kept alive
        for operator in _OPERATORS:
            _torchvision.library.define(operator)
        importlib.import_module("torchvision")
    return True


def images(family):
    """The module of transformers that prepares a family's images with PIL: no torchvision."""
    pytest.importorskip("transformers", reason="transformers is the oracle of preprocessing")
    _torchvision()  # transformers imports it where it finds it
    return importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")


def torch():
    """torch itself, whose `linspace` and `arange` the processors take frames with."""
    return pytest.importorskip("torch", reason="the processors pick frames with torch")


def videos(family):
    """The module of transformers that prepares a family's videos: torch and torchvision."""
    torch()
    if not _torchvision():
        pytest.skip("transformers' video processors need torchvision")
    return importlib.import_module(f"transformers.models.{family}.video_processing_{family}")


def metadata(total, rate):
    """What transformers knows of a clip."""
    _torchvision()
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(total_num_frames=total, fps=rate)


def processing(family):
    """The module of transformers that joins a family's text and media."""
    torch()
    _torchvision()
    return importlib.import_module(f"transformers.models.{family}.processing_{family}")
