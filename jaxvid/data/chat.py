"""Text to token ids and back: the chat template, the places of media in it, a small tokenizer.

A conversation is one user turn (media, then text) and one reply, in the pieces a tree is made of:

    prefix    everything up to and with the media              once per clip
    suffix    the text after it, up to where the reply starts  once per question
    response  the reply with its closing token                 once per branch

The pieces are cut from the model folder's own chat template, so prefix + suffix + response is the
template's text, token for token; the marker that the template writes for a medium is replaced by
the family's tokens for it. Special tokens written inside a text are read as plain text, never as
control tokens. Reads the folder with `tokenizers` and `jinja2` alone: Grain workers start fast.
Left out: several turns, tools.
"""

import collections
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jinja2
import numpy as np
import tokenizers
from jaxtyping import Int
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL = (END_OF_TEXT, TURN, END_OF_TURN)  # of ChatML
ROLES = ("user", "assistant")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# What Qwen's templates write for media. A family of another kind brings its own.
MARKERS = {
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
}
SPECIAL = (
    *CONTROL,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# ChatML as Qwen writes it, without a default system turn; the generation marks give loss masks.
_TEMPLATE = """\
{%- macro said(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] in markers -%}{{- markers[part['type']] -}}
{%- else -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- said(message['content']) -}}{{- '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- said(message['content']) -}}{{- '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_QUESTION, _ANSWER = "\u2402QUESTION\u2403", "\u2402ANSWER\u2403"  # marks cut out of the template


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant says; here it only renders its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> str:
    raise ValueError(f"the chat template refuses a user turn with a clip and one reply: {message}")


class _Cut(NamedTuple):
    """A template around one combination of media, a question and a reply."""

    pieces: tuple[list[int], ...]  # before the first medium, between two, ...; the last is text
    #   alone: `between`
    between: str  # from the last medium (without media: from the start) to the question
    anchor: str  # what `between` continues: the last marker; without media all before the question
    middle: str  # from the question to where the reply starts
    lead: str  # what the template writes before a reply, such as a space
    closing: str  # the token that ends a reply; "" where the template writes none


class Chat:
    """Tokenizer and chat template of a model folder. Can be pickled into workers."""

    def __init__(self, folder: str | pathlib.Path, markers: Mapping[str, str] = MARKERS):
        """`markers`: kind of medium -> what the template writes for one, replaced whole.

        Raises ValueError naming what the folder lacks.
        """
        self.folder, self.markers = str(folder), dict(markers)
        path = pathlib.Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"no {path}; a model folder holds tokenizer.json and a chat template")
        # Of two readers, since threads share them: one reads special tokens, one plain text alone.
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._plainer = tokenizers.Tokenizer.from_file(str(path))
        self._plainer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {t.content: i for i, t in added.items() if t.special}
        self._template = _read_template(pathlib.Path(folder))
        self._ends = _ends(pathlib.Path(folder), self._special)
        for marker in markers.values():
            if self.decode(self._parsed(marker)):
                raise ValueError(
                    f"the tokenizer in {folder} does not have all special tokens of {marker}; use "
                    f"the tokenizer of the model's own family, or make one (jaxvid tiny)"
                )
        self._cuts = {(): self._cut(())} | {(kind,): self._cut((kind,)) for kind in markers}
        first = next(iter(self._cuts.values()))
        if not first.closing and not self._ends:
            raise ValueError(
                f"neither the chat template in {folder} closes a reply nor does the tokenizer have "
                f"an eos_token; set one in tokenizer_config.json"
            )
        self._close = self._special[first.closing] if first.closing else self._ends[0]
        self._lead, self._opening = first.lead, first.middle

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._plainer.encode_special_tokens = True  # not part of a pickled tokenizer

    def _cut(self, kinds: tuple[str, ...]) -> _Cut:
        """The template's text around the media, the question and the reply."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.globals["raise_exception"] = _refuse
        template = environment.from_string(self._template)
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": _QUESTION}]
        user = {"role": "user", "content": content}
        reply = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
        asked = template.render(messages=[user], add_generation_prompt=True)
        text = template.render(messages=[user, reply], add_generation_prompt=False)
        head, found, middle = asked.partition(_QUESTION)
        before, found_answer, tail = text.removeprefix(asked).partition(_ANSWER)
        pieces, rest = [], head
        for kind in kinds:
            piece, marker, rest = rest.partition(self.markers[kind])
            pieces.append(piece)
            found = found and marker
        if not (found and found_answer and text.startswith(asked)):
            wanted = " ".join([*(self.markers[kind] for kind in kinds), "question, reply"])
            raise ValueError(
                f"the chat template in {self.folder} does not write {wanted}, in this order; it "
                f"gives {text!r}. Use the template of the model's own family."
            )
        closing = [t for t in self._special if tail.lstrip().startswith(t)]
        return _Cut(
            tuple(self._parsed(p, start=not i) for i, p in enumerate(pieces or [head])),
            rest if kinds else "",
            self.markers[kinds[-1]] if kinds else head,
            middle,
            before,
            max(closing, key=len, default=""),
        )

    def _parsed(self, text: str, *, start: bool = False) -> list[int]:
        """Ids of text of the template, in which special tokens are themselves.

        At the start of a prompt, with what the tokenizer puts before any text (Llama's <s>).
        """
        if not start:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        alone = self._tokenizer.encode("", add_special_tokens=True).ids
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if ids[: len(alone)] == alone else [*alone, *ids]

    def _plain(self, text: str) -> list[int]:
        """Ids of text from outside: a question that quotes "<|im_end|>" does not end the turn."""
        return self._plainer.encode(text, add_special_tokens=False).ids

    def _after(self, anchor: str, text: str) -> list[int]:
        """Ids of `text` as it is read where `anchor` stands before it."""
        known, ids = self._parsed(anchor), self._parsed(anchor + text)
        if ids[: len(known)] != known:
            raise ValueError(
                f"{text[:60]!r} after {anchor[-20:]!r} melts into one token with it, so that the "
                "pieces would not be the template's text; let it start with a word"
            )
        return ids[len(known) :]

    def _quotes(self, text: str) -> bool:
        return any(token in text for token in self._special)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply."""
        return tuple(dict.fromkeys((self._close, *self._ends)))

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """The tokens a reply never holds: media placeholders and control tokens, less the stops."""
        return tuple(sorted(set(self._special.values()) - set(self.stop_ids)))

    @property
    def size(self) -> int:
        """Ids the tokenizer knows; a model's table may have more rows, which are never text."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def _of(self, kinds: Sequence[str]) -> _Cut:
        kinds = tuple(kinds)
        if unknown := [kind for kind in kinds if kind not in self.markers]:
            raise ValueError(
                f"a prompt has {unknown[0]!r}; this model takes {', '.join(self.markers)}"
            )
        if kinds not in self._cuts:
            self._cuts[kinds] = self._cut(kinds)
        return self._cuts[kinds]

    def prefix(
        self, kinds: Sequence[str] = (), placed: Sequence[Iterable] = ()
    ) -> Int[np.ndarray, "n"]:
        """Everything up to the question; `placed` are the tokens of each medium, in order."""
        pieces = self._of(kinds).pieces
        if len(kinds) != len(placed):
            raise ValueError(f"{len(kinds)} media but tokens of {len(placed)}; give one of each")
        return _array([i for piece, ids in zip(pieces, [*placed, ()]) for i in (*piece, *ids)])

    def starts(self, kinds: Sequence[str], lengths: Sequence[int]) -> list[int]:
        """Where in the prefix each medium's tokens start, of which it has so many."""
        out, at = [], 0
        for piece, n in zip(self._of(kinds).pieces, lengths):
            out.append(at := at + len(piece))
            at += n
        return out

    def suffix(self, text: str, kinds: Sequence[str] = ()) -> Int[np.ndarray, "n"]:
        """The question after the media, and the template up to where the reply starts."""
        cut = self._of(kinds)
        if self._quotes(text):
            between = self._after(cut.anchor, cut.between) if cut.between else []
            return _array([*between, *self._plain(text), *self._parsed(cut.middle)])
        return _array(self._after(cut.anchor, cut.between + text + cut.middle))

    def response(
        self, text: str, *, after: bool = False, ends: bool = True
    ) -> Int[np.ndarray, "n"]:
        """The reply with its closing token; without, where it goes on (`ends` False). `after`: it
        goes on with `text`, which stands for itself and may start with white space.

        Raises ValueError for a reply that starts with white space: template and pieces would then
        be cut into different tokens.
        """
        close = [self._close] if ends else []
        if after:
            return _array([*self._plain(text), *close])
        if text != text.lstrip():
            raise ValueError(f"the reply {text[:60]!r} starts with white space; strip it first")
        if self._quotes(text):
            return _array([*self._plain(self._lead + text), *close])
        return _array([*self._after(self._opening, self._lead + text), *close])

    def encode(self, text: str) -> list[int]:
        """Ids of plain text on its own."""
        return self._plain(text)

    def decode(self, ids: Iterable) -> str:
        """The text of the ids (integers of any kind), control tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def _ends(folder: pathlib.Path, special: Mapping[str, int]) -> tuple[int, ...]:
    """What ends a reply by the folder's own word, whatever the template writes."""
    found: list[int] = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := folder / name).is_file():
            token = json.loads(path.read_text()).get("eos_token")
            token = token["content"] if isinstance(token, dict) else token
            found += [special[token]] if token in special else []
    if (path := folder / "generation_config.json").is_file():
        ids = json.loads(path.read_text()).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids] if ids is not None else []
    found += [special[END_OF_TEXT]] if END_OF_TEXT in special else []
    return tuple(dict.fromkeys(found))


def _array(ids: list) -> Int[np.ndarray, "n"]:
    return np.asarray(ids, np.int32)


def _read_template(folder: pathlib.Path) -> str:
    """The chat template, from the places where folders of different versions keep it."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text()
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (path := folder / name).is_file():
            template = json.loads(path.read_text()).get("chat_template")
            if isinstance(template, str):
                return template
    raise ValueError(
        f"no chat template in {folder}; put the model's chat_template.jinja beside tokenizer.json"
    )


def build_tokenizer(
    texts: Iterable[str],
    vocab: int,
    out: str | pathlib.Path,
    *,
    special: Sequence[str] = SPECIAL,
    markers: Mapping[str, str] = MARKERS,
) -> None:
    """Make a small tokenizer for `texts` of at most `vocab` ids and save it as a model folder's,
    with a ChatML template that writes `markers` for media.

    Byte-level, so any text can be written and read back; the most frequent words (with their
    leading space) are one token each, a fifth of the room goes to merges for the other words.
    Control tokens come first, at the ids of their place in `special`; each of the reply's tags is
    one token.
    """
    split = pre_tokenizers.Sequence(
        [
            # A word or a digit with the space before it; runs of signs; runs of other space.
            pre_tokenizers.Split(
                tokenizers.Regex(r" ?\p{L}+| ?\p{N}|[^\s\p{L}\p{N}]|\s"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fixed = len(special) + len(TAGS) + len(alphabet)
    if vocab < fixed:
        raise ValueError(f"a vocabulary of {vocab} is too small; bytes and tags need {fixed}")
    texts = [_without_tags(t) for t in texts]
    words = collections.Counter(w for t in texts for w, _ in split.pre_tokenize_str(t))
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + (vocab - fixed) // 5,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    learnt = json.loads(trained.to_str())["model"]
    content = [*special, *TAGS, *sorted(learnt["vocab"], key=learnt["vocab"].get)]
    known = {*content, *ROLES}
    frequent = sorted((w for w in words if w not in known), key=lambda w: (-words[w], w))
    frequent = [*(r for r in ROLES if r not in content), *frequent]
    content += frequent[: vocab - len(content)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(content)},
            merges=[tuple(m) for m in learnt["merges"]],
            ignore_merges=True,  # a word of the vocabulary is taken whole, without merges for it
        )
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
    tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in TAGS])
    _save(tokenizer, pathlib.Path(out), markers)


def extend_tokenizer(
    folder: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    special: Sequence[str] = SPECIAL,
    markers: Mapping[str, str] = MARKERS,
) -> None:
    """Save the tokenizer of a model folder with the control tokens of another family added after
    all it has, and a ChatML template that writes `markers` for media."""
    tokenizer = tokenizers.Tokenizer.from_file(str(pathlib.Path(folder) / "tokenizer.json"))
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
    _save(tokenizer, pathlib.Path(out), markers)


def _without_tags(text: str) -> str:
    for tag in TAGS:
        text = text.replace(tag, "\n")
    return text


def _save(tokenizer: tokenizers.Tokenizer, out: pathlib.Path, markers: Mapping[str, str]) -> None:
    # Imported here: it takes seconds and only this function needs it.
    from transformers import PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = f"{{%- set markers = {json.dumps(dict(markers))} -%}}\n" + _TEMPLATE
    fast.save_pretrained(str(out))
