"""The paper's tables as commands: every experiment from end to end, its arms, its claims, and going on after a stop."""
import copy
import html
import json
import re

import pytest

import mstar
from data import TASKS, TESTBEDS
from evaluate import CLAIMS, TABLES, claims_of, dynamics_claims, format_experiment, write_experiment_html

FLAGS = ["--preset", "test", "--validation", "6", "--test", "10", "--testbed", "3", "--prm_questions", "6", "--base_images", "30", "--labeled", "16", "--passes", "1", "--threshold", "0",
         "--max_new_tokens", "8"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All experiments in one folder, with grades by the length of a text, so that the untrained policies have right responses to train
    on, and with sweeps that always choose T = 0.5."""
    with pytest.MonkeyPatch.context() as patch:
        choose = mstar.choose_temperature
        patch.setattr(mstar, "choose_temperature", lambda values, current: choose(values, current) | {"chosen": 0.5})
        patch.chdir(tmp_path_factory.mktemp("experiments"))
        patch.setattr(mstar, "grade", lambda text, gold: "right" if len(text) % 7 else "wrong")
        found = {name: mstar.main(["--experiment", name, *FLAGS]) for name in TABLES}
        with pytest.MonkeyPatch.context() as inner:                # once more: nothing is run again
            inner.setattr(mstar, "self_evolve", None)
            inner.setattr(mstar, "fit", None)
            again = {name: mstar.main(["--experiment", name, *FLAGS]) for name in TABLES}
        yield found, again, {name: json.loads(open(f"results/test-{name}.json").read()) for name in TABLES}


@pytest.mark.parametrize("name", TABLES)
def test_every_experiment_has_its_arms_with_equal_budgets_and_a_verdict_on_every_claim(results, name):
    result = results[0][name]
    assert {arm["arm"] for arm in result["arms"]} == set(TABLES[name]) and len(result["arms"]) == len(TABLES[name]) * (3 if name == "table5" else 1)
    for size in {arm["size"] for arm in result["arms"]}:
        evolved = [arm for arm in result["arms"] if arm["arm"] not in ("base", "+ warm-up", "sft") and arm["size"] == size]
        assert len({(arm["responses"], arm["updates"]) for arm in evolved}) == 1 and evolved[0]["responses"] == 32 and evolved[0]["updates"] == 3 + 4
        assert all(arm["updates"] == 3 + 4 for arm in result["arms"] if arm["arm"] == "sft")
    assert len(result["claims"]) >= len(CLAIMS.get(name, ())) and result["claims"]
    for claim in result["claims"]:
        assert claim["verdict"] in ("holds", "fails", "unresolved") and all(low <= effect <= high for effect, low, high in claim["effects"].values())
    text = format_experiment(result)
    assert all(words in text for words, *_ in TABLES[name].values()) and all(claim["words"] in text for claim in result["claims"])


def test_finished_arms_are_not_run_again_and_the_file_holds_the_result(results):
    found, again, files = results
    for name in TABLES:
        assert found[name]["arms"] == again[name]["arms"] and found[name]["claims"] == again[name]["claims"]
        assert files[name] == json.loads(json.dumps(again[name])) and format_experiment(files[name]) == format_experiment(again[name])


def test_arms_differ_in_their_switches_only(results):
    """The arms of all tables for one seed stand in one folder, from one base, pi_0 and PRM; watching changes nothing that is trained."""
    arms = {arm["arm"]: arm for name in results[0] for arm in results[0][name]["arms"] if arm["size"] == "medium"}
    assert len({tuple(round(arm["iterations"][0][key], 6) for key in ("greedy_accuracy", "pass_at_1", "entropy")) for arm in arms.values() if arm["iterations"]}) == 1      # pi_0
    assert arms["prm_watched"]["row"]["graded"] == arms["prm"]["row"]["graded"] and arms["mstar_watched"]["row"]["graded"] == arms["mstar"]["row"]["graded"]
    assert [line["loss"] for line in arms["prm_watched"]["iterations"][1:]] == [line["loss"] for line in arms["prm"]["iterations"][1:]]
    assert {line["temperature"] for line in arms["prm_watched"]["iterations"]} == {1.0} and [line["temperature"] for line in arms["mstar"]["iterations"]] == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert all(line["sweep"]["chosen"] == 1.0 for line in arms["prm_watched"]["iterations"] if "sweep" in line)
    assert [line["unlabeled"] for line in arms["vote_50"]["iterations"][1:]] == [0, 0, 2, 2] and [line["unlabeled"] for line in arms["oracle"]["iterations"][1:]] == [2, 2, 2, 2]
    assert [line["kept"] for line in arms["top_1"]["iterations"][1:]] != [line["kept"] for line in arms["top_4"]["iterations"][1:]]
    assert [arms[f"continuous_{n}"]["iterations"][-1]["iteration"] for n in ("100", "50", "12.5", "6.25")] == [1, 2, 8, 16]


def test_an_experiment_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags, real, begun = ["--experiment", "table2", *FLAGS, "--out", "mine"], mstar.self_evolve, []

    def stop_in_the_third(cfg, arm, *rest):
        begun.append(arm)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return real(cfg, arm, *rest)

    monkeypatch.setattr(mstar, "self_evolve", stop_in_the_third)
    with pytest.raises(SystemExit) as stop:
        mstar.main(flags)
    assert stop.value.code == 130 and f"go on with: python mstar.py {' '.join(flags)}\n" in capsys.readouterr().err and not (tmp_path / "results").exists()
    mstar.main(flags)
    assert begun == ["continuous", "random_2", "threshold", "threshold", "top_1", "prm", "top_4"] and (tmp_path / "mine" / "test-table2.json").exists() and not (tmp_path / "results").exists()
    with pytest.raises(SystemExit) as stop:                        # with other values the folder is another experiment's
        mstar.main([*flags, "--rollouts_per_question", "3"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--rollouts_per_question 2, not 3" in error
    with pytest.raises(SystemExit) as stop:
        mstar.main(["--resume", "mine/seed0"])
    (tmp_path / "mine" / "seed0" / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as damaged:
        mstar.main(flags)
    assert damaged.value.code == 2
    assert stop.value.code == 2 and f"its own command: python mstar.py {' '.join(flags)}" in capsys.readouterr().err


def test_a_result_of_more_seeds_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mstar, "run", lambda *a: {})
    monkeypatch.setattr(mstar, "make_experiment", lambda name, reports, command: {"seeds": list(range(len(reports)))})
    monkeypatch.setattr(mstar, "format_experiment", lambda result: "the table")
    monkeypatch.setattr(mstar, "write_experiment_html", lambda *a: None)
    flags, file = ["--preset", "test", "--experiment", "table2"], tmp_path / "results" / "test-table2.json"
    for seeds, kept in ((2, 2), (1, 2), (3, 3)):
        mstar.main([*flags, "--seeds", str(seeds)])
        assert json.loads(file.read_text())["seeds"] == list(range(kept))
        assert ("wrote results/" if seeds == kept else "wrote runs/test-experiments/test-table2.json") in capsys.readouterr().out


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table4", "table5"])
def test_claims_say_which_arm_is_better(name):
    """For each pair of a claim: the first arm right everywhere and all others wrong, then the second."""
    def effects(best, size="medium"):
        arms = [{"arm": arm, "size": s, "responses": 1, "row": {"id": {"all": 0.5}, "graded": dict.fromkeys(("test", *TESTBEDS), ("r" if (arm, s) == (best, size) else "w") * 5)}}
                for s in ("small", "medium", "large") for arm in TABLES[name]]
        verifier = {"best_of_n": "0 0", "weighted_voting": "0 0", "majority_voting": "1 1", "false_all": "0.5 -", "false_top_2": "0.25 -", "steps_all": "4 -", "steps_top_2": "3 -"}
        return {(words, effect): float(sum(group.mean() for group in groups)) / len(groups)
                for _, words, parts, *_ in claims_of(name, arms, [{"tasks": " ".join(TASKS), "verifier": verifier}]) for effect, groups in parts.items()}

    called = {arm: words for arm, (words, *_) in TABLES[name].items()}
    for _, words, pairs, _ in CLAIMS.get(name, []):
        for better, worse in pairs:
            key = words, f"{called[better]} over {called[worse]}"
            assert effects(better)[key] == 1 and effects(worse)[key] == -1
    if name in ("table4", "table5"):
        size = {"table4": "medium", "table5": "large"}[name]
        mine = {effect: value for (words, effect), value in effects("mstar", size).items() if "every task type" in words}
        assert mine == dict.fromkeys((*TASKS, *TESTBEDS), 1.0)
    if name == "table5":
        assert [effects("mstar", size)["the smallest policy gains least out of domain", "gain of large over gain of small"] for size in ("large", "small", "medium")] == [1, -1, 0]
    if name == "table2":                                           # the question without two right ones to leave out counts 0
        assert list(effects("prm").values())[-4:] == [1, 1, 0.125, 0.5]          # two ways to vote, false steps, number of steps


def test_claims_on_dynamics_measure_what_they_say():
    """Two runs whose greedy answers rise by half, whose pass@k falls by a quarter, more at T = 0.5, and whose Reward-Pass@2 rises only at first."""
    def look(greedy, right, reward, low, high):
        return {"by_question": {"greedy": greedy, "right": right, "reward_pass_at_2": reward}, "sweep": {"any_right": {"0.5": low, "1.5": high}}}
    lines = [look("0 0 1 0", "1 4 2 3", "0 0 0.5 0", "1 1 1 1", "1 1 1 1"), {"iteration": 1}, look("0 1 1 0", "0 4 2 3", "1 0 0.5 1", "1 0 1 1", "1 1 1 1"), {"iteration": 3},
             look("1 1 1 0", "0 9 2 3", "1 0.5 0.5 1", "0 0 1 1", "1 0 1 1")]
    claims = dynamics_claims([lines, copy.deepcopy(lines)])
    effects = {words: groups[0].mean() for _, words, parts, *_ in claims for groups in parts.values()}
    assert list(effects.values()) == [0.5, 0.25, 0.75, 0.5 - 0.125, 0.25] and all(parts["effect"][0].shape == (2, 4) for _, _, parts, *_ in claims)


def test_the_page_of_an_experiment_shows_its_numbers_and_the_dynamics_as_curves(results, tmp_path):
    result = json.loads(json.dumps(results[2]["dynamics"]))
    other = copy.deepcopy(result["arms"])                          # of another seed: everything a quarter higher
    for line in (line for arm in other for line in arm["iterations"] if "sweep" in line):
        line["greedy_accuracy"] += 0.25
        line["sweep"]["surface"]["1.5"]["pass_at_k"] += 0.25
    curves = {}
    for arms in (result["arms"], result["arms"] + other):
        write_experiment_html(tmp_path / "page.html", result | {"arms": arms})
        page = (tmp_path / "page.html").read_text()
        curves[len(arms)] = dict(re.findall(r"[ ;.] ?([^;:.]*?(?:greedy|T = \S+?)): ([-0-9., e]+)", re.search("aria-label='Figures 3 and 4a([^']*)", page)[1]))
    words = re.sub("<[^>]*>", " ", page)
    assert all(claim["words"] in html.unescape(words) for claim in result["claims"]) and page.count("<polyline") == 4 + 3 + 2 + 2
    mine = [line for line in result["arms"][0]["iterations"] if "sweep" in line]
    for name, value in (("greedy", lambda line: line["greedy_accuracy"]), ("pass@4, T = 1.5", lambda line: line["sweep"]["surface"]["1.5"]["pass_at_k"])):
        assert [float(y) for y in curves[2][name].split(", ")] == pytest.approx([100 * value(line) for line in mine], rel=1e-3)
        assert [float(y) for y in curves[4][name].split(", ")] == pytest.approx([100 * value(line) + 12.5 for line in mine], rel=1e-3)
