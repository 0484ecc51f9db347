"""Memory of a host while it loads a sharded model folder: in one process, and in two that share it.

    python -m benchmarks.load --folder /tmp/model          about 3 minutes and 8 GB

The folder is made once: a bfloat16 model of Qwen2.5-VL-3B's widths with fewer layers, in files of
200 MB. It is loaded as float32 onto 8 devices of one process, and onto 4 + 4 devices of two. On CPU
the devices' memory is the host's, so what counts is what is held above the weights themselves.
Memory is what the process has of its own (RssAnon), sampled every 2 ms; pages of the mapped files
can be dropped at any time and are left out.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import threading
import time

import jax
import ml_dtypes
import numpy as np

from benchmarks import measure
from benchmarks.measure import MIB
from jaxvid import sharding
from jaxvid.models import decoder, hf, qwen25vl, vision, weights

DEVICES = 8
PORT = 47_311


def config(layers: int, width: int, ffn: int, vocab: int) -> qwen25vl.Config:
    """Qwen2.5-VL-3B's decoder where the numbers are its own, and a small tower."""
    text = decoder.Config(
        layers=layers,
        width=width,
        ffn=ffn,
        heads=width // 128,
        kv_heads=2,
        vocab=vocab,
        rope_sections=(16, 24, 24),
    )
    tower = vision.Config(layers=1, width=64, ffn=64, heads=4, out=width, full=(0,))
    return qwen25vl.Config(text=text, vision=tower, tied=True)


def make(folder: pathlib.Path, cfg: qwen25vl.Config) -> None:
    """A model folder of random numbers, a tensor at a time."""
    rng = np.random.default_rng(0)
    places = hf.family_of(cfg).places(cfg)
    shapes = hf.shapes(cfg)

    def tensors():
        joined: dict[str, list] = {}
        for path, place in places.items():
            joined.setdefault(place.name, []).append((place, shapes[path]))
        for name, pieces in joined.items():
            stacked = "{}" in name
            for i in range(pieces[0][1][0] if stacked else 1):
                found = []
                for place, shape in sorted(pieces, key=lambda p: p[0].part):
                    own = shape[1:] if stacked else shape
                    x = rng.random(own, np.float32).astype(ml_dtypes.bfloat16)
                    found.append(weights.to_stored(x, place))
                x = np.concatenate(found)
                extra = pieces[0][0].stored
                yield name.format(i), np.ascontiguousarray(x.reshape(-1, *extra) if extra else x)

    folder.mkdir(parents=True)
    weights.SHARD_BYTES = 200 * MIB
    weights.write(folder, tensors())
    (folder / "config.json").write_text(json.dumps(cfg.to_hf()))


def resident() -> int:
    """Bytes that this process has of its own now."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (own,) = [line for line in lines if line.startswith("RssAnon")]
    return int(own.split()[1]) * 1024


def child(folder: str, process: int, processes: int) -> None:
    """Load this process's share and print what it took."""
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    if processes > 1:
        jax.distributed.initialize(f"localhost:{PORT}", processes, process)
    mesh = sharding.make_mesh()
    before, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    loaded = jax.block_until_ready(hf.load(folder, mesh=mesh).params)
    took = time.perf_counter() - start
    done.set()
    watcher.join()
    own = sum(s.data.nbytes for x in jax.tree.leaves(loaded) for s in x.addressable_shards)
    largest = max(s.data.nbytes for x in jax.tree.leaves(loaded) for s in x.addressable_shards)
    above = peak[0] - before - own
    print(json.dumps({"own": own, "above": above, "largest": largest, "seconds": took}))


def run(folder: pathlib.Path, processes: int) -> dict[str, float]:
    """The largest figures over the processes of one load."""
    command = [sys.executable, "-m", "benchmarks.load", "--folder", str(folder), "--child"]
    started = [
        subprocess.Popen([*command, str(i), str(processes)], stdout=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    said = [json.loads(p.communicate()[0].splitlines()[-1]) for p in started]
    if any(p.returncode for p in started):
        raise RuntimeError("a process that loads failed; its error is above")
    return {name: max(s[name] for s in said) for name in said[0]}


def main(args: list[str] | None = None) -> None:
    """Make the folder if it is not there, load it both ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=11_008)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--child", nargs=2, type=int, help="used by itself")
    parser.add_argument("--out", default="", help="also write the table here")
    chosen = parser.parse_args(args)
    if chosen.child:
        child(str(chosen.folder), *chosen.child)
        return
    if not chosen.folder.exists():
        make(chosen.folder, config(chosen.layers, chosen.width, chosen.ffn, chosen.vocab))
    rows = []
    for processes in (1, 2):
        found = run(chosen.folder, processes)
        name = f"{processes} process{'es' * (processes > 1)}"
        share, largest = found["own"] / MIB, found["largest"] / MIB
        rows.append(measure.Row(f"{name}: weights of a process, MiB", f"{share:.0f}"))
        rows.append(measure.Row(f"{name}: largest piece of a device, MiB", f"{largest:.0f}"))
        above = found["above"] / MIB
        what = f"{name}: above its weights, MiB"
        rows.append(measure.at_most(what, above, 2 * largest, "{:.0f}"))
        rows.append(measure.Row(f"{name}: seconds", f"{found['seconds']:.1f}"))
    measure.table(rows, chosen.out)


if __name__ == "__main__":
    main()
