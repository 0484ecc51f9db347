"""What preflight found, as text for a terminal and as the table of docs/preflight.md."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

GIB = 2**30
MARKS = ("<!-- made by jaxvid-launch preflight all -->", "<!-- end -->")
KINDS = ("parameters", "optimizer", "gradients", "activations", "cache", "reference", "batch")
COLUMNS = (
    "recipe",
    "slice",
    "mesh",
    "program",
    "GiB a chip",
    "parameters",
    "optimizer",
    "gradients",
    "activations",
    "cache",
    "PFLOPs",
    "bound by",
    "seconds",
    "MFU, %",
)


def report(found: dict[str, Any]) -> str:
    """All of what `jaxvid-launch preflight` prints of a recipe."""
    lines = [
        f"{found['recipe']} on {found['topology']} ({found['chips']} chips: {_mesh(found)})",
        f"model {found['model']}; {found['rows']} rows of {found['tokens']:,} tokens at a time",
    ]
    for weight in found["programs"]:
        lines += ["", *_program(weight)]
    lines += ["", "the largest arrays"]
    head = ("array", "shape", "type", "split", "GiB", "GiB a chip")
    rows = [
        (
            a["name"],
            "x".join(map(str, a["shape"])),
            a["dtype"],
            a["split"],
            f"{a['bytes'] / GIB:.2f}",
            f"{a['chip'] / GIB:.3f}",
        )
        for a in found["arrays"]
    ]
    lines += _columns([head, *rows])
    for what, (best, tried) in found["search"].items():
        told = ", ".join(f"{n}: {x / GIB:.2f} GiB" for n, x in tried)
        lines += ["", f"largest {what} that fits: {best or 'none'} (tried {told})"]
    return "\n".join(lines)


def _program(w: dict[str, Any]) -> list[str]:
    fits = "fits" if w["fits"] else "DOES NOT FIT"
    over = f"{w['need'] / GIB:.2f} of {w['limit'] / GIB:.2f} GiB a chip"
    lines = [f"{w['program']}: {fits}, {over}"]
    if w["told"]:
        lines.append(f"  {w['told']}")
    if not w["fits"]:
        lines += ["  turn one of these:", *(f"    {knob}" for knob in w["knobs"])]
    order = sorted(w["kinds"].items(), key=lambda item: -item[1])
    lines += [f"  {name:<12}{x / GIB:9.2f} GiB" for name, x in order if x > 2**20]
    if not w["seconds"]:
        return lines
    lines.append(
        f"  {w['products'] / 1e12:,.1f} TFLOPs a chip ({w['useful'] / w['products']:.0%} of them "
        f"not made twice), {w['moved'] / 1e9:,.1f} GB from and to HBM"
    )
    lines.append(
        f"  {w['least']:.3g} s at best, bound by {w['bound']} (MFU {w['mfu_best']:.0%}); "
        f"{w['most']:.3g} s with nothing overlapped (MFU {w['mfu_worst']:.0%})"
    )
    lines.append("  " + ", ".join(f"{name} {s:.3g} s" for name, s in w["seconds"].items()))
    if not w["collectives"]:
        return lines
    rows = [
        (m["kind"], f"{m['times']:,.0f}", str(m["group"]), _gb(m["ici"]), _gb(m["dcn"]))
        for m in w["collectives"]
    ]
    head = ("collective", "times", "chips", "GB over ICI", "GB over DCN")
    return lines + ["  " + line for line in _columns([head, *rows])]


def _gb(x: float) -> str:
    return f"{x / 1e9:,.3f}" if x else "-"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(x.ljust(n) for x, n in zip(row, wide)).rstrip() for row in rows]


def table(folder: pathlib.Path) -> str:
    """The table of all results in a folder, in Markdown."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = [_row(COLUMNS), _row("---" for _ in COLUMNS)]
    for one in found:
        lines += [_row(_cells(one, w)) for w in one["programs"]]
    return "\n".join(lines) + "\n"


def in_page(page: str, lines: str) -> str:
    """The page with these lines between its two marks. Raises ValueError without them."""
    before, mark, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise ValueError(f"the page has no {MARKS[0]} ... {MARKS[1]} for the table to stand in")
    return f"{before}{mark}\n{lines}{end}{after}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mesh(found: dict[str, Any]) -> str:
    """The axes over which something is split."""
    return " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items() if n > 1) or "one chip"


def _cells(found: dict[str, Any], w: dict[str, Any]) -> list[str]:
    kinds = w["kinds"]
    gib = lambda name: f"{kinds[name] / GIB:.2f}" if kinds.get(name) else ""
    used = f"{w['need'] / GIB:.2f} of {w['limit'] / GIB:.2f}{'' if w['fits'] else ', too much'}"
    timed = w["seconds"]
    return [
        f"`{found['recipe']}`",
        found["topology"],
        _mesh(found),
        w["program"],
        used,
        *(gib(name) for name in ("parameters", "optimizer", "gradients", "activations", "cache")),
        f"{w['products'] * found['chips'] / 1e15:.3g}" if timed else "",
        w["bound"] if timed else "",
        f"{w['least']:.3g} to {w['most']:.3g}" if timed else "",
        f"{100 * w['mfu_worst']:.0f} to {100 * w['mfu_best']:.0f}" if timed else "",
    ]
