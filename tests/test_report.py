"""The page of a run: what it shows, from whatever is there, and that hostile text stays text."""
import base64
import hashlib
import json
import os
import random
import re
import runpy
import sys
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import data
import mstar
from data import TASKS, TESTBEDS, oracle, write_reasoning
from model import Response, read_json, write_json
from prm import RewardModel
from results import report
from results.report import line_chart, write_page, write_picture

PI_0 = mstar.ROW_NAMES["pi_0"]
EVIL = "</script><img src=x onerror=alert(1)>'\"&"
METHOD = f"mstar {EVIL}"
KIND = f"FQA {EVIL}"
SCRIPT = (report.FOLDER / "page.js").read_text()

class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, the text of its scripts,
    and its words."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.words, self.inside = [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words += data

    def all(self, tag):
        """The attributes of all tags of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]

# ---------------------------------------------------------------- the files of a run

@pytest.fixture
def run_folder(tmp_path, world):
    """The files of an unfinished run in which everything that somebody else may have written is
    hostile."""
    folder = tmp_path / EVIL.replace("/", "")
    (folder / "samples").mkdir(parents=True)
    Image.fromarray(data.render(world["validation"][0])).save(folder / "samples" / "0.png")
    write_json(folder / "config.json", {
        "method": METHOD, "arms": f"prm,{METHOD}", "preset": EVIL, "splits": {}, "world_seed": 0,
        "command": f"python mstar.py {EVIL}"})
    surface = {"0.7": {"reward_pass_at_2": 0.65}, "1.0": {"reward_pass_at_2": 0.6}}
    sweep = {"aim": "reward_pass_at_2", "chosen": 0.7, "surface": surface}
    first = {"arm": METHOD, "iteration": 0, "temperature": 1.0, "greedy_accuracy": 0.5,
             "pass_at_k": 0.75, "reward_pass_at_2": 0.6, "unsound": 0.125, "entropy": 0.2,
             "reward_auc": 0.9}
    second = {**first, "iteration": 1, "num_kept": 3, "loss": 0.1, "sweep": sweep}
    lines = [json.dumps(line) + "\n" for line in (first, second)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    for iteration in range(2):
        write_samples_of(folder, iteration, [
            response(f"{EVIL} is 3\nanswer: 7", "correct", [0.25, 0.5], [0.125, 1.0],
                     [False, True], selected=True),
            response("hm", "unparseable", [0.1], [0.0], [False], truncated=True),
            response(f"{EVIL} is 3\nanswer: 7", "correct", [0.25, 0.5], [0.125, 1.0],
                     [False, True])])                              # the first once more
    return folder

def response(text, grade, scores, labels, oracle, selected=False, truncated=False):
    return {"text": text, "steps": re.findall(r"[^\n]+\n*", text), "grade": grade,
            "scores": scores, "labels": labels, "oracle": oracle, "sound": all(oracle),
            "selected": selected, "truncated": truncated}

def write_samples_of(folder, iteration, responses):
    questions = [{"id": "validation/0", "kind": KIND, "text": f"how much is {EVIL}?",
                  "answer": EVIL, "responses": responses}]
    write_json(folder / "samples" / f"{iteration}.json",
               {"iteration": iteration, "temperature": 1.0, "questions": questions})

def finish(folder):
    """Add what a finished run leaves: report.json."""
    rows = []
    for name, accuracy in ((EVIL, 0.25), ("M-STaR", 0.5)):
        row = {"name": name, "ci95": {}, "unparseable": 0.125, "unsound": 0.0625,
               "readings": {"test": 0.99}}
        for i, (key, columns) in enumerate((("id", ("all", *TASKS)), ("ood", (*TESTBEDS, "all")))):
            row[key] = {column: accuracy + (6 * i + j) / 100 for j, column in enumerate(columns)}
            row["ci95"][key] = {column: [value - 0.1, value + 0.1]
                                for column, value in row[key].items()}
        rows.append(row)
    gain = {"id": [0.25, 0.125, 0.375], "ood": [0.1, -0.1, 0.2]}
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    finished = {"iterations": list(map(json.loads, lines)), "rows": rows, "mine": "M-STaR",
                "config": {"data": ""},
                "gain_over": {EVIL: gain}, "seconds": 90,
                "device": f"cpu {EVIL}", "seed": 3, "stages": {"base": 60, "arm mstar": 30}}
    write_json(folder / "report.json", finished)
    return finished

# ---------------------------------------------------------------- hostile text

@pytest.mark.parametrize("is_finished", [False, True])
def test_the_page_shows_hostile_text_and_runs_none_of_it(is_finished, run_folder):
    if is_finished:
        finish(run_folder)
    page = Page(write_page(run_folder).read_text())
    assert page.scripts == [SCRIPT]
    # the question, a step in both iterations, a chart's legend, and the command, all as text
    assert page.words.count(EVIL) >= 5
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "iframe", "object", "base", "a", "form"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:") and "href" not in attributes
    rules = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert len(rules) == 1 and "default-src 'none'" in rules[0]
    assert re.findall("script-src ([^;]*)", rules[0]) == [f"'sha256-{digest}'"]

def test_a_folder_whose_name_is_no_text_has_a_page_too(run_folder):
    folder = run_folder.rename(run_folder.parent / os.fsdecode(b"run\xff"))
    assert "<title>M-STaR: run?</title>" in write_page(folder).read_text()

def test_a_page_is_written_whole_or_not_at_all(run_folder, monkeypatch):
    path = write_page(run_folder)
    path.write_text("before")

    def full(number):
        raise OSError("full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_page(run_folder)
    assert path.read_text() == "before"

# ---------------------------------------------------------------- what it shows

def test_the_page_of_an_unfinished_run_says_what_it_shows(run_folder):
    path = write_page(run_folder)
    page = Page(path.read_text())
    assert path == run_folder / "report.html"
    for words in (f"No report yet: 1 iterations of prm,{METHOD}",
                  "correct, selected, unsound ×2",
                  "PRM 0.25 · rollouts 0.12 · ✗ false", "PRM 0.50 · rollouts 1.00 · ✓ true",
                  "unparseable, truncated", "iteration 1, T = 1.0: 2 of 3 correct",
                  "before iteration 1", "gold answer: ", "T = 0.7"):
        assert words in page.words, words
    cells = [cell for cell in page.all("td") if "heat" in cell.get("class", "")]
    assert cells == [{"class": "heat chosen", "style": "--s: 1.00"},
                     {"class": "heat", "style": "--s: 0.00"}]
    assert "<td class='heat chosen' style='--s: 1.00'>65.0" in path.read_text()
    assert page.all("img")[0]["src"].startswith("data:image/png;base64,")

def test_a_chart_for_each_metric_that_is_there(run_folder):
    page = Page(write_page(run_folder).read_text())
    drawn = [line["points"] for line in page.all("polyline")]
    labels = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    assert len(drawn) == len(labels) == len(report.CURVES)         # the fixture has all of them
    by_title = {label.split(" by iteration. ")[0]: label for label in labels}
    assert by_title["Greedy accuracy"].endswith(f"{METHOD}: 50, 50")           # in percent
    assert by_title["Unsound"].endswith(f"{METHOD}: 12.5, 12.5")
    assert by_title["Entropy"].endswith(f"{METHOD}: 0.2, 0.2")                 # in nats
    assert len(drawn[0].split()) == 2
    lines = [{"arm": "a", "iteration": 0}, {"arm": "a", "iteration": 1, "entropy": 3}]
    one_point = report.html_curves(lines)                          # one chart, of one point
    assert one_point.count("<polyline") == 1 and "Entropy by iteration. a: 3'" in one_point

def test_responses_are_framed_coloured_and_marked_by_their_outcome(run_folder):
    page = Page(write_page(run_folder).read_text())
    responses = [item for item in page.all("li") if "response" in item.get("class", "")]
    assert [(item["class"], item["data-outcome"]) for item in responses] == 2 * [
        ("response selected", "correct selected unsound"), ("response", "unparseable truncated")]
    steps = [item["style"] for item in page.all("li") if "style" in item]
    assert steps == 2 * ["--s: 0.25", "--s: 0.50", "--s: 0.10"]

def test_without_a_prm_only_the_oracle_speaks(run_folder):
    write_samples_of(run_folder, 1, [response("red is 3", "wrong", None, None, [True])])
    page = Page(write_page(run_folder).read_text())
    assert "red is 3✓ true" in page.words
    assert "style" not in page.all("li")[-1]                       # no score, no colour

def test_a_response_cut_off_behind_a_line_break_has_a_step_less_than_lines(run_folder):
    """Its text ends in an empty line, which is no step: it has no score and no label."""
    cut = response("red is 3\n", "unparseable", [0.25], [1.0], [True, False], truncated=True)
    write_samples_of(run_folder, 1, [cut])
    page = Page(write_page(run_folder).read_text())
    assert "PRM 0.25 · rollouts 1.00 · ✓ true" in page.words
    assert [item["style"] for item in page.all("li") if "style" in item][-1] == "--s: 0.25"

def test_a_step_that_ends_in_an_empty_line_is_one_step(run_folder):
    """As of public tokenizers, in which two line breaks are one token."""
    spaced = response("red is 3\n\nanswer: 3", "correct", [0.25, 0.75], [0.5, 1.0], [])
    write_samples_of(run_folder, 1, [spaced])
    words = Page(write_page(run_folder).read_text()).words
    assert "red is 3\n\nPRM 0.25 · rollouts 0.50" in words
    assert "answer: 3PRM 0.75 · rollouts 1.00" in words

def test_the_page_of_a_finished_run_begins_with_its_result(run_folder):
    finish(run_folder)
    page = Page(write_page(run_folder).read_text())
    for words in ("M-STaR: 50.0 % in domain", "1.5 minutes on cpu", "seed 3", "50.0 [40, 60]",
                  f"over {EVIL}: +25.0 points [+12.5, +37.5] in domain, "
                  "+10.0 points [-10.0, +20.0] out"):
        assert words in page.words, words
    assert "No report" not in page.words
    head = page.words[:page.words.index("Over iterations")]
    assert "%" + "".join(["ID", *TASKS, *TESTBEDS, "OOD"]) + EVIL in head
    cells = re.findall(r"(\d+\.\d) \[(\d+), (\d+)\]", head)       # of both rows, in order
    expected = [*range(25, 37), *range(50, 62)]
    assert cells == [(f"{n}.0", f"{n - 10}", f"{n + 10}") for n in expected]

def test_the_filters_know_every_outcome_kind_and_iteration(run_folder):
    text = write_page(run_folder).read_text()
    page = Page(text)
    filters = {}
    for name, options in re.findall("<select id='(.*?)'>(.*?)</select>", text):
        filters[name] = options.split("<option>")[1:]
    assert set(filters) == set(re.findall(r"choice\('(\w+)'\)", SCRIPT))
    assert all(options[0] == "any" for options in filters.values())
    for item in page.all("li"):
        assert set(item.get("data-outcome", "any").split()) <= set(filters["outcome"])
    assert [item["data-kind"] for item in page.all("article")] == [unescape(filters["kind"][1])]
    iterations = [item["data-iteration"] for item in page.all("details")]
    assert iterations == filters["iteration"][1:] == ["0", "1"]
    assert ["open" in item for item in page.all("details")] == [False, True]   # the last one

# ---------------------------------------------------------------- whatever is there

def test_a_page_can_be_made_of_whatever_is_there(run_folder):
    finish(run_folder)
    titles = {"report.json": "50.0 % in domain",
              "metrics.jsonl": "Over iterations", "samples/1.json": "iteration 1, T = 1.0",
              "samples/0.json": "Samples"}
    left = dict(titles)
    for name in titles:
        words = Page(write_page(run_folder).read_text()).words
        assert all(title in words for title in left.values())
        (run_folder / name).unlink()
        gone = left.pop(name)
        assert gone not in Page(write_page(run_folder).read_text()).words
    (run_folder / "samples/0.png").unlink()
    (run_folder / "samples").rmdir()
    page = Page(write_page(run_folder).read_text())                # of config.json alone
    assert "No report yet: 0 iterations" in page.words and not page.scripts

def test_iterations_are_in_the_order_of_their_numbers(run_folder):
    for iteration in (10, 2):
        write_samples_of(run_folder, iteration, [response("hm", "wrong", [0.1], [0.0], [False])])
    page = Page(write_page(run_folder).read_text())
    assert [item["data-iteration"] for item in page.all("details")] == ["0", "1", "2", "10"]

def run_command(monkeypatch, *folders):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, folders)])
    runpy.run_path(report.__file__, run_name="__main__")

def test_the_command_makes_pages_or_says_in_one_line_why_not(run_folder, monkeypatch, capsys):
    run_command(monkeypatch, run_folder, run_folder)
    assert capsys.readouterr().out == 2 * f"wrote {run_folder / 'report.html'}\n"
    assert "No report" in (run_folder / "report.html").read_text()
    for damage in ("samples/0.json", "metrics.jsonl", "config.json"):
        (run_folder / damage).write_text("nonsense")
        with pytest.raises(SystemExit) as stop:
            run_command(monkeypatch, run_folder)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and str(run_folder) in error
    (run_folder / "config.json").unlink()
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch, run_folder)
    assert stop.value.code == 2 and "config.json" in capsys.readouterr().err

def test_the_command_without_a_folder_is_wrong_use(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "runs/NAME" in error

# ---------------------------------------------------------------- charts

@pytest.mark.parametrize("values", [
    [0.5, 0.5, 0.5], [0, 100], [-3, 4, 12], [1e-4, 3e-4], [1234, 5678], [0], [0, 0]])
def test_a_chart_has_ticks_around_its_values(values):
    text = line_chart("title", "unit", {"a": list(enumerate(values))}, "note")
    page = Page(text)
    points = page.all("polyline")[0]["points"].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == len(values) and all(15 <= y <= 175 for y in heights)
    for a, b, y, z in zip(values, values[1:], heights, heights[1:]):
        assert (a < b) == (y > z)                                  # y points down
    grid = [line for line in page.all("line") if line.get("class") == "grid"]
    assert 2 <= len(grid) <= 8
    ticks = [float(tick) for tick in re.findall("text-anchor='end'>([^<]*)<", text)]
    assert len(ticks) == len(grid) and ticks == sorted(ticks)
    assert ticks[0] <= min(values) and max(values) <= ticks[-1]
    gaps = np.diff(ticks)
    assert np.allclose(gaps, gaps[0], rtol=0.02)
    # a value stands where the ticks say it does
    for value, y in zip(values, heights):
        expected = 175 - 160 * (value - ticks[0]) / (ticks[-1] - ticks[0])
        assert y == pytest.approx(expected, abs=0.5)

def test_a_chart_has_a_line_a_key_and_a_dash_pattern_for_each_series():
    series = {EVIL: [(0, 1.0), (2, 2.0)], "b": [(1, 3.0)]}
    text = line_chart(EVIL, EVIL, series, EVIL)
    page = Page(text)
    lines = page.all("polyline")
    assert len({line["stroke-dasharray"] for line in lines}) == 2  # not by colour alone
    assert page.words.count(EVIL) == 4                             # title, unit, key, note
    label = f"{EVIL} by iteration. {EVIL}: 1, 2; b: 3"
    assert [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg] == [label]
    assert not page.all("img") and not page.scripts
    places = re.findall(r"x='([\d.]+)' y='192' text-anchor='middle'>(\d)", text)
    assert places == [("52.0", "0"), ("202.0", "1"), ("352.0", "2")]

def test_a_picture_holds_every_chart_apart_and_loads_nothing(tmp_path):
    charts = {f"{EVIL} {i}": {EVIL: [(0, 1.0), (2, 2.0)], "b": [(1, 3.0)]} for i in range(3)}
    write_picture(tmp_path / "a.svg", charts)
    text = (tmp_path / "a.svg").read_text()
    ElementTree.fromstring(text)                                   # it is XML, escaped
    assert text.count("<polyline") == 6 and "<script" not in text and "href" not in text
    places = re.findall(r"<g transform='translate\((\d+) (\d+)\)'><title>", text)
    assert len(set(places)) == 3
    width, height = map(int, re.search(r"viewBox='0 0 (\d+) (\d+)'", text).groups())
    for x, y in places:
        assert int(x) + 360 <= width and int(y) + 260 <= height    # with two rows of keys

# ---------------------------------------------------------------- samples, and the screen

def test_samples_show_grades_selection_steps_and_the_oracle(policy, world, tmp_path, monkeypatch):
    """Responses made by hand: a true text twice, a wrong one, one that was cut off."""
    cfg, _ = mstar.parse(["--preset", "test", "--method", "continuous", "--max_new_tokens", "72"])
    run = SimpleNamespace(out=tmp_path, main_method="continuous")
    questions, texts, responses = [], [], []
    for task in TASKS:
        questions += [question for question in world["validation"] if question.task == task][:2]
    for bed in TESTBEDS:
        questions += world[bed][:2]
    for question in questions:
        true = write_reasoning(question, random.Random(0))
        wrong = f"1 + 1 = 3\nanswer: {question.answer % 99 + 1}"
        texts.append([true, true, wrong, "red is 3\n"])
        tokens = [policy.tokenizer.response(text) for text in texts[-1]]
        tokens[3] = tokens[3][:-1]                                 # cut off behind its line break
        responses.append([Response(tokens[l], l < 3, []) for l in range(4)])

    def sample_texts(policy, prompts, how, title, prefixes=None):
        assert how.temperature == 0.7 and how.rollouts == cfg.rollouts_per_question
        asked = [policy.tokenizer.decode(prompt.ids) for prompt in prompts]
        assert asked == [question.text for question in questions]
        return texts, responses

    monkeypatch.setattr(report, "sample_texts", sample_texts)
    reward_model = RewardModel(policy.config, policy.tokenizer)
    for prm in (None, reward_model):
        report.write_samples(cfg, run, mstar.select, policy, policy, prm, world, 0.7, 2)
        shown = read_json(tmp_path / "samples" / "2.json")
        assert shown["iteration"] == 2 and shown["temperature"] == 0.7
        assert [part["id"] for part in shown["questions"]] == [q.id for q in questions]
        assert [part["kind"] for part in shown["questions"][::2]] == [*TASKS, *TESTBEDS]
        for part, question, group in zip(shown["questions"], questions, texts):
            assert [r["text"] for r in part["responses"]] == group
            assert ["".join(r["steps"]) for r in part["responses"]] == group
            grades = [r["grade"] for r in part["responses"]]
            assert grades == ["correct", "correct", "wrong", "unparseable"]
            assert [r["selected"] for r in part["responses"]] == [True, False, False, False]
            assert [r["truncated"] for r in part["responses"]] == [False, False, False, True]
            first, again, wrong, cut = part["responses"]
            assert first["oracle"] == oracle(question, group[0]) and all(first["oracle"])
            assert wrong["oracle"] == [False, False]
            if prm is None:
                assert first["scores"] is None and first["labels"] is None
                continue
            assert len(first["scores"]) == len(first["labels"]) == len(first["oracle"])
            assert first["labels"][-1] == 1 and wrong["labels"][-1] == 0
            assert first["scores"] == again["scores"] and first["labels"] == again["labels"]
            assert len(cut["scores"]) == len(cut["labels"]) == 1
    run.main_method = "mstar"                                      # another arm's are not shown
    report.write_samples(cfg, run, mstar.select, policy, policy, None, world, 0.7, 3)
    assert not (tmp_path / "samples" / "3.json").exists()

def test_a_picture_of_the_page_is_the_questions(run_folder, world, tmp_path):
    page = Page(write_page(run_folder).read_text())
    png = base64.b64decode(page.all("img")[0]["src"].split(",")[1])
    (tmp_path / "picture.png").write_bytes(png)
    shown = np.array(Image.open(tmp_path / "picture.png"))
    assert (shown == data.render(world["validation"][0])).all()

def test_the_last_line_on_screen_is_the_gain_over_pi_0(run_folder, capsys):
    finished = finish(run_folder)
    finished["gain_over"] = {PI_0: {"id": [0.1, 0, 0.2], "ood": [0.2, 0.1, 0.3]},
                             "continuous": {"id": [0.3, 0.2, 0.4], "ood": [0, -0.1, 0.1]}}
    report.print_report(finished)
    lines = capsys.readouterr().out.splitlines()
    assert ("M-STaR: unparseable 12.5 %, unsound (of the correct) 6.2 %, readings true 99.0 %"
            ) in lines
    assert lines[-5].endswith("base 1.0, arm mstar 0.5")
    for files, word in (("", "-"), ("train.json", "not known")):   # of nothing; without an oracle
        finished["rows"][0] |= {"unsound": None, "readings": {"test": None}}
        report.print_report({**finished, "config": {"data": files}})
        assert f"unsound (of the correct) {word}, readings true {word}\n" in capsys.readouterr().out
    assert lines[-1] == f"M-STaR over {PI_0}, in domain: +10.0 points [+0.0, +20.0]"
    assert lines[-2].startswith("M-STaR over continuous, in domain")
