"""Every command in the pages is one that works: its program, verb, recipe and flags exist.

Cheap ones are run; training and evaluating by recipe is run by test_launch.py.
"""

import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
from test_objectives import make

from data_gen import build
from jaxvid import main, runs
from jaxvid.objectives.sft import SFT
from launch import main as launch

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("jaxvid", "jaxvid-forge", "jaxvid-launch")


def commands():
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"```bash\n(.*?)```", text, re.S) + re.findall(
            r"^ {4}((?:jaxvid|jaxvid-forge|jaxvid-launch|pip|pytest|ruff) [^\n]*)$", text, re.M
        )
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words:
                    yield page.name, words


FOUND = list(commands())


def test_pages_have_commands():
    assert {"README.md", "data.md", "train.md", "preferences.md", "evaluate.md"} <= {
        page for page, _ in FOUND
    }


@pytest.mark.parametrize(
    "page, words", FOUND, ids=lambda x: x if isinstance(x, str) else " ".join(x)
)
def test_command_is_one_that_works(page, words, monkeypatch, tmp_path):
    program, *rest = words
    if program not in PROGRAMS:
        assert program in ("pip", "pytest", "ruff"), f"{page}: no program {program!r}"
        return
    if program == "jaxvid-forge":
        called = []
        monkeypatch.setattr(build, "VERBS", {kind: called.append for kind in build.VERBS})
        build.main(rest)
        assert called
    elif program == "jaxvid-launch":
        called = []
        monkeypatch.setattr(launch, "VERBS", {kind: called.append for kind in launch.VERBS})
        launch.main(rest)
        assert called
    elif rest[0] in ("train", "eval", "score", "steps", "ablate"):
        own = [
            i for i, w in enumerate(rest) if w in ("--workdir", "--out", "--seeds", "--distributed")
        ]  # not of the recipe
        flags = [w for i, w in enumerate(rest) if i > 1 and i not in own and i - 1 not in own]
        monkeypatch.chdir(ROOT)
        runs.load_config(rest[1], [f for f in flags if f != "--help"])
    else:
        parser, verbs = main._parser()
        assert rest[0] in verbs
        parser.parse_args(rest)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pages_name_no_machine():
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(work|root|home)/", page.read_text()), page.name


def test_the_objective_of_its_page_is_one():
    """The page's code, run: with gamma 0 it is the mean NLL of SFT."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/objective.md").read_text(), re.S)
    there: dict = {}
    exec(code, there)
    scores, batch = make()
    plain, focal, want = (
        jax.jit(objective)(scores, batch)
        for objective in (there["Focal"](gamma=0.0), there["Focal"](), SFT())
    )
    np.testing.assert_allclose(plain[:2], want[:2], rtol=1e-6)
    assert set(plain.metrics) == {"focal"} and focal.numerator < plain.numerator
