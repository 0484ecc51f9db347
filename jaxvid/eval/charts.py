"""Charts as inline SVG: bars with intervals, and lines over steps.

A chart is drawn for a width of about 340 pixels, so that a phone shows one and a desk three side by
side with letters of one size. Colours are classes of the page (`ink`, `accent`, `mute`, `grid`,
`paper`), which follow light and dark. What a chart shows is also said in its label, in words.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxvid.eval.markup import Markup, el, join

WIDTH = 340.0
Point = tuple[float, float]


class Mark(NamedTuple):
    """A second value in a bar's row: drawn under the bar as a hollow circle or diamond."""

    label: str
    value: float
    diamond: bool = False


class Bar(NamedTuple):
    label: str
    value: float
    low: float
    high: float
    marks: tuple[Mark, ...] = ()


class Line(NamedTuple):
    """`kind` is drawn: "accent" solid and coloured, "ink" dashed, "dots" dotted. So colour is never
    the only way to tell two lines apart."""

    label: str
    points: tuple[Point, ...]
    kind: str = "accent"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def number(value: float) -> str:
    """Three digits are enough to read off a chart."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


# Bars -------------------------------------------------------------------------------------------

ROW, LEFT, RIGHT = 44.0, 62.0, 46.0
LONG = 9  # letters of a label; longer ones are cut in the picture, not in its words


def bars(
    rows: Sequence[Bar], title: str, *, accent: bool = False, chance: float | None = None
) -> Markup:
    """Shares of 1 as horizontal bars, with whiskers, and a dotted line where guessing would be."""
    x = lambda share: LEFT + share * (WIDTH - LEFT - RIGHT)
    bottom = ROW * len(rows) + 6
    parts = []
    for share in (0.0, 0.5, 1.0):
        parts.append(_line("grid", x(share), 0.0, x(share), bottom))
        parts.append(_text("mute small", x(share), bottom + 15, f"{100 * share:.0f} %", "middle"))
    for i, bar in enumerate(rows):
        parts.append(_bar(bar, ROW * (i + 0.5) - 3, x, "accent" if accent else "ink"))
    if chance is not None:
        parts.insert(6, _line("chance", x(chance), 0.0, x(chance), bottom))
    told = "; ".join(_told(bar) for bar in rows)
    return _svg(join(parts), bottom + 22, f"{title}. {told}.")


def _bar(bar: Bar, y: float, x, colour: str) -> Markup:
    end, low, high = x(bar.value), x(bar.low), x(bar.high)
    short = (
        bar.label if len(bar.label) <= LONG else bar.label[: LONG - 1] + "\N{HORIZONTAL ELLIPSIS}"
    )
    box = {"x": x(0.0), "y": y - 8, "width": max(end - x(0.0), 0.5), "height": 16.0, "rx": 2}
    parts = [
        _text("label", 0.0, y + 4.5, short, "start"),
        el("rect", {"class": f"bar {colour}"} | box),
        # The part of a whisker that lies on the bar is drawn light.
        _line("whisker inner", low, y, end, y),
        _line("whisker inner", low, y - 4, low, y + 4),
        _line("whisker", end, y, high, y),
        _line("whisker", high, y - 4, high, y + 4),
        _text("value", WIDTH, y + 4.5, percent(bar.value), "end"),
        *(_mark(x(m.value), y + 17, m.diamond) for m in bar.marks),
    ]
    return join(parts)


def _mark(x: float, y: float, diamond: bool) -> Markup:
    if not diamond:
        return el("circle", {"class": "control", "cx": x, "cy": y, "r": 4.0})
    corners = ((x, y - 4.8), (x + 4.8, y), (x, y + 4.8), (x - 4.8, y))
    points = " ".join(f"{a:.2f},{b:.2f}" for a, b in corners)
    return el("polygon", {"class": "control", "points": points})


def _told(bar: Bar) -> str:
    """A bar in words."""
    marks = "".join(f", {m.label} {percent(m.value)}" for m in bar.marks)
    interval = f"{percent(bar.low)} to {percent(bar.high)}"
    return f"{bar.label} {percent(bar.value)} percent, interval {interval}{marks}"


# Lines ------------------------------------------------------------------------------------------

HEIGHT, TOP, BOTTOM, AXIS, NAMES = 190.0, 10.0, 26.0, 40.0, 92.0
MANY = 80  # points; more are drawn thin, with their running mean on top


def lines(series: Sequence[Line], title: str, *, shares: bool = False, zero: bool = True) -> Markup:
    """Lines over steps, named at their ends. `shares` writes percent; `zero` starts at 0 or below.

    Every line wants at least one point.
    """
    every = [p for line in series for p in line.points]
    xs, ys = [p[0] for p in every], [p[1] for p in every]
    low, high = min([*ys, 0.0]) if zero else min(ys), max(ys)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    first, last = min(xs), max(max(xs), min(xs) + 1)
    plot_right, plot_bottom = WIDTH - NAMES, HEIGHT - BOTTOM
    x = lambda v: AXIS + (v - first) / (last - first) * (plot_right - AXIS)
    y = lambda v: plot_bottom - (v - low) / (high - low) * (plot_bottom - TOP)
    parts = []
    for tick in ticks(low, high):
        parts.append(_line("grid", AXIS, y(tick), plot_right, y(tick)))
        name = f"{100 * tick:g} %" if shares else f"{tick:g}"
        parts.append(_text("mute small", AXIS - 6, y(tick) + 4, name, "end"))
    for tick in ticks(first, last, 3):
        parts.append(_text("mute small", x(tick), HEIGHT - 8, f"{tick:g}", "middle"))
    parts.append(_text("mute small", WIDTH - 36, HEIGHT - 8, "updates", "middle"))
    for line in series:
        parts.append(_path(line, x, y))
    write = (lambda v: f"{percent(v)} %") if shares else number
    drawn = [smooth(line.points) for line in series]
    places = apart([y(d[-1][1]) for d in drawn], 28.0, TOP + 6, plot_bottom - 12)
    told = []
    for line, d, at in zip(series, drawn, places):
        first_value, last_value = write(d[0][1]), write(d[-1][1])
        parts.append(_text(f"name {line.kind}", plot_right + 10, at, line.label, "start"))
        parts.append(_text("mute small", plot_right + 10, at + 13, last_value, "start"))
        told.append(f"{line.label} from {first_value} to {last_value}")
    label = f"{title}, updates {first:g} to {last:g}. {'; '.join(told)}."
    return _svg(join(parts), HEIGHT, label)


def smooth(points: Sequence[Point]) -> tuple[Point, ...]:
    """The running mean of many points over the last twenty-fifth of them; few stay as they are."""
    if len(points) <= MANY:
        return tuple(points)
    span, out = len(points) // 25 + 1, []
    for i, (at, _) in enumerate(points):
        near = [p[1] for p in points[max(0, i + 1 - span) : i + 1]]
        out.append((at, sum(near) / len(near)))
    return tuple(out)


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as can be to those wanted, in their order, at least `gap` apart, from `low`
    and, where they fit, up to `high`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed, floor = [0.0] * len(wanted), low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = max(min(placed[i], ceiling), low)
        ceiling = placed[i] - gap
    return placed


def _path(line: Line, x, y) -> Markup:
    if len(line.points) == 1:
        (at, value), *_ = line.points
        return el("circle", {"class": f"dot {line.kind}", "cx": x(at), "cy": y(value), "r": 3})
    draw = lambda points: " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    parts = [el("polyline", {"class": f"line {line.kind}", "points": draw(smooth(line.points))})]
    if len(line.points) > MANY:
        thin = {"class": f"thin {line.kind}", "points": draw(line.points)}
        parts.insert(0, el("polyline", thin))
    return join(parts)


# SVG --------------------------------------------------------------------------------------------


def _svg(content: Markup, height: float, label: str) -> Markup:
    box = {"viewBox": f"0 0 {WIDTH:g} {height:g}", "role": "img", "aria-label": label}
    return el("svg", box, content)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return el("line", {"class": kind, "x1": x1, "y1": y1, "x2": x2, "y2": y2})


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> Markup:
    return el("text", {"class": kind, "x": x, "y": y, "text-anchor": anchor}, text)
