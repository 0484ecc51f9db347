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
    assert additive(Asked(), text)[:3] == (0.5 * well_formed + 2.0 * right, well_formed, right)
    strict = rewards.Answer(gated=True)(Asked(), text)
    assert strict[:3] == (well_formed + gated, well_formed, gated)


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


def say(answer: str, thought: str = "so it is") -> str:
    return f"<think>{thought}</think> <answer>{answer}</answer>"


def grade(reward, answer, completion):
    return reward.grade(answer, completion)


TRACK = "Ball<id1>frame1:[0,0,2,2];frame2:[2,0,4,2]</id1>"

GRADES = [
    (rewards.YesNo(), "no", say("No."), 1),
    (rewards.YesNo(), "no", say("Yes"), 0),
    (rewards.YesNo(), "no", say("no and yes"), 0),
    (rewards.YesNo(), "no", say("nothing"), 0),
    (rewards.YesNo(), "no", "no", 0),  # from the tag alone
    (rewards.Number(), "3", say("3"), 1),
    (rewards.Number(), "3", say("2, 3 or 4"), 0),
    (rewards.Number(tolerance=0.5), "3", say("3.4"), 1),
    (rewards.Number(tolerance=0.5), "3", say("3.6"), 0),
    (rewards.Seconds(), "0.8", say("0.9 s"), 1),
    (rewards.Seconds(), "0.8", say("1.4 s"), 0.5),
    (rewards.Seconds(), "0.8", say("2.1"), 0),
    (rewards.Seconds(), "0.1", say("-0.1"), 0),  # the other direction
    (rewards.Seconds(), "0", say("-0.1"), 1),
    (rewards.Seconds(), "-0.4 s", say("-0.4 seconds"), 1),
    (rewards.Seconds(), "0.4", say("0.4 or 0.8"), 0),
    (rewards.Interval(), "1 - 3 s", say("1 - 3"), 1),
    (rewards.Interval(), "1 - 3 s", say("from 2 to 4 s"), 1 / 3),
    (rewards.Interval(enough=0.3), "1 - 3 s", say("from 2 to 4 s"), 1),
    (rewards.Interval(), "1 - 3 s", say("0:02 - 0:03"), 0.5),
    (rewards.Interval(), "1 - 3 s", say("[4, 5]"), 0),
    (rewards.Interval(), "1 - 3 s", say("3 - 1"), 0),
    (rewards.Interval(), "1 - 3 s", say("0 - 1000000"), 2e-6),
    (rewards.Interval(), "2 - 2 s", say("2 - 2"), 1),
    (rewards.Tracks(), TRACK, say(TRACK), 1),
    (rewards.Tracks(), TRACK, say("Ball<id7>frame1:[0,0,2,2]</id7>"), 0.5),
    (rewards.Tracks(), TRACK, say("Ball<id1>frame1:[0,0,2,1];frame2:[2,0,4,2]</id1>"), 0.75),
    (rewards.Tracks(), TRACK, say(TRACK + ";Cup<id2>frame1:[0,0,1,1]</id2>"), 2 / 3),
    (rewards.Tracks(), TRACK, say(TRACK + TRACK), 0),  # a name twice
    (rewards.Tracks(), TRACK, say("Ball<id1>frame1:[0,0,0,2]</id1>"), 0),  # no area
    (rewards.Tracks(), TRACK, say("It moves. " + TRACK.replace("Ball", "")), 0),
    (rewards.Tracks(), TRACK, say("Ball<id1>frame1:[0,0,2,2];frame1:[2,0,4,2]</id1>"), 0),
    (rewards.Open(), "The red ball | a ball", say("A ball."), 1),
    (rewards.Open(), "The red ball | a ball", say("ball"), 0),
    (rewards.Open(), "The red ball | a ball", say("the red ball | a ball"), 0),
    (rewards.Open(match="words"), "the red ball", say("the blue ball"), 2 / 3),
    (rewards.Open(match="words", enough=0.6), "the red ball", say("the blue ball"), 1),
    (rewards.Open(match="words"), "the red ball", say("ball " * 97 + "red the"), 2 * 3 / 102),
    (rewards.Open(match="words"), "the red ball", say("a cube"), 0),
]


@pytest.mark.parametrize("reward, answer, reply, wanted", GRADES)
def test_grades_by_hand(reward, answer, reply, wanted):
    np.testing.assert_allclose(grade(reward, answer, reply), wanted, rtol=1e-6)
    paid = reward(Asked(options=(), answer=answer), reply)
    formed = float(answers.formatted(reply))
    assert paid[:3] == pytest.approx((formed + wanted, formed, float(wanted == 1)))


EACH = [
    (rewards.YesNo(), "yes"),
    (rewards.Number(), "3"),
    (rewards.Seconds(), "0.8"),
    (rewards.Interval(), "1 - 3 s"),
    (rewards.Tracks(), TRACK),
]


@pytest.mark.parametrize("reward, right", [*EACH, (rewards.Open(), "the red shape")])
def test_tricks_earn_no_grade(reward, right):
    """Nothing, thoughts, several answers, look-alikes, quotes of the question, endless replies."""
    asked = f"Answer with {right} or not?"
    tricks = (
        "",
        right,
        f"<think>{right}</think>",
        f"<think><answer>{right}</answer></think>",
        say("", right),
        say(f"{right} | 9 s"),
        say(right) + say("7 - 9 s"),
        say(asked),
        say(f"<answer>{right}</answer>"),
        say(right.replace("3", "３").replace("e", "е").replace("0", "о").replace("f", "ｆ")),
        f"<answer>{right}",
        say("x" * 100_000),
        say((right + " ") * 3000),
    )
    assert grade(reward, right, say(right)) == 1
    for trick in tricks:
        assert grade(reward, right, trick) == 0, trick[:80]


@pytest.mark.parametrize("reward, right", EACH)
def test_an_answer_that_a_reward_cannot_read_is_an_error(reward, right):
    with pytest.raises(ValueError, match="the example's answer is 'blue'; this reward wants"):
        reward(Asked(options=(), answer="blue"), say(right))
    gated = dataclasses.replace(reward, gated=True, format_weight=0.5)
    assert gated(Asked(options=(), answer=right), f"<answer>{right}</answer>").total == 0
    assert gated(Asked(options=(), answer=right), say(right)).total == 1.5
    with pytest.raises(ValueError, match="0 <= tolerance < reach"):
        rewards.Seconds(tolerance=1.0)


@pytest.mark.parametrize(
    "answer, options, kind",
    [
        ("B", ("falls", "rises"), rewards.Answer),
        ("yes", (), rewards.YesNo),
        ("-3", (), rewards.Number),
        ("1,200", (), rewards.Number),
        ("0.5 s", (), rewards.Seconds),
        ("0:05", (), rewards.Seconds),
        ("1 - 2.5 s", (), rewards.Interval),
        (TRACK, (), rewards.Tracks),
        ("3 balls", (), rewards.Open),
        ("nothing happens", (), rewards.Open),
    ],
)
def test_by_answer_takes_the_fitting_reward(answer, options, kind):
    reward = rewards.ByAnswer(format_weight=0.5, gated=True, seconds_tolerance=0.3)
    asked = Asked(options=options, answer=answer)
    assert type(reward.fitting(asked)) is kind
    assert reward(asked, say(answer))[:3] == (1.5, 1.0, 1.0)
    assert reward(asked, answer).total == 0
    if kind is rewards.Seconds:
        assert reward.fitting(asked).tolerance == 0.3


def paid_by(tmp_path, body, **settings):
    (tmp_path / "mine.py").write_text(f"def pay(record, completion):\n    return {body}\n")
    rewards.loaded.cache_clear()
    reward = rewards.Function(path=f"{tmp_path / 'mine.py'}:pay", **settings)
    return reward(rewards.Case("r7", "q", "What?", (), "blue", 1, {"extra": 2}), say("blue"))


def test_a_function_of_your_own(tmp_path):
    plain = paid_by(tmp_path, "len(record.id) + record.side + record.meta['extra']")
    assert plain.total == 5 and plain.format == 1 and np.isnan(plain.correct)
    with pytest.raises(ValueError, match="with 'correct', 0 or 1"):
        rewards.judged(plain)
    named = paid_by(
        tmp_path,
        "{'correct': record.answer in completion, 'short': 0.5, 'odd': -1}",
        weights=(("short", 4.0),),
    )
    assert named[:3] == (2.0, 1.0, 1.0) and named.parts == {"short": 0.5, "odd": -1.0}
    assert rewards.judged(named) is named


@pytest.mark.parametrize(
    "body, words",
    [
        ("float('nan')", "its value = nan"),
        ("'high'", "its value = 'high'"),
        ("{}", "its value = {}"),
        ("{'a': None}", "a = None"),
        ("{'correct': 0.5}", "correct = 0.5; it is 0 or 1"),
    ],
)
def test_what_a_function_may_not_return(tmp_path, body, words):
    with pytest.raises(ValueError, match=words):
        paid_by(tmp_path, body)


def test_a_function_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="weights name \\['b'\\]; .* returned \\['a'\\]"):
        paid_by(tmp_path, "{'a': 1}", weights=(("b", 1.0),))
    for path, words in (
        ("nowhere", "give package.module:function or file.py:function"),
        ("no_such_package.rewards:pay", "No module named 'no_such_package'"),
        (f"{tmp_path}/none.py:pay", "No such file"),
        (f"{tmp_path / 'mine.py'}:play", "no function 'play' there; it has \\['pay'\\]"),
    ):
        with pytest.raises(ValueError, match=words):
            rewards.loaded(path)
