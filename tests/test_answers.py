"""The reader of replies against honest and adversarial replies."""

import pytest

from jaxvid import answers

GOOD = "<think>it rises to the top</think> <answer>C</answer>"


@pytest.mark.parametrize(
    "text, wanted",
    [
        (GOOD, True),
        (GOOD.replace("> <", "><"), True),
        (GOOD.replace("> <", ">\n<"), True),
        ("<think>two\nlines</think> <answer>the red ball</answer>", True),
        (GOOD.replace("> <", ">  <"), False),
        (GOOD.replace("> <", ">\n\n<"), False),
        (GOOD.replace("> <", "> so <"), False),
        (GOOD + " ", False),
        (GOOD + "\n", False),
        (GOOD + " I am sure.", False),
        (" " + GOOD, False),
        ("Sure! " + GOOD, False),
        ("<think></think> <answer>C</answer>", False),
        ("<think> </think> <answer>C</answer>", False),
        ("<think>x</think> <answer></answer>", False),
        ("<think>x</think> <answer> </answer>", False),
        ("<think>x</think>", False),
        ("<answer>C</answer>", False),
        ("<answer>C</answer> <think>x</think>", False),
        (GOOD + GOOD, False),
        ("<think>x</think> <answer>C</answer><answer>C</answer>", False),
        ("<think><think>x</think></think> <answer>C</answer>", False),
        ("<think>x<answer>A</answer></think> <answer>C</answer>", False),
        ("<think>x</think> <answer><answer>C</answer></answer>", False),
        ("<think>x <answer>C</think></answer>", False),
        ("<THINK>x</THINK> <ANSWER>C</ANSWER>", False),
        ("<think>x</think> <answer>C", False),
        ("", False),
    ],
)
def test_formatted(text, wanted):
    assert answers.formatted(text) is wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B.", "B"),
        ("B)", "B"),
        ("(B)", "B"),
        ("(B).", "B"),
        (GOOD, "C"),
        ("<think>maybe A or B</think><answer>C</answer>", "C"),
        ("<think>x</think>\nC", "C"),
        ("<answer> (C) </answer>", "C"),
        ("The answer is A. <answer>B</answer>", "B"),
        ("<answer>B</answer><answer>B</answer>", "B"),
        # two answers, or one hidden in the thought
        ("<answer>A</answer> <answer>B</answer>", None),
        ("<think><answer>A</answer></think> <answer>B</answer>", None),
        ("<answer>A or B</answer>", None),
        ("<answer>AB</answer>", None),
        ("<answer>A, B, C, D</answer>", None),
        ("A B", None),
        ("A\nB", None),
        # an empty answer is inside every right answer as a substring
        ("", None),
        ("<answer></answer>", None),
        ("<answer> </answer>", None),
        ("()", None),
        (".", None),
        # broken tags
        ("<answer>B", None),
        ("B</answer>", None),
        ("<answer><answer>B</answer></answer>", None),
        ("<answer><answer>B</answer>", None),
        ("<answer>B</answer></answer>", None),
        ("</answer>B<answer>", None),
        ("<think>B", None),
        ("<think>x</think>", None),
        ("<think>x</think> <think>B</think>", None),
        ("<answer><think>x</think>B</answer>", None),
        # prose is never searched
        ("A man opens the door, so the answer is C", None),
        ("Answer: C", None),
        ("The answer is (C).", None),
        ("<answer>The answer is C</answer>", None),
        ("C. it rises", None),
        ("Best option: C", None),
        # not a letter of this question
        ("E", None),
        ("<answer>Z</answer>", None),
        ("b", None),
        ("1", None),
        ("\u0412", None),  # Cyrillic
        ("\uff22", None),  # full width
        ("\u200bB", None),  # zero-width space
        ("(B", None),
        ("B..", None),
        ("**B**", None),
    ],
)
def test_choice(text, wanted):
    assert answers.choice(text, 4) == wanted


def test_choice_is_bounded_by_the_options():
    assert answers.choice("E", 5) == "E" and answers.choice("B", 1) is None
    for options in (0, 27, -1):
        with pytest.raises(ValueError, match="1 to 26"):
            answers.choice("A", options)


def test_tagged_reads_answer_tags_alone():
    assert answers.choice("B", 4, tagged=True) is None
    assert answers.choice("<think>x</think> B", 4, tagged=True) is None
    assert answers.choice(GOOD, 4, tagged=True) == "C"


def test_no_right_letter_by_luck():
    """A reply that names every letter, in any wrapping, never reads as one of them."""
    for spray in ("A B C D", "ABCD", "A/B/C/D", "(A)(B)(C)(D)", "A.B.C.D."):
        tagged = f"<answer>{spray}</answer>"
        for text in (spray, tagged, f"<think>x</think> {tagged}"):
            assert answers.choice(text, 4) is None, text
    each = "".join(f"<answer>{x}</answer>" for x in "ABCD")
    assert answers.choice(each, 4) is None


def test_long_replies_are_read_in_linear_time():
    for piece in ("<answer>", "<think>", "</answer>", "<answer>A</answer>", "(", " ", "1,"):
        text = piece * 100_000
        answers.formatted(text), answers.choice(text, 4), answers.yes_no(text)
        answers.number(text), answers.seconds(text), answers.words(text)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("YES!", "yes"),
        ("No, the ball stays on the floor.", "no"),
        ("<think>yes?</think> <answer>No</answer>", "no"),
        ("Nothing happens", None),
        ("Yesterday", None),
        ("No doubt it does", None),
        ("Yes or no: no", None),
        ("Yes. No.", None),
        ("No, yes.", None),
        ("yes no", None),
        ("<answer>yes</answer><answer>no</answer>", None),
        ("It is not.", None),
        ("", None),
    ],
)
def test_yes_no(text, wanted):
    assert answers.yes_no(text) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("3", 3.0),
        ("There are 3 balls.", 3.0),
        ("-2.5", -2.5),
        ("1,000", 1000.0),
        ("3, I count 3", 3.0),
        ("<answer>4</answer>", 4.0),
        ("<think>2 and 2</think> 4", 4.0),
        ("2 or 3", None),
        ("3/4", None),
        ("50%", None),
        ("0:05", None),
        ("frame3", None),
        ("3rd", None),
        ("1.2.3", None),
        ("three", None),
        ("", None),
    ],
)
def test_number(text, wanted):
    assert answers.number(text) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("1.5", 1.5),
        ("1.5 s", 1.5),
        ("-0.4 seconds.", -0.4),
        ("2sec", 2.0),
        ("0:05", 5.0),
        ("1:02:03.5", 3723.5),
        ("<answer>0:30</answer>", 30.0),
        ("0:75", None),
        ("1:75:00", None),
        ("at 3 s or 4 s", None),
        ("3 minutes", None),
        ("soon", None),
        ("", None),
    ],
)
def test_seconds(text, wanted):
    assert answers.seconds(text) == wanted


def test_words():
    assert answers.words("<answer>The Red  ball.</answer>") == "the red ball"
    assert answers.words("the red\nball") == "the red ball"
    assert answers.words("") is None and answers.words("...") is None
    assert answers.words("<answer>a ball</answer><answer></answer>") is None
