"""Rewards by hand, and replies that try to be paid for nothing."""

import dataclasses

import numpy as np
import pytest

from jaxvid import answers, rewards


@dataclasses.dataclass(frozen=True)
class Asked:
    options: tuple[str, ...] = ("falls", "stops", "rises", "bursts")
    answer: str = "C"


RIGHT = "<think>it rises to the top</think> <answer>C</answer>"


@pytest.mark.parametrize(
    "text, well_formed, right, gated",
    [
        (RIGHT, 1, 1, 1),
        (RIGHT.replace("C", "B"), 1, 0, 0),
        ("<answer>C</answer>", 0, 1, 0),
        (RIGHT + " Surely.", 0, 1, 0),
        ("C", 0, 0, 0),  # the letter is read from the tag alone
        ("<think>it rises</think> C", 0, 0, 0),
        ("", 0, 0, 0),
        ("<think>x</think> <answer></answer>", 0, 0, 0),
        ("<think>x</think> <answer>A B C D</answer>", 1, 0, 0),
        ("<think>x</think> <answer>c</answer>", 1, 0, 0),
        ("<think>x</think> <answer>rises</answer>", 1, 0, 0),
        ("".join(f"<answer>{x}</answer>" for x in "ABCD"), 0, 0, 0),
        ("<think><answer>C</answer></think> <answer>B</answer>", 0, 0, 0),
    ],
)
def test_answer(text, well_formed, right, gated):
    additive = rewards.Answer(format_weight=0.5, correct_weight=2.0)
    assert additive(Asked(), text) == (0.5 * well_formed + 2.0 * right, well_formed, right)
    assert rewards.Answer(gated=True)(Asked(), text) == (well_formed + gated, well_formed, gated)


def test_most_is_paid_for_the_right_answer_alone():
    """No reply of a list of tricks reaches the reward of a right, well-formed one."""
    best = rewards.Answer()(Asked(), RIGHT).total
    tricks = [RIGHT * 2, RIGHT + "<answer>C</answer>", "<think>C</think> <answer>C B</answer>"]
    assert all(rewards.Answer()(Asked(), t).total < best for t in tricks)


def test_open_answers_are_compared_as_words():
    asked = Asked(options=(), answer="The red ball")
    assert rewards.Answer()(asked, "<think>x</think> <answer>the red ball.</answer>").correct == 1
    assert rewards.Answer()(asked, "<think>x</think> <answer>the red</answer>").correct == 0
    assert answers.is_right("The red ball.", "the red ball", 0)


def test_an_example_without_an_answer_is_an_error():
    with pytest.raises(ValueError, match="one of the letters ABCD"):
        rewards.Answer()(Asked(answer="rises"), RIGHT)
    with pytest.raises(ValueError, match="one of the letters ABCD"):
        rewards.Answer()(Asked(answer=""), "")
    with pytest.raises(ValueError, match="one of the letters ABCD"):
        rewards.Answer()(Asked(answer="AB"), "AB")
    with pytest.raises(ValueError, match="a short text"):
        rewards.Answer()(Asked(options=(), answer=""), "")


def test_overlong():
    """DAPO eq. 13 with L_max 20, buffer 4: 0 up to 16, -1 at 20."""
    lengths = np.array([1, 16, 17, 18, 20])
    punished = rewards.Overlong(buffer=4, factor=1.0)(lengths, 20)
    np.testing.assert_allclose(punished, [0, 0, -0.25, -0.5, -1.0])
    assert (rewards.Overlong()(lengths, 20) == 0).all()
    with pytest.raises(ValueError, match="overlong.buffer = 20"):
        rewards.Overlong(buffer=20)(lengths, 20)
