"""YAML as a person would write it: texts of several lines as blocks, nothing by reference."""

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump(value: Any) -> str:
    """The document, its keys in the order that they were given in."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000)
