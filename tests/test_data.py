"""The world: reasoning texts are true, the oracle knows it, splits share nothing, the tokenizer
keeps every text."""
import random
import re
from dataclasses import replace
from itertools import chain, combinations

import numpy as np
import pytest
from PIL import Image

import data
from data import (COMPOSE, IN_DOMAIN, SIZE, TASKS, TESTBEDS, Tokenizer, build_world, oracle,
                  oracle_of_steps, render, sound, write_reasoning)
from evaluate import grade
from weights.base import write_caption

def all_questions(world):
    return [question for questions in world.values() for question in questions]

# ---------------------------------------------------------------- reasoning and oracle

def test_every_written_reasoning_is_true_and_long_enough(world):
    for question in all_questions(world):
        for draw in range(4):
            text = write_reasoning(question, random.Random(draw))
            assert sound(question, text), (question, text)
            *steps, last = text.split("\n")
            readings = [line for line in steps if re.fullmatch(data.READING, line)]
            assert last == f"answer: {question.answer}"
            assert len(steps) >= 3 and len(readings) >= 2, text

def test_oracle_rejects_a_reasoning_with_any_number_changed(world):
    for question in world["test"] + world["size"] + world["compose"]:
        text = write_reasoning(question, random.Random(0))
        for number in re.finditer(r"\d+", text):
            true = int(number[0])
            for other in {true + 1, true - 1, 50} - {true}:
                changed = text[:number.start()] + str(other) + text[number.end():]
                assert not sound(question, changed), (question, text, number, other)

def test_verdicts_of_steps_are_those_of_their_lines(world):
    """Also where one token holds several line breaks, as in public tokenizers."""
    for question in world["test"][:20]:
        lines = write_reasoning(question, random.Random(0)).split("\n")
        lines[1] = "answer is 7"                                   # nothing of the picture
        text = "\n".join(lines)
        steps = Tokenizer().steps(Tokenizer().encode(text))
        assert "".join(steps) == text and oracle_of_steps(question, text, steps) == \
            oracle(question, text) and oracle(question, text)[0] and not oracle(question, text)[1]
        wide = [f"{line}\n\n" for line in lines[:-1]] + lines[-1:]
        assert oracle_of_steps(question, "".join(wide), wide) == oracle(question, text)
        cut = text.split("answer")[0]                              # it ends in a line break
        steps = Tokenizer().steps(Tokenizer().encode(cut))
        assert oracle_of_steps(question, cut, steps) == oracle(question, cut)[:-1]

def test_oracle_rejects_numbers_from_nowhere_and_noise(world):
    question = world["test"][0]
    # a right sum, but no line and no question gave 41 and 17
    assert oracle(question, "41 + 17 = 58")[0] is False
    # guessed: nothing worked it out
    assert oracle(question, f"answer: {question.answer}") == [False]
    assert oracle(question, "is is 7\n\nanswer: x") == [False, False, False]

def test_sound_is_every_line_true(world):
    for question in world["test"]:
        text = write_reasoning(question, random.Random(0))
        lines = text.split("\n")
        assert sound(question, text) and all(oracle(question, text))
        for i in range(len(lines)):
            noisy = "\n".join([*lines[:i], "is is 7", *lines[i:]])
            verdicts = oracle(question, noisy)
            assert verdicts.pop(i) is False and all(verdicts)      # one false line among true ones
            assert not sound(question, noisy)
        assert not sound(question, "")
        for ending in (".", "\n", ".\n"):                          # as `grade` takes it
            assert grade(text + ending, question) == "correct"
            assert sound(question, text + ending)

BOTH_COST_7 = {"text": "what do 5 of each square and cross cost?", "answer": 70,
               "routes": ("(a + b) * n",), "facts": {"square": 7, "cross": 7, "star": 7},
               "slots": {"a": "square", "b": "cross", "n": 5}}

@pytest.mark.parametrize("text, is_sound", [
    ("square is 7\ncross is 7\n7 + 7 = 14\n14 * 5 = 70\nanswer: 70", True),
    ("square is 7\n7 * 5 = 35\ncross is 7\n7 * 5 = 35\n35 + 35 = 70\nanswer: 70", True),
    ("cross is 7\nstar is 7\nsquare is 7\n7 - 7 = 0\n7 + 7 = 14\n5 * 14 = 70\nanswer: 70", True),
    ("square is 7\nsquare is 7\n7 + 7 = 14\n14 * 5 = 70\nanswer: 70", False),
    ("square is 7\nstar is 7\n7 + 7 = 14\n14 * 5 = 70\nanswer: 70", False),
    ("square is 7\ncross is 7\n7 * 5 = 35\n35 + 35 = 70\nanswer: 70", True)])
def test_true_lines_that_compute_something_else_are_not_sound(world, text, is_sound):
    question = replace(world["test"][0], **BOTH_COST_7)
    assert all(oracle(question, text)) and sound(question, text) == is_sound

def test_an_answer_that_no_route_gives_is_not_sound(world):
    """Every question with a fact or a product of facts that equals the answer by chance."""
    number = 0
    for question in world["test"] + world["validation"]:
        for fact, value in question.facts.items():
            if value == question.answer:
                text = f"{fact} is {value}\nanswer: {value}"
                assert all(oracle(question, text)) and not sound(question, text)
                number += 1
    assert number > 3

def test_a_text_that_repeats_itself_takes_no_long_time(world, monkeypatch):
    """Of each line at most 200 x 200 ways to understand it are worked out."""
    question = replace(world["test"][0], answer=4, facts={"square": 2, "cross": 2},
                       slots={"a": "square", "b": "cross"}, routes=("a + b",))
    text = "square is 2\ncross is 2\n" + "2 + 2 = 4\n4 - 2 = 2\n" * 6 + "2 + 2 = 4\nanswer: 4"
    made = []

    def add(left, right):
        made.append(left + right)
        return made[-1]

    monkeypatch.setitem(data.OPERATIONS, "+", add)
    sound(question, text)
    assert len(made) < 7 * 200 ** 2

def test_questions_have_several_routes(world):
    for question in all_questions(world):
        texts = {write_reasoning(question, random.Random(draw)) for draw in range(30)}
        assert len(texts) > 1, question

def test_no_two_prices_counts_or_multipliers_are_equal(world):
    """One can be taken for an equal one at no cost: right by luck. Of six groups some are equal."""
    for question in all_questions(world):
        numbers = [value for value in question.slots.values() if isinstance(value, int)]
        assert len(set(numbers)) == len(numbers), question
        prices = [part[-1] for part in question.drawing if part[0] == "item"]
        counts = [n for name, n in question.facts.items()
                  if question.task == "VQA" and name.split()[-1] in data.SHAPES and " " in name]
        for equal in (prices, counts if len(counts) <= 4 else []):
            assert len(set(equal)) == len(equal), question

def test_captions_are_true(world):
    for question in all_questions(world):
        for asked in (False, True):
            prompt, text = write_caption(question, random.Random(0), asked)
            assert all(oracle(question, text))
            subjects = [line.rsplit(" is ", 1)[0] for line in text.split("\n")]
            if asked:
                named = prompt.removeprefix("describe ").split(" and ")
                assert sorted(named) == sorted(subjects)
            else:
                assert prompt == "describe" and sorted(subjects) == sorted(question.facts)

def test_routes_of_a_question_agree(world):
    """Worked out by Python itself instead of by work_out."""
    for question in all_questions(world):
        values = {letter: question.facts.get(subject, subject)
                  for letter, subject in question.slots.items()}
        assert {eval(route, {}, values) for route in question.routes} == {question.answer}

# ---------------------------------------------------------------- templates and splits

def test_each_task_has_templates_and_wordings():
    for task in TASKS:
        assert sum(template.task == task for template in IN_DOMAIN) >= 3
    assert all(len(template.wordings) >= 4 for template in IN_DOMAIN)

def test_wording_testbed_uses_new_sentences_from_known_words():
    def words(wordings):
        without_slots = re.sub(r"\{.s?\}", "", " ".join(wordings))
        return set(re.findall(r"[a-z]+|[^\s\w]", without_slots))

    known = set()
    for template in IN_DOMAIN:
        known |= words(template.wordings[:-1])
    for template in IN_DOMAIN:
        *asked, kept_back = template.wordings
        assert kept_back not in asked and words([kept_back]) <= known, template.name
    # an unknown word would test the embedding table, not the shift
    for template in (*SIZE, *COMPOSE):
        assert words(template.wordings) <= known, template.name

def test_only_the_wording_testbed_asks_in_kept_back_sentences(world):
    def is_kept_back(question):
        for template in IN_DOMAIN:
            if template.name == question.template:
                pattern = re.sub(r"\\\{\w+\\\}", ".+", re.escape(template.wordings[-1]))
                return re.fullmatch(pattern, question.text) is not None

    assert all(map(is_kept_back, world["wording"]))
    for split in ("test", "validation", "labeled", "unlabeled", "base", "style", "layout"):
        assert not any(map(is_kept_back, world[split]))

def test_splits_share_no_picture():
    # large enough for chance to repeat itself
    world = build_world({"test": 750, "validation": 250, "labeled": 4000, "base": 4000})
    drawings = [question.drawing for question in all_questions(world)]
    assert len(set(drawings)) == len(drawings) == 9000

def test_smaller_tests_are_parts_of_those_that_a_base_has_left_out():
    """Else a base would have seen some of their pictures (by as little as --test 100)."""
    whole = build_world(data.FULL_SIZES)
    small = build_world({"test": 100, "validation": 10, "layout": 250, "labeled": 500})
    for split in ("test", "validation", "layout"):
        assert small[split] == whole[split][:len(small[split])]
    assert len(small["test"]) == 100 and not small["style"]
    tested = {question.drawing for question in all_questions(whole)}
    assert not [question for question in small["labeled"] if question.drawing in tested]

def test_testbeds_differ_from_the_training_questions(world):
    for bed in ("style", "layout"):
        assert {question.look for question in world[bed]} == {bed}
        for question in world[bed][:10]:
            assert (render(question) != render(replace(question, look="plain"))).any()
    train_templates = {question.template for question in world["labeled"]}
    for bed in ("size", "compose"):
        assert not train_templates & {question.template for question in world[bed]}

def test_what_stands_beside_the_scene_of_a_question_is_not_named_and_not_covered(world):
    asked = {"FQA": "bar", "GPS": "rect", "MWP": "item", "TQA": "cell", "VQA": "shape"}
    assert {question.task for question in world["compose"]} == set(TASKS)
    for question in world["compose"]:
        scene = [part for part in question.drawing if part[0] == asked[question.task]]
        beside = [part for part in question.drawing if part not in scene]
        named = set(re.findall(r"[a-z]+", question.text))
        named |= {word.removesuffix("es").removesuffix("s") for word in named}         # stars
        assert beside and not named & set(chain(*beside)), question
        white, grid = 255, 215
        pictures = [render(replace(question, drawing=tuple(parts))) for parts in (scene, beside)]
        marks = [((picture != white) & (picture != grid)).any(axis=2) for picture in pictures]
        assert not (marks[0] & marks[1]).any(), question

def test_same_seed_same_world_and_tests_do_not_depend_on_training_sizes(world):
    tests = ("test", "validation", *TESTBEDS)
    again = build_world(dict.fromkeys(tests, 60) | {"labeled": 5})
    for split in tests:
        assert again[split] == world[split]
        assert (render(again[split][3]) == render(world[split][3])).all()
    assert build_world({"test": 60}, seed=1)["test"] != world["test"]

def test_a_world_without_enough_pictures_is_an_error_and_no_endless_search(monkeypatch):
    make, first = data._make, []

    def again_and_again(*rest):
        first.append(make(*rest))
        return first[0]

    monkeypatch.setattr(data, "_make", again_and_again)
    with pytest.raises(ValueError, match="question 1 of the split test"):
        build_world({"labeled": 5})

# ---------------------------------------------------------------- pictures

def test_picture_shows_every_fact(world):
    """Changing any fact's drawing changes the picture: what is asked can be seen."""
    for question in world["test"]:
        whole, drawing = render(question, 64), question.drawing
        for i in range(len(drawing)):
            without = replace(question, drawing=drawing[:i] + drawing[i + 1:])
            assert (render(without, 64) != whole).any()

def test_shapes_and_digits_look_different(world):
    def picture(name, digit):
        drawing = (("item", 1, 1, name, "red", digit),)
        return render(replace(world["test"][0], drawing=drawing)).astype(int)

    for pictures, least in (([picture(name, 3) for name in data.SHAPES], 20),
                            ([picture("star", digit) for digit in range(1, 10)], 8)):
        for a, b in combinations(pictures, 2):
            assert (abs(a - b).max(axis=2) > 100).sum() > least    # pixels of the 256 of a square

def test_each_drawing_has_a_look_of_its_own(world, monkeypatch):
    """It was once drawn by the last four letters of the drawing: 13 looks in all."""
    real, seeds = np.random.default_rng, []

    def watch(seed):
        seeds.append(seed)
        return real(seed)

    monkeypatch.setattr(data.np.random, "default_rng", watch)
    for question in world["style"]:
        assert (render(question) == render(replace(question, text="other words"))).all()
    assert len(set(seeds)) == len(world["style"]) == len(seeds) / 2

def test_render_sizes(world):
    question = world["style"][0]
    assert render(question, 64).shape == (64, 64, 3)
    assert render(question, 128).dtype == np.uint8

def test_preview_is_a_picture(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    data.main(["--preview", str(sheet)])
    assert Image.open(sheet).size[0] > 1000 and str(sheet) in capsys.readouterr().out
    data.write_preview(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == sheet.read_bytes()
    for path in (tmp_path / "no folder" / "sheet.png", tmp_path / "sheet.txt"):
        with pytest.raises(SystemExit) as stop:
            data.main(["--preview", str(path)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and str(path) in error
        assert not path.exists()

def test_a_preview_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, capsys,
                                                                         monkeypatch):
    (tmp_path / "folder.png").mkdir()

    def full(image, path):
        raise OSError(28, "No space left on device")

    for path, word in ((tmp_path / "folder.png", "directory"), (tmp_path / "sheet.png", "space")):
        if word == "space":
            monkeypatch.setattr(Image.Image, "save", full)
        with pytest.raises(SystemExit) as stop:
            data.main(["--preview", str(path)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and word in error
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]

# ---------------------------------------------------------------- tokenizer

def test_tokenizer_keeps_every_text(world, tokenizer):
    for question in all_questions(world):
        for text in (question.text, f"{question.text} the answer is {question.answer}.",
                     write_reasoning(question, random.Random(0)),
                     *write_caption(question, random.Random(0), asked=True)):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.response("answer: 7")) == "answer: 7"

def test_prompts_and_responses_have_their_signs(tokenizer):
    words = tokenizer.encode("add all the bars.")
    assert tokenizer.prompt("add all the bars.") == [tokenizer.BOS, *words, tokenizer.SEP]
    told = tokenizer.prompt("add all the bars.", answer=7)
    assert tokenizer.decode(told) == "add all the bars. the answer is 7."
    assert tokenizer.response("red is 3")[-1] == tokenizer.EOS

@pytest.mark.parametrize("text, named", [
    ("red is 7 €", "€"), ("Red is 7", "R"), ("red is 100", "100"), ("red is zebra", "zebra"),
    ("red is 07", "07")])
def test_tokenizer_names_unknown_symbols(tokenizer, text, named):
    with pytest.raises(ValueError, match=f"unknown symbol '{named}'"):
        tokenizer.encode(text)

def test_steps_end_at_line_breaks_and_at_the_last_token(tokenizer):
    text = "red is 3\n3 + 4 = 7\nanswer: 7"
    tokens = tokenizer.response(text)
    ends = tokenizer.step_ends(tokens)
    beginnings = [tokenizer.decode(tokens[:end + 1]) for end in ends]
    assert beginnings == ["red is 3\n", "red is 3\n3 + 4 = 7\n", text]
    assert ends[-1] == tokens.index(tokenizer.EOS)
    cut = tokens[:-2]                                              # inside the last step
    assert tokenizer.step_ends(cut) == [*ends[:2], len(cut) - 1]
    cut = tokens[:ends[1] + 1]                                     # just behind a line break
    assert tokenizer.step_ends(cut) == ends[:2]
    assert tokenizer.step_ends([tokenizer.EOS]) == [0] and tokenizer.step_ends([]) == []
