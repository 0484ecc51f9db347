"""What a model family gives to the rest: its config, its module, its places in the files.

A family is one file that ends in `FAMILY = Family(...)`; `hf.FAMILIES` lists them. Its `Config` is
a frozen dataclass with

    text, vision         the decoder's and the vision tower's configs (audio, where there is one)
    compute              layers.Compute
    from_hf(dict)        reads a config.json; every attribute is read or named as ignored, and all
                         that is wrong is in one ValueError (`Reader` helps)
    to_hf() -> dict      the config.json that transformers reads
    prompting            what data preparation needs of the family (`prompting.Prompting`)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

Path = tuple[str, ...]  # of a weight in the parameters


class Place(NamedTuple):
    """Where a weight stands in the files. `{}` is the layer; `inputs` of its leading dimensions
    are contracted (0: a vector or a table, stored as it is); `part` of `parts` equal pieces of the
    stored tensor's first axis; `stored`, where not empty, the stored tensor's other axes."""

    name: str
    inputs: int = 0
    part: int = 0
    parts: int = 1
    stored: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    name: str  # as the command line calls it
    model_types: tuple[str, ...]  # of the config.json files it reads
    config: Any  # the Config class
    model: Callable[..., nnx.Module]  # (cfg, *, rngs)
    places: Callable[[Any], dict[Path, Place]]  # for every weight of a config
    hub_name: Callable[[str], str]  # a tensor's name as `save` writes it, from any spelling
    ignored: tuple[str, ...] = ()  # patterns of tensors that files may hold and nothing here needs
    special: Mapping[str, str]  # field of the config -> the special token whose id it is
    tiny: Callable[[int, dict[str, int]], Any]  # (vocab, ids of `special`) -> Config, laptop size
    preprocessor: Callable[[Any], dict[str, Any]]  # cfg -> preprocessor_config.json
    # A tensor's name as transformers' module has it, from hub_name's; without it no PEFT adapter.
    module_name: Callable[[str], str] | None = None


class Reader:
    """Takes attributes out of one section of a config and remembers what was wrong."""

    def __init__(self, section: Mapping[str, Any], where: str, problems: list[str]):
        self.left, self.where, self.problems = dict(section), where, problems

    def take(self, name: str, *default):
        if name in self.left:
            return self.left.pop(name)
        if not default:
            self.problems.append(f"{self.where}{name} is missing")
            return 0
        return default[0]

    def must(self, name: str, *wanted) -> None:
        """The attribute, where it is there, is one of `wanted`."""
        if (got := self.take(name, wanted[0])) not in wanted:
            known = " or ".join(map(repr, wanted))
            self.problems.append(f"{self.where}{name} is {got!r}; only {known} is supported")

    def done(self, ignored: Sequence[str]) -> None:
        """What is left and not in `ignored` is a problem."""
        for name in ignored:
            self.left.pop(name, None)
        for name, value in self.left.items():
            self.problems.append(f"{self.where}{name}={value!r} is not known")


def refuse(problems: list[str]) -> None:
    """Raise one ValueError with all problems of a config, if there are any."""
    if problems:
        raise ValueError("this config cannot be imported:\n  " + "\n  ".join(problems))


class Places(dict[Path, Place]):
    """Path in the parameters -> place in the files, filled a layer at a time."""

    def linear(
        self, path: Path, name: str, *, bias: bool, inputs: int = 1, part: int = 0, parts: int = 1
    ) -> None:
        self[*path, "w"] = Place(f"{name}.weight", inputs, part, parts)
        if bias:
            self[*path, "b"] = Place(f"{name}.bias", 0, part, parts)

    def norm(self, path: Path, name: str, *, bias: bool = False) -> None:
        self[*path, "scale"] = Place(f"{name}.weight")
        if bias:
            self[*path, "bias"] = Place(f"{name}.bias")


def decoder_places(out: Places, model: str, *, qkv_bias: bool, qk_norm: bool = False) -> None:
    """Those of `decoder.Decoder` at ("decoder",), whose files call it `model` ("model.")."""
    out["decoder", "table"] = Place(f"{model}embed_tokens.weight")
    out.norm(("decoder", "norm"), f"{model}norm")
    at, block = ("decoder", "blocks"), f"{model}layers.{{}}"
    out.norm((*at, "attention_norm"), f"{block}.input_layernorm")
    out.norm((*at, "mlp_norm"), f"{block}.post_attention_layernorm")
    for which in ("gate", "up", "down"):
        out.linear((*at, "mlp", which), f"{block}.mlp.{which}_proj", bias=False)
    for which in "qkv":
        out.linear((*at, "attention", which), f"{block}.self_attn.{which}_proj", bias=qkv_bias)
    out.linear((*at, "attention", "out"), f"{block}.self_attn.o_proj", bias=False, inputs=2)
    if qk_norm:
        for which in "qk":
            out.norm((*at, "attention", f"{which}_norm"), f"{block}.self_attn.{which}_norm")
