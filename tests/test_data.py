"""The world: reasoning texts are true, the oracle knows it, splits share nothing, the tokenizer keeps every text."""
import random
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

import data
from data import COMPOSE, IN_DOMAIN, SIZE, TASKS, TESTBEDS, build_world, oracle, render, write_caption, write_reasoning


def all_questions(world):
    return [question for questions in world.values() for question in questions]


def test_every_written_reasoning_is_true_and_long_enough(world):
    for question in all_questions(world):
        for draw in range(4):
            text = write_reasoning(question, random.Random(draw))
            assert all(oracle(question, text)), (question, text)
            *steps, last = text.split("\n")
            readings = [line for line in steps if re.fullmatch(data.READING, line)]
            assert last == f"answer: {question.answer}" and len(steps) >= 3 and len(readings) >= 2, text


def test_oracle_rejects_a_reasoning_with_any_number_changed(world):
    for question in world["test"] + world["size"] + world["compose"]:
        text = write_reasoning(question, random.Random(0))
        for number in re.finditer(r"\d+", text):
            for other in {int(number[0]) + 1, int(number[0]) - 1, 50} - {int(number[0])}:
                assert not all(oracle(question, text[:number.start()] + str(other) + text[number.end():])), (question, text, number, other)


def test_oracle_rejects_numbers_from_nowhere_and_noise(world):
    question = world["test"][0]
    assert oracle(question, "41 + 17 = 58")[0] is False            # right sum, but no line and no question gave 41 and 17
    assert oracle(question, f"answer: {question.answer}") == [False]        # guessed: nothing worked it out
    assert oracle(question, "is is 7\n\nanswer: x") == [False, False, False]


def test_questions_have_several_routes(world):
    for question in all_questions(world):
        assert len({write_reasoning(question, random.Random(draw)) for draw in range(30)}) > 1, question


def test_captions_are_true(world):
    for question in all_questions(world):
        for asked in (False, True):
            prompt, text = write_caption(question, random.Random(0), asked)
            assert all(oracle(question, text))
            subjects = [line.rsplit(" is ", 1)[0] for line in text.split("\n")]
            assert prompt == "describe" if not asked else sorted(prompt.removeprefix("describe ").split(" and ")) == sorted(subjects)


def test_routes_of_a_question_agree(world):
    """Worked out by Python itself instead of by work_out."""
    for question in all_questions(world):
        values = {letter: question.facts.get(subject, subject) for letter, subject in question.slots.items()}
        assert {eval(route, {}, values) for route in question.routes} == {question.answer}


def test_each_task_has_templates_and_wordings():
    for task in TASKS:
        assert sum(template.task == task for template in IN_DOMAIN) >= 3
    assert all(len(template.wordings) >= 4 for template in IN_DOMAIN)


def test_wording_testbed_uses_new_sentences_from_known_words():
    def words(wordings):
        return set(re.findall(r"[a-z]+|[^\s\w]", re.sub(r"\{.s?\}", "", " ".join(wordings))))

    known = words(wording for template in IN_DOMAIN for wording in template.wordings[:-1])
    for template in IN_DOMAIN:
        assert template.wordings[-1] not in template.wordings[:-1] and words(template.wordings[-1:]) <= known, template.name
    for template in (*SIZE, *COMPOSE):                             # an unknown word would test the embedding table, not the shift
        assert words(template.wordings) <= known, template.name


def test_splits_share_no_picture():
    world = build_world({"test": 750, "validation": 250, "labeled": 4000, "base": 4000})            # large enough for chance to repeat itself
    drawings = [question.drawing for question in all_questions(world)]
    assert len(set(drawings)) == len(drawings) == 9000


def test_testbeds_differ_from_the_training_questions(world):
    assert {question.look for question in world["style"]} == {"style"} and {question.look for question in world["layout"]} == {"layout"}
    train_templates = {question.template for question in world["labeled"]}
    for bed in ("size", "compose"):
        assert not train_templates & {question.template for question in world[bed]}


def test_same_seed_same_world_and_tests_do_not_depend_on_training_sizes(world):
    again = build_world(dict.fromkeys(("test", "validation", *TESTBEDS), 60) | {"labeled": 5})
    for split in ("test", "validation", *TESTBEDS):
        assert again[split] == world[split]
        assert (render(again[split][3]) == render(world[split][3])).all()
    assert build_world({"test": 60}, seed=1)["test"] != world["test"]


def test_picture_shows_every_fact(world):
    """Changing any fact's drawing changes the picture: what is asked can be seen."""
    for question in world["test"]:
        whole = render(question, 64)
        for i in range(len(question.drawing)):
            without = replace(question, drawing=question.drawing[:i] + question.drawing[i + 1:])
            assert (render(without, 64) != whole).any()


def test_shapes_and_digits_look_different():
    for names, least in ((data.SHAPES, 0.1), ("0123456789", 0.01)):
        masks = [data._stamp(name, 16)[0] for name in names]
        for a, b in combinations(masks, 2):
            assert (a != b).mean() > least
    mask, outline = data._stamp("heart", 16, 1)
    assert 0 < outline.sum() < mask.sum() and not (outline & ~mask).any()


def test_render_sizes(world):
    question = world["style"][0]
    assert render(question, 64).shape == (64, 64, 3) and render(question, 128).dtype == np.uint8
    with pytest.raises(ValueError, match="100"):
        render(question, 100)


def test_tokenizer_keeps_every_text(world, tokenizer):
    for question in all_questions(world):
        for text in (question.text, write_reasoning(question, random.Random(0)), *write_caption(question, random.Random(0), True),
                     f"{question.text} the answer is {question.answer}."):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.response("answer: 7")) == "answer: 7"


@pytest.mark.parametrize("text, named", [("red is 7 €", "€"), ("Red is 7", "R"), ("red is 100", "100"), ("red is zebra", "zebra"), ("red is 07", "07")])
def test_tokenizer_names_unknown_symbols(tokenizer, text, named):
    with pytest.raises(ValueError, match=f"unknown symbol '{named}'"):
        tokenizer.encode(text)


def test_tokenizer_refuses_spacing_it_cannot_keep(tokenizer):
    with pytest.raises(ValueError, match="spacing"):
        tokenizer.encode("red  is 7")


def test_preview_is_a_picture(tmp_path):
    data.main(["--preview", str(tmp_path / "sheet.png")])
    assert Image.open(tmp_path / "sheet.png").size[0] > 1000
    with pytest.raises(SystemExit) as stop:
        data.main(["--preview", str(tmp_path / "no folder" / "sheet.png")])
    assert stop.value.code == 2


def test_a_world_without_enough_pictures_is_an_error_and_no_endless_search(monkeypatch):
    make, first = data._make, []

    def again_and_again(*rest):
        first.append(make(*rest))
        return first[0]

    monkeypatch.setattr(data, "_make", again_and_again)
    with pytest.raises(ValueError, match="question 1 of the split labeled"):
        data.build_world({"labeled": 5})
