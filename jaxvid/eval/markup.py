"""HTML and SVG elements from Python, escaped by construction.

A child that is not `Markup` is text and gets escaped, and so does every attribute; no caller can
forget to.
"""

import html
from collections.abc import Iterable, Mapping

VOID = ("br", "hr", "img", "input", "meta")  # have no end tag


class Markup(str):
    """Text that is markup already. Made by `el` and `join`; wrap nothing else in it."""

    __slots__ = ()


def el(name: str, attributes: Mapping[str, str | int | float], *children: str) -> Markup:
    """<name attributes>children</name>. Numbers in attributes keep two decimals."""
    given = "".join(f' {k}="{html.escape(_plain(v))}"' for k, v in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    """Children one after another, text escaped."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(c) for c in children))


def _plain(value: str | int | float) -> str:
    return f"{round(value, 2):g}" if isinstance(value, float) else str(value)
