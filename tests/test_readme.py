"""README.md shows what the runs in results/ measured, and nothing else."""
import json
import re
from pathlib import Path
from statistics import mean

from data import TASKS, TESTBEDS

ROOT = Path(__file__).parent.parent
REPORTS = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("cpu-mstar-seed?.json"))]


def figures(row):
    return [row["id"]["all"], *(row["id"][task] for task in TASKS), *(row["ood"][bed] for bed in TESTBEDS), row["ood"]["all"]]


def test_the_result_table_is_the_mean_of_the_committed_runs():
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]*[^| ]) +\| (.*) \|$", text, re.MULTILINE))
    assert [report["seed"] for report in REPORTS] == list(range(len(REPORTS))) and REPORTS
    for i, row in enumerate(REPORTS[0]["rows"]):
        columns = zip(*(figures(report["rows"][i]) for report in REPORTS))
        assert rows[row["name"]].split(" | ") == [f"{100 * mean(column):.1f}" for column in columns], row["name"]
    for report in REPORTS:
        for name in set(report["gain_over"]) - {"base", "SFT (direct answers)"}:
            gains = [f"{100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" for gain, low, high in (report["gain_over"][name][part] for part in ("id", "ood"))]
            assert f"| M-STaR over {name}, seed {report['seed']} | {gains[0]} | {gains[1]} |" in text
        assert f"{report['seconds'] / 60:.1f} minutes" in text
