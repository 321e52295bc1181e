"""README.md and RESULTS.md show what the runs in results/ measured, and nothing else."""
import json
import re
from pathlib import Path
from statistics import mean

import pytest

from data import TASKS, TESTBEDS
from evaluate import format_experiment

ROOT = Path(__file__).parent.parent
EXPERIMENTS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("cpu-*.json")) if path.stem.startswith(("cpu-table", "cpu-dynamics"))}
REPORTS = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("cpu-mstar-seed?.json"))]


def figures(row):
    return [row["id"]["all"], *(row["id"][task] for task in TASKS), *(row["ood"][bed] for bed in TESTBEDS), row["ood"]["all"]]


def test_the_result_table_is_the_mean_of_the_committed_runs():
    text = (ROOT / "README.md").read_text()
    rows = dict(reversed(re.findall(r"^\| ([^|]*[^| ]) +\| (.*) \|$", text, re.MULTILINE)))              # the first table
    assert [report["seed"] for report in REPORTS] == list(range(len(REPORTS))) and REPORTS
    for i, row in enumerate(REPORTS[0]["rows"]):
        columns = zip(*(figures(report["rows"][i]) for report in REPORTS))
        assert rows[row["name"]].split(" | ") == [f"{100 * mean(column):.1f}" for column in columns], row["name"]
    def points(gain):
        return f"{100 * gain[0]:+.1f} [{100 * gain[1]:+.1f}, {100 * gain[2]:+.1f}]"

    comparison, results = json.loads((ROOT / "results" / "cpu-comparison.json").read_text()), (ROOT / "RESULTS.md").read_text()
    for name in ("+ warm-up", "continuous", "+ PRM re-rank", "SFT (direct answers)"):
        gain = comparison["gain_in_all_runs"][f"M-STaR - {name}"]
        assert f"| M-STaR over {name}, {len(REPORTS)} seeds | {points(gain['id'])} | {points(gain['ood'])} |" in text
    for report in REPORTS:
        for name in set(report["gain_over"]) - {"base", "SFT (direct answers)"}:
            gain = report["gain_over"][name]
            assert f"| M-STaR over {name}, seed {report['seed']} | {points(gain['id'])} | {points(gain['ood'])} |" in results
        assert f"{report['seconds'] / 60:.1f} minutes" in text


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_tables_and_verdicts_are_those_of_the_committed_experiments(name):
    lines = format_experiment(EXPERIMENTS[name]).splitlines()
    text, results = ((ROOT / file).read_text().splitlines() for file in ("README.md", "RESULTS.md"))
    assert not [line for line in lines if line not in text]
    verdicts = lines[next(i for i, line in enumerate(lines) if line.startswith("| claim | verdict")):]
    assert len(verdicts) > 2 and not [line for line in verdicts if line not in results]
