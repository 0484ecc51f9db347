"""One archive with all that a machine needs: code, recipe, pinned versions, set-up, the command.

    code/               jaxvid, configs, data_gen, launch
    recipes/            the recipe, if it lies outside of the code
    requirements.txt    the dependencies in the versions that run here
    python-version      the Python that runs here
    job.sh              the command

The same files give the same bytes, so the digest tells whether two archives are one.
"""

import gzip
import hashlib
import importlib.metadata
import io
import pathlib
import re
import sys
import tarfile
import tomllib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ("jaxvid", "configs", "data_gen", "launch")
LEFT_OUT = {"__pycache__", ".DS_Store"}
BACKENDS = ("tpu", "cuda13", "cpu")  # extras of jax
STORAGE = {"gs://": "gcs", "s3://": "s3"}  # extras of jaxvid, which read and write there


class Bundle(NamedTuple):
    data: bytes  # a .tar.gz
    digest: str  # 12 letters of its SHA-256
    names: tuple[str, ...]

    def __str__(self) -> str:
        size = len(self.data) / 1e6
        return f"{len(self.names)} files, {size:.1f} MB, sha256 {self.digest}..."


def place(config: str) -> tuple[str, pathlib.Path | None]:
    """(the recipe's name over there, the file to send if it is not in the code).

    A name of a shipped recipe stays; so does its path. Variants (`:runlocal`) stay behind it.
    Raises ValueError when there is no such file.
    """
    path, *variants = config.split(":")
    behind = "".join(f":{v}" for v in variants)
    file = pathlib.Path(path)
    if file.suffix != ".py":
        if not (ROOT / "configs" / f"{path}.py").is_file():
            raise ValueError(f"no recipe {path!r} in configs/; give its name or a path to a .py")
        return config, None
    if not file.is_file():
        raise ValueError(f"no config file {file}")
    here = file.resolve()
    if here.is_relative_to(ROOT) and here.relative_to(ROOT).parts[0] in ROOMS:
        return f"{here.relative_to(ROOT).as_posix()}{behind}", None
    return f"../recipes/{here.name}{behind}", here


def pins(backend: str, text: str = "") -> str:
    """requirements.txt: every dependency of the project in the version that runs here, and what
    reads and writes the buckets named in `text`, in any version that fits if it is not here.

    Raises ValueError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r} of jax; there are {BACKENDS}")
    lines = []
    for wanted in _dependencies():
        name = re.match(r"[A-Za-z0-9._-]+", wanted)[0]
        extra = f"[{backend}]" if name == "jax" and backend != "cpu" else ""
        lines.append(f"{name}{extra}=={importlib.metadata.version(name)}")
    for scheme, extra in STORAGE.items():
        lines += map(_storage, _dependencies(extra) if scheme in text else ())
    return "".join(f"{line}\n" for line in lines)


def _storage(wanted: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", wanted)[0]
    try:
        return f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # of no use on this machine
        return wanted


def _dependencies(extra: str = "") -> list[str]:
    """The project's own or an extra's, from pyproject.toml in a checkout, else from what is
    installed."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        about = tomllib.loads(project.read_text())["project"]
        return about["optional-dependencies"][extra] if extra else about["dependencies"]
    wanted = [line.partition(";") for line in importlib.metadata.requires("jaxvid") or []]
    mark = re.compile(rf".*extra == ['\"]{extra}['\"]" if extra else "(?!.*extra ==)")
    return [line.strip() for line, _, when in wanted if mark.match(when)]


def pack(recipe: pathlib.Path | None, backend: str, job: str) -> Bundle:
    """The archive. `recipe`: a file from outside of the code; `job`: the text of job.sh."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}\n"
    asked = job if recipe is None else job + recipe.read_text()
    files: dict[str, bytes] = {
        "requirements.txt": pins(backend, asked).encode(),
        "python-version": python.encode(),
        "job.sh": job.encode(),
    }
    if recipe is not None:
        files[f"recipes/{recipe.name}"] = recipe.read_bytes()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and not LEFT_OUT & set(path.parts):
                files[f"code/{path.relative_to(ROOT).as_posix()}"] = path.read_bytes()
    stream = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=stream, mode="wb", mtime=0, compresslevel=1) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in sorted(files):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(files[name]), 0o755 if name.endswith(".sh") else 0o644
            tar.addfile(info, io.BytesIO(files[name]))
    data = stream.getvalue()
    return Bundle(data, hashlib.sha256(data).hexdigest()[:12], tuple(sorted(files)))


def save(bundle: Bundle, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bundle.data)
