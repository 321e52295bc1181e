"""The process reward model: labels, scores, selection and votes, against counting by hand."""
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import mstar
import prm
from data import Tokenizer, build_world, oracle, write_reasoning
from evaluate import answer_greedily, make_prompts, tokens_of
from model import (Example, Response, Sampling, collate, fit, read_json, sample, save, seed_for,
                   write_json)
from prm import (RewardModel, StepLabels, label_responses, label_steps, random_k, response_rewards,
                 reward_of, score, top_k, train_prm, weighted_vote)

TOKENIZER = Tokenizer()
CFG = mstar.Config(prm_epochs=15, prm_lr=3e-3, batch_size=16)
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
    cfg = mstar.Config(prm_responses=2, prm_rollouts=3, prm_temperature=0.5, max_new_tokens=72)
    seed = seed_for(0, "labels")
    how, rollouts = Sampling(2, 1.0, 72, seed), Sampling(3, 0.5, 72, seed + 1)

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
    labels = label_steps(cfg, policy, questions)["labels"]
    labels = [StepLabels(**label) for label in labels]
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
    """Logits at each step's end, from a plain full pass over this response alone."""
    seen = {}
    hook = model.policy.norm.register_forward_hook(lambda *args: seen.update(hidden=args[-1]))
    ids = torch.tensor([prompt.ids + tokens])
    log_probs = model.policy(prompt.image[None], ids)[0].log_softmax(-1)
    hook.remove()
    before = len(prompt.ids) - 1                                   # place of the prompt's last id
    places = range(before, before + len(tokens))
    of_tokens = torch.stack([log_probs[i, token] for i, token in zip(places, tokens)])
    read = torch.cat([seen["hidden"][0, before:before + len(tokens)],
                      model.policy.embed(torch.tensor(tokens)), of_tokens[:, None]], dim=1)
    logits = []
    for end in TOKENIZER.step_ends(tokens):                        # nothing behind the step's end
        x = model.enter(read[None, :end + 1])
        cos, sin = model.policy.rope(torch.arange(end + 1)[None])
        for block in model.blocks:
            x, _, _ = block(x, cos, sin, torch.ones(end + 1, end + 1, dtype=torch.bool).tril())
        so_far = of_tokens[:end + 1].sum()
        logits.append(model.head(model.norm(x[0, -1])) + model.share * so_far)
    return torch.cat(logits).detach()

def test_scores_are_of_what_stands_before_and_rewards_by_the_lowest_of_them(reward_model, prompts):
    texts = [[TEXT, "answer: 7", TEXT, OTHER], [], ["1 + 1 = 2\nanswer: 2"]]
    responses = tokens_of(responses_of(texts))
    responses[2][0] = responses[2][0][:-3]                         # cut off inside the last step
    for rows in (1, 2, 100):
        scores = score(reward_model, prompts[:3], responses, rows)
        assert list(map(len, scores)) == [4, 0, 1]
        for q, group in enumerate(responses):
            for tokens, steps in zip(group, scores[q]):
                expected = by_hand(reward_model, prompts[q], tokens).sigmoid()
                torch.testing.assert_close(torch.tensor(steps), expected, rtol=1e-3, atol=1e-3)
    assert scores[0][0] == scores[0][2] and len(set(scores[0][0])) == 3
    first, *_, other = scores[0]                                   # they part in the second step
    assert first[0] == pytest.approx(other[0], abs=1e-5) and first[1] != other[1]
    rewards = response_rewards(reward_model, prompts[:3], responses)
    for group, of_group in zip(rewards, scores):
        assert group == list(map(reward_of, of_group))             # four digits of the smallest
        assert group == pytest.approx([sorted(steps)[0] for steps in of_group], rel=5e-4)
    assert score(reward_model, prompts[:2], [[], []]) == [[], []]

def test_responses_whose_weakest_step_is_the_same_have_equal_rewards():
    steps, scored_in_another_batch = [0.9, 0.3712345, 0.8], [0.9, 0.3712352, 0.7]
    assert reward_of(steps) == reward_of(scored_in_another_batch)
    assert reward_of([0.9, 0.3712]) > reward_of([0.3711, 0.9])     # a difference that is real
    assert 0 < reward_of([2.345e-9, 0.5]) < reward_of([2.346e-9, 0.5])  # small ones differ, too

def test_an_untrained_prm_goes_by_likelihood(policy, prompts):
    model = RewardModel(policy.config, policy.tokenizer)
    model.policy.load_state_dict(policy.state_dict())
    (steps,), = score(model, prompts[:1], [[TOKENIZER.response(TEXT)]])
    assert steps == sorted(steps, reverse=True) and steps[-1] < steps[0] < 0.5 + 1e-6

def labels_by_a_rule(number, rng):
    """A step is good if its first word is "red": six made-up responses of two steps for each of so
    many prompts."""
    red, blue, line_break = (TOKENIZER.ids[word] for word in ("red", "blue", "\n"))
    labels = []
    for i in range(number):
        for _ in range(6):
            first, second = rng.choice((red, blue)), rng.choice((red, blue))
            noise = [rng.randint(20, 120) for _ in range(2)]
            tokens = [first, noise[0], line_break, second, noise[1], TOKENIZER.EOS]
            labels.append(StepLabels(i, tokens, [4 * (first == red), 4 * (second == red)], 4))
    return labels

def test_training_finds_the_rule_behind_the_labels(policy, world, monkeypatch):
    """It holds on questions that were held out, too: the last tenth of those with labels. The six
    responses to a question are in few batches, mostly side by side: the loss compares them."""
    questions = world["test"][:45]                                 # the last five have no labels
    labels = labels_by_a_rule(40, random.Random(0))
    learned, held_out, images = set(), set(), []

    def watch_fit(model, optimizer, stream, updates, *rest):
        assert updates == math.ceil(15 * 36 * 6 / 16)

        def watched():
            for batch in stream:
                images.append({id(example.image) for example in batch})
                learned.update(images[-1])
                yield batch
        return fit(model, optimizer, watched(), updates, *rest)

    def watch_score(model, prompts, responses):
        held_out.update(id(prompt.image) for prompt in prompts)
        return score(model, prompts, responses)

    monkeypatch.setattr(prm, "fit", watch_fit)
    monkeypatch.setattr(prm, "score", watch_score)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    model, about = train_prm(CFG, policy, questions, labels)
    assert set(about) == {"steps", "good", "auc", "loss"}
    assert about["auc"] > 0.98 and about["steps"] == 4 * 6 * 2 and about["loss"] < 0.1
    held_out_targets = [target for label in labels[-24:] for target in label.targets]
    assert about["good"] == np.mean(held_out_targets)
    assert np.mean(list(map(len, images))) < 9                     # of 16 examples
    assert len(learned) == 36 and len(held_out) == 4 and not learned & held_out
    for name, tensor in model.policy.state_dict().items():
        assert torch.equal(tensor, before[name])                   # only what is on top learns

def test_scores_mean_what_the_labels_say(policy, world):
    """Soft labels that no text tells apart: the mean score comes close to the mean label, which a
    loss on hard labels would not."""
    labels = []
    for label in labels_by_a_rule(20, random.Random(1)):
        labels.append(label._replace(correct=[1, 1]))              # a quarter
    model, _ = train_prm(CFG, policy, world["test"], labels)
    prompts = make_prompts(policy, world["test"][:20])
    scores = score(model, [prompts[label.question] for label in labels],
                   [[label.tokens] for label in labels])
    assert np.mean([steps for (steps,) in scores]) == pytest.approx(0.25, abs=0.03)

def test_the_loss_is_by_hand_that_of_steps_and_of_pairs_of_one_question(reward_model, prompts):
    """Two responses to one question, one to another."""
    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    examples, logits, soft, asked, number = [], [], [], [], 0
    for q, text, labels in ((0, TEXT, [1.0, 0.25, 0.5]), (0, "answer: 7", [0.75]),
                            (1, OTHER, [0.0, 0.5, 1.0])):
        tokens = TOKENIZER.response(text)
        at_end = dict(zip(TOKENIZER.step_ends(tokens), labels))
        examples.append(Example(*prompts[q], tokens,
                                [at_end.get(i, -1.0) for i in range(len(tokens))]))
        logits += by_hand(reward_model, prompts[q], tokens).double().tolist()
        soft += labels
        asked += [q] * len(labels)
        number += len(tokens)
    expected = 0.0
    for i, (x, t) in enumerate(zip(logits, soft)):
        expected -= t * np.log(sigmoid(x)) + (1 - t) * np.log(1 - sigmoid(x))
        for j, (y, u) in enumerate(zip(logits, soft)):
            if asked[i] == asked[j] and t > u:                     # i should be above j
                expected -= 2 * (t - u) * np.log(sigmoid(x - y)) / asked.count(asked[i])
    loss = reward_model.loss(*collate(examples)).item()
    assert loss == pytest.approx(expected / number, rel=1e-3)

def test_training_on_next_to_nothing_goes_on(policy, world, capsys):
    labels, cfg = labels_by_a_rule(4, random.Random(0)), mstar.Config(prm_epochs=1)
    _, about = train_prm(cfg, policy, world["test"], labels[5:7])  # one response to learn from
    assert about["steps"] == 2
    capsys.readouterr()
    alike = [label._replace(correct=[4, 4]) for label in labels]
    _, about = train_prm(cfg, policy, world["test"], alike)
    assert about["auc"] is None and about["good"] == 1
    assert "AUC not known" in capsys.readouterr().out

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
    assert weighted_vote([9, 9, 2], [6e-21, 6e-21, 1e-24]) == 9    # R_p of long responses is small
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
        def scores_of(question, tokens):
            verdicts = oracle(question, TOKENIZER.decode(tokens))
            return [0.5 + direction * (0.4 if is_true else -0.4) for is_true in verdicts]

        found = []
        for question, group in zip(questions, responses):
            found.append([scores_of(question, tokens) for tokens in group])
        return found

    def greedy(policy, questions, max_new_tokens, title):
        return None, ["correct"] * 3 + ["wrong"] * 3

    monkeypatch.setattr(prm, "sample_texts", fake)
    monkeypatch.setattr(prm, "score", truth)
    monkeypatch.setattr(prm, "answer_greedily", greedy)
    labeled, labels = world["labeled"], []
    for i in range(3):
        tokens = TOKENIZER.response("1 + 1 = 3\n" + write_reasoning(labeled[i], random.Random(1)))
        steps = len(TOKENIZER.step_ends(tokens))
        labels.append(StepLabels(i, tokens, [1, *[2 + direction] * (steps - 1)], 4))
    result = prm.audit(policy, None, labels, labeled, questions, 72, n=4)
    is_perfect = float(direction == 1)
    assert set(result) == {"mean", "by_question", "auc_of_labels", "auc_of_scores"}
    assert result["auc_of_scores"] == is_perfect
    # only the first step of each labeled response is false
    assert result["auc_of_labels"] == (1.0 if direction == 1 else 0.5)
    mean, of_question = result["mean"], result["by_question"]
    assert mean["unsound_all"] == 0.5 and mean["auc_reward"] == is_perfect
    assert mean["auc_likelihood"] == 0                             # the lucky one is the likeliest
    assert mean["greedy"] == 0.5 and of_question["greedy"] == "1 1 1 0 0 0"
    assert mean["best_of_4"] == is_perfect and mean["likeliest_of_4"] == 1
    assert of_question["best_of_4"] == " ".join(str(int(is_perfect)) * 6)
    assert mean["best_of_2"] == mean["majority_of_2"] == 0 and "best_of_8" not in mean

def test_the_top_2_beside_the_others(world):
    """Three correct and different responses, one of them unsound, one of them twice."""
    question = world["test"][0]
    short, long = sorted({write_reasoning(question, random.Random(i)) for i in range(9)})[:2]
    unsound = f"1 + 1 = 3\nanswer: {question.answer}"
    texts = [short, "answer: 0", unsound, long, short]
    numbers = prm.compare_top_2(question, texts, [0.9, 1.0, 0.1, 0.8, 0.2], [-3, 0, -1, -2, -9])
    steps = [text.count("\n") + 1 for text in (short, long, unsound)]
    assert numbers == {
        "auc_reward": 1.0, "auc_likelihood": 0.0, "unsound_all": pytest.approx(1 / 3),
        "steps_all": np.mean(steps), "unsound_top_2": 0.0, "steps_top_2": np.mean(steps[:2]),
        "unsound_likely_2": 0.5, "steps_likely_2": np.mean(steps[1:])}
    assert set(prm.compare_top_2(question, ["hm"], [0.5], [-1.0]).values()) == {None}

def test_each_way_to_choose_among_n_responses_goes_by_its_own_numbers(world):
    """The gold answer is 7. What each way finds among the first 1, 2, 4 responses."""
    question = replace(world["test"][0], answer=7)
    texts = ["answer: 5", "5 + 2 = 7\nanswer: 7", "hm\nanswer: 5", "hm"]
    found = prm.verify(question, texts, [0.2, 0.3, 0.05, 0.9], [-1.0, -2.0, -3.0, -4.0])
    right = {way for way, is_correct in found.items() if is_correct}
    # a tie of votes: the smaller answer; the best of four has no answer
    assert right == {"best_of_2", "weighted_vote_of_2", "weighted_vote_of_4"} and len(found) == 12

def test_the_command_audits_the_prm_of_a_run(reward_model, policy, tmp_path, capsys):
    splits = {"test": 10, "labeled": 5}
    world = build_world(splits, 3)
    tokens = TOKENIZER.response(write_reasoning(world["labeled"][4], random.Random(0)))
    steps = len(TOKENIZER.step_ends(tokens))
    labels = [StepLabels(4, tokens, [1] * steps, 2)]
    write_json(tmp_path / "config.json", {"splits": splits, "world_seed": 3, "max_new_tokens": 4,
                                          "policy": "base.safetensors",
                                          "warmup_questions": 0, "data": ""})
    save(tmp_path / "pi_0.safetensors", policy)
    save(tmp_path / "prm.safetensors", reward_model)
    write_json(tmp_path / "labels.json", {"labels": [label._asdict() for label in labels]})
    prm.main([str(tmp_path)])
    result = read_json(tmp_path / "audit.json")
    assert result.pop("seconds") > 0                               # as a run's own has it
    assert result == prm.audit(policy, reward_model, labels, world["labeled"], world["test"], 4)
    _, graded = answer_greedily(policy, world["test"], 4, "greedy")
    assert result["mean"]["greedy"] == graded.count("correct") / 10
    assert len(result["by_question"]["best_of_16"].split()) == 10
    assert "AUC" in capsys.readouterr().out.splitlines()[-1]
    (tmp_path / "prm.json").unlink()
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SystemExit) as stop:
            prm.main([str(folder)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and str(folder) in error
