"""Rollouts from a server that speaks OpenAI's protocol, such as vLLM: the same interface over HTTP.

    engine = Server("http://host:8000", "my-model", chat, key_file="/run/secrets/key")
    engine([Prompt(tree, text, media)], sampling, group=8, keys=keys) -> Rollouts

One request a prompt, to /v1/chat/completions, for all its replies (`n`); the clip travels as a data
URL. Tokens are the server's own where it gives them (vLLM: `return_token_ids`, or token ids in
`logprobs`). From a server that gives text alone the text is tokenised again, which need not be what
was sampled: that is warned of, and its log-probs are NaN, which the losses take as not known.

Left out: sending weights to the server. It samples from the model that it was started with, and it
cuts clips into frames by its own rules: `check` compares its prompt with ours where it tells.
"""

import base64
import concurrent.futures
import dataclasses
import http.client
import json
import pathlib
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxvid.data import records
from jaxvid.data.chat import Chat
from jaxvid.rollout.groups import Rollouts
from jaxvid.rollout.sampler import Prompt, Sampling

AGAIN = (408, 425, 429, 500, 502, 503, 504)  # what a server says that may answer a little later
MIMES = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"RIFF", "audio/wav"))


@dataclasses.dataclass(frozen=True)
class Server:
    """A server of one model. `chat` is that model's own tokenizer and template."""

    url: str
    model: str  # its name there
    chat: Chat
    key: str = dataclasses.field(default="", repr=False)  # secret; never printed, never logged
    key_file: str = ""  # where it stands instead; read for each call
    timeout: float = 600.0  # seconds that one try may take
    tries: int = 5
    wait: float = 1.0  # seconds before the second try; twice as many before each next one
    parallel: int = 16  # requests under way at a time
    check: bool = True  # the server's prompt, where it tells, has to be ours
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more of the request's body

    def __post_init__(self):
        if self.key and self.key_file:
            raise ValueError("the server has both a key and a key_file; give one of them")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url = {self.url!r}, wanted http://HOST:PORT or https://HOST")
        if self.tries < 1 or self.parallel < 1 or self.timeout <= 0 or self.wait < 0:
            raise ValueError(
                f"tries = {self.tries}, parallel = {self.parallel}, timeout = {self.timeout}, "
                f"wait = {self.wait}; wanted at least 1, at least 1, more than 0, at least 0"
            )

    def __call__(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, group: int, keys: Key[Array, "n"]
    ) -> Rollouts:
        """numpy, [n, G, R]. Raises RuntimeError, which names the server and its answer, where it
        does not answer, and ValueError where what it answers cannot be used."""
        key = self.key
        if self.key_file:
            key = pathlib.Path(self.key_file).read_text(encoding="utf-8").strip()
        seeds = np.asarray(jax.vmap(lambda k: jax.random.bits(k, dtype=jnp.uint32))(keys)) >> 1

        def one(prompt, seed):
            answer = self.ask(self.body(prompt, sampling, group, int(seed)), key)
            return self.read(answer, prompt, sampling, group)

        with concurrent.futures.ThreadPoolExecutor(self.parallel) as pool:
            rows = list(pool.map(one, prompts, seeds))
        shape = (0, group, sampling.max_tokens)
        none = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        blank = Rollouts(*none, np.zeros(shape[:2], np.int32), np.zeros(shape[:2], bool))
        return Rollouts(*(np.stack(leaves) for leaves in zip(*rows))) if rows else blank

    def body(self, prompt: Prompt, sampling: Sampling, group: int, seed: int) -> dict[str, Any]:
        """The request for all replies to a prompt."""
        if not prompt.text:
            raise ValueError(
                f"prompt {prompt.tree.name!r} has no text for a server to read; give Prompt its "
                f"text and media beside the tree"
            )
        content = [*map(_medium, prompt.media), {"type": "text", "text": prompt.text}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "n": group,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "logprobs": True,
            "logit_bias": {str(i): -100 for i in self.chat.banned_ids},
            "stop_token_ids": list(self.chat.stop_ids),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.min_p:
            body["min_p"] = sampling.min_p
        if sampling.stop:
            body |= {"stop": list(sampling.stop), "include_stop_str_in_output": True}
        return body | dict(self.extra)

    def ask(self, body: dict[str, Any], key: str) -> dict[str, Any]:
        """The server's answer to a request; what may pass is tried again."""
        url = self.url.rstrip("/") + "/v1/chat/completions"
        head = {"Content-Type": "application/json"}
        if key:
            head["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode()
        for i in range(self.tries):
            if i:
                time.sleep(self.wait * 2 ** (i - 1))
            request = urllib.request.Request(url, data, head)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(500).decode(errors="replace")
                fault = f"answered {error.code} {error.reason}: {said}"
                if error.code not in AGAIN:
                    break
            except (OSError, http.client.HTTPException) as error:  # no connection, or it broke off
                fault = f"did not answer: {error}"
            except json.JSONDecodeError as error:
                fault = f"did not answer in JSON ({error})"
        raise RuntimeError(
            f"{url} {fault} (try {i + 1} of {self.tries}). See that the server runs there, that it "
            f"serves {self.model!r}, and that the key is right."
        )

    def read(self, answer: dict[str, Any], prompt: Prompt, sampling: Sampling, group: int):
        """The leaves of `Rollouts` for one prompt, [G, R] and [G]."""
        choices = sorted(answer["choices"], key=lambda c: c["index"])
        if len(choices) != group:
            raise ValueError(
                f"{self.url} gave {len(choices)} replies and was asked for {group}; use a server "
                f"that takes `n`, or set the group to {len(choices)}"
            )
        theirs = answer.get("prompt_token_ids")
        if self.check and theirs and list(theirs) != prompt.tree.prompt.tolist():
            raise ValueError(
                f"{self.url} read the prompt {prompt.tree.name!r} as {len(theirs)} tokens that are "
                f"not our {len(prompt.tree.prompt)}; serve the same template, sample clips alike "
                f"(mm_processor_kwargs in `extra`), or set check to False"
            )
        limit = sampling.max_tokens
        tokens, logp = np.zeros((group, limit), np.int32), np.zeros((group, limit), np.float32)
        length, ended = np.zeros(group, np.int32), np.zeros(group, bool)
        for g, choice in enumerate(choices):
            ids, chances = self.tokens(choice, sampling)
            n = length[g] = min(len(ids), limit)
            tokens[g, :n], logp[g, :n] = ids[:n], chances[:n]
            ended[g] = choice["finish_reason"] == "stop" and len(ids) <= limit
        return tokens, logp, length, ended

    def tokens(self, choice: dict[str, Any], sampling: Sampling) -> tuple[list[int], list[float]]:
        """Ids of a reply with the token that ends it, and their log-probs (NaN: not known)."""
        content = (choice.get("logprobs") or {}).get("content") or []
        chances = [float(entry["logprob"]) for entry in content]
        ids = choice.get("token_ids")
        if ids is None and all(e["token"].startswith("token_id:") for e in content) and content:
            ids = [int(e["token"].removeprefix("token_id:")) for e in content]
        if ids is None:
            warnings.warn(
                f"{self.url} gives no token ids; replies are tokenised again from their text, and "
                f"no log-probs are taken",
                stacklevel=2,
            )
            ids, chances = self.chat.encode(choice["message"]["content"] or ""), []
        # A server's log-probs are those at temperature 1, ours those of the sampling.
        if len(chances) != len(ids) or sampling.temperature not in (0, 1):
            chances = [np.nan] * len(ids)
        ids, stopped = list(ids), choice["finish_reason"] == "stop"
        text = choice["message"]["content"] or ""
        if stopped and not (ids and ids[-1] in self.chat.stop_ids):
            if not any(stop in text for stop in sampling.stop):  # the closing token was left out
                ids, chances = [*ids, self.chat.stop_ids[0]], [*chances, np.nan]
        return ids, chances


def _medium(medium: records.Media) -> dict[str, Any]:
    """A clip, image or sound as part of a message."""
    default = {"video": "video/mp4", "image": "image/png", "audio": "audio/mp4"}[medium.kind]
    mime = next((name for start, name in MIMES if medium.data.startswith(start)), default)
    url = f"data:{mime};base64,{base64.b64encode(medium.data).decode()}"
    kind = f"{medium.kind}_url"
    return {"type": kind, kind: {"url": url}}
