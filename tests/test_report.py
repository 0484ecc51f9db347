"""The report says what the results say, whole, in one file, and is silent where nothing is."""

import dataclasses
import html.parser
import json
import math
import re

import numpy as np
import pairs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxvid.eval import charts, findings, metrics, page, report, run
from jaxvid.eval.findings import Evaluation, Item, Report, Stage
from jaxvid.eval.markup import Markup, el, join

VOID = {"meta", "input", "br", "img", "hr", "link"}
NASTY = "<script>alert('1')</script> & \"$body\" <b"
RIGHT = {"base": 0.3, "sft": 0.6, "dpo": 0.7, "dna": 0.9}


class Page(html.parser.HTMLParser):
    """Every element with its attributes and text; fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute of {tag} is given twice"
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        self.text += data
        for element in self.open:
            element["text"] += data

    def all(self, tag, **wanted):
        wanted = {k.rstrip("_"): v for k, v in wanted.items()}
        found = [e for e in self.elements if e["tag"] == tag]
        return [e for e in found if all(e.get(k) == v for k, v in wanted.items())]


def predictions(stage: str, control: str, count: int, seed: int) -> list[run.Prediction]:
    """Seeded replies to `count` of the pairs in tests/pairs.py, some of them unreadable."""
    rng, found = np.random.default_rng((seed, len(stage), len(control))), []
    for i in range(count):
        for side, answer in zip(run.SIDES, "AB"):
            draw = rng.random()
            read = answer if draw < RIGHT[stage] else "C" if draw < 0.95 else None
            reply = pairs.REPLIES["ABC".index(read)] if read else "<think>it gets gets gets"
            found.append(
                run.Prediction(
                    record=f"pair {i}",
                    question=0,
                    side=side,
                    category=["light", "dark"][i % 2],
                    prompt=prompt(),
                    options=pairs.OPTIONS,
                    answer=answer,
                    reply=reply,
                    read=read,
                    correct=read == answer,
                    formatted=read is not None,
                    tokens=9,
                    ended=True,
                )
            )
    return found


def prompt() -> str:
    listed = "\n".join(f"{a}. {o}" for a, o in zip("ABCD", pairs.OPTIONS))
    return f"What happens?\n{listed}"


def log(stage: str) -> list[dict]:
    rows = [{"step": n, "loss": 2 / n, "grad_norm": None} for n in range(1, 101)]
    rows.append({"step": 100, "eval_loss": 0.04})
    if stage == "dna":
        for row in rows[:100]:
            row |= {"pair/S_real": 3.0, "pair/S_cf": 5.0 - row["loss"]}
            row |= {"reward": 1.5, "rewards/correct/real": 0.5, "pair/dead_real": 0.25}
    return rows


def fill(workdir, stages=report.STAGES, count=12, shards=True):
    """A folder as the local pipeline leaves it."""
    made = [pairs.record(i) for i in range(count)]
    made = [
        dataclasses.replace(r, meta=r.meta | {"held_out": i % 3 == 0, "edit": "odd_edit"})
        for i, r in enumerate(made)
    ]
    pairs.write(workdir, made)
    builder = pairs.builder(workdir)
    for n, stage in enumerate(stages):
        for control in ("none", "blank", "shuffled"):
            results = run.grade(predictions(stage, control, count, n))
            settings = run.Settings(control=control)
            run.write(workdir / stage / "eval" / control, results, builder, settings, {})
        lines = "".join(json.dumps(row) + "\n" for row in log(stage))
        (workdir / stage / "metrics.jsonl").write_text(lines + '{"step": 101, "lo')
    if "dna" in stages:
        sampled(workdir / "dna" / "rollouts")
    return workdir


def sampled(folder, groups=5):
    """Two tables of rollouts: the first is not shown."""
    folder.mkdir()
    for step in (10, 20):
        rows = [
            {
                "step": step,
                "record": f"pair {i}",
                "side": side,
                "branch": g,
                "prompt": prompt(),
                "answer": "AB"[side == "counterfactual"],
                "reply": f"<b>reply {g} of {step}" if g else "",
                "reward": g / 2,
                "advantage": None if i == 3 else g - 1.0,
            }
            for i in range(groups)
            for side in ("real", "counterfactual")
            for g in (2, 1, 0)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"step-{step:06d}.parquet")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def found(workdir):
    return report.collect(workdir, title="A run", pairs=5)


@pytest.fixture(scope="module")
def shown(workdir, found):
    out = report.write(workdir / "report" / "index.html", found)
    assert out == workdir / "report" / "index.html" and len(list(out.parent.iterdir())) == 1
    return out.read_text(encoding="utf-8")


def test_collect_reads_what_was_written(workdir, found):
    assert [s.name for s in found.stages] == list(report.STAGES)
    for stage in found.stages:
        written = run.grade(run.load(workdir / stage.name / "eval" / "none"))
        assert stage.results.overall == written.overall
        assert stage.results.categories == written.categories
        assert set(stage.controls) == {"blank", "shuffled"}
        assert [r["step"] for r in stage.curve] == [*range(1, 101), 100]  # not the cut-off line
        seen, held = (stage.results.groups[f"{k} combinations"] for k in ("seen", "held-out"))
        assert (seen.pairs, held.pairs) == (8, 4)
        total = seen.pairs * seen.both.value + held.pairs * held.both.value
        assert total == pytest.approx(12 * written.overall.both.value)
    assert found.chance == (1 / 4, 1 / 16)
    assert not found.missing


def test_what_was_sampled_is_shown(found, shown):
    stage = found.stages[-1]
    assert [p.step for p in stage.sampled] == [20] * 3 and not found.stages[0].sampled
    assert [p.record for p in stage.sampled] == ["pair 3", "pair 2", "pair 4"]  # by crc32
    first, second = stage.sampled[0].groups
    assert (first.side, first.answer, second.answer) == ("real", "A", "B")
    assert [(x.reward, x.advantage) for x in first.samples] == [(0, None), (0.5, None), (1, None)]
    assert "What DNA sampled" in shown and "What SFT sampled" not in shown
    assert "&lt;b&gt;reply 1 of 20" in shown and "reply 1 of 10" not in shown
    assert "(an empty reply)" in shown and "not used" in shown and "+1.00" in shown


def test_gallery_takes_turns_and_shows_the_clips(found):
    assert len(found.gallery) == 5
    assert [i.category for i in found.gallery] == ["dark", "light"] * 2 + ["dark"]
    for item in found.gallery:
        assert (item.question, item.options) == ("What happens?", pairs.OPTIONS)
        assert item.answers == ("A", "B") and list(item.replies) == list(report.STAGES)
        real, other = item.frames
        assert real.shape == other.shape == (8, 16, 16, 3) and real.dtype == np.uint8
        assert real[-1].mean() > real[0].mean() and other[-1].mean() < other[0].mean()


def test_gains_are_paired_differences(workdir, found):
    ends = [(g.before, g.after) for g in found.gains]
    steps = [("base", "sft"), ("sft", "dpo"), ("sft", "dna")]
    assert ends == [*steps, ("base", "dna")]
    first, last = (run.load(workdir / s / "eval" / "none") for s in ("base", "dna"))
    assert found.gains[-1].both == run.compare(last, first)["both"]


def test_page_is_one_well_formed_file(shown):
    parsed = Page(shown)
    assert not re.search(r"https?:|//[a-z]|src=|@import|<link|<script", shown)
    uris = re.findall(r"url\(([^)]*)\)", shown)
    assert uris and all(u.startswith("data:image/jpeg;base64,") for u in uris)
    ids = [e["id"] for e in parsed.elements if "id" in e]
    assert len(ids) == len(set(ids))
    assert all(e["for"] in ids for e in parsed.all("label") if "for" in e)
    for heading in ("h1", "main", "header", "title"):
        assert len(parsed.all(heading)) == 1
    assert parsed.all("html", lang="en") and parsed.all("meta", name="viewport")


def test_page_can_be_heard(shown):
    parsed = Page(shown)
    pictures = [e for e in parsed.elements if e.get("role") == "img"]
    assert parsed.all("svg") and all(e in pictures for e in parsed.all("svg"))
    assert all(e.get("aria-label", "").strip() for e in pictures)
    assert all(e.get("scope") in ("row", "col") for e in parsed.all("th"))
    assert len(parsed.all("caption")) + 5 == len(parsed.all("table"))  # 5 stand under their h3
    marks = [e for e in parsed.all("span") if e.get("class", "").startswith("mark")]
    for mark in marks:
        assert mark["text"] in ("\N{CHECK MARK}right", "\N{BALLOT X}wrong")
    assert len(marks) == 2 * 4 * 5 + 2 * 4  # the cards, and the pair on top


def test_numbers_shown_are_the_numbers_given(found, shown):
    parsed = Page(shown)
    cells = [e["text"] for e in parsed.all("td")]
    for stage in found.stages:
        for evaluation in (stage.results, *stage.controls.values()):
            m = evaluation.overall
            row = [_cell(x) for x in (m.real, m.counterfactual, m.both)]
            row += [f"{100 * m.unparsed:.1f}", f"{100 * m.same:.1f}"]
            assert any(cells[i : i + 5] == row for i in range(len(cells)))
        for m in (*stage.results.categories.values(), *stage.results.groups.values()):
            assert {_cell(x) for x in (m.real, m.counterfactual, m.both)} <= set(cells)
    both = found.stages[-1].results.overall.both.value
    (head,) = parsed.all("h1")
    assert f"DNA answers both videos right in {100 * both:.1f}\N{NO-BREAK SPACE}%" in head["text"]
    panel = next(e for e in parsed.all("svg") if e["aria-label"].startswith("Both videos"))
    for stage in found.stages:
        x = stage.results.overall.both
        told = f"{100 * x.value:.1f} percent, interval {100 * x.low:.1f} to {100 * x.high:.1f}"
        assert f"{page.name(stage.name)} {told}" in panel["aria-label"]


def _cell(x):
    return f"{100 * x.value:.1f}{100 * x.low:.1f}\N{EN DASH}{100 * x.high:.1f}"


def test_curves_are_drawn(shown):
    titles = [e["text"] for e in Page(shown).all("h3")]
    for title in ("Base: loss", "DNA: loss", "Signal S", "Reward", "Dead groups"):
        assert title in titles
    assert "Scale \N{GREEK SMALL LETTER ALPHA}" not in titles  # not in the log
    labels = [e["aria-label"] for e in Page(shown).all("svg")]
    (signal,) = [x for x in labels if x.startswith("Signal S")]
    assert "updates 1 to 100" in signal and "real from 3 to 3" in signal
    assert "counterfact. from 3 to 4.98" in signal


def test_all_text_is_escaped(found):
    item = found.gallery[0]
    reply = findings.Reply(NASTY + " \ud800", None, False)
    bad = Item(
        NASTY, NASTY, NASTY, NASTY, NASTY, NASTY, (NASTY, "b"), (NASTY, "B"), item.frames,
        {NASTY: (reply, reply)},
    )  # fmt: skip
    one = found.stages[0]
    odd = Evaluation(one.results.overall, {NASTY: one.results.overall})
    stage = Stage(NASTY, odd, {NASTY: odd}, one.curve)
    gain = findings.Gain(NASTY, NASTY, *found.gains[0][2:])
    content = Report(NASTY, {NASTY: NASTY}, (stage,), (bad,), (gain,), None, (NASTY,))
    text = page.page(content)
    parsed = Page(text)
    assert not parsed.all("script") and not parsed.all("b", text="")
    assert text.count("<title>") == text.count("<body>") == 1
    for tag in ("title", "h3", "dd", "dt", "li", "th", "p"):
        assert any(NASTY in e["text"] for e in parsed.all(tag)), tag
    assert any(NASTY in e.get("aria-label", "") for e in parsed.elements)


def test_half_a_surrogate_can_be_written(found, tmp_path):
    out = report.write(tmp_path / "r.html", found._replace(title="odd \ud800"))
    assert "<title>odd ?</title>" in out.read_text(encoding="utf-8")


def test_absent_stages_and_controls_are_named(tmp_path):
    work = fill(tmp_path, stages=("base", "dna"), count=4)
    for path in (work / "base" / "eval" / "blank", work / "dna" / "eval" / "shuffled"):
        for file in path.iterdir():
            file.unlink()
    (work / "base" / "metrics.jsonl").unlink()
    found = report.collect(work)
    assert found.missing == (
        "control blank of Base",
        "training log of Base",
        "stage SFT",
        "stage DPO",
        "control shuffled of DNA",
    )
    assert [(g.before, g.after) for g in found.gains] == [("base", "dna")]
    text = Page(page.page(found)).text
    assert f"Not there: {'; '.join(found.missing)}." in text and "SFT: loss" not in text


def test_without_shards_there_are_numbers_but_no_clips(workdir, tmp_path):
    for stage in ("base", "sft"):
        (tmp_path / stage).symlink_to(workdir / stage)
    found = report.collect(tmp_path)
    assert not found.gallery and not found.stages[0].results.groups
    assert any(m.startswith("shards") for m in found.missing)
    parsed = Page(page.page(found))
    assert "Pairs" not in [e["text"] for e in parsed.all("h2")] and parsed.all("td")


def test_a_run_in_progress_and_an_empty_folder(workdir, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 5, "loss": 1.5}\n')
    found = report.collect(tmp_path)
    parsed = Page(page.page(found))
    assert parsed.all("h1")[0]["text"] == "No evaluation yet." and len(parsed.all("svg")) == 1
    assert "evaluation of SFT" in found.missing
    with pytest.raises(FileNotFoundError, match="none of the stages base, sft"):
        report.collect(tmp_path / "elsewhere")


def test_evaluations_of_other_questions_are_not_compared(workdir, tmp_path):
    for stage, count in (("base", 4), ("dna", 3)):
        results = run.grade(predictions(stage, "none", count, 0))
        builder = pairs.builder(workdir)
        run.write(tmp_path / stage / "eval" / "none", results, builder, run.Settings(), {})
    found = report.collect(tmp_path)
    assert not found.gains
    assert "difference of DNA from Base, which were asked different questions" in found.missing


def test_sentences_say_when_a_difference_may_be_chance(found):
    null = found.gains[-1]._replace(both=metrics.Interval(0.02, -0.03, 0.07))
    told = findings.evidence(found._replace(gains=(null,)), found.stages)
    assert "+2.0 points (95 % interval \N{MINUS SIGN}3.0 to +7.0), which may be chance." in told
    sure = null._replace(both=metrics.Interval(0.2, 0.1, 0.3))
    assert "chance" not in findings.evidence(found._replace(gains=(sure,)), found.stages)
    assert findings.headline(found.stages[:1]).count("%") == 1


def test_the_pair_on_top_is_one_that_was_mended(found):
    item = findings.mended(found, found.stages)
    right = {s: all(r.correct for r in item.replies[s]) for s in ("base", "dna")}
    assert right == {"base": False, "dna": True}
    assert findings.mended(found, found.stages[:1]) == found.gallery[0]


def test_markup_escapes_what_is_not_markup():
    assert el("p", {"title": 'a"b', "x": 1.005}, "<i>", el("i", {}, "&")) == Markup(
        '<p title="a&quot;b" x="1">&lt;i&gt;<i>&amp;</i></p>'
    )
    assert el("br", {}) == "<br>" and join(["<", Markup("<")]) == "&lt;<"


def test_ticks_are_round_and_inside():
    assert charts.ticks(0.0, 1.0) == [0, 0.25, 0.5, 0.75, 1]
    assert charts.ticks(0.13, 0.68) == [0.2, 0.4, 0.6]
    assert charts.ticks(-3.0, 40.0) == [0, 20, 40]
    assert charts.ticks(2.0, 2.0) == [2]


def test_labels_keep_apart():
    for wanted in ([50.0, 51.0, 52.0], [90.0, 10.0, 89.0], [99.0, 98.0]):
        found = charts.apart(wanted, 20.0, 5.0, 100.0)
        order = sorted(found)
        assert all(b - a >= 20 for a, b in zip(order, order[1:]))
        assert min(found) >= 5 and max(found) <= 100
        assert np.argsort(found).tolist() == np.argsort(wanted, kind="stable").tolist()


def test_bars_are_as_long_as_their_values():
    rows = [
        charts.Bar("a", 0.8, 0.7, 0.9, (charts.Mark("grey", 0.25),)),
        charts.Bar("b", 0.4, 0.3, 0.6),
    ]
    parsed = Page(charts.bars(rows, "T", chance=0.25))
    long, short = (float(e["width"]) for e in parsed.all("rect"))
    assert long / short == pytest.approx(2, abs=0.01)
    zero = float(parsed.all("rect")[0]["x"])
    (circle,) = parsed.all("circle")
    (guess,) = parsed.all("line", class_="chance")
    at = zero + long * 0.25 / 0.8
    assert float(circle["cx"]) == pytest.approx(at, abs=0.1) == float(guess["x1"])
    assert parsed.all("svg")[0]["aria-label"].startswith("T. a 80.0 percent, interval 70.0 to 90.0")


def test_lines_show_every_point_and_smooth_long_ones():
    short = charts.Line("s", tuple((float(n), float(n * n)) for n in range(5)))
    long = charts.Line("l", tuple((float(n), math.sin(n)) for n in range(200)), "ink")
    lone = charts.Line("o", ((3.0, 2.0),), "dots")
    parsed = Page(charts.lines([short, long, lone], "T"))
    counts = [len(e["points"].split()) for e in parsed.all("polyline")]
    assert counts == [5, 200, 200] and len(parsed.all("circle")) == 1
    smooth = charts.smooth(long.points)
    assert [p[0] for p in smooth] == [p[0] for p in long.points]
    assert smooth[-1][1] == pytest.approx(np.mean([math.sin(n) for n in range(191, 200)]))
    assert Page(charts.lines([charts.Line("flat", ((0.0, 1.0), (9.0, 1.0)))], "T", zero=False)).text
