"""The HTML of a report, section by section.

No script: clips play and pause by CSS, replies unfold as `details`. Every picture is in the page.
"""

import base64
import io
import math
import string
from collections.abc import Callable, Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxvid.eval.charts import Bar, Line, Mark, bars, lines, percent
from jaxvid.eval.findings import (
    ABOUT,
    CONTROLS,
    SIDES,
    Gain,
    Item,
    Reply,
    Report,
    Stage,
    evidence,
    headline,
    mended,
    name,
    option,
    points,
)
from jaxvid.eval.markup import Markup, el, join
from jaxvid.eval.metrics import Interval, PairMetrics
from jaxvid.eval.sampled import cards


def page(report: Report) -> str:
    """The whole file."""
    evaluated = [s for s in report.stages if s.results is not None]
    sections = [
        _header(report, evaluated),
        _results(report, evaluated),
        _categories(evaluated),
        _training(report.stages),
        _duality(report.stages),
        *(_sampled(stage) for stage in report.stages if stage.sampled),
        _gallery(report),
        _settings(report),
    ]
    template = resources.files("jaxvid.eval").joinpath("report.html").read_text(encoding="utf-8")
    return string.Template(template).substitute(title=join([report.title]), body=join(sections))


def _header(report: Report, evaluated: list[Stage]) -> Markup:
    parts = [
        el("p", {"class": "kicker"}, report.title),
        el("h1", {}, _unbroken(headline(evaluated))),
    ]
    beside = evidence(report, evaluated)
    if beside:
        parts.append(el("p", {"class": "lede"}, _unbroken(beside)))
    item = mended(report, evaluated)
    if item is not None:
        parts.append(_hero(item, evaluated))
    return el("header", {}, *parts)


def _unbroken(text: str) -> str:
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _hero(item: Item, evaluated: list[Stage]) -> Markup:
    clips = []
    for side in (0, 1):
        shown = film(item.frames[side], _alt(item, side), strip=False)
        told = option(item, item.answers[side]).removeprefix(item.answers[side] + " ")
        label = el("p", {"class": f"side side{side}"}, SIDES[side])
        marks = [_short(item, s.name, side) for s in evaluated if s.name in item.replies]
        text = el("div", {}, label, el("p", {"class": "truth"}, told), *marks)
        clips.append(el("div", {"class": "clip"}, shown, text))
    box = el("input", {"type": "checkbox", "id": "pause"})
    pause = el("label", {"class": "pause"}, box, " pause the clips")
    caption = el(
        "figcaption",
        {},
        el("span", {"class": "question"}, item.question),
        " One pair: the same scene with two endings, asked the same question. ",
        pause,
    )
    return el("figure", {"class": "hero"}, caption, el("div", {"class": "clips"}, *clips))


def _short(item: Item, stage: str, side: int) -> Markup:
    return el("p", {"class": "reply"}, name(stage) + " ", mark(item.replies[stage][side]))


# Results ----------------------------------------------------------------------------------------


def _results(report: Report, evaluated: list[Stage]) -> Markup:
    if not evaluated:
        return join([])
    panels = []
    measures = (
        ("Real video", lambda m: m.real, 0),
        ("Counterfactual video", lambda m: m.counterfactual, 0),
        ("Both videos of a pair", lambda m: m.both, 1),
    )
    for title, of, which in measures:
        rows = [_bar(stage, of) for stage in evaluated]
        guess = None if report.chance is None else report.chance[which]
        drawn = bars(rows, title, accent=which == 1, chance=guess)
        panels.append(_panel(title, drawn))
    key = [_key("circle", "grey frames"), _key("diamond", "shuffled frames")]
    used = {c for s in evaluated for c in s.controls}
    key = [k for k, c in zip(key, ("blank", "shuffled")) if c in used]
    if report.chance is not None:
        key.append(_key("guess", "guessing"))
    known = [s.name for s in evaluated if s.name in ABOUT]
    about = [el("span", {}, el("b", {}, name(k)), " " + ABOUT[k]) for k in known]
    return _section(
        "Right answers",
        "Percent of questions answered right. Whiskers are 95 % intervals over pairs; they do not "
        "speak of other training seeds.",
        el("div", {"class": "panels"}, *panels),
        el("p", {"class": "key"}, *key),
        el("p", {"class": "key"}, *about),
        _scores(evaluated),
        _gains(report.gains),
    )


def _bar(stage: Stage, of: Callable[[PairMetrics], Interval]) -> Bar:
    marks = tuple(
        Mark(CONTROLS[c], of(stage.controls[c].overall).value, diamond=c == "shuffled")
        for c in ("blank", "shuffled")
        if c in stage.controls
    )
    return Bar(name(stage.name), *of(stage.results.overall), marks)


def _key(kind: str, label: str) -> Markup:
    return el("span", {}, el("i", {"class": kind, "aria-hidden": "true"}), " " + label)


def _scores(evaluated: list[Stage]) -> Markup:
    """Stage x condition against every measure."""
    heads = ("Model", "Real", "Counter\N{SOFT HYPHEN}factual", "Both", "Un\N{SOFT HYPHEN}parsed")
    heads += ("Same answer",)
    bodies = []
    for stage in evaluated:
        shown = {"none": stage.results, **stage.controls}
        rows = []
        for control, found in shown.items():
            m = found.overall
            label = name(stage.name) if control == "none" else CONTROLS.get(control, control)
            kind = {"class": "model" if control == "none" else "control"}
            cells = [el("th", {"scope": "row"} | kind, label)]
            cells += [_cell(x) for x in (m.real, m.counterfactual, m.both)]
            cells += [_plain_cell(percent(x)) for x in (m.unparsed, m.same)]
            rows.append(el("tr", kind, *cells))
        bodies.append(el("tbody", {}, *rows))
    n = evaluated[0].results.overall.pairs
    caption = (
        f"All numbers in percent, {n} pairs. Unparsed: replies without a readable answer, counted "
        "as wrong. Same answer: pairs whose two videos got one answer, so one of them is wrong."
    )
    return _table(caption, heads, bodies)


def _gains(gains: Sequence[Gain]) -> Markup:
    if not gains:
        return join([])
    rows = []
    for g in gains:
        label = f"{name(g.after)} \N{MINUS SIGN} {name(g.before)}"
        cells = [_cell(x, points) for x in (g.real, g.counterfactual, g.both)]
        rows.append(el("tr", {}, el("th", {"scope": "row"}, label), *cells))
    heads = ("Difference", "Real", "Counter\N{SOFT HYPHEN}factual", "Both")
    caption = "Differences on the same pairs, in points. An interval that holds 0 shows nothing."
    return _table(caption, heads, [el("tbody", {}, *rows)])


def _cell(x: Interval, write: Callable[[float], str] = percent) -> Markup:
    # A dash between signed numbers would read as a sign.
    between = "\N{EN DASH}" if write is percent else " to "
    return el("td", {}, write(x.value), el("small", {}, write(x.low) + between + write(x.high)))


def _plain_cell(text: str) -> Markup:
    return el("td", {}, text)


def _table(caption: str, heads: Sequence[str], bodies: Sequence[Markup]) -> Markup:
    head = el("thead", {}, el("tr", {}, *(el("th", {"scope": "col"}, h) for h in heads)))
    table = el("table", {}, el("caption", {}, caption), head, *bodies)
    frame = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": caption}
    return el("div", frame, table)


def _categories(evaluated: list[Stage]) -> Markup:
    if not any(s.results.categories for s in evaluated):
        return join([])
    both = _breakdown(evaluated, "Both videos right", lambda m: m.both)
    rest = [
        _breakdown(evaluated, title, of)
        for title, of in (
            ("Real video right", lambda m: m.real),
            ("Counterfactual video right", lambda m: m.counterfactual),
        )
    ]
    summary = el("summary", {}, "Real and counterfactual videos apart")
    return _section(
        "By kind of edit",
        "Percent of pairs with both answers right. Held-out combinations are colours, shapes and "
        "outcomes that no training clip put together.",
        both,
        el("details", {}, summary, *rest),
    )


def _breakdown(evaluated: list[Stage], title: str, of: Callable[[PairMetrics], Interval]) -> Markup:
    """Categories and groups against stages."""
    bodies = []
    for pick in (lambda e: e.categories, lambda e: e.groups, lambda e: {"All pairs": e.overall}):
        labels = list(dict.fromkeys(k for s in evaluated for k in pick(s.results)))
        rows = []
        for label in labels:
            found = [pick(s.results).get(label) for s in evaluated]
            n = next(m.pairs for m in found if m is not None)
            head = el("th", {"scope": "row"}, label, el("small", {}, f"{n} pairs"))
            cells = [_plain_cell("\N{EN DASH}") if m is None else _cell(of(m)) for m in found]
            rows.append(el("tr", {}, head, *cells))
        bodies.append(el("tbody", {}, *rows) if rows else join([]))
    return _table(title, ("Edit", *(name(s.name) for s in evaluated)), bodies)


# Training ---------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """A chart of a stage's log: (metric, label, kind) of each line."""

    title: str
    note: str
    series: tuple[tuple[str, str, str], ...]
    shares: bool = False


TRAINING = (
    Panel("Loss", "", (("loss", "training", "accent"), ("eval_loss", "validation", "ink"))),
    Panel(
        "Preferred reply ahead",
        "Percent of preferences on which the model leans the right way.",
        (
            ("rewards/accuracies", "training", "accent"),
            ("eval_rewards/accuracies", "validation", "ink"),
        ),
        True,
    ),
    Panel(
        "Validation pairs right",
        "Greedy answers, percent.",
        (
            ("eval_both", "both", "accent"),
            ("eval_real", "real", "ink"),
            ("eval_counterfactual", "counterfact.", "dots"),
        ),
        True,
    ),
)
DUALITY = (
    Panel(
        "Signal S",
        "Sum of absolute advantages of a group, before balancing.",
        (
            ("pair/S_real", "real", "ink"),
            ("pair/S_cf", "counterfact.", "accent"),
        ),
    ),
    Panel(
        "Scale \N{GREEK SMALL LETTER ALPHA}",
        "What each side's advantages are multiplied by, so that both weigh the same.",
        (
            ("pair/alpha_real", "real", "ink"),
            ("pair/alpha_cf", "counterfact.", "accent"),
        ),
    ),
    Panel(
        "Dead groups",
        "Percent of groups, of the pairs kept, whose replies all earned the same.",
        (
            ("pair/dead_real", "real", "ink"),
            ("pair/dead_cf", "counterfact.", "accent"),
        ),
        True,
    ),
    Panel(
        "Sampled replies that are right",
        "Before any pair is filtered out, percent.",
        (
            ("rewards/correct/real", "real", "ink"),
            ("rewards/correct/counterfactual", "counterfact.", "accent"),
        ),
        True,
    ),
    Panel("Reward", "Mean over all sampled replies.", (("reward", "reward", "accent"),)),
    Panel(
        "Pairs kept by the filter",
        "Percent of pairs with signal, and of groups whose replies all earned the same.",
        (
            ("rollout/kept", "kept", "accent"),
            ("frac_reward_zero_std", "no spread", "ink"),
        ),
        True,
    ),
)


def _training(stages: Sequence[Stage]) -> Markup:
    panels = [
        _curve(s, panel, f"{name(s.name)}: {panel.title.lower()}")
        for s in stages
        for panel in TRAINING
    ]
    if not any(panels):
        return join([])
    note = "As logged; of long runs the running mean, with the log behind it."
    return _section("How it learned", note, el("div", {"class": "panels"}, *panels))


def _duality(stages: Sequence[Stage]) -> Markup:
    panels = [_curve(s, panel, panel.title) for s in stages for panel in DUALITY]
    if not any(panels):
        return join([])
    return _section(
        "Two sides, one weight",
        "Each question is sampled on the real and on the counterfactual video. The side whose "
        "replies differ more would dominate the gradient; the duality norm makes both count alike.",
        el("div", {"class": "panels"}, *panels),
    )


def _curve(stage: Stage, panel: Panel, title: str) -> Markup:
    """The panel's chart, or nothing if the log has none of its metrics."""
    series = []
    for metric, label, kind in panel.series:
        points = tuple(
            (float(row["step"]), float(row[metric]))
            for row in stage.curve
            if row.get(metric) is not None and math.isfinite(row[metric])
        )
        if points:
            series.append(Line(label, points, kind))
    if not series:
        return join([])
    return _panel(title, lines(series, title, shares=panel.shares), panel.note)


def _panel(title: str, chart: Markup, note: str = "") -> Markup:
    caption = el("figcaption", {}, el("h3", {}, title), el("p", {}, note) if note else "")
    return el("figure", {"class": "panel"}, caption, chart)


def _sampled(stage: Stage) -> Markup:
    note = (
        "Replies of a training update, in their groups. Drawn by the names of the pairs, not by "
        "result."
    )
    return _section(f"What {name(stage.name)} sampled", note, *cards(stage.sampled))


# Gallery ----------------------------------------------------------------------------------------


def _gallery(report: Report) -> Markup:
    if not report.gallery:
        return join([])
    cards = [_card(item, [s.name for s in report.stages]) for item in report.gallery]
    note = "Drawn from the test pairs by their names, in turn from every category; not by result."
    pause = el("label", {"for": "pause", "class": "pause"}, "Pause or play the clips")
    return _section("Pairs", note, pause, *cards)


def _card(item: Item, stages: Sequence[str]) -> Markup:
    tags = (item.category, item.edit, f"{item.level} edit", f"premise: {item.premise}")
    letters = string.ascii_uppercase
    options = [
        el("li", {}, el("b", {}, letter), f" {text}") for letter, text in zip(letters, item.options)
    ]
    films = [
        el(
            "div",
            {"class": "film-row"},
            el("p", {"class": f"side side{side}"}, SIDES[side]),
            film(item.frames[side], _alt(item, side)),
        )
        for side in (0, 1)
    ]
    return el(
        "article",
        {"class": "card"},
        el("p", {"class": "tags"}, " \N{MIDDLE DOT} ".join(t.replace("_", " ") for t in tags)),
        el("h3", {}, item.question),
        el("ol", {"class": "options"}, *options),
        *films,
        _answers(item, [s for s in stages if s in item.replies]),
    )


def _answers(item: Item, stages: Sequence[str]) -> Markup:
    truth = [el("td", {}, option(item, a)) for a in item.answers]
    rows = [el("tr", {"class": "truth"}, el("th", {"scope": "row"}, "Truth"), *truth)]
    words = []
    for stage in stages:
        cells = [
            el(
                "td",
                {},
                mark(r),
                " " + ("no readable answer" if r.read is None else option(item, r.read)),
            )
            for r in item.replies[stage]
        ]
        rows.append(el("tr", {}, el("th", {"scope": "row"}, name(stage)), *cells))
        for side, reply in zip(SIDES, item.replies[stage]):
            words.append(el("dt", {}, f"{name(stage)}, {side.lower()}"))
            words.append(el("dd", {}, reply.text))
    heads = [el("th", {"scope": "col"}, h) for h in ("Answer", *SIDES)]
    table = el("table", {}, el("thead", {}, el("tr", {}, *heads)), el("tbody", {}, *rows))
    if not words:
        return table
    unfold = el("details", {}, el("summary", {}, "Word for word"), el("dl", {}, *words))
    return join([table, unfold])


def mark(reply: Reply) -> Markup:
    """Right or wrong by shape, and in words for who cannot see it."""
    kind, sign = ("right", "\N{CHECK MARK}") if reply.correct else ("wrong", "\N{BALLOT X}")
    sign = el("span", {"aria-hidden": "true"}, sign)
    return el("span", {"class": f"mark {kind}"}, sign, el("span", {"class": "said"}, kind))


def _alt(item: Item, side: int) -> str:
    n = len(item.frames[side])
    return f"{n} frames of the {SIDES[side].lower()} video: {option(item, item.answers[side])}"


def film(frames: UInt8[np.ndarray, "F h w 3"], label: str, *, strip: bool = True) -> Markup:
    """A clip that plays, and its frames side by side; one image serves both."""
    n, h, w, _ = frames.shape
    style = f"--f:url({data_uri(frames)});--n:{n};--r:{w}/{h}"
    timing = f"animation-timing-function:steps({n},jump-none)" if n > 1 else "animation:none"
    seen = {"role": "img", "aria-label": label}
    player = {"class": "player", "style": timing}
    if not strip:
        return el("div", {"class": "film", "style": style}, el("div", player | seen))
    stills = [el("i", {"style": f"--i:{i}"}) for i in range(n)]
    return el(
        "div",
        {"class": "film", "style": style},
        el("div", player | {"aria-hidden": "true"}),
        el("div", {"class": "strip"} | seen, *stills),
    )


def data_uri(frames: UInt8[np.ndarray, "F h w 3"]) -> str:
    """The frames side by side as one JPEG."""
    file = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(
        file, "JPEG", quality=90, subsampling=0
    )
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


# Settings ---------------------------------------------------------------------------------------


def _settings(report: Report) -> Markup:
    rows = [el("div", {}, el("dt", {}, k), el("dd", {}, v)) for k, v in report.settings.items()]
    parts = [el("dl", {"class": "settings"}, *rows)] if rows else []
    if report.missing:
        parts.append(el("p", {"class": "missing"}, f"Not there: {'; '.join(report.missing)}."))
    return _section("Settings", "", *parts) if parts else join([])


def _section(title: str, note: str, *content: Markup) -> Markup:
    lead = el("p", {"class": "note"}, note) if note else join([])
    return el("section", {}, el("h2", {}, title), lead, *content)
