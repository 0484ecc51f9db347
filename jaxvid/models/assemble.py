"""A start folder of video-SALMONN-o1 out of released folders of its parts. What no part has is
fresh: the projectors, the segment vectors and the Q-Former.

    assemble.video_salmonn_o1("siglip-so400m-patch14-384", "whisper-large-v3",
                              "Qwen2-7B-Instruct", "start")

Tensors go from file to file, so that no model has to fit in memory.
"""

import contextlib
import functools
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxvid.models import hf, salmonn, weights
from jaxvid.models.family import Path, Place

MARKERS = {which: f"<{which}>" for which in salmonn.TOKENS}
# ChatML as Qwen writes it, with the markers and without a default system turn.
TEMPLATE = (
    "{%- set markers = "
    + json.dumps(MARKERS)
    + """ -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in markers -%}{{- markers[part['type']] -}}
{%- else -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)


class Part(NamedTuple):
    """A folder that some of our tensors come from."""

    folder: pathlib.Path
    prefix: str  # of their names here
    here: tuple[tuple[str, str], ...]  # (pattern, replacement): a name there -> here; first fits
    section: str  # of its config.json that tells of it, where there is one

    def name(self, there: str) -> str:
        for pattern, new in self.here:
            if re.match(pattern, there):
                return re.sub(pattern, new, there, count=1)
        return f"unused.{there}"

    def config(self) -> dict[str, Any]:
        file = self.folder / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{self.folder} has no config.json; give a saved model")
        whole = json.loads(file.read_text())
        return dict(whole.get(self.section) or whole)


def video_salmonn_o1(
    vision_folder: str | pathlib.Path,
    speech_folder: str | pathlib.Path,
    text_folder: str | pathlib.Path,
    out: str | pathlib.Path,
    seed: int = 0,
    *,
    dtype: str = "bfloat16",
) -> None:
    """Write `out`: SigLIP (alone or with its text model), Whisper, Qwen2 with its tokenizer, to
    which the tokens of media are added, and a fresh Q-Former and projectors from `seed`. Fresh
    sizes are those that `salmonn` states.

    Raises ValueError with all that is wrong with the configs, or else with the tensors, and where
    the embedding table has no rows left for the tokens of media.
    """
    # A pooling head, a decoder and a text model are left where they are.
    parts = (
        Part(
            pathlib.Path(vision_folder),
            "vision_tower.",
            ((r"(vision_model\.)?(?=(embeddings|encoder|post_)\S)", "vision_tower.vision_model."),),
            "vision_config",
        ),
        Part(
            pathlib.Path(speech_folder),
            "speech_encoder.",
            (
                (r"(model\.)?encoder\.", "speech_encoder."),
                (r"(?=(conv\d|embed_positions|layers|layer_norm)\.)", "speech_encoder."),
            ),
            "",
        ),
        Part(
            pathlib.Path(text_folder),
            "language_model.",
            ((r"(?=(model|lm_head)\.)", "language_model."),),
            "text_config",
        ),
    )
    seen, heard, text = (part.config() for part in parts)
    tokenizer, ids = _tokens(parts[2].folder, text)
    whole = config(seen, heard, text) | {
        f"{which}_token_index": ids[marker] for which, marker in MARKERS.items()
    }
    cfg = salmonn.Config.from_hf(whole)
    where, shapes = salmonn.places(cfg), hf.shapes(cfg)
    with contextlib.ExitStack() as stack:
        found, problems = [], []
        for part in parts:
            files = weights.Files(part.folder, part.name, stack)
            own = {path: p for path, p in where.items() if p.name.startswith(part.prefix)}
            wanted = {path: shapes[path] for path in own}
            try:
                weights.check(files, own, wanted, (r".*",))
            except ValueError as error:
                problems.append(f"{part.folder}: {error}")
            found.append((files, own))
        if problems:
            raise ValueError("\n".join(problems))
        copied = frozenset(path for _, own in found for path in own)
        fresh = _initialiser(cfg, copied)(jax.random.key(seed))
        like = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _companions(parts[2].folder, like, tokenizer)
        tensors = _copies(found, shapes, hf.DTYPES[dtype])
        hf.save(out, cfg, fresh, like=like, dtype=dtype, copied=tensors)


def config(seen: dict, heard: dict, text: dict) -> dict[str, Any]:
    """config.json of the whole, of those of its parts."""
    width = heard.get("d_model", 0)
    asked = {
        "model_type": "blip_2_qformer",
        "num_hidden_layers": 2,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heard.get("encoder_attention_heads", 0),
        "encoder_hidden_size": width,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "cross_attention_frequency": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return {
        "model_type": salmonn.FAMILY.name,
        "vision_config": seen | {"vision_use_head": False},
        "speech_config": heard,
        "qformer_config": asked,
        "text_config": text,
        "window_frames": 10,
        "num_query_tokens": 1,
        "max_segments": salmonn.SEGMENTS,
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
    }


@functools.lru_cache
def _initialiser(cfg: salmonn.Config, copied: frozenset[Path]):
    """Makes the initial values of all weights but the copied from a key; these are never made."""

    def build(key):
        state = nnx.state(salmonn.Salmonn(cfg, rngs=nnx.Rngs(key)))
        flat = nnx.to_flat_state(state)
        return nnx.from_flat_state([(path, v) for path, v in flat if path not in copied])

    return jax.jit(build, compiler_options=hf.quick())


def _copies(
    found: list[tuple[weights.Files, dict[Path, Place]]],
    shapes: dict[Path, tuple[int, ...]],
    kind: Any,
) -> Iterator[tuple[str, np.ndarray]]:
    for files, own in found:
        for path, place in own.items():
            for i in range(shapes[path][0] if "{}" in place.name else 1):
                handle, key = files.handles[name := place.name.format(i)]
                yield name, handle.get_tensor(key).astype(kind)


def _tokens(folder: pathlib.Path, text: dict) -> tuple[dict, dict[str, int]]:
    """tokenizer.json with the tokens of media in it, and all added tokens' ids."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json; give the language model's folder")
    read = json.loads(file.read_text())
    ids = {t["content"]: t["id"] for t in read["added_tokens"]}
    largest = max([*ids.values(), *read["model"]["vocab"].values()])
    for marker in MARKERS.values():
        if marker not in ids:
            ids[marker] = largest = largest + 1
            token = {"id": largest, "content": marker, "special": True, "normalized": False}
            token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            read["added_tokens"].append(token)
    rows = text.get("vocab_size", 0)
    if most := [f"{marker} ({ids[marker]})" for marker in MARKERS.values() if ids[marker] >= rows]:
        raise ValueError(
            f"{folder} has an embedding table of {rows} rows, which has none for {most}; enlarge "
            "it (transformers' resize_token_embeddings)"
        )
    return read, ids


def _companions(folder: pathlib.Path, to: pathlib.Path, tokenizer: dict) -> None:
    """The files that go with the text model's tokenizer, with the tokens of media."""
    for name in hf.COMPANIONS:
        if (folder / name).is_file() and "chat_template" not in name:
            shutil.copy(folder / name, to / name)
    (to / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (to / "chat_template.jinja").write_text(TEMPLATE)
    if (file := to / "tokenizer_config.json").is_file():
        told = json.loads(file.read_text())
        told.pop("chat_template", None)
        known = told.get("added_tokens_decoder", {})
        for token in tokenizer["added_tokens"]:
            if known and token["content"] in MARKERS.values():
                known[str(token["id"])] = {k: v for k, v in token.items() if k != "id"}
        file.write_text(json.dumps(told, indent=2, ensure_ascii=False))
