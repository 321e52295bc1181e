"""The process reward model: labels, scores, selection and votes, against counting by hand."""
import random

import pytest
import torch

import prm
from data import Tokenizer, write_reasoning
from evaluate import make_prompts
from model import load_policy, save_policy
from prm import RewardModel, label_steps, rerank, score, step_ends, train_prm, weighted_vote

TOKENIZER = Tokenizer()
TEXT = "red is 3\n3 + 4 = 7\nanswer: 7"


@pytest.fixture
def reward_model(policy):
    torch.manual_seed(2)
    model = RewardModel(policy.config)
    model.policy.load_state_dict(policy.state_dict())
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


# ---------------------------------------------------------------- labels

def test_steps_end_at_line_breaks_and_at_the_last_token():
    tokens = TOKENIZER.response(TEXT)
    assert [TOKENIZER.decode(tokens[:end + 1]) for end in step_ends(tokens, TOKENIZER)] == ["red is 3\n", "red is 3\n3 + 4 = 7\n", TEXT]
    assert step_ends(tokens, TOKENIZER)[-1] == tokens.index(TOKENIZER.EOS)
    cut = tokens[:-2]                                              # cut off inside the last step
    assert step_ends(cut, TOKENIZER)[-1] == len(cut) - 1 and len(step_ends(cut, TOKENIZER)) == 3


def test_labels_count_the_right_completions(policy, world, monkeypatch):
    """A sampler with known completions: of the 3 rollouts from prefix j of question i, (i + j) % 4 are right."""
    questions = world["test"][:4]

    def fake(policy, prompts, tokenizer, L, temperature, T, seed, title, prefixes=None):
        if prefixes is None:
            assert (L, temperature) == (2, 1.0)
            texts = [[write_reasoning(q, random.Random(0)) if i else "1 + 1 = 2\nanswer: 0"] * 2 for i, q in enumerate(questions)]      # twice the same
        else:
            assert (L, temperature) == (3, 0.5)
            texts = [[f"answer: {q.answer if r < (i + j) % 4 else 0}" for j, _ in enumerate(prefixes[i]) for r in range(L)] for i, q in enumerate(questions)]
        return texts, [[type("R", (), {"tokens": tokenizer.response(text)}) for text in group] for group in texts]

    monkeypatch.setattr(prm, "sample_texts", fake)
    labels = label_steps(policy, questions, TOKENIZER, 2, 3, 0.5, 72, 0)
    assert len(labels) == 4                                        # equal responses are labeled once
    for i, label in enumerate(labels):
        assert label.question == i and len(label.right) == len(label.ends) == TOKENIZER.decode(label.tokens).count("\n") + 1
        assert label.right == [(i + j) % 4 for j in range(len(label.ends) - 1)] + [3 if i else 0]      # the last step: its own answer
    assert prm.estimate(labels[1]._replace(right=[0, 1, 3]), "soft") == [0, 1 / 3, 1]
    assert prm.estimate(labels[1]._replace(right=[0, 1, 3]), "hard") == [0, 1, 1]


def test_responses_that_begin_alike_share_their_labels(policy, world, monkeypatch):
    """Two responses with the same first step and different second ones, through the real sampler's ordering of prefixes."""
    question = world["test"][0]
    texts = [["red is 3\n3 + 4 = 7\nanswer: 7", "red is 3\n3 + 4 = 8\nanswer: 8"]]
    prefixes_seen = []

    def fake(policy, prompts, tokenizer, L, temperature, T, seed, title, prefixes=None):
        if prefixes is not None:
            prefixes_seen.extend(tokenizer.decode(prefix) for prefix in prefixes[0])
            right = {"red is 3\n": 2, "red is 3\n3 + 4 = 7\n": 1, "red is 3\n3 + 4 = 8\n": 0}
            return [[f"answer: {question.answer if r < right[prefix] else 0}" for prefix in prefixes_seen for r in range(L)]], None
        return texts, [[type("R", (), {"tokens": tokenizer.response(text)}) for text in group] for group in texts]

    monkeypatch.setattr(prm, "sample_texts", fake)
    labels = label_steps(policy, [question], TOKENIZER, 2, 2, 0.5, 72, 0)
    assert len(prefixes_seen) == 3 and [label.right[:2] for label in labels] == [[2, 1], [2, 0]]


# ---------------------------------------------------------------- the model

def by_hand(model, prompt, tokens):
    """What the head reads at each step's end, from a full pass over this response alone: [(sum, lowest, last word, number)]."""
    log_probs = model.policy(prompt.image[None], torch.tensor([prompt.ids + tokens]))[0].log_softmax(-1)
    words = [log_probs[len(prompt.ids) + i - 1, token].item() for i, token in enumerate(tokens)]
    return [[sum(words[:end + 1]), min(words[:end + 1]), words[max(end - 1, 0)], number] for number, end in enumerate(step_ends(tokens, TOKENIZER), 1)]


def test_the_head_reads_the_words_up_to_each_steps_end_and_nothing_else(reward_model, prompts):
    texts = [TEXT, "answer: 7", "1 + 1 = 2\nanswer: 2", "red is 3\n3 + 4 = 8\nanswer: 8"]
    asked, responses = [prompts[q] for q in (2, 0, 2, 2)], [TOKENIZER.response(text) for text in texts]
    responses[2] = responses[2][:-3]                               # cut off inside the last step
    for rows in (1, 2, 100):
        for prompt, tokens, got in zip(asked, responses, reward_model.features(asked, responses, TOKENIZER, rows)):
            torch.testing.assert_close(got, torch.tensor(by_hand(reward_model, prompt, tokens)), rtol=1e-3, atol=1e-3)
    first, *_, other = reward_model.features(asked, responses, TOKENIZER)
    torch.testing.assert_close(first[0], other[0])                 # they part in the second step
    assert not torch.allclose(first[1], other[1])


def test_scores_are_the_heads_whatever_the_batch(reward_model, prompts):
    texts = [[TEXT, "answer: 7", TEXT], ["1 + 1 = 2\nanswer: 2"]]
    responses = [[TOKENIZER.response(text) for text in group] for group in texts]
    for rows in (1, 3, 100):
        got = score(reward_model, prompts[:2], responses, TOKENIZER, rows=rows)
        for q, group in enumerate(responses):
            for tokens, steps in zip(group, got[q]):
                expected = reward_model.head(torch.tensor(by_hand(reward_model, prompts[q], tokens)))[:, 0].sigmoid()
                torch.testing.assert_close(torch.tensor(steps), expected, rtol=1e-3, atol=1e-4)


def test_training_finds_the_rule_behind_the_labels(policy, world, reward_model, capsys, monkeypatch):
    """Labels that follow from one of the head's numbers: learned, and true on questions that were held out."""
    rng, questions = random.Random(0), world["test"][:40]
    prompts = make_prompts(questions, TOKENIZER, 64)
    responses = [(i, [rng.randint(20, 120) for _ in range(3)] + [TOKENIZER.ids["\n"], rng.randint(20, 120), TOKENIZER.EOS]) for i in range(40) for _ in range(6)]
    lowest = [features[:, 1] for features in reward_model.features([prompts[i] for i, _ in responses], [tokens for _, tokens in responses], TOKENIZER)]
    middle = torch.cat(lowest).median()
    labels = [prm.StepLabels(i, tokens, step_ends(tokens, TOKENIZER), [4 * int(v > middle) for v in values], 4) for (i, tokens), values in zip(responses, lowest)]
    seen = []
    features = RewardModel.features
    monkeypatch.setattr(RewardModel, "features", lambda self, prompts, *rest: seen.append(prompts) or features(self, prompts, *rest))
    model, metrics = train_prm(policy, questions, labels, TOKENIZER, "soft")
    assert metrics["auc"] > 0.98 and metrics["balanced_accuracy"] > 0.9 and metrics["steps"] == 48 and "alike" not in capsys.readouterr().out
    learned, held_out = ({id(prompt.image) for prompt in prompts} for prompts in seen)
    assert len(learned) == 36 and len(held_out) == 4 and not learned & held_out
    assert all(torch.equal(a, b) for a, b in zip(policy.state_dict().values(), model.policy.state_dict().values()))       # only the head learns
    train_prm(policy, questions[:2], [label for label in labels if label.question < 2][5:7], TOKENIZER, "soft")         # one response to learn from
    capsys.readouterr()
    _, metrics = train_prm(policy, questions, [label._replace(right=[4] * 2) for label in labels], TOKENIZER, "soft")
    assert metrics["auc"] is None and "alike" in capsys.readouterr().out


def test_saved_prm_is_the_same_prm(reward_model, prompts, tmp_path):
    save_policy(reward_model, tmp_path / "prm.safetensors", TOKENIZER.symbols)
    loaded, _ = load_policy(tmp_path / "prm.safetensors", kind=RewardModel)
    responses = [[TOKENIZER.response(TEXT)]]
    assert score(loaded, prompts[:1], responses, TOKENIZER) == score(reward_model, prompts[:1], responses, TOKENIZER)


# ---------------------------------------------------------------- selection

def test_rerank_equals_a_brute_force_sort_in_any_order():
    rng = random.Random(0)
    for trial in range(50):
        items = sorted({(rng.randint(0, 4), f"text {rng.randint(0, 9)}") for _ in range(20)})
        reward = {item: rng.choice([0.1, 0.5, 0.7, 0.9]) for item in items}                          # many ties
        shuffled = rng.sample(items, len(items))
        got = {how: rerank(shuffled, [reward[item] for item in shuffled], how, 2, 0.5, 3) for how in ("all", "top", "threshold", "random")}
        assert got["all"] == items and got["threshold"] == [item for item in items if reward[item] > 0.5]
        for question in {q for q, _ in items}:
            mine = [item for item in items if item[0] == question]
            best = sorted(mine, key=lambda item: (-reward[item], item[1]))[:2]
            assert [item for item in got["top"] if item[0] == question] == sorted(best)
            assert sum(item[0] == question for item in got["random"]) == min(2, len(mine))
        assert set(got["random"]) <= set(items)
        again = rng.sample(items, len(items))
        assert rerank(again, [reward[item] for item in again], "random", 2, 0.5, 3) == got["random"]
    assert rerank([], [], "top", 2, 0.5, 0) == []


def test_weighted_vote():
    assert weighted_vote([5, 7, 7, None], [0.9, 0.4, 0.4, 5.0]) == 5
    assert weighted_vote([5, 7, 7, None], [0.7, 0.4, 0.4, 5.0]) == 7
    assert weighted_vote([5, 7, 7], [1, 1, 1]) == 7 and weighted_vote([7, 5], [1, 1]) == 5
    assert weighted_vote([None], [1.0]) is None and weighted_vote([], []) is None


# ---------------------------------------------------------------- the audit

def test_audit_of_a_perfect_and_of_a_reversed_prm(policy, world, monkeypatch):
    """Responses and scores made by hand: truth itself as score must give AUC 1 and the oracle's accuracy, its reverse AUC 0."""
    questions = world["test"][:6]
    good = [write_reasoning(q, random.Random(1)) for q in questions]
    lucky = [f"1 + 1 = 3\nanswer: {q.answer}" for q in questions]
    wrong = [f"1 + 1 = 3\nanswer: {q.answer + 1}" for q in questions]
    texts = [[w, w, g, l] for g, l, w in zip(good, lucky, wrong)]

    def fake(policy, prompts, tokenizer, *rest, **more):
        return texts, [[type("R", (), {"tokens": tokenizer.response(text), "log_probs": [-1.0, -(j != 3)]}) for j, text in enumerate(group)] for group in texts]

    monkeypatch.setattr(prm, "sample_texts", fake)
    monkeypatch.setattr(prm, "grade_greedily", lambda *a: ["right"] * 3 + ["wrong"] * 3)
    for direction in (1, -1):
        def truth(model, prompts, responses, tokenizer):
            return [[[0.5 + direction * (0.4 if v else -0.4) for v in prm.oracle(q, tokenizer.decode(tokens))] for tokens in group]
                    for q, group in zip(questions, responses)]
        monkeypatch.setattr(prm, "score", truth)
        result = prm.audit(policy, None, [], questions, questions, TOKENIZER, 72, n=4)
        assert result["scores"]["step"]["all"]["auc"] == (1 if direction == 1 else 0)
        assert result["selection"]["all"]["false_step"] == 0.5 and result["selection"]["top_1"]["false_step"] == (0 if direction == 1 else 1)
        assert result["verifier"][4]["best_of_n"] == (1 if direction == 1 else 0) and result["verifier"][4]["oracle"] == 1
        assert result["verifier"][4]["likeliest"] == 1 and result["selection"]["likely_2"]["responses"] == 12
        assert set(result["verifier"][2].values()) == {0} and len(result["verifier"][2]) == 5 and result["verifier"]["greedy"] == 0.5
        assert prm.format_audit(result)
