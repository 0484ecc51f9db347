"""Differences of arms: taken pair by pair, with an interval that knows about pairs."""

import numpy as np
import pytest

from jaxvid import ablation


def test_summary_by_hand():
    before = np.array([[1, 0, 0, 0], [1, 0, 0, 1]], float)
    after = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], float)
    result = ablation.summary({"grpo": before, "dna": after})
    assert result["seeds"] == 2 and result["pairs"] == 4
    assert result["arms"]["grpo"]["both"] == 0.375 and result["arms"]["dna"]["both"] == 0.5
    (row,) = result["differences"]
    assert (row["after"], row["before"], row["difference"]) == ("dna", "grpo", 0.125)
    assert row["low"] <= 0.125 <= row["high"]
    text = ablation.table(result)
    assert "| dna - grpo | +12.5 |" in text and "| grpo | 37.5% |" in text


def test_equal_arms_have_no_difference():
    both = (np.random.default_rng(0).random((5, 50)) > 0.5).astype(float)
    (row,) = ablation.summary({"a": both, "b": both})["differences"]
    assert row["difference"] == row["low"] == row["high"] == 0


def test_bad_requests_say_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="has no ARMS"):
        ablation.run("tiny_dna", [], 5, tmp_path)
    with pytest.raises(ValueError, match="needs at least 2"):
        ablation.run("ablation_dna", [], 1, tmp_path)
