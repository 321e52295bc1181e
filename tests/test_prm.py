"""The process reward model: labels, scores, selection and votes, against counting by hand."""
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import prm
from data import Tokenizer, build_world, oracle, write_reasoning
from evaluate import grade_greedily, make_prompts, tokens_of
from model import Response, Sampling, load_network, read_json, sample, save, write_json
from prm import (RewardModel, StepLabels, label_responses, label_steps, random_k, response_rewards,
                 score, top_k, train_prm, weighted_vote)

TOKENIZER = Tokenizer()
TEXT = "red is 3\n3 + 4 = 7\nanswer: 7"
OTHER = "red is 3\n3 + 4 = 8\nanswer: 8"                           # they part in the second step

@pytest.fixture
def reward_model(policy):
    torch.manual_seed(2)
    model = RewardModel(policy.config, policy.tokenizer)
    model.policy.load_state_dict(policy.state_dict())
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model

def responses_of(texts):
    """[question][rollout] of texts as what the sampler would return."""
    responses = []
    for group in texts:
        responses.append([Response(TOKENIZER.response(text), True, [-1.0]) for text in group])
    return responses

# ---------------------------------------------------------------- labels

def test_targets_are_shares_of_correct_rollouts():
    assert StepLabels(0, TOKENIZER.response(TEXT), [0, 1, 3], 3).targets == [0, 1 / 3, 1]

def test_labels_count_the_correct_completions(policy, world, monkeypatch):
    """A sampler with known completions: of the 3 rollouts from prefix j of question i, (i + j) % 4
    are correct."""
    questions = world["test"][:4]
    how, rollouts = Sampling(2, 1.0, 72, seed=0), Sampling(3, 0.5, 72, seed=1)

    def fake(policy, prompts, given, title, prefixes=None):
        assert given == (how if prefixes is None else rollouts) and len(prompts) == 4
        texts = []
        for i, question in enumerate(questions):
            if prefixes is None:                                   # of each question twice the same
                true = write_reasoning(question, random.Random(0))
                texts.append([true if i else "1 + 1 = 2\nanswer: 0"] * 2)
                continue
            completions = []
            for j in range(len(prefixes[i])):
                for r in range(3):
                    answer = question.answer if r < (i + j) % 4 else 0
                    completions.append(f"answer: {answer}")
            texts.append(completions)
        return texts, responses_of(texts)

    monkeypatch.setattr(prm, "sample_texts", fake)
    labels = label_steps(policy, questions, how, rollouts)
    assert len(labels) == 4                                        # equal ones are labeled once
    for i, label in enumerate(labels):
        steps = TOKENIZER.decode(label.tokens).count("\n") + 1
        assert label.question == i and label.rollouts == 3
        # the last step needs no rollout: its own answer counts
        from_rollouts = [(i + j) % 4 for j in range(steps - 1)]
        assert label.correct == [*from_rollouts, 3 if i else 0]

def test_labels_are_those_of_completing_each_prefix_alone(policy, world, monkeypatch):
    """The real sampler. Responses that begin alike share a prefix; which others are completed
    beside it changes nothing."""
    def by_length(text, gold):                                     # a random policy is never right
        return "correct" if len(text) % 3 else "wrong"

    monkeypatch.setattr(prm, "grade", by_length)
    questions, how = world["test"][:3], Sampling(4, 1.5, 24, seed=5)
    prompts = make_prompts(policy, questions)
    texts = [[TEXT, OTHER], [], ["answer: 7", TEXT]]
    responses = [list(map(tuple, group)) for group in tokens_of(responses_of(texts))]
    completed = []

    def count(policy, prompts, how, title, prefixes):
        completed.extend(map(len, prefixes))
        return sample_texts(policy, prompts, how, title, prefixes)

    sample_texts = prm.sample_texts
    monkeypatch.setattr(prm, "sample_texts", count)
    labels = label_responses(policy, questions, prompts, responses, how)
    assert completed == [3, 0, 2] and [label.question for label in labels] == [0, 0, 2, 2]
    for label, text in zip(labels, [TEXT, OTHER, "answer: 7", TEXT]):
        assert label.tokens == TOKENIZER.response(text)
        expected = []
        for end in TOKENIZER.step_ends(label.tokens)[:-1]:
            alone = [[], [], []]
            alone[label.question] = [label.tokens[:end + 1]]
            found = sample(policy, prompts, how, alone)[label.question]
            graded = [by_length(TOKENIZER.decode(response.tokens), None) for response in found]
            expected.append(graded.count("correct"))
        expected.append(4 if by_length(text, None) == "correct" else 0)
        assert label.correct == expected
    assert labels[0].correct[0] == labels[1].correct[0]            # of the step they share
    assert len({correct for label in labels for correct in label.correct}) > 2

# ---------------------------------------------------------------- the model

def by_hand(model, prompt, tokens):
    """What the head reads at each step's end, from a full pass over this response alone: [(sum,
    lowest, last word, number)]."""
    ids = torch.tensor([prompt.ids + tokens])
    log_probs = model.policy(prompt.image[None], ids)[0].log_softmax(-1)
    words, before = [], len(prompt.ids) - 1
    for i, token in enumerate(tokens):
        words.append(log_probs[before + i, token].item())
    features = []
    for number, end in enumerate(TOKENIZER.step_ends(tokens), 1):
        so_far = words[:end + 1]
        features.append([sum(so_far), min(so_far), words[max(end - 1, 0)], number])
    return torch.tensor(features)

def test_the_head_reads_the_words_up_to_each_steps_end_and_nothing_else(reward_model, prompts):
    texts = [TEXT, "answer: 7", "1 + 1 = 2\nanswer: 2", OTHER]
    asked = [prompts[q] for q in (2, 0, 2, 2)]
    responses = [TOKENIZER.response(text) for text in texts]
    responses[2] = responses[2][:-3]                               # cut off inside the last step
    for rows in (1, 2, 100):
        found = reward_model.features(asked, responses, rows)
        for prompt, tokens, features in zip(asked, responses, found):
            expected = by_hand(reward_model, prompt, tokens)
            torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)
    first, *_, other = reward_model.features(asked, responses)
    torch.testing.assert_close(first[0], other[0])
    assert not torch.allclose(first[1], other[1])

def test_scores_are_the_heads_and_rewards_the_lowest_of_them(reward_model, prompts, monkeypatch):
    texts = [[TEXT, "answer: 7", TEXT], [], ["1 + 1 = 2\nanswer: 2"]]
    responses = tokens_of(responses_of(texts))
    calls, features = [], RewardModel.features

    def count(model, prompts, responses):
        calls.append(len(responses))
        return features(model, prompts, responses)

    monkeypatch.setattr(RewardModel, "features", count)
    scores = score(reward_model, prompts[:3], responses)
    assert calls == [3] and list(map(len, scores)) == [3, 0, 1]    # equal ones are computed once
    for q, group in enumerate(responses):
        for tokens, steps in zip(group, scores[q]):
            expected = reward_model(by_hand(reward_model, prompts[q], tokens)).sigmoid()
            torch.testing.assert_close(torch.tensor(steps), expected, rtol=1e-3, atol=1e-4)
    assert scores[0][0] == scores[0][2]
    rewards = response_rewards(reward_model, prompts[:3], responses)
    for q in range(3):
        assert rewards[q] == [min(steps) for steps in scores[q]]
    assert score(reward_model, prompts[:2], [[], []]) == [[], []]

def labels_by_a_rule(reward_model, prompts, rng):
    """Labels that follow from one of the numbers that the head reads, the lowest log-probability:
    six made-up responses of two steps for each of the prompts."""
    asked, responses = [], []
    for i in range(len(prompts)):
        for _ in range(6):
            words = [rng.randint(20, 120) for _ in range(4)]
            asked.append(i)
            responses.append([*words[:3], TOKENIZER.ids["\n"], words[3], TOKENIZER.EOS])
    features = reward_model.features([prompts[i] for i in asked], responses)
    lowest = [steps[:, 1] for steps in features]
    middle = torch.cat(lowest).median()
    labels = []
    for i, tokens, values in zip(asked, responses, lowest):
        labels.append(StepLabels(i, tokens, [4 * int(value > middle) for value in values], 4))
    return labels

def test_training_finds_the_rule_behind_the_labels(policy, world, reward_model, capsys,
                                                   monkeypatch):
    """It holds on questions that were held out, too: the last tenth of those with labels."""
    questions = world["test"][:45]                                 # the last five have no labels
    prompts = make_prompts(policy, questions[:40])
    labels = labels_by_a_rule(reward_model, prompts, random.Random(0))
    seen, features = [], RewardModel.features

    def watch(model, prompts, responses):
        seen.append({id(prompt.image) for prompt in prompts})
        return features(model, prompts, responses)

    monkeypatch.setattr(RewardModel, "features", watch)
    model, about = train_prm(policy, questions, labels)
    assert set(about) == {"steps", "good", "auc", "loss"}
    assert about["auc"] > 0.98 and about["steps"] == 4 * 6 * 2 and about["loss"] < 0.2
    held_out_targets = [target for label in labels[-24:] for target in label.targets]
    assert about["good"] == np.mean(held_out_targets)
    assert "alike" not in capsys.readouterr().out
    learned, held_out = seen
    assert len(learned) == 36 and len(held_out) == 4 and not learned & held_out
    for before, after in zip(policy.state_dict().values(), model.policy.state_dict().values()):
        assert torch.equal(before, after)                          # only the head learns

def test_scores_mean_what_the_labels_say(policy, world, reward_model):
    """At the optimum of a cross-entropy with a free bias, the mean score of the steps that were
    learned is their mean target. (The head was trained on scaled numbers, and reads unscaled
    ones.)"""
    prompts, rng = make_prompts(policy, world["test"][:20]), random.Random(1)
    labels = []
    for label in labels_by_a_rule(reward_model, prompts, rng):
        # noisy, so that no score is near 0 or 1
        noisy = [min(4, max(0, correct + rng.randint(-3, 4))) for correct in label.correct]
        labels.append(label._replace(correct=noisy))
    model, _ = train_prm(policy, world["test"], labels)
    learned = [label for label in labels if label.question < 18]
    scores = score(model, [prompts[label.question] for label in learned],
                   [[label.tokens] for label in learned])
    scores = [value for (steps,) in scores for value in steps]
    targets = [target for label in learned for target in label.targets]
    assert len(scores) == len(targets) == 18 * 6 * 2 and np.std(scores) > 0.05
    assert np.mean(scores) == pytest.approx(np.mean(targets), abs=2e-3)

def test_training_on_next_to_nothing_goes_on(policy, world, reward_model, capsys):
    prompts = make_prompts(policy, world["test"][:4])
    labels = labels_by_a_rule(reward_model, prompts, random.Random(0))
    _, about = train_prm(policy, world["test"], labels[5:7])       # one response to learn from
    assert about["steps"] == 2
    capsys.readouterr()
    alike = [label._replace(correct=[4, 4]) for label in labels]
    _, about = train_prm(policy, world["test"], alike)
    assert about["auc"] is None and about["good"] == 1 and "alike" in capsys.readouterr().out

def test_saved_prm_is_the_same_prm(reward_model, prompts, tmp_path):
    save(tmp_path / "prm.safetensors", reward_model)
    loaded = load_network(tmp_path / "prm.safetensors", TOKENIZER, kind=RewardModel)
    responses = [[TOKENIZER.response(TEXT)]]
    assert score(loaded, prompts[:1], responses) == score(reward_model, prompts[:1], responses)

# ---------------------------------------------------------------- selection and voting

def test_top_k_equals_a_brute_force_sort_in_any_order():
    rng = random.Random(0)
    for trial in range(50):
        items = {(rng.randint(0, 4), f"text {rng.randint(0, 9)}") for _ in range(20)}
        reward = {item: rng.choice([0.1, 0.5, 0.7, 0.9]) for item in items}            # many ties
        for k in (1, 2, 4, 99):
            expected = []
            for question in range(5):
                own = [item for item in items if item[0] == question]
                own.sort(key=lambda item: item[1])                 # equal rewards: by text
                own.sort(key=lambda item: reward[item], reverse=True)
                expected += own[:k]
            for _ in range(3):
                shuffled = rng.sample(sorted(items), len(items))
                rewards = [reward[item] for item in shuffled]
                kept = top_k(shuffled, rewards, k)
                assert kept == sorted(expected)
    assert top_k([], [], 2) == []

def test_random_k_keeps_k_of_each_question_whatever_the_order():
    rng = random.Random(0)
    items = sorted({(rng.randint(0, 4), f"text {rng.randint(0, 9)}") for _ in range(30)})
    times = dict.fromkeys(items, 0)
    for seed in range(300):
        kept = random_k(items, 2, seed)
        assert kept == random_k(rng.sample(items, len(items)), 2, seed) == sorted(set(kept))
        for question in range(5):
            number = sum(item[0] == question for item in items)
            assert sum(item[0] == question for item in kept) == min(2, number)
        for item in kept:
            times[item] += 1
    for item in items:                                             # nobody is preferred
        share = min(1, 2 / sum(other[0] == item[0] for other in items))
        assert times[item] / 300 == pytest.approx(share, abs=0.12)
    assert random_k([], 2, 0) == []

def test_weighted_vote():
    answers = [5, 7, 7, None]
    assert weighted_vote(answers, [0.9, 0.4, 0.4, 5.0]) == 5
    assert weighted_vote(answers, [0.7, 0.4, 0.4, 5.0]) == 7
    assert weighted_vote([5, 7, 7], [1, 1, 1]) == 7                # a majority
    assert weighted_vote([7, 5], [1, 1]) == 5                      # a tie: the smaller answer
    assert weighted_vote([None], [1.0]) is None and weighted_vote([], []) is None

def test_votes_that_tie_on_paper_tie_and_their_order_does_not_matter():
    # in floating point, 0.1 + 0.1 + 0.1 > 0.3
    assert weighted_vote([5, 5, 5, 3], [0.1, 0.1, 0.1, 0.3]) == 3
    # and ten times 0.1, one after the other, are less than 1
    assert weighted_vote([5, *[3] * 10], [1.0, *[0.1] * 10]) == 3
    rng = random.Random(0)
    votes = [(answer, rng.random()) for answer in (3, 5, 7) for _ in range(20)]
    votes += [(9, weight) for _, weight in votes[:20]]             # the same weights as 3
    winners = set()
    for _ in range(100):
        answers, weights = zip(*rng.sample(votes, len(votes)))
        winners.add(weighted_vote(answers, weights))
    assert len(winners) == 1 and winners <= {3, 5, 7}

# ---------------------------------------------------------------- the comparison with the oracle

@pytest.mark.parametrize("direction", [1, -1])
def test_audit_of_a_perfect_and_of_a_reversed_prm(direction, policy, world, monkeypatch):
    """Responses and scores made by hand: truth itself as score must give AUC 1 and the oracle's
    accuracy, its reverse AUC 0."""
    questions, texts = world["test"][:6], []
    for question in questions:
        good = write_reasoning(question, random.Random(1))
        lucky = f"1 + 1 = 3\nanswer: {question.answer}"
        wrong = f"1 + 1 = 3\nanswer: {question.answer + 1}"
        texts.append([wrong, wrong, good, lucky])

    def fake(policy, prompts, how, title, prefixes=None):
        assert (how.rollouts, how.temperature, how.max_new_tokens) == (4, 1.0, 72)
        responses = responses_of(texts)
        for group in responses:                                    # the lucky one is the likeliest
            group[3] = group[3]._replace(log_probs=[-0.5])
        return texts, responses

    def truth(model, prompts, responses):
        def steps_of(question, tokens):
            verdicts = oracle(question, TOKENIZER.decode(tokens))
            return [0.5 + direction * (0.4 if is_true else -0.4) for is_true in verdicts]

        scores = []
        for question, group in zip(questions, responses):
            scores.append([steps_of(question, tokens) for tokens in group])
        return scores

    def greedy(policy, questions, max_new_tokens, title):
        return ["correct"] * 3 + ["wrong"] * 3

    monkeypatch.setattr(prm, "sample_texts", fake)
    monkeypatch.setattr(prm, "score", truth)
    monkeypatch.setattr(prm, "grade_greedily", greedy)
    labeled, labels = world["labeled"], []
    for i in range(3):
        tokens = TOKENIZER.response("1 + 1 = 3\n" + write_reasoning(labeled[i], random.Random(1)))
        steps = len(TOKENIZER.step_ends(tokens))
        labels.append(StepLabels(i, tokens, [1, *[2 + direction] * (steps - 1)], 4))
    result = prm.audit(policy, None, labels, labeled, questions, 72, n=4)
    is_perfect = float(direction == 1)
    assert set(result) == {"labels", "scores", "selection", "verifier", "length", "by_question",
                           "responses"}
    assert result["scores"]["step"]["auc"] == is_perfect and result["responses"] == 24
    # only the first step of each labeled response is false, and every step after it is unsound
    assert result["labels"]["step"]["auc"] == (1.0 if direction == 1 else 0.5)
    assert result["labels"]["step"]["same_question"] is None
    assert result["labels"]["so_far"] == {"auc": None, "same_question": None, "true": 0.0}
    assert result["selection"]["all"] == {"responses": 12, "unsound": 0.5}
    assert result["selection"]["top_1"] == {"responses": 6, "unsound": 1 - is_perfect}
    assert result["selection"]["likely_2"]["responses"] == 12
    verifier = result["verifier"]
    assert list(verifier) == ["greedy", "1", "2", "4"] and verifier["greedy"] == 0.5
    assert verifier["4"]["best_of_n"] == is_perfect and verifier["4"]["oracle"] == 1
    assert verifier["4"]["likeliest"] == 1
    assert set(verifier["2"].values()) == {0} and len(verifier["2"]) == 5      # both are wrong
    assert result["length"] == {"top_2": None, "others": None}     # nobody has more than two
    assert result["by_question"]["greedy"] == "1 1 1 0 0 0"
    assert result["by_question"]["best_of_n"] == " ".join(str(int(is_perfect)) * 6)
    assert result["by_question"]["unsound_top_2"] == "- - - - - -"

def test_the_top_2_beside_the_others():
    """Question 0 has three correct responses, question 2 has two, the others none."""
    correct = [(0, "a"), (0, "b\nb"), (0, "c\nc\nc"), (2, "d"), (2, "e")]
    is_sound = {key: key[1] != "c\nc\nc" for key in correct}
    length, numbers = prm.compare_top_2(correct, [(0, "a"), (0, "b\nb"), (2, "d"), (2, "e")],
                                        is_sound, 4)
    assert length == {"top_2": 1.5, "others": 3.0}
    assert numbers == {"unsound_top_2": "0 - - -", "unsound_all": "0.3333 - - -",
                       "steps_top_2": "1.5 - - -", "steps_all": "2 - - -"}

def test_each_way_to_choose_among_n_responses_goes_by_its_own_numbers(world):
    """The gold answer is 7. What each way finds among the first 1, 2, 4 responses."""
    question = replace(world["test"][0], answer=7)
    texts = ["answer: 5", "5 + 2 = 7\nanswer: 7", "hm\nanswer: 5", "hm"]
    keys = [(0, text) for text in texts]
    reward = dict(zip(keys, (0.2, 0.3, 0.05, 0.9)))                # the best has no answer
    likelihood = dict(zip(keys, (-1.0, -2.0, -3.0, -4.0)))
    is_sound = dict(zip(keys, (False, True, False, False)))
    accuracy, of_question = prm.verify([question], [texts], reward, likelihood, is_sound)
    assert list(accuracy) == ["1", "2", "4"] and set(accuracy["1"].values()) == {0}
    assert accuracy["2"] == {"best_of_n": 1, "likeliest": 0, "weighted_voting": 1,
                             "majority_voting": 0, "oracle": 1}    # a tie: the smaller answer
    assert accuracy["4"] == {"best_of_n": 0, "likeliest": 0, "weighted_voting": 1,
                             "majority_voting": 0, "oracle": 1}
    assert of_question == {way: [bool(value)] for way, value in accuracy["4"].items()}

def test_the_command_audits_the_prm_of_a_run(reward_model, policy, tmp_path, capsys):
    splits = {"test": 10, "labeled": 5}
    world = build_world(splits, 3)
    tokens = TOKENIZER.response(write_reasoning(world["labeled"][4], random.Random(0)))
    steps = len(TOKENIZER.step_ends(tokens))
    labels = [StepLabels(4, tokens, [1] * steps, 2)]
    write_json(tmp_path / "config.json", {"splits": splits, "world_seed": 3, "max_new_tokens": 4})
    save(tmp_path / "pi_0.safetensors", policy)
    save(tmp_path / "prm.safetensors", reward_model)
    write_json(tmp_path / "labels.json", {"labels": [label._asdict() for label in labels]})
    prm.main([str(tmp_path)])
    result = read_json(tmp_path / "audit.json")
    assert result.pop("seconds") > 0                               # as a run's own has it
    assert result == prm.audit(policy, reward_model, labels, world["labeled"], world["test"], 4)
    assert result["labels"]["step"]["true"] == 1 and result["responses"] == 160
    graded = grade_greedily(policy, world["test"], 4, "greedy")
    assert result["verifier"]["greedy"] == graded.count("correct") / 10
    assert "AUC" in capsys.readouterr().out.splitlines()[-1]
    (tmp_path / "prm.json").unlink()
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SystemExit) as stop:
            prm.main([str(folder)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and str(folder) in error
