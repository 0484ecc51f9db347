"""A recipe, run: the one place where the parts of training and evaluation are put together."""

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import itertools
import json
import pathlib
import pkgutil
import tempfile
from types import ModuleType
from typing import Any, Literal

import jax
import optax
import tyro
from flax import nnx
from jax.sharding import Mesh

from jaxvid import config, files, hosts, perplexity, rewards, scoring, sharding
from jaxvid.config import AnyRun, EvalRun, ProbeRun, Run
from jaxvid.data import chat, frames, pipeline, shards, sidecar
from jaxvid.eval import probe as probes
from jaxvid.eval import run as evaluation
from jaxvid.eval import sound
from jaxvid.models import hf, lora, peft
from jaxvid.models.layers import Compute
from jaxvid.rollout import remote
from jaxvid.train import checkpoint, loop, optimizers, policy, state, step, tracker, work

FILES = ("*.safetensors", "*.json", "*.jinja")  # what a model folder computes with


def load_config(name: str, overrides: list[str], prog: str = "jaxvid train") -> AnyRun:
    """The run a recipe gives, with typed overrides (`--optimizer.lr 1e-3`) and paths resolved.

    `name` is a path to a Python file or a module of the `configs` package. `:runlocal` after it
    asks for the small variant; in a recipe with ARMS, `:ARM` for one of them. A wrong flag ends
    the program with the nearest ones named.
    """
    path, *variants = name.split(":")
    module = recipe(path)
    arms = [v for v in variants if v in arms_of(module)]
    unknown = [v for v in variants if v != "runlocal" and v not in arms]
    if unknown or len(arms) > 1:
        raise ValueError(
            f"config {name!r}: variants are `:runlocal` and at most one of the recipe's arms "
            f"({', '.join(arms_of(module)) or 'it has none'}), not {variants}"
        )
    given = {"arm": arms[0]} if arms else {}
    run = module.get_config(runlocal="runlocal" in variants, **given)
    if not isinstance(run, AnyRun):
        raise ValueError(
            f"get_config() of {path} returned a {type(run).__name__}; it must return one of "
            f"{[k.__name__ for k in AnyRun.__args__]} from jaxvid.config"
        )
    # Of a union (an optimizer) the flags are those of the class that the recipe chose.
    kind = tyro.conf.AvoidSubcommands[type(run)]
    return config.resolve(tyro.cli(kind, default=run, args=overrides, prog=f"{prog} {name}"))


def arms_of(module: ModuleType) -> tuple[str, ...]:
    """The arms of a recipe that compares some; none in others."""
    return vars(module).get("ARMS", ())


def recipe(path: str) -> ModuleType:
    """The module of a recipe, from a file or from the installed recipes."""
    file = pathlib.Path(path)
    if file.suffix == ".py":
        if not file.is_file():
            raise FileNotFoundError(f"no config file {file}")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        folder = importlib.import_module("configs").__path__
        shipped = [m.name for m in pkgutil.iter_modules(folder)]
        if path not in shipped:
            near = difflib.get_close_matches(path, shipped, 1)
            raise ValueError(
                f"no recipe {path!r}; {f'perhaps {near[0]!r}, ' if near else ''}the shipped ones "
                f"are {shipped}. Give one of those or the path of a .py file."
            )
        module = importlib.import_module(f"configs.{path}")
    if "get_config" not in vars(module):
        raise ValueError(f"{path} has no get_config(runlocal=False); a recipe needs one")
    return module


# A training run -----------------------------------------------------------------------------------


def train(run: Run, workdir: pathlib.Path, checkpoints: str = "", *, name: str = "") -> loop.Result:
    """Run a recipe to its end, from its last checkpoint if there is one.

    Writes config.json, metrics.jsonl, tensorboard/, checkpoints/ (or to the URL `checkpoints`) and,
    at the end, model/. `name` is what trackers call the run; default: the folder's.
    """
    tracker.check(run.wandb)
    mesh = _mesh(run)
    for data in filter(None, (run.data, run.validation)):  # say at once if rows do not divide
        sharding.row_sharding(mesh, data.budget.rows)
        sharding.check_tokens(mesh, data.budget.tokens)
    if isinstance(run, config.PolicyRun):
        rewards.check(run.reward)
    scoring.check(run)
    saved = _save_config(run, workdir)
    tracked = tracker.opened(run.wandb, name or workdir.resolve().name, workdir, saved)
    with tracked as also, jax.set_mesh(mesh):
        loaded = config.load_model(run, mesh)
        trained, frozen = config.divide(run, loaded.params)
        steps = run.steps * run.updates_per_step()
        tx = optimizers.scaled(run.optimizer.build(steps, trained), run.rates, trained)
        flops = _work(run, loaded, trained, frozen)
        update, stream, prepare = _update(run, loaded, trained, tx, mesh, workdir, flops)
        result = loop.train(
            state.create(trained, tx, mesh, frozen=frozen),
            update,
            stream,
            run.loop_settings(checkpoints),
            workdir,
            rate=run.optimizer.rate(steps),
            evaluate=_evaluation(run, loaded, mesh, prepare),
            config=saved,
            describe=functools.partial(_record_ids, run),
            also=also,
        )
        if not result.interrupted:
            write_model(run, loaded.cfg, result.state.weights, workdir / "model")
    return result


def _update(
    run: Run,
    loaded: hf.Loaded,
    trained: nnx.State,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    workdir: pathlib.Path,
    flops: step.Work,
):
    """The update of a kind of run, the stream it reads, and what validation does to a batch."""
    builder = config.make_builder(run.model, loaded.cfg, run.data)
    builder = scoring.with_sidecar(run, builder, "data")
    share = hosts.share()
    temperature = run.rollout.sampling.temperature if isinstance(run, config.PolicyRun) else 1.0
    train_step = step.make_step(
        loaded.graph,
        run.objective,
        tx,
        temperature=temperature,
        drop=lora.drop if run.lora.dropout else None,
        seed=run.seed,
        work=flops,
    )
    refer = functools.partial(_reference, run, loaded, trained, mesh)
    if isinstance(run, config.PolicyRun):
        score = step.make_score(loaded.graph, temperature=temperature)
        prompts = iter(pipeline.prompts(run.data, builder, run.seed, **share))
        parts = policy.Parts(
            settings=run.rollout,
            graph=loaded.graph,
            chat=builder.chat,
            stream=policy.Questions(prompts, run.data.pairs // share["processes"]),
            train_step=train_step,
            score=score,
            reward=run.reward,
            advantages=run.advantages,
            budget=run.data.budget,
            mesh=mesh,
            reference=refer(score, temperature) if run.objective.kl_coef else None,
            dropout=run.lora.dropout > 0,
            workdir=workdir,
            engine=remote.Server(chat=builder.chat, **vars(run.server)) if run.server.url else None,
        )
        return policy.make_update(parts, run.seed), parts.stream, lambda _, batch: batch
    batches = iter(pipeline.batches(run.data, builder, run.seed, **share))
    if isinstance(run, config.PreferenceRun) and not run.sidecar:
        reference = refer(step.make_score(loaded.graph), temperature)
        prepare = lambda now, batch: batch._replace(ref=reference(now, batch))
        return loop.preference(train_step, reference, mesh), batches, prepare
    return loop.supervised(train_step, mesh), batches, lambda _, batch: batch


def _work(run: Run, loaded: hf.Loaded, trained: nnx.State, frozen: nnx.State) -> step.Work:
    """What an update is for the model; where a reference scores the batch, its forward pass too."""
    learn = work.measure(loaded.cfg, loaded.graph, trained, frozen)
    if not isinstance(run, config.PreferenceRun) or run.sidecar:
        return learn
    graph, params = hf.abstract(loaded.cfg)
    refer = work.measure(loaded.cfg, graph, state.NONE, params)
    return lambda batch: learn(batch) + refer(batch)


def _reference(run: Run, loaded: hf.Loaded, trained: nnx.State, mesh: Mesh, score, temperature):
    """The run's reference: a folder, or where it starts. `score` is of the model as it is trained;
    a reference has no adapters."""
    if run.lora.rank:
        score = step.make_score(hf.abstract(loaded.cfg)[0], temperature=temperature)
    if run.reference:
        return loop.fixed(score, hf.load(run.reference, mesh=mesh).params)
    return loop.base(score) if run.lora.rank else loop.start(score, trained)


def _evaluation(run: Run, loaded: hf.Loaded, mesh: Mesh, prepare) -> loop.Evaluate | None:
    """Validation: the objective's own loss, and answers to the policy questions if asked for."""
    if run.validation is None:
        if run.eval_every or run.ask:
            raise ValueError("eval_every or ask is set but there is no validation data; set both")
        return None
    builder = config.make_builder(run.model, loaded.cfg, run.validation)
    builder = scoring.with_sidecar(run, builder, "validation")
    parts = []
    if not isinstance(run, config.PolicyRun) and set(run.validation.tasks) != {"policy"}:
        data = pipeline.batches(run.validation, builder, run.seed, epochs=1, **hosts.share())
        some = lambda: itertools.islice(iter(data), run.eval_batches or None)
        loss = step.make_eval(loaded.graph, run.objective)
        parts.append(loop.validation(loss, some, mesh, prepare=prepare))
    if run.ask is not None:

        def asked(state):
            model = nnx.merge(loaded.graph, state.weights)
            return evaluation.scores(evaluation.evaluate(model, builder, run.ask, mesh=mesh))

        parts.append(asked)
    return lambda state: {k: v for part in parts for k, v in part(state).items()}


def _record_ids(run: Run, n: int, item: Any) -> list[str]:
    """The ids of the records in update n."""
    if isinstance(run, config.PolicyRun):
        return sorted({question.record.id for question in item})
    return sorted(pipeline.update_ids(run.data, run.seed, n - 1, **hosts.share()))


def _mesh(run: AnyRun) -> Mesh:
    mesh = sharding.make_mesh(run.replica, run.fsdp, run.tensor, run.context)
    hosts.check(mesh)
    return mesh


def _save_config(run: AnyRun, workdir: pathlib.Path) -> dict[str, Any]:
    """Write config.json; on a folder of an earlier run, say what has changed since."""
    saved, path = config.plain(run), workdir / "config.json"
    if jax.process_index():
        return saved
    if path.is_file():
        changed = config.differences(json.loads(path.read_text()), json.loads(json.dumps(saved)))
        for line in changed:
            print(f"changed since the run began: {line}")
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    return saved


def export(workdir: pathlib.Path | str, out: pathlib.Path, which: str, *, adapter: bool) -> None:
    """A checkpoint ("last", "best" or a step) of the run in `workdir`, a folder here or at gs://,
    as a model folder, adapters merged; or its adapters alone, as a folder that PEFT loads.

    Raises FileNotFoundError without such a checkpoint, ValueError for adapters of a run without.
    """
    run = config.read(json.loads(files.read(files.inside(workdir, "config.json"))))
    if adapter and not run.lora.rank:
        raise ValueError(f"the run in {workdir} has no adapters (lora.rank 0); leave --adapter out")
    saver = checkpoint.Checkpoints(
        files.inside(workdir, "checkpoints"), best=run.best, mode=run.best_mode, tidy=False
    )
    named = {"last": saver.latest, "best": saver.best_step}
    at = named[which]() if which in named else int(which)
    if at is None:
        raise FileNotFoundError(f"{workdir} has no {which} checkpoint")
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        if run.lora.rank or run.freeze:
            loaded = config.load_model(run, mesh)
        else:  # all of it is in the checkpoint
            cfg = hf.read_config(run.model)
            loaded = hf.Loaded(cfg, *hf.abstract(cfg))
        shapes, frozen = config.divide(run, loaded.params)
        places = sharding.parameter_shardings(shapes, mesh)
        params = saver.restore_params(shapes, places, at, frozen=frozen)
        if adapter:
            peft.save(out, loaded.cfg, params, run.lora, base=run.model)
            print(f"wrote {out}")
        else:
            write_model(run, loaded.cfg, nnx.merge_state(params, frozen), out)


def write_model(run: Run, cfg: Any, params: nnx.State, out: pathlib.Path) -> None:
    """The model folder, adapters merged; sampling.json in it says which frames the model was
    trained to see."""
    params = lora.merge(params, run.lora) if run.lora.rank else params
    hf.save(out, cfg, params, like=run.model, dtype=run.export_dtype)
    if jax.process_index() == 0:
        text = json.dumps(dataclasses.asdict(run.data.sampling), indent=1)
        (out / "sampling.json").write_text(text + "\n")
        print(f"wrote {out}")


def evaluate(run: EvalRun, workdir: pathlib.Path) -> dict[str, evaluation.Results]:
    """Answer every pair under each control; WORKDIR/<control> gets replies and results."""
    mesh = _mesh(run)
    saved, found = _save_config(run, workdir), {}
    with jax.set_mesh(mesh):
        loaded = config.load_model(run, mesh)
        builder = config.make_builder(run.model, loaded.cfg, run.data)
        model = nnx.merge(loaded.graph, loaded.params)
        for control in run.controls:
            ask, out = dataclasses.replace(run.ask, control=control), workdir / control
            found[control] = evaluation.evaluate(
                model, builder, ask, out=out, about=saved, mesh=mesh
            )
    return found


def probe(run: ProbeRun, workdir: pathlib.Path) -> probes.Results:
    """Answer every probe; WORKDIR gets replies and results, and sound.json where it is asked."""
    rewards.check(run.reward)
    mesh = _mesh(run)
    saved = _save_config(run, workdir)
    with jax.set_mesh(mesh):
        loaded = config.load_model(run, mesh)
        builder = config.make_builder(run.model, loaded.cfg, run.data)
        model = nnx.merge(loaded.graph, loaded.params)
        found = probes.evaluate(
            model, builder, run.ask, run.reward, out=workdir, about=saved, mesh=mesh
        )
    if run.sound and jax.process_index() == 0:
        measured = sound.measures(found.predictions, seed=run.ask.seed)
        text = json.dumps({name: m._asdict() for name, m in measured.items()}, indent=1)
        (workdir / "sound.json").write_text(text + "\n")
        for name, m in measured.items():
            print(f"{name}: {m.value:.3f} ({m.low:.3f} to {m.high:.3f})")
    return found


def tpl(
    model: pathlib.Path,
    source: shards.Source,
    sampling: frames.Sampling,
    settings: perplexity.Settings,
    workdir: pathlib.Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> tuple[list[perplexity.Row], list[perplexity.Skipped]]:
    """Temporal perplexity of every answer of a source, computed in `dtype`; on all devices."""
    about = {"model": str(model), "weights": sidecar.of_files(model, FILES), "dtype": dtype}
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        cfg = dataclasses.replace(hf.read_config(model), compute=Compute(dtype=dtype))
        params = hf.load(model, mesh=mesh).params
        builder = config.make_builder(model, cfg, None)
        start = hf.abstract(cfg)[0], params, builder, source
        return perplexity.measure(*start, sampling, settings, workdir, mesh=mesh, about=about)


def sampling_of(
    folder: pathlib.Path, cfg: Any, asked: dict[str, Any] | None = None
) -> frames.Sampling:
    """Which frames a model sees: as it was trained (the folder's sampling.json), or else two a
    second, at most 32 of at most 256 tokens. `asked` takes the place of single settings."""
    path, vision = pathlib.Path(folder) / "sampling.json", cfg.prompting.vision
    if path.is_file():
        stored = json.loads(path.read_text())
    elif vision.size:
        stored = {"frames": 32, "fps": 2.0, "height": vision.size, "width": vision.size}
    else:
        most = 256 * (vision.patch * vision.merge) ** 2
        stored = {"frames": 32, "fps": 2.0, "height": 0, "width": 0, "max_pixels": most}
    return frames.Sampling(**stored | (asked or {}))


# What a tiny twin's own tokenizer knows as words; all other text is written letter by letter.
WORDS = (
    "Answer the question about the clip. What happens? Yes or no?",
    "The red ball moves left and the blue box moves right, then they collide and a sound is heard.",
    "It is faster, slower, brighter, darker, louder, silent; at the top, at the bottom, behind.",
)


def tiny(
    family: str,
    out: pathlib.Path,
    *,
    tokenizer: pathlib.Path | None = None,
    like: pathlib.Path | None = None,
    seed: int = 0,
) -> None:
    """Write a family's tiny twin: its own classes at laptop size with fresh weights, a tokenizer
    and a chat template. Every verb that takes a model takes it.

    `like` is a model folder, maybe of another family: its tokenizer is taken, with the family's
    control tokens added, and its weights wherever both have one of the same name and width.

    Raises ValueError for a family that is not known, and for a tokenizer without its tokens.
    """
    if like is not None and tokenizer is not None:
        raise ValueError(f"--like {like} and --tokenizer {tokenizer}: give one; --like has its own")
    with tempfile.TemporaryDirectory() as made:
        found = hf.named(family)
        special = tuple(dict.fromkeys((*chat.CONTROL, *found.special.values())))
        markers = hf.tiny_config(family).prompting.markers
        if like is not None:
            chat.extend_tokenizer(like, made, special=special, markers=markers)
        elif tokenizer is None:
            chat.build_tokenizer(WORDS, 640, made, special=special, markers=markers)
        tokenizer = tokenizer or pathlib.Path(made)
        loaded = hf.initialise(hf.tiny_config(family, tokenizer), seed)
        params = loaded.params if like is None else _grafted(loaded.params, hf.load(like).params)
        hf.save(out, loaded.cfg, params, like=tokenizer, dtype="float32")
    print(f"wrote {out}")


def _grafted(params: nnx.State, source: nnx.State) -> nnx.State:
    """`params` with the weights of `source` that are of one path and shape. A table of tokens may
    be the longer one: its first rows are those of the source."""
    there = dict(nnx.to_flat_state(source))
    taken = []
    for path, v in nnx.to_flat_state(params):
        x, old = v[...], there[path][...] if path in there else None
        if old is not None and old.ndim == x.ndim and old.shape[1:] == x.shape[1:]:
            rows = min(len(old), len(x)) if x.ndim else None
            if old.shape == x.shape or path[-1] == "table":
                x = x.at[:rows].set(old[:rows])
        taken.append((path, v.replace(x)))
    return nnx.from_flat_state(taken)
