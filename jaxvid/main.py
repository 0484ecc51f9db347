"""The command line: `jaxvid VERB ...`; `jaxvid VERB --help` shows an example of each.

A config is a Python file with `get_config(runlocal=False)`, or the name of a shipped recipe;
`CONFIG:runlocal` is its small variant. Every field of what it returns is a flag. What the verbs do
is in the rooms and in runs.py. Verbs import what they need when they run, so that help is quick.
"""

import argparse
import dataclasses
import difflib
import importlib.metadata
import pathlib
import platform
import sys

SCORE = "configs/tiny_pasta.py --out runs/pasta/reference"
ABLATE = "ablation_dna --workdir runs/ablation --seeds 5"
TPL = "runs/utr/shards --model runs/sft/model --keep-top 0.8 --out runs/utr/kept"
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
    p.add_argument("--workdir", help="a local folder, or gs://, s3:// and others of fsspec")
    _distributed_flag(p)
    p = verb("score", _score, "a reference's log-probs, once", SCORE, overrides=True)
    p.add_argument("config", nargs="?", help="path or name of a recipe of preferences")
    p.add_argument("--out", type=pathlib.Path, help="folder; default: beside the first shards")
    p = verb("eval", _eval, "answer every pair", "tiny_eval --workdir runs/eval", overrides=True)
    p.add_argument("config", nargs="?", help="path or name of a recipe")
    p.add_argument("--workdir", help="a local folder, or gs://, s3:// and others of fsspec")
    _distributed_flag(p)
    p = verb(
        "steps", _steps, "step pairs for pDPO", "tiny_steps --workdir runs/pdpo", overrides=True
    )
    p.add_argument("config", nargs="?", help="path or name of a recipe")
    p.add_argument("--workdir", type=_local)
    p = verb("ablate", _ablate, "arms of a recipe over seeds", ABLATE, overrides=True)
    p.add_argument("config", nargs="?", help="path or name of a recipe with ARMS")
    p.add_argument("--workdir", type=_local)
    p.add_argument("--seeds", type=int, default=5)
    p = verb("ask", _ask, "ask a model about a clip", 'runs/sft/model a.mp4 "What happens?"')
    p.add_argument("model", type=pathlib.Path)
    p.add_argument("clip", type=pathlib.Path)
    p.add_argument("question")
    _sampling_flags(p)
    p.add_argument("--sound", action="store_true", help="a video is heard as well as seen")
    p.add_argument("--max-tokens", type=int, default=64)
    p = verb("validate", _validate, "read every byte of shards", "runs/shards --media")
    p.add_argument("shards", type=pathlib.Path, nargs="+")
    p.add_argument("--media", action="store_true", help="decode every clip as well")
    p = verb("inspect", _inspect, "parts, tokens of a clip, memory", "runs/sft/model --seconds 30")
    p.add_argument("model", type=pathlib.Path)
    p.add_argument("--clip", type=pathlib.Path, help="whose tokens are counted")
    p.add_argument("--seconds", type=float, default=10.0, help="of a clip without --clip")
    p.add_argument("--pixels", default="720x1280", help="HEIGHTxWIDTH of it")
    _sampling_flags(p)
    p.add_argument("--sound", action="store_true", help="a video is heard as well as seen")
    p.add_argument("--chips", type=int, default=16, help="that share the weights in training")
    p.add_argument("--tokens", type=int, default=8192, help="of the rows of one chip")
    p.add_argument("--trained", type=int, help="weights that are trained; default: all")
    p.add_argument("--moments", type=int, default=2, help="of the optimizer; AdamW 2, Adafactor 0")
    _tpl_flags(verb("tpl", _tpl, "temporal perplexity of answers", TPL))
    verb("env", _env, "versions and devices, for a report", "")
    p = verb("tiny", _tiny, "a small model with fresh weights", "qwen2_5_vl runs/start")
    p.add_argument("family", help="of the model; a wrong name lists those there are")
    p.add_argument("out", type=pathlib.Path)
    p.add_argument(
        "--tokenizer", type=pathlib.Path, help="folder whose tokenizer it gets; default: its own"
    )
    p.add_argument("--like", type=pathlib.Path, help="folder whose weights it takes where they fit")
    p.add_argument("--seed", type=int, default=0)
    p = verb("export", _export, "a checkpoint as a model folder", "runs/sft out --which best")
    p.add_argument("workdir", help="of the run; a local folder or gs://")
    p.add_argument("out", type=pathlib.Path)
    p.add_argument("--which", default="last", help="last, best, or a step")
    p.add_argument("--adapter", action="store_true", help="a LoRA run's adapters alone, for PEFT")
    p = verb("report", _report, "one HTML file of a folder of stages", "runs/local")
    p.add_argument("workdir", type=pathlib.Path)
    return parser, made


def _local(text: str) -> pathlib.Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not a local folder, which this verb wants")
    return pathlib.Path(text)


def _distributed_flag(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--distributed",
        default="",
        help="auto on a TPU slice, SLURM, GKE; or HOST:PORT,I,N; default: one process",
    )


def _tpl_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("shards", help="folder of shards, or a pattern of folders")
    p.add_argument("--model", type=pathlib.Path, required=True)
    p.add_argument("--workdir", type=_local, default=pathlib.Path("runs/tpl"))
    p.add_argument("--split", default="train")
    p.add_argument("--frame", choices=("last", "middle", "random"), default="last")
    p.add_argument("--tasks", nargs="+", help="whose answers; default: sft choice caption")
    p.add_argument("--seed", type=int, default=0, help="of random frames, and of the intervals")
    p.add_argument("--rows", type=int, default=8, help="of a batch")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    _sampling_flags(p)
    p.add_argument("--keep-above", type=float, help="write records of at least this TPL to --out")
    p.add_argument("--keep-top", type=float, help="or this share of them, the largest")
    p.add_argument("--by", choices=("record", "example"), default="record", help="what is kept")
    p.add_argument("--out", type=pathlib.Path, help="new folder of shards with what is kept")


def _sampling_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--frames", type=int, help="most frames; default: as the model was trained")
    p.add_argument("--fps", type=float)
    p.add_argument("--height", type=int)
    p.add_argument("--width", type=int)
    p.add_argument("--max-pixels", type=int, help="of a frame")


def _sampling(args: argparse.Namespace, cfg):
    """What the flags ask for, on top of what the folder says."""
    from jaxvid import runs

    names = ("frames", "fps", "height", "width", "max_pixels")
    asked = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    return runs.sampling_of(args.model, cfg, asked)


def _from_command(args: argparse.Namespace, rest: list[str], folder: str = "workdir"):
    from jaxvid import runs

    if args.config is None and rest and not rest[0].startswith("-"):
        args.config = rest.pop(0)  # argparse gives up on it where it stands after an option
    if args.config is None:
        example = SCORE if folder == "out" else "configs/tiny_base.py:runlocal --workdir /tmp/run"
        print(
            f"usage: jaxvid {args.verb} CONFIG [--field.sub VALUE ...] --{folder} DIR\n"
            f"       jaxvid {args.verb} CONFIG --help     shows every field of CONFIG\n"
            f"example: jaxvid {args.verb} {example}"
        )
        raise SystemExit(0 if {"-h", "--help"} & {*rest} else 2)
    run = runs.load_config(args.config, rest, f"jaxvid {args.verb}")
    if folder == "workdir" and args.workdir is None:
        raise ValueError("no --workdir; name the folder that this run shall write to")
    return run


# Verbs --------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid import config, files, hosts, runs
    from jaxvid.train import checkpoint

    hosts.start(args.distributed)
    run = _from_command(args, rest)
    if not isinstance(run, config.Run):
        raise ValueError(f"{args.config} is a {type(run).__name__}; it does not train")
    there = files.checkpoints(args.workdir, hosts.share()["processes"])
    if there:
        checkpoint.check_bucket(there)
    with files.at(args.workdir, checkpoints=not there, until=hosts.until) as workdir:
        name = pathlib.PurePath(args.workdir).name
        result = runs.train(run, workdir, there, name=name)
    if files.is_remote(args.workdir):
        checkpoint.say(f"copied to {args.workdir}")
    if result.interrupted:
        print(f"stopped and saved at step {result.step}; the same command goes on from there")
        return 143  # as a process that SIGTERM ended, so that a scheduler starts it again
    return 0


def _score(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid import config, scoring

    run = _from_command(args, rest, "out")
    if not isinstance(run, config.PreferenceRun):
        raise ValueError(
            f"{args.config} is a {type(run).__name__}; `jaxvid score` wants a PreferenceRun"
        )
    out = scoring.score(run, args.out)
    print(f"wrote {out}; train with --sidecar {out}")
    return 0


def _eval(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid import config, files, hosts, runs

    hosts.start(args.distributed)
    run = _from_command(args, rest)
    if not isinstance(run, config.EvalRun | config.ProbeRun):
        raise ValueError(
            f"{args.config} is a {type(run).__name__}; `jaxvid eval` wants an EvalRun or a ProbeRun"
        )
    with files.at(args.workdir, until=hosts.until) as workdir:
        if isinstance(run, config.ProbeRun):
            results = runs.probe(run, workdir)
        else:
            results = runs.evaluate(run, workdir)
    if hosts.share()["process"] == 0:
        _tell(run, results)
        print(f"wrote replies and results to {args.workdir}")
    return 0


def _tell(run, found) -> None:
    """Print the scores of an evaluation."""
    if not isinstance(found, dict):  # of probes
        for kind, s in (found.kinds | {"overall": found.overall}).items():
            a = s.accuracy
            print(
                f"{kind}: {a.value:.3f} ({a.low:.3f} to {a.high:.3f}) of {s.n} right, grade "
                f"{s.grade.value:.3f}, unparsed {s.unparsed:.3f}"
            )
        return
    for control, results in found.items():
        o = results.overall
        print(
            f"{control}: both {o.both.value:.3f}  real {o.real.value:.3f}  counterfactual "
            f"{o.counterfactual.value:.3f}  unparsed {o.unparsed:.3f}"
        )
        for name, m in results.votes.items():
            print(
                f"{control}, {name} of {run.ask.samples}: both {m.both.value:.3f}  real "
                f"{m.real.value:.3f}  counterfactual {m.counterfactual.value:.3f}"
            )


def _steps(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid import config, stepping

    run = _from_command(args, rest)
    if not isinstance(run, config.StepsRun):
        raise ValueError(
            f"{args.config} is a {type(run).__name__}; `jaxvid steps` wants a StepsRun"
        )
    print(stepping.told(stepping.run(run, args.workdir)))
    print(f"the pairs are in {args.workdir / 'shards'}")
    return 0


def _ablate(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid import ablation

    _from_command(args, list(rest))  # a wrong flag is told before the first arm starts
    print(ablation.run(args.config, rest, args.seeds, args.workdir))
    return 0


def _ask(args: argparse.Namespace, rest: list[str]) -> int:
    import jax
    from flax import nnx

    from jaxvid import config
    from jaxvid.data import pipeline
    from jaxvid.models import hf
    from jaxvid.rollout import sampler

    loaded = hf.load(args.model)
    builder = config.make_builder(args.model, loaded.cfg, None)
    seen = pipeline.Seen(_sampling(args, loaded.cfg), sound=args.sound)
    clip = builder.clip(args.clip.read_bytes(), str(args.clip), seen)
    tree = builder.tree(str(args.clip), clip, args.question, ())
    chat = builder.chat
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
    from jaxvid import inspection
    from jaxvid.data import media
    from jaxvid.models import hf
    from jaxvid.models.layers import Compute

    cfg = hf.read_config(args.model)
    print(f"{hf.family_of(cfg).name}, {cfg.text.max_positions:,} tokens of context")
    counts = inspection.parts(cfg)
    for part, count in counts.items():
        print(f"  {part:<12}{count:>16,} parameters")
    print(f"  {'all':<12}{sum(counts.values()):>16,} parameters")
    sampling = _sampling(args, cfg)
    if args.clip:
        told = media.plan(args.clip.read_bytes(), sampling, cfg.prompting.vision)
    else:
        size = args.pixels.split("x")
        if len(size) != 2 or not all(side.isdigit() and int(side) for side in size):
            raise ValueError(f"--pixels {args.pixels!r}; give HEIGHTxWIDTH, such as 720x1280")
        height, width = map(int, size)
        told = inspection.imagined(args.seconds, height, width, sampling, cfg)
    clip = inspection.cost(args.model, cfg, told, heard=args.sound)
    h, w = clip.size
    named = args.clip or f"a clip of {args.seconds:g} s, {args.pixels} pixels"
    print(f"{named}: {clip.tokens:,} tokens")
    print(f"  {clip.frames} frames of {h} x {w}, {clip.sound} log-mel frames, by {sampling}")
    cfg = dataclasses.replace(cfg, compute=Compute(dtype="bfloat16"))
    step = {"chips": args.chips, "tokens": args.tokens, "moments": args.moments}
    each = inspection.memory(cfg, **step, trained=args.trained)
    print(f"training in bfloat16 on {args.chips} chips, {args.tokens:,} tokens on each, about")
    for what, size in each.items():
        print(f"  {size:8.2f} GiB  {what}")
    print(f"  {sum(each.values()):8.2f} GiB  a chip")
    return 0


def _tiny(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid import runs

    given = {"tokenizer": args.tokenizer, "like": args.like}
    runs.tiny(args.family, args.out, **given, seed=args.seed)
    return 0


def _export(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid import runs

    runs.export(args.workdir, args.out, args.which, adapter=args.adapter)
    return 0


def _report(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid.eval import report

    page = report.write(args.workdir / "report.html", report.collect(args.workdir))
    print(f"wrote {page}")
    return 0


def _tpl(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxvid import config, perplexity, runs, sift
    from jaxvid.data import shards
    from jaxvid.models import hf

    how = None
    limits = args.keep_above, args.keep_top
    if limits != (None, None):
        how = sift.Filter(above=args.keep_above, top=args.keep_top, by=args.by)
    if (how is None) != (args.out is None):
        raise ValueError("filtering wants --out DIR and one of --keep-above X, --keep-top SHARE")
    args.model = pathlib.Path(config.resolve(str(args.model)))
    source = shards.Source(args.shards, args.split)
    tasks = {"tasks": tuple(args.tasks)} if args.tasks else {}
    settings = perplexity.Settings(frame=args.frame, seed=args.seed, rows=args.rows, **tasks)
    sampling = _sampling(args, hf.read_config(args.model))
    rows, skipped = runs.tpl(args.model, source, sampling, settings, args.workdir, args.dtype)
    print(perplexity.page(perplexity.summary(rows, skipped, seed=args.seed), settings))
    print(f"wrote {args.workdir / 'tpl.jsonl'}")
    if how is not None:
        about = {"model": str(args.model), "frame": args.frame, "seed": args.seed}
        written, left = sift.write(source, rows, how, args.out, about)
        print(
            f"wrote {written.records} records to {args.out}; {len(left)} left out are listed in it"
        )
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
