"""The command line: `jaxvid VERB ...`; `jaxvid VERB --help` shows an example of each.

A config is a Python file with `get_config(runlocal=False)`, or the name of a shipped recipe;
`CONFIG:runlocal` is its small variant. Every field of what it returns is a flag. What the verbs do
is in the rooms; this file puts the parts of a run together. Verbs import what they need when they
run, so that help is quick; for the same reason runs and models stand here without their types.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import pathlib
import pkgutil
import platform
import sys
from typing import Any

PACKAGES = ("jaxvid", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")


def main(argv: list[str] | None = None) -> int:
    """Entry point of `jaxvid`. Returns the exit code; errors a user can mend are one line."""
    parser, verbs = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.verb is None:
        parser.print_help()
        return 2
    if rest and not args.overrides:
        known = [o for a in verbs[args.verb]._actions for o in a.option_strings]
        near = difflib.get_close_matches(rest[0], known, 1)
        hint = f"; perhaps you meant {near[0]}" if near else ""
        verbs[args.verb].error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    try:
        return args.run(args, rest)
    except (ValueError, FileNotFoundError, FileExistsError, FloatingPointError) as error:
        if args.trace:
            raise
        print(f"jaxvid {args.verb}: {error}", file=sys.stderr)
        return 1


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog="jaxvid", description=__doc__.split(";")[0])
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    made: dict[str, argparse.ArgumentParser] = {}

    def verb(name, run, text, example, *, overrides=False):
        # A verb with overrides leaves --help to the config, whose flags it must show.
        p = made[name] = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: jaxvid {name} {example}",
            allow_abbrev=False,
            add_help=not overrides,
        )
        p.add_argument("--trace", action="store_true", help="show where an error was raised")
        p.set_defaults(run=run, overrides=overrides)
        return p

    p = verb("train", _train, "train by a recipe", "tiny_sft --workdir runs/sft", overrides=True)
    p.add_argument("config", nargs="?", help="path or name of a recipe, `:runlocal` for the small")
    p.add_argument("--workdir", type=pathlib.Path)
    p = verb("eval", _eval, "answer every pair", "tiny_eval --workdir runs/eval", overrides=True)
    p.add_argument("config", nargs="?", help="path or name of a recipe")
    p.add_argument("--workdir", type=pathlib.Path)
    p = verb("ask", _ask, "ask a model about a clip", 'runs/sft/model a.mp4 "What happens?"')
    p.add_argument("model", type=pathlib.Path)
    p.add_argument("clip", type=pathlib.Path)
    p.add_argument("question")
    p.add_argument("--frames", type=int, help="default: as the model was trained")
    p.add_argument("--height", type=int)
    p.add_argument("--width", type=int)
    p.add_argument("--max-tokens", type=int, default=64)
    p = verb("validate", _validate, "read every byte of shards", "runs/shards --media")
    p.add_argument("shards", type=pathlib.Path, nargs="+")
    p.add_argument("--media", action="store_true", help="decode every clip as well")
    p = verb("inspect", _inspect, "show a model folder", "runs/sft/model")
    p.add_argument("model", type=pathlib.Path)
    verb("env", _env, "versions and devices, for a report", "")
    p = verb("tiny", _tiny, "a small model with fresh weights", "qwen2_5_vl runs/tiny")
    p.add_argument("family", choices=["qwen2_5_vl"])
    p.add_argument("out", type=pathlib.Path, help="a folder with a tokenizer gets its vocabulary")
    p.add_argument("--seed", type=int, default=0)
    p = verb("export", _export, "a checkpoint as a model folder", "runs/sft out --which best")
    p.add_argument("workdir", type=pathlib.Path)
    p.add_argument("out", type=pathlib.Path)
    p.add_argument("--which", default="last", help="last, best, or a step")
    p = verb("report", _report, "what a run has measured", "runs/sft")
    p.add_argument("workdir", type=pathlib.Path)
    return parser, made


# Configs ------------------------------------------------------------------------------------------


def load_config(name: str, overrides: list[str], prog: str = "jaxvid train"):
    """The run a recipe gives, with typed overrides (`--optimizer.lr 1e-3`) and paths resolved.

    `name` is a path to a Python file or a module of the `configs` package; `:runlocal` after it
    asks for the small variant. A wrong flag ends the program with the nearest ones named.
    """
    import tyro

    from jaxvid import config

    path, _, variant = name.partition(":")
    if variant not in ("", "runlocal"):
        raise ValueError(f"config {name!r}: the only variant is `:runlocal`, not {variant!r}")
    run = _recipe(path).get_config(runlocal=variant == "runlocal")
    if not isinstance(run, config.AnyRun):
        raise ValueError(
            f"get_config() of {path} returned a {type(run).__name__}; it must return one of "
            f"{[k.__name__ for k in config.AnyRun.__args__]} from jaxvid.config"
        )
    # Of a union (an optimizer) the flags are those of the class that the recipe chose.
    kind = tyro.conf.AvoidSubcommands[type(run)]
    return config.resolve(tyro.cli(kind, default=run, args=overrides, prog=f"{prog} {name}"))


def _recipe(path: str) -> Any:
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


def _from_command(args: argparse.Namespace, rest: list[str]):
    if args.config is None and rest and not rest[0].startswith("-"):
        args.config = rest.pop(0)  # argparse gives up on it where it stands after an option
    if args.config is None:
        print(
            f"usage: jaxvid {args.verb} CONFIG [--field.sub VALUE ...] --workdir DIR\n"
            f"       jaxvid {args.verb} CONFIG --help     shows every field of CONFIG\n"
            f"example: jaxvid {args.verb} configs/tiny_base.py:runlocal --workdir /tmp/run"
        )
        raise SystemExit(0 if {"-h", "--help"} & {*rest} else 2)
    run = load_config(args.config, rest, f"jaxvid {args.verb}")
    if args.workdir is None:
        raise ValueError("no --workdir; name the folder that this run shall write to")
    return run


# A training run -----------------------------------------------------------------------------------


def train(run, workdir: pathlib.Path):
    """Run a recipe to its end, from its last checkpoint if there is one.

    Writes config.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end, model/.
    """
    import jax

    from jaxvid import config, sharding
    from jaxvid.train import loop, state

    mesh = sharding.make_mesh(run.replica, run.fsdp, run.tensor)
    sharding.row_sharding(mesh, run.data.budget.rows)  # says at once if the rows do not divide
    saved = _save_config(run, workdir)
    with jax.set_mesh(mesh):
        loaded = config.load_model(run, mesh)
        steps = run.steps * run.updates_per_step()
        tx = run.optimizer.build(steps, loaded.params)
        update, stream, prepare = _update(run, loaded, tx, mesh)
        result = loop.train(
            state.create(loaded.params, tx, mesh),
            update,
            stream,
            run.loop_settings(),
            workdir,
            rate=run.optimizer.rate(steps),
            evaluate=_evaluation(run, loaded, mesh, prepare),
            config=saved,
            describe=functools.partial(_record_ids, run),
        )
        if not result.interrupted:
            _write_model(run, loaded.cfg, result.state.params, workdir / "model")
    return result


def _update(run, loaded, tx, mesh):
    """The update of a kind of run, the stream it reads, and what validation does to a batch."""
    import jax

    from jaxvid import config
    from jaxvid.data import pipeline
    from jaxvid.train import loop, policy, step

    builder = config.make_builder(run.model, loaded.cfg, run.data)
    share = {"process": jax.process_index(), "processes": jax.process_count()}
    if isinstance(run, config.PolicyRun):
        temperature = run.rollout.sampling.temperature
        prompts = iter(pipeline.prompts(run.data, builder, run.seed, **share))
        parts = policy.Parts(
            settings=run.rollout,
            graph=loaded.graph,
            chat=builder.chat,
            stream=policy.Questions(prompts, run.data.pairs),
            train_step=step.make_step(loaded.graph, run.objective, tx, temperature=temperature),
            score=step.make_score(loaded.graph, temperature=temperature),
            reward=run.reward,
            advantages=run.advantages,
            budget=run.data.budget,
            mesh=mesh,
            reference=_reference(run, loaded, mesh) if run.objective.kl_coef else None,
        )
        return policy.make_update(parts, run.seed), parts.stream, lambda batch: batch
    batches = iter(pipeline.batches(run.data, builder, run.seed, **share))
    train_step = step.make_step(loaded.graph, run.objective, tx)
    if isinstance(run, config.PreferenceRun):
        score, reference = step.make_score(loaded.graph), _reference(run, loaded, mesh)
        prepare = lambda batch: batch._replace(ref=score(reference, batch).logp)
        return loop.preference(train_step, score, reference, mesh), batches, prepare
    return loop.supervised(train_step, mesh), batches, lambda batch: batch


def _reference(run, loaded, mesh):
    from jaxvid.models import hf
    from jaxvid.train import loop

    return hf.load(run.reference, mesh=mesh).params if run.reference else loop.frozen(loaded.params)


def _evaluation(run, loaded, mesh, prepare):
    """Validation: the objective's own loss, and answers to the policy questions if asked for."""
    import jax
    from flax import nnx

    from jaxvid import config
    from jaxvid.data import pipeline
    from jaxvid.eval import run as evaluation
    from jaxvid.train import loop, step

    if run.validation is None:
        if run.eval_every or run.ask:
            raise ValueError("eval_every or ask is set but there is no validation data; set both")
        return None
    builder = config.make_builder(run.model, loaded.cfg, run.validation)
    parts = []
    if not isinstance(run, config.PolicyRun) and set(run.validation.tasks) != {"policy"}:
        share = {"process": jax.process_index(), "processes": jax.process_count()}
        data = pipeline.batches(run.validation, builder, run.seed, epochs=1, **share)
        some = lambda: itertools.islice(iter(data), run.eval_batches or None)
        loss = step.make_eval(loaded.graph, run.objective)
        parts.append(loop.validation(loss, some, mesh, prepare=prepare))
    if run.ask is not None:

        def asked(state):
            model = nnx.merge(loaded.graph, state.params)
            return evaluation.scores(evaluation.evaluate(model, builder, run.ask, mesh=mesh))

        parts.append(asked)
    return lambda state: {k: v for part in parts for k, v in part(state).items()}


def _record_ids(run, n: int, item: Any) -> list[str]:
    """The ids of the records in update n."""
    import jax

    from jaxvid import config
    from jaxvid.data import pipeline

    if isinstance(run, config.PolicyRun):
        return sorted({question.record.id for question in item})
    share = {"process": jax.process_index(), "processes": jax.process_count()}
    return sorted(pipeline.update_ids(run.data, run.seed, n - 1, **share))


def _save_config(run, workdir: pathlib.Path) -> dict[str, Any]:
    """Write config.json; on a folder of an earlier run, say what has changed since."""
    from jaxvid import config

    saved, path = config.plain(run), workdir / "config.json"
    if path.is_file():
        changed = config.differences(json.loads(path.read_text()), json.loads(json.dumps(saved)))
        for line in changed:
            print(f"changed since the run began: {line}")
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    return saved


def _write_model(run, cfg, params, out: pathlib.Path) -> None:
    """The model folder; sampling.json in it says which frames the model was trained to see."""
    import jax

    from jaxvid.models import hf

    hf.save(out, cfg, params, like=run.model, dtype=run.export_dtype)
    if jax.process_index() == 0:
        text = json.dumps(dataclasses.asdict(run.data.sampling), indent=1)
        (out / "sampling.json").write_text(text + "\n")
        print(f"wrote {out}")


# Verbs --------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid import config

    run = _from_command(args, rest)
    if not isinstance(run, config.Run):
        raise ValueError(f"{args.config} is an EvalRun; run it with `jaxvid eval`")
    result = train(run, args.workdir)
    if result.interrupted:
        print(f"stopped and saved at step {result.step}; the same command goes on from there")
        return 143  # as a process that SIGTERM ended, so that a scheduler starts it again
    return 0


def evaluate(run, workdir: pathlib.Path):
    """Answer every pair; writes config.json, predictions.jsonl and results.json."""
    import jax
    from flax import nnx

    from jaxvid import config, sharding
    from jaxvid.eval import run as evaluation

    mesh = sharding.make_mesh(run.replica, run.fsdp, run.tensor)
    saved = _save_config(run, workdir)
    with jax.set_mesh(mesh):
        loaded = config.load_model(run, mesh)
        builder = config.make_builder(run.model, loaded.cfg, run.data)
        model = nnx.merge(loaded.graph, loaded.params)
        return evaluation.evaluate(model, builder, run.ask, out=workdir, about=saved, mesh=mesh)


def _eval(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid import config

    run = _from_command(args, rest)
    if not isinstance(run, config.EvalRun):
        raise ValueError(f"{args.config} is a {type(run).__name__}; `jaxvid eval` wants an EvalRun")
    overall = evaluate(run, args.workdir).overall
    for name in ("both", "real", "counterfactual"):
        print(f"{name} {getattr(overall, name).value:.3f}")
    print(f"wrote {args.workdir}/predictions.jsonl and {args.workdir}/results.json")
    return 0


def _ask(args: argparse.Namespace, rest: list[str]) -> int:
    import jax
    import numpy as np
    from flax import nnx

    from jaxvid import config
    from jaxvid.data import layout, media
    from jaxvid.models import hf
    from jaxvid.rollout import sampler

    loaded = hf.load(args.model)
    builder = config.make_builder(args.model, loaded.cfg, None)
    path = args.model / "sampling.json"
    asked = {k: vars(args)[k] for k in ("frames", "height", "width") if vars(args)[k] is not None}
    stored = json.loads(path.read_text()) if path.is_file() else {}
    clip = media.decode(args.clip.read_bytes(), media.Sampling(**stored | asked))
    patches, grid = media.patchify(clip.frames, builder.vision)
    image, chat = len(clip.frames) == 1, builder.chat
    prompt = chat.prompt(args.question, int(np.prod(grid)) // builder.vision.merge**2, image=image)
    tree = layout.tree(
        str(args.clip),
        prompt,
        builder.positions(prompt, [grid], [clip.seconds_per_frame * builder.vision.temporal]),
        builder.vision,
        placeholders=prompt == (chat.image_id if image else chat.video_id),
        patches=patches,
        grid=grid,
    )
    how = sampler.Sampling(max_tokens=args.max_tokens, temperature=0.0)
    keys = jax.random.split(jax.random.key(0), 1)
    model = nnx.merge(loaded.graph, loaded.params)
    drawn = sampler.generate_all(model, [tree], chat, how, group=1, keys=keys)
    print(chat.decode(drawn.tokens[0, 0, : drawn.length[0, 0]]))
    return 0


def _validate(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid.data import shards

    failed = 0
    for folder in args.shards:
        report = shards.validate(folder, media=args.media)
        print(f"{folder}: {report.records} records, {len(report.bad)} faults")
        for bad in report.bad:
            print(f"  {bad.file}[{bad.index}] {bad.id}: {bad.reason}")
        failed += bool(report.bad or not report.records)
    return 1 if failed else 0


def _inspect(args: argparse.Namespace, rest: list[str]) -> int:
    import jax

    from jaxvid.models import hf

    cfg = hf.read_config(args.model)
    _, params = hf.abstract(cfg)
    counts: dict[str, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        part = jax.tree_util.keystr(path[:1], simple=True)
        counts[part] = counts.get(part, 0) + x.size
    for name, part in dataclasses.asdict(cfg).items():
        print(f"{name}: {part}")
    for part, count in counts.items():
        print(f"{part}: {count:,} parameters")
    print(f"total: {sum(counts.values()):,} parameters")
    return 0


def _tiny(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid.models import hf

    known = args.out if (args.out / "tokenizer.json").is_file() else None
    loaded = hf.initialise(hf.tiny_config(known), args.seed)
    hf.save(args.out, loaded.cfg, loaded.params, like=known, dtype="float32")
    print(f"wrote {args.out}")
    return 0


def _export(args: argparse.Namespace, rest: list[str]) -> int:
    import jax

    from jaxvid import config, sharding
    from jaxvid.models import hf
    from jaxvid.train import checkpoint

    run = config.read(json.loads((args.workdir / "config.json").read_text()))
    saver = checkpoint.Checkpoints(args.workdir / "checkpoints", best=run.best, mode=run.best_mode)
    named = {"last": saver.latest, "best": saver.best_step}
    step = named[args.which]() if args.which in named else int(args.which)
    if step is None:
        raise FileNotFoundError(f"{args.workdir} has no {args.which} checkpoint")
    cfg, mesh = hf.read_config(run.model), sharding.make_mesh()
    with jax.set_mesh(mesh):
        _, shapes = hf.abstract(cfg)
        params = saver.restore_params(shapes, sharding.parameter_shardings(shapes, mesh), step)
        _write_model(run, cfg, params, args.out)
    return 0


def _report(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid.train import metrics

    lines = metrics.read(args.workdir)
    if not lines:
        raise ValueError(f"{args.workdir}/metrics.jsonl is empty; nothing was measured yet")
    names = sorted({name for line in lines for name in line} - {"step"})
    print(f"{args.workdir}: step {lines[-1]['step']}\n{'metric':40} {'first':>12} {'last':>12}")
    for name in names:
        seen = [line[name] for line in lines if line.get(name) is not None]
        if seen:
            print(f"{name:40} {seen[0]:12.5g} {seen[-1]:12.5g}")
    return 0


def _env(args: argparse.Namespace, rest: list[str]) -> int:
    import jax

    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        print(f"{name} {_version(name)}")
    for kind in sorted({d.device_kind for d in jax.devices()}):
        print(f"{sum(d.device_kind == kind for d in jax.devices())} x {kind}")
    return 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
