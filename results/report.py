"""
results/report.py: what a run says: after an iteration, at its end, as a page.

Read:     print_line -> make_report, print_report -> write_samples -> write_page, write_picture
Run:      python -m results.report runs/NAME      (make the page again, of an unfinished run, too)
"""
import argparse
import base64
import hashlib
import io
import json
import math
import platform
from collections import Counter
from dataclasses import asdict
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import oracle_of_steps, sound
from evaluate import (GAINS, columns_of, format_table, grade, make_prompts, one_line_errors,
                      paired_gain, percent, points, sample_texts, testbeds_of, tokens_of,
                      unique_correct, with_official)
from model import (WORKERS, Sampling, pixels_of, read_json, run_command, seed_for, write_json,
                   write_whole)
from prm import label_responses, score

FOLDER = Path(__file__).parent
SHOWN = 2                                      # questions of each task type and testbed on the page
SNAPSHOTS = 4                                  # at iteration 0, and so many more times

# ---------------------------------------------------------------- during and after a run

def print_line(line):
    """The main things of one line of metrics.jsonl on screen."""
    parts = [f"{line['arm']} {line['iteration']:>2}: T {line['temperature']}"]
    for name, words in (("greedy_accuracy", "greedy"), ("pass_at_1", "pass@1"),
                        ("pass_at_k", f"pass@{line.get('k')}"),
                        ("reward_pass_at_2", "Reward-Pass@2"), ("unsound", "correct but unsound"),
                        ("unparseable", "unparseable")):
        if name in line:
            parts.append(f"{words} {percent(line[name])}")
    if "num_kept" in line:
        parts.append(f"kept {line['num_kept']:,} of {line['num_unique_correct']:,} unique correct")
    print(f"{', '.join(parts)}, {line['seconds']:.0f} s", flush=True)

def make_report(cfg, run, command, world, rows, main_row):
    """report.json: all numbers that tables, figures and the page show. main_row: the name of the
    main method's row."""
    mine = next(row for row in rows if row["name"] == main_row)
    chip = torch.cuda.get_device_name() if run.device == "cuda" else platform.machine()
    seconds = {name: round(about["seconds"], 1) for name, about in run.about.items()}
    return {"command": command, "config": asdict(cfg), "method": cfg.method, "seed": cfg.seed,
            "device": f"{run.device}, {chip}, {WORKERS} worker{'s' * (WORKERS > 1)}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__},
            "seconds": round(sum(seconds.values()), 1), "stages": seconds, "rows": rows,
            "mine": main_row, "iterations": run.done,
            "updates": {name.removeprefix("arm "): about["updates"]
                        for name, about in run.about.items() if "updates" in about},
            "audit": run.about.get("audit", {}).get("by_question"),
            "tasks": " ".join(question.task for question in world["test"]),
            "questions": seed_for(0, [world[split] for split in ("test", *testbeds_of(world))]),
            "gain_over": {row["name"]: paired_gain(mine, row) for row in rows if row is not mine}}

def print_report(report):
    """The result of a run on screen: table, how sound and true texts are, last the main gain."""
    print(f"\n{format_table(report['rows'])}\n")
    none = "not known" if report["config"]["data"] else "-"        # "-": there was none
    for row in report["rows"]:
        unsound, readings = percent(row["unsound"], none), percent(row["readings"]["test"], none)
        print(f"{row['name']}: unparseable {percent(row['unparseable'])}, unsound (of the correct) "
              f"{unsound}, readings true {readings}")
    stages = ", ".join(f"{name} {s / 60:.1f}" for name, s in report["stages"].items())
    print(f"{report['seconds'] / 60:.1f} minutes on {report['device']}: {stages}")
    others = sorted(report["gain_over"], key=lambda name: name.startswith("pi_0"))     # pi_0 last
    for key, where in GAINS.items():
        for name in others:
            if gain := report["gain_over"][name].get(key):
                print(f"{report['mine']} over {name}, {where}: {points(gain)}")

# ---------------------------------------------------------------- samples for the page

def write_samples(cfg, run, select, policy, pi_0, prm, world, temperature, iteration):
    """What the page shows of an iteration: SHOWN questions of each task type (of validation) and
    testbed, with L responses: grade, whether `select` would take it, and for each step the PRM's
    score, the Monte-Carlo label (rollouts of pi_0), the oracle's verdict. Never trained on."""
    if cfg.method != run.main_method or not cfg.due(iteration, SNAPSHOTS):
        return
    chosen = []
    for kind in sorted({question.task for question in world["validation"]}):
        asked = [question for question in world["validation"] if question.task == kind]
        chosen += [(kind, question) for question in asked[:SHOWN]]
    for bed in testbeds_of(world):
        chosen += [(bed, question) for question in world[bed][:SHOWN]]
    kinds, questions = zip(*chosen)
    seed, prompts = seed_for(cfg.seed, "samples"), make_prompts(policy, questions)
    how = Sampling(cfg.rollouts_per_question, temperature, cfg.max_new_tokens, seed)
    texts, responses = sample_texts(policy, prompts, how, f"iteration {iteration}: samples to show")
    scores, labels = None, {}
    if prm:
        scores = score(prm, prompts, tokens_of(responses))
        rollouts = Sampling(cfg.prm_rollouts, cfg.prm_temperature, cfg.max_new_tokens, seed + 1)
        for label in label_responses(pi_0, questions, prompts, tokens_of(responses), rollouts):
            labels[label.question, tuple(label.tokens)] = label.targets
    correct, _ = unique_correct(questions, texts)                  # as in training
    selected = set(select(cfg, prm, prompts, correct, iteration))
    shown, folder = [], run.out / "samples"
    folder.mkdir(exist_ok=True)
    for i, question in enumerate(questions):
        png = io.BytesIO()
        Image.fromarray(pixels_of(prompts[i].image).numpy()).save(png, "PNG", optimize=True)
        write_whole(folder / f"{i}.png", png.getvalue())
        shown.append({"id": question.id, "kind": kinds[i], "text": question.text,
                      "answer": question.answer, "responses": []})
        for l, text in enumerate(texts[i]):
            first = texts[i].index(text) == l                      # a repeat is not selected
            tokens, known = responses[i][l].tokens, bool(question.facts)   # to the oracle
            steps = policy.tokenizer.steps(tokens)
            shown[-1]["responses"].append({
                "text": text, "steps": steps, "grade": grade(text, question),
                "selected": first and (i, text) in selected,
                "truncated": not responses[i][l].complete, "scores": scores and scores[i][l],
                "labels": labels.get((i, tuple(tokens))),
                "oracle": oracle_of_steps(question, text, steps) if known else None,
                "sound": sound(question, text) if known else None})
    write_json(folder / f"{iteration}.json",
               {"iteration": iteration, "temperature": temperature, "questions": shown})

# ---------------------------------------------------------------- report.html

def write_page(folder):
    """Write folder/report.html from the files of a run, finished or not: one page that needs no
    network and no other file. Text of policies and questions is escaped, and no script but page.js
    may run on it. Returns its path."""
    folder, report, lines = Path(folder), None, []
    config, metrics = read_json(folder / "config.json"), folder / "metrics.jsonl"
    if (folder / "report.json").exists():
        report = read_json(folder / "report.json")
        lines = report["iterations"]
    elif metrics.exists():
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    rounds = [read_json(path) for path in (folder / "samples").glob("*.json")]
    rounds.sort(key=lambda part: part["iteration"])
    parts = [html_head(report, config, lines)]
    if lines:
        sweeps = [line for line in lines if line["arm"] == config["method"] and "sweep" in line]
        parts += ["<h2>Over iterations</h2>", html_curves(lines), html_sweeps(sweeps)]
    if rounds:
        script = f"<script>{(FOLDER / 'page.js').read_text()}</script>"
        parts += ["<h2>Samples</h2>", html_samples(rounds, folder / "samples"), script]
    digest = base64.b64encode(hashlib.sha256((FOLDER / "page.js").read_bytes()).digest()).decode()
    rules = ("default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
             f"script-src 'sha256-{digest}'")
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{rules}">
<title>M-STaR: {escape(folder.name)}</title>
<style>{(FOLDER / 'page.css').read_text()}</style><body>{''.join(parts)}</body></html>"""
    write_whole(folder / "report.html", page.encode(errors="replace"))     # a name may be no text
    return folder / "report.html"

def html_table(head, rows):
    """An HTML table of cells that are HTML already; a cell may bring its own <td>."""
    lines = ["".join(f"<th>{cell}" for cell in head)]
    for row in rows:
        cells = (cell if str(cell).startswith("<td") else f"<td>{cell}" for cell in row)
        lines.append("".join(cells))
    return f"<div class='scroll'><table><tr>{'<tr>'.join(lines)}</table></div>"

def html_head(report, config, lines):
    """What came out, at what cost, by which command; without a report, how far the run has come."""
    command = f"<p><code>{escape(config['command'])}</code></p>"
    if not report:
        number = sum(line["iteration"] > 0 for line in lines)
        return f"<h1>No report yet: {number} iterations of {escape(config['arms'])}</h1>{command}"
    rows, row = [], next(row for row in report["rows"] if row["name"] == report["mine"])
    for other in with_official(report["rows"]):
        pairs = zip(columns_of(other).values(), columns_of(other["ci95"]).values())
        rows.append([escape(other["name"]), *(f"{100 * value:.1f} <small>[{100 * low:.0f}, "
                                              f"{100 * high:.0f}]</small>"
                                              for value, (low, high) in pairs)])
    gains = []
    for name, gain in report["gain_over"].items():
        kinds = [f"{points(gain[key])} {GAINS[key]}" for key in reversed(GAINS) if key in gain]
        gains.append(f"<li>over {escape(name)}: {', '.join(kinds)}")
    return (f"<h1>{escape(row['name'])}: {percent(row['id']['all'])} in domain</h1>"
            f"<p>{report['seconds'] / 60:.1f} minutes on {escape(report['device'])}, preset "
            f"{escape(config['preset'])}, seed {report['seed']}. In brackets: 95 % intervals over "
            f"questions.</p>{command}{html_table(['%', *columns_of(row)], rows)}"
            f"<p>{escape(row['name'])}, paired by question:</p><ul>{''.join(gains)}</ul>")

CURVES = (     # name in metrics.jsonl, title, unit, how to read it (Figures of the paper)
    ("greedy_accuracy", "Greedy accuracy", "%", "Exploitation: should rise, then flatten (3)."),
    ("pass_at_k", "Pass@k", "%", "Exploration: one of k responses is correct (3, 4a)."),
    ("reward_pass_at_2", "Reward-Pass@2", "%", "What the PRM can exploit of it (4c, 5)."),
    ("temperature", "Temperature", "T", "Of the responses trained on: where the sweeps put it."),
    ("unsound", "Unsound", "%", "Unique correct responses whose steps do not derive the answer."),
    ("entropy", "Entropy", "nats per token", "Falls as the policy repeats itself."),
    ("reward_auc", "AUC of R_p", "%", "Does the PRM, fixed since pi_0, still know this policy?"))

def html_curves(lines):
    """Line charts of the metrics, one line per arm."""
    figures = []
    for name, title, unit, note in CURVES:
        series = {}
        for line in lines:
            if name in line:
                point = line["iteration"], line[name] * (100 if unit == "%" else 1)
                series.setdefault(line["arm"], []).append(point)
        if series:
            figures.append(line_chart(title, unit, series, note))
    return f"<div class='charts'>{''.join(figures)}</div>"

def line_chart(title, unit, series, note):
    """A chart of a page: series {name: [(iteration, value)]}."""
    drawn, keys, values = draw_lines(series)
    keys = [f"<span class='key'><svg width='34' height='10'>{key}</svg> {escape(name)}</span>"
            for name, key in keys.items()]
    return (f"<figure><b>{escape(title)}</b>, {escape(unit)}<svg viewBox='0 0 360 212' role='img' "
            f"aria-label='{escape(title)} by iteration. {values}'>{drawn}</svg>"
            f"<div>{''.join(keys)}</div><figcaption>{escape(note)}</figcaption></figure>")

def write_picture(path, charts):
    """Write charts {title: series}, two in a row, as an SVG file that loads nothing."""
    parts = []
    for i, (title, series) in enumerate(charts.items()):
        drawn, keys, values = draw_lines(series)
        for j, (name, key) in enumerate(keys.items()):
            drawn += (f"<g transform='translate({52 + 150 * (j % 2)} {220 + 18 * (j // 2)})'>{key}"
                      f"<text x='40' y='9'>{escape(name)}</text></g>")
        drawn += f"<text x='20' y='-8'>{escape(title)}</text>"
        x, y = 380 * (i % 2), 30 + 300 * (i // 2)
        parts.append(f"<g transform='translate({x} {y})'><title>{values}</title>{drawn}</g>")
    write_whole(path, (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 750 {300 * (i // 2 + 1)}' "
        f"font-family='sans-serif'><style>{(FOLDER / 'page.css').read_text()}</style>"
        f"<rect width='100%' height='100%' fill='var(--bg)'/>{''.join(parts)}</svg>").encode())

def draw_lines(series):
    """Axes, ticks and lines in a box of 360 x 212, as SVG: (all of it, {name: its line in the
    legend}, the values in words, for those who cannot see it)."""
    dots = [dot for line in series.values() for dot in line]
    xs, ys = sorted({x for x, _ in dots}), [y for _, y in dots]
    low, high = min(ys), max(*ys, min(ys) + max(0.02 * abs(min(ys)), 0.01))    # never flat
    size = 10.0 ** math.floor(math.log10(high - low))
    tick = next(size * m for m in (0.2, 0.5, 1, 2, 5) if (high - low) / (size * m) <= 5)
    low, high = math.floor(low / tick) * tick, math.ceil(high / tick) * tick

    def at(x, y):                                                  # in the box of 360 x 212
        return (52 + 300 * (x - xs[0]) / max(1, xs[-1] - xs[0]),
                175 - 160 * (y - low) / (high - low))

    drawn, keys, values = [], {}, []
    for i in range(round((high - low) / tick) + 1):
        value = low + i * tick
        y = at(0, value)[1]
        drawn.append(f"<line class='grid' x1='52' x2='352' y1='{y:.1f}' y2='{y:.1f}'/>"
                     f"<text x='46' y='{y + 4:.1f}' text-anchor='end'>{value:.4g}</text>")
    for x in xs[::math.ceil(len(xs) / 9)]:                         # not too many to read
        drawn.append(f"<text x='{at(x, low)[0]:.1f}' y='192' text-anchor='middle'>{x}</text>")
    for i, (name, line) in enumerate(series.items()):
        dashes = ("", "6 3", "2 3", "8 3 2 3")[(i + i // 4) % 4]   # not by colour alone
        look = f"stroke='var(--c{i % 4})' fill='none' stroke-width='2' stroke-dasharray='{dashes}'"
        path = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in line)
        drawn.append(f"<polyline {look} points='{path}'/>")
        values.append(f"{name}: " + ", ".join(f"{y:.4g}" for _, y in line))
        keys[name] = f"<line {look} x1='0' x2='34' y1='5' y2='5'/>"
    drawn.append("<text x='202' y='209' text-anchor='middle'>iteration</text>")
    return "".join(drawn), keys, escape("; ".join(values))

def html_sweeps(lines):
    """Sweeps as a table: a row per temperature, a column per sweep; the choice is outlined."""
    if not lines:
        return ""
    aim, rows, columns = lines[0]["sweep"]["aim"], [], []
    for line in lines:
        surface = line["sweep"]["surface"]
        columns.append({float(t): values[aim] for t, values in surface.items()})
    values = [value for column in columns for value in column.values()]
    low, high = min(values), max(values)
    for t in columns[0]:                                           # the grid
        cells = [f"T = {t}"]
        for line, column in zip(lines, columns):
            shade = (column[t] - low) / max(high - low, 1e-9)
            kind = "heat chosen" if t == line["sweep"]["chosen"] else "heat"
            cells.append(f"<td class='{kind}' style='--s: {shade:.2f}'>{100 * column[t]:.1f}")
        rows.append(cells)
    head = [f"{escape(aim)}, %", *(f"before iteration {line['iteration']}" for line in lines)]
    return html_table(head, rows) + "<p class='soft'>Dark: high. Outlined: chosen.</p>"

def html_samples(rounds, folder):
    """The sample browser: per question its picture and, per iteration, every response and step."""
    articles = []
    for number, shown in enumerate(rounds[0]["questions"]):
        folds = []
        for part in rounds:
            group = part["questions"][number]["responses"]
            times = Counter(r["text"] for r in group)
            different = {r["text"]: r for r in reversed(group)}.values()
            different = sorted(different, key=lambda r: (-r["selected"], r["grade"] != "correct"))
            items = "".join(html_response(r, times[r["text"]]) for r in different)
            correct = sum(r["grade"] == "correct" for r in group)
            folds.append(f"<details data-iteration='{part['iteration']}'"
                         f"{' open' if part is rounds[-1] else ''}><summary>iteration "
                         f"{part['iteration']}, T = {part['temperature']}: {correct} of "
                         f"{len(group)} correct</summary><ul class='responses'>{items}</ul>"
                         "</details>")
        image = base64.b64encode((folder / f"{number}.png").read_bytes()).decode()
        kind, text, answer = (escape(str(shown[name])) for name in ("kind", "text", "answer"))
        articles.append(f"<article data-kind='{kind}'><div><img alt='' src='data:image/png;base64,"
                        f"{image}'><p class='soft'>{kind}, {escape(shown['id'])}</p></div><div><p>"
                        f"<b>{text}</b><br>gold answer: {answer}</p>{''.join(folds)}</div>"
                        "</article>")
    filters = {"kind": dict.fromkeys(escape(one["kind"]) for one in rounds[0]["questions"]),
               "iteration": [part["iteration"] for part in rounds],
               "outcome": ("correct", "selected", "unsound", "wrong", "unparseable", "truncated")}
    bar = ""
    for name, options in filters.items():
        items = "".join(f"<option>{option}" for option in ("any", *options))
        bar += f"<label>{name} <select id='{name}'>{items}</select></label>"
    return ("<p class='soft'>With a PRM, a step's colour is its score, 0 orange to 1 blue (the "
            "smallest is R_p). rollouts: share of pi_0's completions from there that are correct. "
            "✓ ✗: the oracle (✗ also if a number comes from nowhere). Framed: selected."
            f"</p><div class='filter' hidden>{bar}</div>{''.join(articles)}")

def html_response(r, times):
    """One response of the sample browser, which came so many times."""
    outcome = [r["grade"]] + ["selected"] * r["selected"] + ["truncated"] * r["truncated"]
    if r["grade"] == "correct" and r["sound"] is False:            # None: not known
        outcome.append("unsound")
    steps = ""
    for i, text in enumerate(r["steps"]):
        notes = [f"{words} {r[key][i]:.2f}" for key, words in (("scores", "PRM"),
                                                               ("labels", "rollouts")) if r[key]]
        if r["oracle"]:
            notes.append("✓ true" if r["oracle"][i] else "✗ false")
        shade = f" style='--s: {r['scores'][i]:.2f}'" if r["scores"] else ""
        steps += f"<li{shade}>{escape(text)}<small>{' · '.join(notes)}</small>"
    return (f"<li class='response{' selected' * r['selected']}' data-outcome='{' '.join(outcome)}'>"
            f"<b>{', '.join(outcome)}</b>{f' ×{times}' if times > 1 else ''}<ol>{steps}</ol></li>")

def main():
    """Make the pages of the runs that are named."""
    parser = argparse.ArgumentParser(prog="python -m results.report", description=main.__doc__)
    parser.add_argument("runs", metavar="runs/NAME", nargs="+", help="the folder of a run")
    parser.error = lambda text: parser.exit(2, f"results.report: {text}; see --help\n")
    for name in parser.parse_args().runs:
        with one_line_errors("results.report", f"{name}: no run", ValueError, KeyError, TypeError):
            print(f"wrote {write_page(name)}")

if __name__ == "__main__":
    run_command(main)
