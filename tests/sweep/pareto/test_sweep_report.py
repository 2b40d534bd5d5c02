"""The report of a sweep on real files: directories as sweeps leave them, with invented losses."""

import csv
import filecmp
import io
import json
import re
from pathlib import Path

import pytest
import typer
from report_support import Page
from rich.console import Console
from rounding import approx_sum
from sweep_support import HIGH, LOW, STATIC, STEPS, TOKENS, TWO_PHASE, sweep_of, write_sweep
from typer.testing import CliRunner

from megaphase.report.plot_parts import PointLabel, label_points
from megaphase.sweep.commands import report_command
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.pareto.report import SweepReport
from megaphase.sweep.pareto.tokens_to_loss import first_reach
from megaphase.utils.errors import InputError
from megaphase.utils.plot_style import inch_axes, new_figure

ARMS = {
    "static": STATIC | {"temperatures": [3.3]},
    "two-phase": {"rates": [0.1, 0.5], "pretrain": [0.5, 0.8]},
    "keep": {"rates": [0.25], "pretrain": [0.8]},
    "low-only": {"pretrain": [0.8]},
    "regularized": {"rates": [0.5], "settings": {"model.dropout": 0.1}, "early_stopping": 2},
}
PLOTS = ("front", "overfitting", "bleu_front", "losses", "data_efficiency", "training_efficiency",
         "pretraining", "convergence", "translation", "law")  # fmt: skip
FAILED, DIVERGED = "static-r0.05-p0.001-s2", "keep-0.8-r0.25-p0.001-s1"
SMALL = {"static": {"rates": [0.1, 0.5]}, "two-phase": TWO_PHASE | {"rates": [0.25]}}


@pytest.fixture(scope="module")
def sweep_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "sweep"
    return write_sweep(folder, ARMS, seeds=[1, 2], bleu=True, failed=[FAILED], diverged=[DIVERGED])


@pytest.fixture(scope="module")
def report(sweep_dir):
    return SweepReport.of(sweep_dir)


@pytest.fixture(scope="module")
def index(report, tmp_path_factory):
    return report.write(tmp_path_factory.mktemp("out") / "report")


def numbers(index: Path, name: str) -> list[dict[str, str]]:
    with open(index.parent / "numbers" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_page_is_self_contained_and_holds_every_plot(index):
    page, text = Page(index), index.read_text()
    assert page.fetched == []
    assert not re.search(r"@import|@font-face|url\((?!#)|<script", text)
    assert len(set(page.ids)) == len(page.ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(page.ids)
    for name in PLOTS:
        assert {f"plots/{name}.png", f"plots/{name}.svg"} <= set(page.links)
    for link in page.links:
        assert (index.parent / link).stat().st_size > 0
    assert "/somewhere" not in text  # the location of corpora is not part of an experiment
    assert text.count("<figure>") == len(PLOTS)


def test_page_says_what_was_found(index, report, sweep_dir):
    text = index.read_text()
    ended = len(list((sweep_dir / "outcomes").iterdir()))
    assert f"Finished: {ended} runs. 2 of them failed or diverged." in text
    for verdict in report.view.verdicts:
        assert verdict.headline in text
    assert f"<code>{FAILED}</code>: the loss is not finite 3 times in a row" in text
    assert f"<code>{DIVERGED}</code>: diverged: the loss of eu is not finite" in text
    assert "low-only 100%, 4e-3 (" in text  # outside the picture of the fronts
    assert "corpus: eu" in text  # in the sweep file


def test_table_of_settings_is_that_of_the_points(index, report):
    rows = [row for row in Page(index).rows if len(row) == 13]
    (fronts,) = report.view.fronts
    points = [(arm, point) for arm in fronts.arms for point in arm.points]
    assert len(rows) == len(points)
    on_front = [point for arm in fronts.arms for point in arm.front]
    found = [row[5].split(" ")[0] for row in rows[: len(on_front)]]
    assert found == [f"{point.high.mean:.3f}" for point in on_front]
    arm, point = fronts.arms[1], fronts.arms[1].front[0]
    row = next(row for row in rows if row[0] == arm.arm)
    high, low = (f"{each.mean:.3f} ± {each.half_width:.3f}" for each in (point.high, point.low))
    setting = point.setting
    assert (setting.share, setting.peaks) == (0.8, (0.004, 0.004))
    assert row[1:7] == [setting.mixture.label, "80%", "4e-3", "2", high, low]
    peaks = {(row[0], row[3]) for row in rows}
    assert ("two-phase", "4e-3 → 1e-3") in peaks
    tokens = setting.mixture.rate * STEPS * (1 - setting.share) * 8 * 64
    hi = tokens * TOKENS["hi"] / sum(TOKENS[task] for task in LOW)
    assert float(row[11]) == pytest.approx(hi / TOKENS["hi"], abs=0.06)


def test_first_stages_are_shown_with_the_peak_that_goes_on(index, report):
    rows = [row for row in Page(index).rows if row[0] in ("pretrain", "keep-pretrain")]
    reasons = ["the lowest loss"] * 2 + ["each continues with its own peak"]
    assert [row[-1] for row in rows] == reasons
    chosen = {row["peak"]: row["goes_on"] for row in numbers(index, "first_stages")[:2]}
    assert chosen == {"0.001": "False", "0.004": "True"}


def test_overfitting_is_measured_from_the_lowest_loss(index, sweep_dir):
    rows = {
        (row["arm"], row["rate"], row["task"]): row
        for row in numbers(index, "overfitting")
    }  # fmt: skip
    found = rows["static", "0.5", "hi"]
    curves = []
    for seed in (1, 2):
        name = f"static-r0.5-p{float(found['peak']):g}-s{seed}"
        lines = (sweep_dir / "runs" / name / "metrics.jsonl").read_text().splitlines()
        measured = [json.loads(line) for line in lines if "validation" in line]
        curves.append([row["validation"]["hi"]["loss"] for row in measured])
    mean = [sum(pair) / 2 for pair in zip(*curves, strict=True)]
    assert float(found["lowest"]) == pytest.approx(min(mean))
    assert int(found["lowest_step"]) == 5 * mean.index(min(mean))
    risen = approx_sum(mean[-1] - min(mean), mean[-1], min(mean), rel=1e-12)
    assert float(found["risen"]) == risen
    assert float(found["risen"]) > 0.1
    assert float(rows["static", "0.05", "hi"]["risen"]) == 0


def test_numbers_of_the_runs(index, sweep_dir):
    runs = {row["run"]: row for row in numbers(index, "runs")}
    name = "two-phase-0.5-r0.5-p0.004-s2"
    outcome = json.loads((sweep_dir / "outcomes" / f"{name}.json").read_text())
    row = runs[name]
    assert float(row["low"]) == pytest.approx(sum(outcome["losses"][t] for t in LOW) / 2)
    assert float(row["high"]) == pytest.approx(sum(outcome["losses"][t] for t in HIGH) / 2)
    assert float(row["bits_per_byte_eu"]) == outcome["bits_per_byte"]["eu"]
    assert float(row["bleu_en"]) == outcome["translation"]["en"]["bleu"]
    # The source's tokens of high-resource tasks, and the branch's own.
    half, en = STEPS / 2 * 8 * 64, TOKENS["en"] / (TOKENS["en"] + TOKENS["fr"])
    assert float(row["tokens_en"]) == pytest.approx(half * en + half * 0.5 * en, abs=2)
    assert float(row["epochs_en"]) == pytest.approx(float(row["tokens_en"]) / 40_000, rel=1e-3)
    assert runs[FAILED]["failed"].startswith("the loss")
    assert runs[DIVERGED]["loss_eu"] == "nan"
    early = runs["regularized-r0.5-p0.004-s1"]
    assert int(early["step"]) <= STEPS
    columns = {name for table in (index.parent / "numbers").iterdir()
               for name in table.read_text().splitlines()[0].split(",")}  # fmt: skip
    assert not {name for name in columns if "second" in name or "time" in name}


def test_curve_of_a_branch_begins_with_its_source(index):
    rows = [row for row in numbers(index, "curves") if row["run"] == "two-phase-0.8-r0.1-p0.004-s1"]
    hi = {int(row["step"]): row for row in rows if row["task"] == "hi"}
    assert list(hi) == [*range(0, 48, 5), 48, 53, 58, 60]
    assert float(hi[48]["tokens"]) == 0
    assert hi[45]["training_loss"] == "nan"
    assert float(hi[60]["training_loss"]) < float(hi[60]["validation_loss"])


def test_fronts_and_settings_are_the_same_as_on_the_page(index, report):
    (fronts,) = report.view.fronts
    found = {row["arm"]: row for row in numbers(index, "fronts")}
    for arm in fronts.arms:
        assert float(found[arm.arm]["hypervolume"]) == arm.hypervolume
    assert found["static"]["verdict"] == ""
    settings = numbers(index, "settings")
    assert len(settings) == len(fronts.points)
    assert sum(row["on_front"] == "True" for row in settings) == sum(
        len(arm.front) for arm in fronts.arms
    )
    assert len(numbers(index, "margins")) == 4 * len(fronts.static)


@pytest.mark.slow
def test_report_does_not_depend_on_where_and_how_fast_runs_were_done(tmp_path):
    first = write_sweep(tmp_path / "a" / "sweep", SMALL)
    second = write_sweep(tmp_path / "b" / "sweep", SMALL, seconds=99.0)
    metrics = second / "runs" / "static-r0.5-p0.004-s1234" / "metrics.jsonl"
    again = metrics.read_text().splitlines(keepends=True)[-9:]
    resume = '{"step": 55, "event": "resume"}\n'
    with open(metrics, "a") as file:
        file.writelines([resume, *again])
    pages = [SweepReport.of(folder).write(folder.parent / "report") for folder in (first, second)]
    files = sorted(p.relative_to(pages[0].parent) for p in pages[0].parent.rglob("*.*"))
    assert len(files) == 1 + 2 * 6 + 13
    same, _, _ = filecmp.cmpfiles(pages[0].parent, pages[1].parent, files, shallow=False)
    assert same == files


def invoke(*arguments):
    app = typer.Typer()
    app.command()(report_command)
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_command_reports_a_sweep_that_has_not_finished(tmp_path):
    models = {"small": {"layers": 2}, "large": {"layers": 4}}
    folder = write_sweep(tmp_path / "sweep", SMALL, until=9, models=models)
    result = invoke(folder, "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert "Not finished: 9 of 16 runs have ended." in result.output
    assert "small: So far, with 9 of 16 runs, " in result.output
    page = Page(tmp_path / "report" / "index.html")
    assert "plots/models.png" in page.links
    assert "plots/overfitting-small.png" in page.links


def test_command_reports_a_sweep_that_has_hardly_begun(tmp_path):
    folder = write_sweep(tmp_path / "sweep", SMALL, until=1)
    result = invoke(folder, "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "report" / "index.html").read_text()
    assert "So far, with 1 of 8 runs, there is no verdict on two-phase yet" in text


def test_wrong_input(sweep_dir, tmp_path):
    other = write_sweep(tmp_path / "sweep", SMALL, until=1)
    error = invoke(sweep_dir, other, "--out", tmp_path / "report").exception
    assert isinstance(error, InputError)
    assert str(error).startswith(f"{sweep_dir}: is a sweep; give it alone")
    (other / "sweep.json").write_text("{}")
    with pytest.raises(InputError, match=r"sweep\.json: file: Field required"):
        SweepReport.of(other)
    whole = write_sweep(tmp_path / "whole", SMALL)
    (whole / "runs" / "static-r0.1-p0.001-s1234" / "plan.json").unlink()
    with pytest.raises(InputError, match=r"static-r0\.1-p0\.001-s1234/plan\.json: no such file"):
        SweepReport.of(whole)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(InputError, match="not an earlier report"):
        SweepReport.of(sweep_dir).write(tmp_path / "mine")
    assert not (tmp_path / "report").exists()


def test_labels_beside_points_cover_neither_each_other_nor_points():
    figure = new_figure(4, 4)
    axes = inch_axes(figure, 0.5, 0.5, 3.9, 3.9)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    near = [(0.5 + dx / 40, 0.5 + dy / 40) for dx in range(3) for dy in range(3)]
    labels = [PointLabel(x, y, "10%", "#000000") for x, y in [*near, (0.01, 0.01), (0.99, 0.5)]]
    left_out = label_points(axes, labels)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) + len(left_out) == len(labels)
    assert len(boxes) >= 8
    dots = [axes.transData.transform((label.x, label.y)) for label in labels]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert not any(box.contains(*dot) for dot in dots)


def test_contrasts_on_the_page_are_those_of_the_table(index, report):
    rows = numbers(index, "contrasts")
    contrasts = report.view.contrasts
    # Mean, both groups and four tasks, in two units, the best of all settings, the other split.
    assert len(rows) == len(contrasts) * (2 * 7 + 2)
    first = contrasts[0]
    found = next(
        row
        for row in rows
        if (row["arm"], row["loss"], row["unit"]) == (first.arm, "mean", "nats_per_token")
    )
    mean = first.nats.mean
    assert [float(found[key]) for key in ("difference", "from", "to", "t", "p")] == pytest.approx(
        [mean.mean, mean.low, mean.high, mean.t, mean.p]
    )
    shown = f"{mean.mean:+.3f} [{mean.low:+.3f}, {mean.high:+.3f}]"
    row = next(row for row in Page(index).rows if row[:2] == [first.arm, first.against])
    assert row[2:4] == [first.result, shown]


def test_tokens_to_a_loss_are_those_of_the_first_validation_at_it(index, report, sweep_dir):
    rows = [row for row in numbers(index, "tokens_to_loss") if row["arm"] == "static"]
    two_phase = [row for row in rows if row["level_of"] == "two-phase"]
    assert {row["tokens"] for row in two_phase} == {""}  # no static setting is ever as low
    level = next(row for row in rows if row["rate"] == "0.25" and row["tokens"])
    loss, share = float(level["level"]), 0.25 * 8 * 64
    curves = []
    for seed in (1, 2):
        name = f"static-r0.25-p{float(level['peak']):g}-s{seed}"
        lines = (sweep_dir / "runs" / name / "metrics.jsonl").read_text().splitlines()
        measured = [json.loads(line) for line in lines if "validation" in line]
        curves.append(
            {row["step"]: sum(row["validation"][t]["loss"] for t in LOW) / 2 for row in measured}
        )
    steps = list(curves[0])
    mean = [sum(curve[step] for curve in curves) / 2 for step in steps]
    i = next(i for i, each in enumerate(mean) if each <= loss)
    part = (mean[i - 1] - loss) / (mean[i - 1] - mean[i])
    step = steps[i - 1] + part * (steps[i] - steps[i - 1])
    assert float(level["step"]) == pytest.approx(step)
    assert float(level["tokens"]) == pytest.approx(step * share, abs=2)


def test_losses_of_the_test_split_and_changes_are_told(tmp_path):
    folder = write_sweep(tmp_path / "sweep", SMALL, test=True, seeds=[1, 2])
    SweepDirectory(folder).prepare(sweep_of(folder, SMALL, seeds=[1, 2, 3]))
    index = SweepReport.of(folder).write(tmp_path / "report")
    text = index.read_text()
    assert "Settings are chosen on the validation split, and losses are shown on the test" in text
    assert "The sweep file was changed once after runs had ended." in text
    assert "<li>After 16 runs: seeds: added 3</li>" in text
    row = numbers(index, "settings")[0]
    assert row["split"] == "test"
    assert float(row["high"]) == pytest.approx(float(row["validation_high"]) + 0.02)


def test_differences_on_the_validation_split_are_beside_those_of_the_test_split(tmp_path):
    report = SweepReport.of(write_sweep(tmp_path / "sweep", SMALL, test=True, seeds=[1, 2]))
    index = report.write(tmp_path / "report")
    (contrast,) = report.view.contrasts
    head, row = (row for row in Page(index).rows if row[2] in ("verdict", contrast.result))
    shown = dict(zip(head, row, strict=True))
    found = contrast.on_validation
    interval = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    assert shown["validation split, nats"] == interval


def test_terminal_tables_fit_into_80_columns(report):
    console = Console(width=80, file=io.StringIO())
    for table in report.summary_tables():
        console.print(table)
    text = console.file.getvalue()
    assert "…" not in text.replace(" … ", "")  # nothing is cut off
    for word in ("hyper-", "volume", "dominated", "margin, nats", "difference", "verdict"):
        assert word in text
    for contrast in report.view.contrasts:
        assert f"{contrast.nats.mean.mean:+.3f} [" in text


def test_long_names_of_arms_are_folded_at_80_columns(tmp_path):
    long = "uniform-natural-uniform-with-average"
    arms = {
        "static-with-a-long-name": {"kind": "static", **STATIC},
        long: {"kind": "two-phase", **TWO_PHASE},
    }
    report = SweepReport.of(write_sweep(tmp_path / "sweep", arms, seeds=[1, 2]))
    console = Console(width=80, file=io.StringIO())
    for table in report.summary_tables():
        console.print(table)
    text = console.file.getvalue()
    assert "…" not in text.replace(" … ", "")
    assert max(map(len, text.splitlines())) <= 80
    assert any(word in text for word in ("wins", "loses", "undecided"))


def test_without_a_static_arm_nothing_is_said_of_its_front(tmp_path):
    report = SweepReport.of(write_sweep(tmp_path / "sweep", {"two-phase": TWO_PHASE}))
    console = Console(width=80, file=io.StringIO())
    for table in report.summary_tables():
        console.print(table)
    text = console.file.getvalue()
    page = report.write(tmp_path / "report").read_text()
    assert "on front" in text
    assert "on front" in page
    for word in ("dominated", "Margin", "margin, nats"):
        assert word not in text
        assert word not in page


def test_a_line_says_both_verdict_and_front(report):
    arms = {arm.arm: arm for arm in report.view.fronts[0].arms}
    static = report.view.fronts[0].static_hypervolume
    for verdict, line in zip(report.view.verdicts, report.sentences(), strict=False):
        assert line.startswith(verdict.sentence)
        larger = "a larger" if arms[verdict.arm].hypervolume > static else "no larger"
        volumes = f"({arms[verdict.arm].hypervolume:.4f}, static {static:.4f})"
        assert f"has {larger} hypervolume than the static one {volumes}" in line


def test_first_reach_by_hand():
    steps, tokens, losses = [0, 10, 20, 30], [0.0, 100.0, 200.0, 300.0], [9.0, 7.0, 5.0, 6.0]
    assert first_reach(steps, tokens, losses, 6.0) == (150.0, 15.0)  # not where it is again
    assert first_reach(steps, tokens, losses, 5.0) == (200.0, 20.0)
    assert first_reach(steps, tokens, losses, 9.5) == (0.0, 0)
    assert first_reach(steps, tokens, losses, 4.9) is None
