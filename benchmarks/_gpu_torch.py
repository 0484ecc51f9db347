"""torch's side of one row of benchmarks/gpu.py, in a process of its own. Prints one line of JSON.

The step that TRL and a plain training loop make of `transformers`' model: every reply is a sequence
with its prompt and its clip, all of one length, so nothing is padding; logits of the replies alone;
gradient checkpointing; autocast; AdamW, fused.
"""

import contextlib
import functools
import json
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from benchmarks import measure, peer, work
from benchmarks.work import Case
from jaxvid.data import layout
from jaxvid.models import qwen25vl

# What transformers calls it, and called it in its first releases of 5.
NAMES = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
ENABLE = next(name for name in NAMES if name in dir(transformers.PreTrainedModel))


class Part(NamedTuple):
    """Some sequences of a step, which one forward pass takes."""

    inputs: dict[str, torch.Tensor]
    replies: torch.Tensor  # [n, R]
    old: torch.Tensor  # [n, R]
    advantage: torch.Tensor  # [n]


def parts(case: Case, cfg: qwen25vl.Config, grown: list[layout.Tree]) -> list[Part]:
    """The step's sequences, at most `case.micro` in each; a chosen reply and its rejected one stand
    together."""
    on, out = peer.device(), []
    flat = [(t, b) for t in grown for b in t.branches]
    for start in range(0, len(flat), case.micro):
        some = flat[start : start + case.micro]
        ids = np.stack([np.concatenate([t.prompt, b.tokens]) for t, b in some])
        ids = torch.tensor(ids, dtype=torch.int64, device=on)
        places = np.stack([layout.extend(t, b.tokens).positions for t, b in some], axis=1)
        inputs = peer.media(ids, [t.clips[0] for t, _ in some], case.sizes.job.grid, cfg)
        inputs |= {"input_ids": ids, "position_ids": torch.tensor(places, dtype=torch.int64)}
        inputs["position_ids"] = inputs["position_ids"].to(on)
        seen = inputs["pixel_values_videos"].to(getattr(torch, case.of.dtype))
        inputs["pixel_values_videos"] = seen
        of = lambda values, kind: torch.tensor(np.stack(values), dtype=kind, device=on)
        replies = of([b.tokens for _, b in some], torch.int64)
        old = of([b.old for _, b in some], torch.float32)
        out.append(Part(inputs, replies, old, of([b.advantage for _, b in some], torch.float32)))
    return out


# ---- losses, each a sum over a part


def logprobs(model: torch.nn.Module, part: Part) -> torch.Tensor:
    """Of the replies' tokens, [n, R], float32."""
    n, R = part.replies.shape
    logits = model(**part.inputs, use_cache=False, logits_to_keep=R + 1).logits[:, :-1]
    flat = F.cross_entropy(logits.float().flatten(0, 1), part.replies.flatten(), reduction="none")
    return -flat.view(n, R)


def sft(model: torch.nn.Module, part: Part, ref: torch.Tensor | None) -> torch.Tensor:
    return -logprobs(model, part).sum()


def dpo(model: torch.nn.Module, part: Part, ref: torch.Tensor | None) -> torch.Tensor:
    ratio = (logprobs(model, part) - ref).sum(-1)
    return -F.logsigmoid(work.BETA * (ratio[::2] - ratio[1::2])).sum()


def dna(model: torch.nn.Module, part: Part, ref: torch.Tensor | None) -> torch.Tensor:
    ratio = torch.exp(logprobs(model, part) - part.old)
    clipped = ratio.clamp(1 - work.LOW, 1 + work.HIGH)
    gain = part.advantage[:, None]
    return -torch.minimum(ratio * gain, clipped * gain).sum()


LOSSES = {"sft": sft, "dpo": dpo, "dna": dna}


# ---- a step


def attention(case: Case) -> str:
    return "flash_attention_2" if case.side == "torch-flash" else "sdpa"


def trainable(case: Case, cfg: qwen25vl.Config) -> torch.nn.Module:
    """What is trained in float32, the rest in the type of what is computed, as on our side."""
    kind = getattr(torch, case.of.dtype)
    if case.of.rank:
        made = peer.adapted(peer.build(cfg, case.of.dtype, attention(case)), case.lora)
    else:
        made = peer.build(cfg, "float32", attention(case))
        for p in made.model.visual.parameters():
            p.data = p.data.to(kind)  # not the buffers: angles of positions stay exact
            p.requires_grad_(False)
    peer.fill(made)
    getattr(made, ENABLE)({"use_reentrant": False})
    made.disable_input_require_grads()  # which enabling asks for: the tower would get gradients
    return made.train()


def reference(case: Case, cfg: qwen25vl.Config, trained: torch.nn.Module):
    """(model of the log-probs that training starts from, what to enter to call it): without
    adapters where there are any, else a copy in the type of what is computed."""
    if case.of.rank:
        return trained, trained.disable_adapter
    made = peer.build(cfg, case.of.dtype, attention(case))
    peer.fill(made)
    made.model.visual = trained.model.visual  # frozen, so there is no second one
    return made, contextlib.nullcontext


class Step:
    """A step of training on all parts; returns its loss."""

    def __init__(self, case: Case, cfg: qwen25vl.Config, grown: list[layout.Tree]):
        self.parts, self.model = parts(case, cfg, grown), trainable(case, cfg)
        self.loss, self.count = LOSSES[case.kind], sum(layout.size(t).scored for t in grown)
        self.precision = functools.partial(
            torch.autocast,
            peer.device().type,
            torch.bfloat16,
            enabled=case.of.dtype == "bfloat16",
        )
        self.reference = None
        if case.kind == "dpo":
            self.count = len(grown)
            self.reference = reference(case, cfg, self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, work.RATE, betas=work.BETAS, weight_decay=0.0, fused=True
        )

    def scored(self, part: Part) -> torch.Tensor | None:
        """The reference's log-probs."""
        if self.reference is None:
            return None
        other, without = self.reference
        with torch.no_grad(), without(), self.precision():
            return logprobs(other, part)

    def __call__(self) -> torch.Tensor:
        total = 0.0
        for part in self.parts:
            ref = self.scored(part)
            with self.precision():
                loss = self.loss(self.model, part, ref) / self.count
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.trained, work.CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def sampling(case: Case, cfg: qwen25vl.Config, grown: list[layout.Tree]):
    made = peer.build(cfg, case.of.dtype)
    peer.fill(made)
    cache = "static" if case.side == "torch-static" else "dynamic"
    return functools.partial(peer.sampled(case.sizes.job, made, cfg, grown[0])[0], cache)


def measured(case: Case) -> dict[str, Any]:
    on = peer.device().type == "cuda"
    if case.of.base and not on:
        raise RuntimeError("torch sees no GPU here; install a torch that is built for CUDA")
    cfg = work.config(case)
    grown = work.trees(case, cfg)
    run = (sampling if case.kind == "rollout" else Step)(case, cfg, grown)
    if on:
        torch.cuda.reset_peak_memory_stats()  # what making the weights took is no part of it
    taken, losses = measure.laps(run, case.repeats, wait=peer.finished)
    cuda = f", CUDA {torch.version.cuda}" if on else ""
    return {
        "first": taken[0],
        "seconds": taken[1:],
        "losses": [] if case.kind == "rollout" else [float(x) for x in losses],
        "peak_gib": torch.cuda.max_memory_allocated() / measure.GIB if on else None,
        "on": torch.cuda.get_device_name() if on else "cpu",
        "versions": f"torch {torch.__version__}{cuda}, transformers {transformers.__version__}",
    }


def main(text: str) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        told = measured(Case(**json.loads(text)))
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
