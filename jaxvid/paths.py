"""Weights by the names of their paths, `decoder.blocks.attention.q.w`, and patterns over them.

A pattern is a regular expression that fits one part of a path or several in a row, each as a whole:
`tower`, `attention.(q|v)`, `blocks.mlp`. It may stand anywhere in the path.
"""

import re
from collections.abc import Iterable, Sequence

from flax import nnx


def names(params: nnx.State) -> list[str]:
    """The name of every weight of a parameter tree, in order."""
    return [join(path) for path, _ in nnx.to_flat_state(params)]


def join(path: Iterable[str | int]) -> str:
    return ".".join(map(str, path))


def fits(pattern: str, name: str) -> bool:
    """Whether the pattern fits a run of whole parts of the name."""
    return re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name) is not None


def check(patterns: Sequence[str], there: Sequence[str], setting: str) -> None:
    """ValueError for a pattern that is no regular expression or fits none of `there`."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{setting}: {pattern!r} is no regular expression: {error}") from None
        if not any(fits(pattern, name) for name in there):
            raise ValueError(
                f"{setting}: {pattern!r} fits nothing; a pattern fits whole parts of a path, such "
                f"as 'decoder' or 'attention.(q|v)'. There are: {', '.join(there)}"
            )


def chosen(patterns: Sequence[str], there: Sequence[str], setting: str) -> set[str]:
    """Those of `there` that one of the patterns fits. Raises as `check` does."""
    check(patterns, there, setting)
    return {name for name in there if any(fits(p, name) for p in patterns)}
