"""One strict reader of replies, used by rewards and by evaluation alike.

A reader gives the answer that a reply states, or None where it states none or more than one; it
never guesses, and whoever counts must count None as unparsed. The reply is either a bare answer,
`<think>...</think>` and a bare answer, or has the answer in `<answer>...</answer>`. Once an answer
tag is present, only what stands inside answer tags is read.

Left out on purpose: searching prose for letters ("A man opens the door" is not an answer "A"),
lower-case and look-alike letters, substring matches, and judging by another model.
"""

import re
import string

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)

# Digits are 0 to 9 alone: `\d` would take those of other scripts.
_LETTER = re.compile(r"\(?([A-Z])\)?\.?")  # B | B. | (B) | B) ; an unclosed "(B" is refused below
_VERDICT = re.compile(r"(yes|no)(?:[.,:;!](?:\s+(.*))?)?", re.IGNORECASE | re.DOTALL)
_NUMBER = re.compile(
    r"(?<![\w.,:/-])[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?![\w,:/%]|\.[0-9])"
)
_SECONDS = re.compile(
    r"([+-]?[0-9]+(?:\.[0-9]+)?)\s*(?:s|sec|secs|second|seconds)?\.?", re.IGNORECASE
)
_TIME = r"[+-]?[0-9:.]+\s*(?:s|sec|secs|second|seconds)?"
_INTERVAL = re.compile(
    rf"\[?\(?(?:from\s+)?({_TIME})\s*(?:-|–|to|,)\s*({_TIME})\)?\]?\.?", re.IGNORECASE
)
_TRACK = re.compile(r"(?P<name>[^<>;:]+)<id(?P<id>[0-9]+)>(?P<boxes>[^<>]+)</id(?P=id)>")
_COORDINATE = r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*"
_BOX = re.compile(rf"frame([0-9]+):\[{','.join([_COORDINATE] * 4)}\]")
_CLOCK = re.compile(r"(?:([0-9]+):)?([0-9]{1,2}):([0-9]{2}(?:\.[0-9]+)?)\.?")


def formatted(text: str) -> bool:
    """Whether the whole reply is `<think>...</think> <answer>...</answer>`.

    One space, one newline or nothing between the two; both filled; each tag once; nothing before
    or after, not even a space.
    """
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    if not (text.startswith(THINK) and text.endswith(END_ANSWER)):
        return False
    thought, between, answer = _cut(text)
    return bool(thought.strip()) and between in ("", " ", "\n") and bool(answer.strip())


def _cut(text: str) -> tuple[str, str, str]:
    """(thought, between, answer) of a reply that has each tag once; blanks if out of order."""
    thought, _, rest = text.removeprefix(THINK).partition(END_THINK)
    between, _, answer = rest.partition(ANSWER)
    return thought, between, answer.removesuffix(END_ANSWER)


def stated(text: str, *, tagged: bool = False) -> list[str]:
    """The answers a reply states, stripped: what stands in its answer tags, else the bare rest.

    Empty if the tags are broken (unclosed, nested, out of order, an answer inside a thought) or,
    with `tagged`, if there is no answer tag.
    """
    if ANSWER in text or END_ANSWER in text:
        thoughts = [piece.partition(END_THINK)[0] for piece in text.split(THINK)[1:]]
        if any(tag in thought for thought in thoughts for tag in (ANSWER, END_ANSWER)):
            return []
        pieces = text.split(ANSWER)
        if END_ANSWER in pieces[0]:
            return []
        bodies = []
        for piece in pieces[1:]:
            body, closed, after = piece.partition(END_ANSWER)
            if not closed or END_ANSWER in after or any(tag in body for tag in TAGS):
                return []
            bodies.append(body.strip())
        return bodies
    if tagged:
        return []
    rest = text.strip()
    if rest.startswith(THINK):
        _, closed, rest = rest.partition(END_THINK)
        if not closed:
            return []
    rest = rest.strip()
    return [] if not rest or any(tag in rest for tag in TAGS) else [rest]


def letters(options: int) -> str:
    """The letters of so many options: "ABCD" of 4."""
    if not 1 <= options <= 26:
        raise ValueError(
            f"{options} options, but letters name 1 to 26; give the question so many options"
        )
    return string.ascii_uppercase[:options]


def choice(text: str, options: int, *, tagged: bool = False) -> str | None:
    """The one option letter a reply states: B of "B", "B.", "B)", "(B)" or of an answer tag.

    None if it states none, another than the first `options` letters, or two different ones.
    `tagged` reads from answer tags only.
    """
    allowed, found = letters(options), set()
    for body in stated(text, tagged=tagged):
        match = _LETTER.fullmatch(body)
        if match is None or (body.startswith("(") and ")" not in body):
            return None
        found.add(match[1])
    if len(found) != 1:
        return None
    (letter,) = found
    return letter if letter in allowed else None


def words(text: str, *, tagged: bool = False) -> str | None:
    """The one stated answer as plain words: lower case, single spaces, no closing full stop."""
    found = {" ".join(b.casefold().split()).rstrip(".!") for b in stated(text, tagged=tagged)}
    return (found.pop() or None) if len(found) == 1 else None


def read(text: str, options: int, *, tagged: bool = False) -> str | None:
    """What the reply answers: an option letter, or without options its words; None: unparsed."""
    return choice(text, options, tagged=tagged) if options else words(text, tagged=tagged)


def is_right(text: str, answer: str, options: int, *, tagged: bool = False) -> bool:
    """Whether the reply states `answer`: its letter, or without options its words.

    Raises ValueError if `answer` itself is not usable.
    """
    wanted = answer if options else words(answer)
    if wanted is None or (options and answer not in tuple(letters(options))):
        kind = f"one of the letters {letters(options)}" if options else "a short text"
        raise ValueError(f"the answer {answer!r} of a question with {options} options; want {kind}")
    return read(text, options, tagged=tagged) == wanted


def yes_no(text: str, *, tagged: bool = False) -> str | None:
    """ "yes" or "no" if the reply is that word, alone or followed by punctuation and a reason.

    None for "Nothing happens", "Yes or no: no", and where the reason contains the other word.
    """
    found = set()
    for body in stated(text, tagged=tagged):
        match = _VERDICT.fullmatch(body)
        if match is None:
            return None
        verdict = match[1].casefold()
        other = "no" if verdict == "yes" else "yes"
        if re.search(rf"\b{other}\b", match[2] or "", re.IGNORECASE):
            return None
        found.add(verdict)
    return found.pop() if len(found) == 1 else None


def number(text: str, *, tagged: bool = False) -> float | None:
    """The one number the reply states ("3", "There are 3 balls.", "1,000"); None if two differ.

    `tagged` reads it from answer tags, where it must stand alone. Fractions, percentages, clock
    times and digits glued to letters are not read as numbers.
    """
    bodies = stated(text, tagged=tagged)
    if tagged and not all(_NUMBER.fullmatch(body.removesuffix(".")) for body in bodies):
        return None
    found = {float(m[0].replace(",", "")) for body in bodies for m in _NUMBER.finditer(body)}
    return found.pop() if len(found) == 1 else None


def seconds(text: str, *, tagged: bool = False) -> float | None:
    """A time in seconds: "1.5", "1.5 s", "-0.4 seconds", "0:05", "1:02:03.5"; None for the rest."""
    found = {_time(body) for body in stated(text, tagged=tagged)}
    return found.pop() if len(found) == 1 else None


def interval(text: str, *, tagged: bool = False) -> tuple[float, float] | None:
    """A stretch of time in seconds, start first: "1.5 - 3 s", "from 0:01 to 0:03", "[1.5, 3.0]".

    None if it states none, two different ones, or one that ends before it starts.
    """
    found = set()
    for body in stated(text, tagged=tagged):
        match = _INTERVAL.fullmatch(body)
        ends = (_time(match[1]), _time(match[2])) if match else (None, None)
        if None in ends or ends[1] < ends[0]:
            return None
        found.add(ends)
    return found.pop() if len(found) == 1 else None


def _time(text: str) -> float | None:
    plain, clock = _SECONDS.fullmatch(text.strip()), _CLOCK.fullmatch(text.strip())
    if plain:
        return float(plain[1])
    if clock and float(clock[3]) < 60 and (clock[1] is None or int(clock[2]) < 60):
        return 3600 * int(clock[1] or 0) + 60 * int(clock[2]) + float(clock[3])
    return None


Box = tuple[float, float, float, float]


def tracks(text: str) -> dict[str, dict[int, Box]] | None:
    """Trajectories in Video-UTR's text (https://arxiv.org/abs/2502.12081):
    `Name<id1>frame1:[x0,y0,x1,y1];frame2:[...]</id1>`, by name, then by frame.

    None for text that holds anything else but tracks, a name or a frame twice, a box without area,
    or no track at all.
    """
    found: dict[str, dict[int, Box]] = {}
    rest = text.strip()
    while rest:
        match = _TRACK.match(rest)
        if match is None or match["name"].strip() in found:
            return None
        boxes: dict[int, Box] = {}
        for part in match["boxes"].split(";"):
            one = _BOX.fullmatch(part.strip())
            if one is None or int(one[1]) in boxes:
                return None
            x0, y0, x1, y1 = map(float, one.groups()[1:])
            if x1 <= x0 or y1 <= y0:
                return None
            boxes[int(one[1])] = (x0, y0, x1, y1)
        found[match["name"].strip()] = boxes
        rest = rest[match.end() :].lstrip(" \n,;")
    return found or None
