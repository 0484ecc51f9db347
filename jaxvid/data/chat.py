"""Text to token ids and back: the chat template, the media placeholders, a small tokenizer.

A conversation is one user turn (a clip, then text) and one reply, in the pieces a tree is made of:

    prefix    everything up to and with <|vision_end|>          once per clip
    suffix    the text after the clip, up to where the reply starts   once per question
    response  the reply with its closing token                  once per branch

The pieces are cut from the model folder's own chat template, so prefix + suffix + response is the
template's text, token for token. Special tokens written inside a text are read as plain text, never
as control tokens. Reads the folder with `tokenizers` and `jinja2` alone: Grain workers start fast.
Left out: several turns, several clips, tools.
"""

import collections
import json
import pathlib
from collections.abc import Iterable

import jinja2
import numpy as np
import tokenizers
from jaxtyping import Int
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL = (END_OF_TEXT, TURN, END_OF_TURN, VISION_START, VISION_END, IMAGE, VIDEO)
ROLES = ("user", "assistant")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# ChatML as Qwen writes it, without a default system turn; the generation marks give loss masks.
TEMPLATE = """\
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
_SAID = """\
{%- macro said(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
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


class Chat:
    """Tokenizer and chat template of a model folder. Can be pickled into workers."""

    def __init__(self, folder: str | pathlib.Path):
        """Raises ValueError naming what the folder lacks."""
        self.folder = str(folder)
        path = pathlib.Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"no {path}; a model folder holds tokenizer.json and a chat template")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {t.content: i for i, t in added.items() if t.special}
        missing = [
            t for t in (TURN, END_OF_TURN, VISION_START, VISION_END) if t not in self._special
        ]
        missing += [t for t in (IMAGE, VIDEO) if t not in self._special]
        if missing:
            raise ValueError(
                f"the tokenizer in {folder} has no special tokens {', '.join(missing)}; use a "
                f"Qwen-VL tokenizer or make one with chat.build_tokenizer"
            )
        template = _read_template(pathlib.Path(folder))
        head, middle = self._cut(template, {"type": "video"})
        self._head, self._middle = self._ids(head), self._ids(middle)
        self._plain_head = self._ids(self._cut(template, None)[0])
        self._plain_text_only()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._plain_text_only()  # this setting is not part of a pickled tokenizer

    def _plain_text_only(self) -> None:
        """From here on a question that quotes "<|im_end|>" does not end the turn."""
        self._tokenizer.encode_special_tokens = True

    def _cut(self, template: str, clip: dict | None) -> tuple[str, str]:
        """The template's text before the question, and between question and reply."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.globals["raise_exception"] = _refuse
        content = [*([clip] if clip else []), {"type": "text", "text": _QUESTION}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]},
        ]
        text = environment.from_string(template).render(
            messages=messages, add_generation_prompt=False
        )
        head, found, rest = text.partition(_QUESTION)
        middle, found_answer, tail = rest.partition(_ANSWER)
        if clip and not head.endswith(VISION_START + VIDEO + VISION_END):
            found = ""
        if not (found and found_answer and tail.startswith(END_OF_TURN)):
            raise ValueError(
                f"the chat template in {self.folder} does not write a clip, a question and a reply "
                f"closed by {END_OF_TURN}; it gives {text!r}. Use a Qwen-VL chat template."
            )
        return head.removesuffix(VIDEO + VISION_END), middle

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @property
    def video_id(self) -> int:
        return self._special[VIDEO]

    @property
    def image_id(self) -> int:
        return self._special[IMAGE]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply."""
        return tuple(self._special[t] for t in (END_OF_TURN, END_OF_TEXT) if t in self._special)

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """The tokens a reply never holds: media placeholders and control tokens, less the stops."""
        return tuple(sorted(set(self._special.values()) - set(self.stop_ids)))

    @property
    def size(self) -> int:
        """Ids the tokenizer knows; a model's table may have more rows, which are never text."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def prefix(self, features: int, *, image: bool = False) -> Int[np.ndarray, "n"]:
        """Everything up to the question, with `features` placeholders; 0 is a turn without clip."""
        if not features:
            return _array(self._plain_head)
        pad = self.image_id if image else self.video_id
        end = self._special[VISION_END]
        return _array([*self._head, *[pad] * features, end])

    def suffix(self, text: str) -> Int[np.ndarray, "n"]:
        """The question after the clip, and the template up to where the reply starts."""
        return _array([*self._ids(text), *self._middle])

    def parts(
        self, text: str, features: int, *, image: bool = False
    ) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
        """(prefix, suffix) of one question."""
        return self.prefix(features, image=image), self.suffix(text)

    def prompt(self, text: str, features: int, *, image: bool = False) -> Int[np.ndarray, "n"]:
        """All that comes before the reply."""
        return np.concatenate(self.parts(text, features, image=image))

    def response(self, text: str) -> Int[np.ndarray, "n"]:
        """The reply with its closing token.

        Raises ValueError for a reply that starts with white space: template and pieces would then
        be cut into different tokens.
        """
        if text != text.lstrip():
            raise ValueError(f"the reply {text[:60]!r} starts with white space; strip it first")
        return _array([*self._ids(text), self._special[END_OF_TURN]])

    def decode(self, ids: Iterable) -> str:
        """The text of the ids (integers of any kind), control tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def _array(ids: list[int]) -> Int[np.ndarray, "n"]:
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


def build_tokenizer(texts: Iterable[str], vocab: int, out: str | pathlib.Path) -> None:
    """Make a small tokenizer for `texts` of at most `vocab` ids and save it as a model folder's.

    Byte-level, so any text can be written and read back; the most frequent words (with their
    leading space) are one token each, a fifth of the room goes to merges for the other words.
    Control tokens come first, at the ids of their place in SPECIAL; the reply's tags are one token.
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
    fixed = len(SPECIAL) + len(TAGS) + len(alphabet)
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
    content = [*SPECIAL, *TAGS, *sorted(learnt["vocab"], key=learnt["vocab"].get)]
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
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in SPECIAL])
    tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in TAGS])
    _save(tokenizer, pathlib.Path(out))


def _without_tags(text: str) -> str:
    for tag in TAGS:
        text = text.replace(tag, "\n")
    return text


def _save(tokenizer: tokenizers.Tokenizer, out: pathlib.Path) -> None:
    # Imported here: it takes seconds and only this function needs it.
    from transformers import PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _SAID + TEMPLATE
    fast.save_pretrained(str(out))
