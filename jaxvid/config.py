"""What a run is. A recipe in configs/ returns one of these; the parts own their own settings.

Every field is a flag of the command line (`--optimizer.lr 1e-3`), by tyro. Paths that start with
"@checkpoints/" name the folder of checkpoints shipped with the recipes.
"""

import dataclasses
import importlib.resources
import pathlib
import typing
from typing import Any, Literal

from flax import nnx
from jax.sharding import Mesh

from jaxvid import paths, rewards
from jaxvid.data import chat, pipeline
from jaxvid.data.pipeline import Data
from jaxvid.eval import probe
from jaxvid.eval import run as evaluation
from jaxvid.models import hf, lora
from jaxvid.models.layers import Compute
from jaxvid.models.lora import LoRA
from jaxvid.objectives.advantages import DAPO, GRPO, DrGRPO, Duality
from jaxvid.objectives.policy import Policy
from jaxvid.objectives.preference import DPO, PDPO
from jaxvid.objectives.sft import SFT
from jaxvid.rollout import steps as step_pairs
from jaxvid.rollout.sampler import Sampling
from jaxvid.train import groups, loop
from jaxvid.train import state as states
from jaxvid.train.checkpoint import differences as differences
from jaxvid.train.optimizers import Adafactor, AdamW, Muon, Rates

SHIPPED = "@checkpoints/"

Ask, Rollout = evaluation.Settings, groups.Settings
Probe, Steps = probe.Settings, step_pairs.Settings
Replies = Sampling  # how a rollout draws; Data.sampling says which frames are seen
Optimizer = AdamW | Muon | Adafactor
Reward = (
    rewards.Answer
    | rewards.YesNo
    | rewards.Number
    | rewards.Seconds
    | rewards.Interval
    | rewards.Tracks
    | rewards.Open
    | rewards.ByAnswer
    | rewards.Function
)
Advantage = Duality | GRPO | DAPO | DrGRPO


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every run has: a model, the data it reads, and the mesh it lies on."""

    model: str  # folder: config.json, weights, tokenizer, chat template
    compute: Compute = Compute()
    data: Data
    replica: int = 1  # the mesh; one of the four may be -1, which takes the devices left over
    fsdp: int = -1
    tensor: int = 1
    context: int = 1  # devices that share the tokens of a row too long for one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Job):
    """What all kinds of training share. Counts are updates; 0 means never."""

    init: bool = False  # fresh weights; the folder gives config and tokenizer alone
    validation: Data | None = None
    ask: Ask | None = None  # also answer the validation's policy questions
    optimizer: Optimizer = AdamW()
    # Patterns are regular expressions over whole parts of a weight's path, such as "tower" or
    # "decoder.blocks.attention.(q|v)"; one that fits nothing is an error that lists the paths.
    lora: LoRA = LoRA()  # lora.rank above 0 trains adapters and freezes everything else
    freeze: tuple[str, ...] = ()  # patterns of weights that stay as they are
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"  # what frozen weights are kept in
    rates: Rates = ()  # (pattern, factor of the learning rate) ...; the last that fits counts
    steps: int
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0  # 0: at the end alone
    eval_batches: int = 0  # of the validation split; 0 = all of it
    checkpoint_every: int = 100
    keep: int = 2  # last checkpoints kept, beside the best
    best: str = "eval_loss"  # the validation metric that names the best checkpoint
    best_mode: Literal["min", "max"] = "min"
    patience: int = 5  # steps in a row without a finite loss that stop the run
    profile: tuple[int, int] = (0, 0)  # first and last step that the profiler traces; 0 0 is none
    stall_minutes: float = 60.0  # without a step that end the run, stacks on stderr; 0 = never
    wandb: str = ""  # project on Weights & Biases that gets the log too; "" is none
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of WORKDIR/model

    def loop_settings(self, checkpoints: str = "") -> loop.Settings:
        """The part of this that the training loop reads, and where its checkpoints go."""
        shared = {f.name for f in dataclasses.fields(loop.Settings)} - {"checkpoints"}
        given = {name: getattr(self, name) for name in shared}
        return loop.Settings(**given, checkpoints=checkpoints)

    def updates_per_step(self) -> int:
        """Optimizer steps that one step of the loop makes."""
        return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTRun(Run):
    """Supervised fine-tuning, or training from nothing."""

    objective: SFT = SFT()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceRun(Run):
    """Preferences against a frozen reference, scored in the same step."""

    objective: DPO | PDPO = DPO()
    reference: str = ""  # model folder; "" is where this run starts, with LoRA at no memory
    sidecar: str = ""  # folder of `jaxvid score`; "" computes the reference in every step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server:
    """A server that samples in place of this process (rollout/remote.py); url "" is none."""

    url: str = ""
    model: str = ""  # its name there
    key_file: str = ""  # file that holds its key
    timeout: float = 600.0  # seconds that one try may take
    tries: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyRun(Run):
    """Reinforcement learning on pairs of a real and a counterfactual video."""

    objective: Policy = Policy()
    rollout: Rollout = Rollout()
    server: Server = Server()
    reward: Reward = rewards.Answer()
    advantages: Advantage = Duality()
    reference: str = ""  # read where objective.kl_coef is above 0; "" is the start
    ask: Ask | None = Ask()
    best: str = "eval_both"
    best_mode: Literal["min", "max"] = "max"

    def updates_per_step(self) -> int:
        return self.rollout.updates * self.rollout.minibatches


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRun(Job):
    """Greedy answers to every pair of a split; `controls` takes the place of `ask.control`."""

    ask: Ask = Ask()
    controls: tuple[Literal["none", "blank", "shuffled"], ...] = ("none",)  # asked one by one


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeRun(Job):
    """Greedy answers to every policy question of a split, each alone on its own clip."""

    ask: Probe = Probe()
    reward: Reward = rewards.Answer()
    sound: bool = False  # also what probes of shifted, muted and swapped sound amount to


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsRun(Job):
    """Pairs of steps, for PDPO, out of a model's own replies to the policy questions of a split."""

    steps: Steps = Steps()
    reward: Reward = rewards.Answer()  # whose `correct` says that a reply is right
    seed: int = 0


AnyRun = SFTRun | PreferenceRun | PolicyRun | EvalRun | ProbeRun | StepsRun


def load_model(run: AnyRun, mesh: Mesh) -> hf.Loaded:
    """The model that a run starts from, computing as the run asks; fresh weights if it says so.

    What the run freezes is in its frozen_dtype, and with LoRA the adapters are there.
    """
    cfg = dataclasses.replace(hf.read_config(run.model), compute=run.compute)
    graph, shapes = hf.abstract(cfg)
    if not isinstance(run, Run):
        return hf.load(run.model, mesh=mesh)._replace(cfg=cfg, graph=graph)
    still = set(paths.names(shapes if run.lora.rank else divide(run, shapes)[1]))
    kind = lambda name: run.frozen_dtype if name in still else "float32"
    if run.init:
        params = hf.initialise(cfg, run.seed, mesh=mesh).params
        flat = nnx.to_flat_state(params)
        flat = [(path, v.replace(v[...].astype(kind(paths.join(path))))) for path, v in flat]
        params = nnx.from_flat_state(flat)
    else:
        params = hf.load(run.model, mesh=mesh, dtype=kind).params
    if run.lora.rank:
        graph, params = lora.attach(graph, params, run.lora, run.seed, mesh=mesh)
    return hf.Loaded(cfg, graph, params)


def divide(run: Run, params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """(what the run trains, what it freezes) of the model's weights, LoRA's among them."""
    if run.lora.rank and run.freeze:
        raise ValueError(
            f"freeze={run.freeze} with lora.rank {run.lora.rank}: LoRA freezes all but its "
            "adapters. Leave freeze empty; lora.targets says which layers get one"
        )
    train = lora.TRAINED if run.lora.rank else ()
    return states.split(params, freeze=run.freeze, train=train)


def make_builder(model: str | pathlib.Path, cfg: Any, data: Data | None) -> pipeline.Builder:
    """What makes the trees of a record for this model: its chat, geometry and positions. Without
    `data`, of single clips alone."""
    prompting = cfg.prompting
    words = chat.Chat(model, prompting.markers)
    return pipeline.Builder(words, prompting, data, context=cfg.text.max_positions)


def resolve(value: Any) -> Any:
    """The same run with every "@checkpoints/NAME" replaced by the folder's path."""
    if isinstance(value, str) and value.startswith(SHIPPED):
        folder = pathlib.Path(str(importlib.resources.files("configs") / "checkpoints"))
        path = folder / value.removeprefix(SHIPPED)
        if not path.exists():
            there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
            raise FileNotFoundError(f"{value}: no {path}; shipped are {there or 'none'}")
        return str(path)
    if isinstance(value, tuple):
        return tuple(resolve(v) for v in value)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{k: resolve(v) for k, v in _fields(value).items()})
    return value


def plain(value: Any) -> Any:
    """Plain JSON of a run; a dataclass says its class, so that an optimizer can be told."""
    if dataclasses.is_dataclass(value):
        return {"class": type(value).__name__} | {k: plain(v) for k, v in _fields(value).items()}
    return [plain(v) for v in value] if isinstance(value, tuple) else value


def read(saved: dict[str, Any]) -> AnyRun:
    """The run that `plain` wrote. ValueError names what this version does not know."""
    return _read(saved, AnyRun, "")


def _read(value: Any, kind: Any, path: str) -> Any:
    options = [k for k in (typing.get_args(kind) or (kind,)) if dataclasses.is_dataclass(k)]
    if not (isinstance(value, dict) and options):
        return _tuples(value)
    value = dict(value)
    name = value.pop("class", None)
    found = [k for k in options if k.__name__ == name]
    if not found:
        raise ValueError(
            f"the saved run's {path or 'class'} is a {name!r}, which this version does not know "
            f"there; it knows {[k.__name__ for k in options]}"
        )
    hints = typing.get_type_hints(found[0])
    if unknown := sorted(value.keys() - hints.keys()):
        raise ValueError(f"the saved run's {path or 'top'} has unknown settings {unknown}")
    return found[0](**{k: _read(v, hints[k], f"{path}.{k}".strip(".")) for k, v in value.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
