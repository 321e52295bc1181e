"""Questions from files: MathV360K's and MathVista's records, their answers and pictures. The data
sets themselves could not be had; records are written here as their files hold them."""
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import evaluate
import mstar
import prm
from data import Question, check_file, normal_answer, open_picture, read_questions, read_world
from evaluate import edit_distance, gold_of, grade, officially_correct, official_prediction
from model import save, write_json
from test_public import write_public
from weights.public import PublicTokenizer

CHOICES = ("12 cm", "14 cm", "no")

def mathv360k(number, image, asked, answer):
    return {"id": f"identity_{number}", "image": image, "conversations": [
        {"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]}

CHOOSE = ("Hint: Please answer the question and provide the correct option letter.\nQuestion: how "
          "long?\nChoices:\n(A) 12 cm\n(B) 14 cm\n(C) no")
RECORDS = [mathv360k(0, "TabMWP/images/1.png", "Question: how much?", "The answer is 1,000."),
           mathv360k(1, "TabMWP/images/1.png", CHOOSE, "The answer is B"),
           mathv360k(2, ["UniGeo/images/2.png"], CHOOSE, "The answer is: 14 CM."),
           mathv360k(3, "../outside.png", "Question: where?", "The answer is 3"),
           mathv360k(4, "UniGeo/images/2.png", "Question: what?", "The answer is "),
           {"id": "identity_5", "image": "UniGeo/images/2.png"},
           mathv360k(6, "VizWiz/images/gone.png", "Question: is it?", "Yes")]

@pytest.fixture
def images(tmp_path):
    """data_images/ with three pictures, of which two are the same; and one outside."""
    folder = tmp_path / "data_images"
    for path, colour in (("TabMWP/images/1.png", "red"), ("UniGeo/images/2.png", "blue"),
                         ("UniGeo/images/3.bmp", "red")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), colour).save(folder / path)
    Image.new("RGB", (20, 10)).save(tmp_path / "outside.png")
    return folder

@pytest.fixture
def file(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(RECORDS))
    return tmp_path / "train.json"

# ---------------------------------------------------------------- records

@pytest.mark.parametrize("text, choices, expected", [
    ("7", (), "7"), ("7.0", (), "7"), (" 1,000. ", (), "1000"), ("$5$", (), "5"),
    ("-0.50", (), "-0.5"), (".5", (), "0.5"), ("Yes", (), "yes"), ("10^4", (), "10^4"),
    ("b", CHOICES, "B"), ("(B)", CHOICES, "B"), ("14  CM", CHOICES, "B"), ("no.", CHOICES, "C"),
    ("(B) 14 cm", CHOICES, "B"), ("B. the longer one", CHOICES, "B"), ("b, I think", CHOICES,
                                                                       "b, i think"),
    ("d", CHOICES, "d"), ("b", (), "b"), ("1,00", (), "1,00"), ("", (), ""),
    (f"1{',000' * 9}", (), f"1{',000' * 9}"),                      # too long for a Decimal
    ("T*", (), "t"), (r"\boxed{5}", (), "5"), ("3*4", (), "3*4"),
    ("", ("*", "+"), ""), ("*", ("*", "+"), "A"),
    ("ff", ("FF", "Ff", "ff"), "C"), ("fF", ("FF", "Ff", "ff"), "A"),
    ("c", ("FF", "Ff", "ff"), "C"), ("A.M.", ("P.M.", "A.M."), "B"),
    ("a:b", ("b:a", "a:b"), "B"), ("a", ("c", "a"), "A"),
    ("C. elegans", ("a worm", "C. elegans", "a plant"), "B")])
def test_what_means_the_same_has_one_form(text, choices, expected):
    assert normal_answer(text, choices) == expected

def test_records_of_mathv360k(file, images):
    questions, wrong = read_questions(file, images)
    assert [(q.id, q.task, q.answer) for q in questions] == [
        ("identity_0", "TabMWP", "1000"), ("identity_1", "TabMWP", "B"),
        ("identity_2", "UniGeo", "B"), ("identity_3", "..", "3"), ("identity_6", "VizWiz", "yes")]
    assert questions[1].text == CHOOSE and questions[1].choices == CHOICES
    assert questions[1].image == f"{images}/TabMWP/images/1.png"
    assert wrong == {"records without an answer (the first: number 4)": 1,
                     "records of another shape (the first: number 5)": 1}

@pytest.mark.parametrize("listed, expected", [
    ("(A) 5 (B) 6 (C) 7", ("5", "6", "7")), ("\n(A)5\n (B) 6 cm", ("5", "6 cm")), ("\nA. 5", ()),
    ("\n(B) 6", ()), ("\n(A) f(X) (B) g", ("f(X)", "g")), ("\n(A) \n(B) \n", ())])
def test_choices_have_the_letters_a_b_c(listed, expected, file, images):
    asked = f"Question: which?\nChoices:{listed}"
    file.write_text(json.dumps([mathv360k(0, "TabMWP/images/1.png", asked, "The answer is A")]))
    (question,), _ = read_questions(file, images)
    assert question.choices == expected

def test_what_no_answer_can_meet_and_no_tokenizer_read_is_left_out(file, images):
    picture = "TabMWP/images/1.png"
    file.write_text(json.dumps([mathv360k(0, picture, CHOOSE, "The answer is A and B"),
                                mathv360k(1, picture, "how \ud83d?", "The answer is 1")]))
    assert read_questions(file, images) == ([], {
        "answers that are none of the choices (the first: number 0)": 1,
        "records of another shape (the first: number 1)": 1})

def test_what_stands_in_brackets_is_a_choice_only_in_a_list_of_choices(file, images):
    record = mathv360k("1", "TabMWP/images/1.png", "Which organ is in panel (A) of the image?",
                       "The answer is liver")
    file.write_text(json.dumps([record]))
    (question,), wrong = read_questions(file, images)
    assert (question.choices, question.answer, wrong) == ((), "liver", {})

def test_a_system_turn_is_no_question_and_two_pictures_are_too_many(file, images):
    told = mathv360k(0, ["TabMWP/images/1.png"], "how much?", "5")
    told["conversations"].insert(0, {"from": "system", "value": "You are"})
    both = mathv360k(1, ["TabMWP/images/1.png", "UniGeo/images/2.png"], "how much?", "5")
    file.write_text(json.dumps([told, both]))
    (question,), wrong = read_questions(file, images)
    assert (question.text, question.answer) == ("how much?", "5")
    assert wrong == {"records of another shape (the first: number 1)": 1}

def test_a_record_per_line_is_the_same(file, images):
    lines = file.with_suffix(".jsonl")
    lines.write_text("\ufeff" + "\n".join(map(json.dumps, RECORDS)) + "\n")
    assert read_questions(lines, images) == read_questions(file, images)
    for other in (RECORDS[0], {"data": RECORDS}, 7):               # of another kind
        file.write_text(json.dumps(other))
        with pytest.raises(ValueError, match="neither a list of records nor MathVista's dict"):
            read_questions(file, images)
    lines.write_text("{}\n{}\n{")
    with pytest.raises(ValueError, match="line 3"):
        read_questions(lines, images)

def mathvista(pid, answer, choices=None, kind="integer", precision=None, unit=None,
              image="TabMWP/images/1.png", task="geometry problem solving"):
    return {"question": "how long?", "image": image, "choices": choices, "unit": unit,
            "precision": precision, "answer": answer, "pid": pid, "metadata": {"task": task},
            "question_type": "multi_choice" if choices else "free_form",
            "answer_type": "text" if choices else kind}

def test_records_of_mathvista(tmp_path, images):
    records = {"1": mathvista("1", "1.20", kind="float", precision=2.0),
               "2": mathvista("2", "14 cm", list(CHOICES), unit="g"),
               "3": mathvista("3", "15 cm", list(CHOICES)),        # no such choice
               "4": {**mathvista("4", "15 cm", list(CHOICES)), "choices": []}}
    (tmp_path / "testmini.json").write_text(json.dumps(records))
    (free, choice), wrong = read_questions(tmp_path / "testmini.json", images)
    assert wrong == {"records of another shape (the first: number 2)": 2}
    assert (free.task, free.answer) == ("GPS", "1.2")
    assert free.text == (
        "Hint: Please answer the question requiring a floating-point number with two decimal "
        "places and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.\n"
        "Question: how long?")
    assert choice.answer == "B" and choice.text == (
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, "
        "D, at the end.\nQuestion: how long? (Unit: g)\nChoices:\n(A) 12 cm\n(B) 14 cm\n(C) no")

# ---------------------------------------------------------------- answers

def asked(answer, choices=()):
    return Question("", "TabMWP", "", "how long?", answer, choices=choices)

@pytest.mark.parametrize("text, question, outcome", [
    ("Answer: 1,000", asked("1000"), "correct"), ("The answer is 1000.", asked("1000"), "correct"),
    ("ANSWER IS: $1000", asked("1000"), "correct"), ("answer: 12 cm.", asked("12"), "correct"),
    ("answer: 0.5", asked("1/2"), "correct"), ("answer: 2/4", asked("0.5"), "correct"),
    ("answer: 1/0", asked("1"), "unparseable"), ("answer: 12", asked("12 cm"), "correct"),
    ("answer: 5\nAnswer: 6", asked("5"), "wrong"), ("5", asked("5"), "unparseable"),
    ("answer: five", asked("5"), "unparseable"), ("answer: ", asked("yes"), "unparseable"),
    ("So the answer is (B).", asked("B", CHOICES), "correct"),
    ("answer: b", asked("B", CHOICES), "correct"), ("answer: A", asked("B", CHOICES), "wrong"),
    ("Answer: 14 cm", asked("B", CHOICES), "correct"),
    ("answer: B. 14 cm\n", asked("B", CHOICES), "correct"),
    ("answer: d", asked("B", CHOICES), "unparseable"),
    ("answer: 15 cm", asked("B", CHOICES), "unparseable"),
    ("answer: **12**", asked("12"), "correct"), ("**Answer:** *12*", asked("12"), "correct"),
    ("answer: 3*4", asked("34"), "unparseable"),
    ("Answer: Yes.", asked("yes"), "correct"), ("Answer: no", asked("yes"), "wrong"),
    ("the answer is A Cow", asked("a cow"), "correct"),
    ("Answer:\n5", asked("5"), "correct"), ("**Answer:** 5", asked("5"), "correct"),
    ("Answer: **5**", asked("5"), "correct"), (r"Answer: \boxed{5}.", asked("5"), "correct"),
    ("**Answer: A**", asked("A", CHOICES), "correct"), ("答案：5。", asked("x"), "wrong"),
    ("Answer: No, it is not.", asked("no"), "correct"), ("答案：5", asked("5"), "correct"),
    ("Answer: $x=5$.", asked("x=5"), "correct"), ("Answer: (b)", asked("b"), "correct"),
    ("Answer: The dog is brown.", asked("A", ("The dog is brown.", "No.")), "correct"),
    ("Answer: $10$", asked("B", ("$5$", "$10$")), "correct"),
    ("Answer: C. elegans", asked("A", ("C. elegans", "E. coli", "yeast")), "correct"),
    ("answer: c. elegans.", asked("A", ("C. elegans", "E. coli", "yeast")), "correct"),
    (r"answer: 10*\sqrt{3}", asked(normal_answer(r"10*\sqrt{3}")), "correct"),
    (r"answer: 5*\pi", asked("A", (r"5*\pi", r"6*\pi")), "correct"),
    ("answer: ", asked("A", ("*", "+")), "unparseable"),
    ("Answer: B", asked("A", ("3", "3", "5")), "correct"),         # two equal choices
    ("Answer: C", asked("A", ("3", "3", "5")), "wrong")])
def test_grades_of_numbers_letters_and_texts(text, question, outcome):
    assert grade(text, question) == outcome

FLOAT = mathvista("3", "5.9", kind="float", precision=1.0)
CHOICE = mathvista("2", "14 cm", list(CHOICES))

@pytest.mark.parametrize("extraction, record, prediction", [
    ("5.9", mathvista("1", "5"), "5"), ("1e3", mathvista("1", "5"), "1000"),
    ("1,000", mathvista("1", "5"), None), ("$5", mathvista("1", "5"), None),
    ("5 cm", mathvista("1", "5"), None), ("1/3", FLOAT, None), ("", FLOAT, None),
    ("5.94", FLOAT, "5.9"), ("6", FLOAT, "6.0"), ("inf", mathvista("1", "5"), None),
    ("[1, 2]", mathvista("1", "[1, 2]", kind="list"), "[1, 2]"),
    ("B", CHOICE, "14 cm"), ("(b) 14", CHOICE, "14 cm"), ("D", CHOICE, "no"),
    ("14 c", CHOICE, "14 cm"), ("", CHOICE, "no"),                 # the shortest is the nearest
    ("f(a)", CHOICE, "12 cm"), ("B.", CHOICE, "no"), ("b", CHOICE, "no")])
def test_the_normal_form_of_mathvista(extraction, record, prediction):
    assert official_prediction(extraction, record) == prediction

@pytest.mark.parametrize("text, record, expected", [
    ("", CHOICE, False), ("answer: (B)", CHOICE, True), ("B", CHOICE, True),
    ("first B\nthen B", CHOICE, False), ("14 cm", CHOICE, True),
    ("answer: B.", CHOICE, True), (" 5 ", mathvista("1", "5"), True), ("5.0", FLOAT, False),
    ("Answer: 5.90", FLOAT, True), ('The answer is "5.9".', FLOAT, True), ("5.9", FLOAT, True),
    ("it is 5", mathvista("1", "5"), False), ("", mathvista("1", "5"), False),
    ("answer: **B**", CHOICE, True), (r"so\nanswer: \boxed{5}.", mathvista("1", "5"), True)])
def test_the_score_of_mathvista(text, record, expected):
    assert officially_correct(text, record) == expected

def test_edit_distance():
    for a, b, distance in (("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("ab", "ba", 2)):
        assert edit_distance(a, b) == edit_distance(b, a) == distance

# ---------------------------------------------------------------- splits

def write_world(world, folder):
    """Our own questions as MathV360K's file and PNGs: the file's path."""
    records = []
    for question in itertools.chain(*world.values()):
        image = f"{question.task}/{question.id.replace('/', '-')}.png"
        (folder / question.task).mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.render(question)).save(folder / image)
        record = mathv360k(0, image, question.text, f"The answer is {question.answer}")
        records.append({**record, "id": question.id})
    (folder / "ours.json").write_text(json.dumps(records))
    return folder / "ours.json"

def test_our_world_as_files_is_our_world(world, tmp_path):
    world = {split: world[split] for split in world if split != "base"}
    sizes = {split: len(questions) for split, questions in world.items()}
    again = read_world(write_world(world, tmp_path), tmp_path, "", sizes)
    assert again.keys() == world.keys()
    for split, questions in world.items():
        for ours, theirs in zip(questions, again[split], strict=True):
            assert (ours.id, ours.task, ours.text) == (theirs.id, theirs.task, theirs.text)
            assert gold_of(ours) == gold_of(theirs) and str(ours.answer) == theirs.answer
            assert (data.picture_of(theirs.image, 128) == data.render(ours)).all()

def noise(folder, number):
    """A picture of its own."""
    pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")

@pytest.fixture
def sixty(tmp_path):
    """A folder with 60 records about 30 pictures, two with the same pixels as others; and three of
    MathVista, one of them on picture 0."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(31):
        noise(folder, min(number, 28) if number < 30 else number)
        if number == 29:
            shutil.copy(folder / "28.png", folder / "29.png")
    records = [mathv360k(i, f"{i % 30}.png", f"Question: {i} + 1?", f"The answer is {i + 1}")
               for i in range(60)]
    (folder / "sixty.json").write_text(json.dumps(records))
    tests = {"1": mathvista("1", "7", image="0.png"),
             "2": mathvista("2", "14 cm", list(CHOICES), image="30.png"),
             "3": mathvista("3", "1.5", kind="float", precision=1, image="30.png",
                            task="math word problem")}
    (folder / "testmini.json").write_text(json.dumps(tests))
    return folder

SIZES = {"labeled": 15, "unlabeled": 15, "validation": 6, "test": 10}

def test_no_picture_is_in_two_splits(sixty, capsys):
    world = read_world(sixty / "sixty.json", sixty, sixty / "testmini.json", SIZES)
    assert {split: len(some) for split, some in world.items()} == {**SIZES, "GPS": 2, "MWP": 1}
    place = {}                                                     # pixels -> split
    for split in SIZES:
        for question in world[split]:
            pixels = open_picture(question.image).tobytes()
            assert place.setdefault(pixels, split) == split
    assert len(place) > 15 and open_picture(sixty / "0.png").tobytes() not in place
    shown = capsys.readouterr().out
    assert "46 questions are used, 2 are on pictures of the testbed, 12 are more" in shown
    again = read_world(sixty / "sixty.json", sixty, "", SIZES, seed=1)
    assert "GPS" not in again and again["test"] != world["test"]

def test_no_picture_of_a_named_split_is_in_another(sixty):
    records = json.loads((sixty / "sixty.json").read_text())
    records[7]["id"] = "test/7"                                    # its picture: 37, too
    (sixty / "named.json").write_text(json.dumps(records))
    world = read_world(sixty / "named.json", sixty, "", SIZES)
    assert world["test"][0].id == "test/7"
    assert sum(q.image.endswith("/7.png") for split in SIZES for q in world[split]) == 1
    records[37]["id"] = "labeled/37"
    (sixty / "named.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match="labeled/37.*test"):
        read_world(sixty / "named.json", sixty, "", SIZES)

def test_all_questions_of_a_file_are_a_test(sixty):
    world = read_world(sixty / "sixty.json", sixty, "", {"test": math.inf})
    assert world.keys() == {"test"} and len(world["test"]) == 60
    with pytest.raises(ValueError, match="not MathVista"):
        read_world(sixty / "sixty.json", sixty, sixty / "sixty.json", SIZES)

def test_what_is_missing_is_said_or_left_out(sixty, capsys):
    (sixty / "5.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be opened.*5.png.*: 1.*skip_missing"):
        read_world(sixty / "sixty.json", sixty, "", SIZES)
    world = read_world(sixty / "sixty.json", sixty, "", SIZES, skip_missing=True)
    used = {question.image for split in SIZES for question in world[split]}
    assert f"{sixty}/6.png" in used and f"{sixty}/5.png" not in used
    capsys.readouterr()
    read_world(sixty / "sixty.json", sixty, "", {"test": math.inf}, skip_missing=True)
    said = capsys.readouterr().out                                 # each is counted once
    assert "58 questions are used" in said and " 0 are more than asked for" in said
    with pytest.raises(ValueError, match="for the split labeled, and not 40: ask for fewer"):
        read_world(sixty / "sixty.json", sixty, "", {**SIZES, "labeled": 40}, skip_missing=True)

# ---------------------------------------------------------------- pictures

def test_transparent_parts_are_white_and_the_size_is_asked_for(images):
    clear = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 15, 30))
    clear.save(images / "clear.png")
    pixels = open_picture(images / "clear.png", images)
    assert pixels.shape == (30, 30, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[0, 29].tolist() == [255, 255, 255]
    assert open_picture(images / "clear.png", images, 64).shape == (64, 64, 3)
    same = open_picture(images / "clear.png", images, 30)          # one of that size is not touched
    assert np.array_equal(same, pixels)

def test_the_longest_side_comes_first_where_it_is_given(images):
    """As SmolVLM's processor does it, for its 512 pixels; other sizes are reached at once."""
    noise(images, 7)                                               # 30 x 20
    path = images / "7.png"
    assert open_picture(path, longest=60).shape == (40, 60, 3)
    for size, longest, other in ((512, 2048, None), (64, None, 2048)):
        seen = data.picture_of(str(path), size)
        assert np.array_equal(seen, open_picture(path, size=size, longest=longest))
        assert not np.array_equal(seen, open_picture(path, size=size, longest=other))

def test_nothing_outside_the_folder_is_opened(images, tmp_path):
    os.symlink(tmp_path / "outside.png", images / "link.png")
    for path in (images / "link.png", images / "../outside.png"):
        with pytest.raises(OSError, match="outside of"):
            open_picture(path, images)

def test_what_is_no_picture_is_named(images, monkeypatch):
    (images / "text.png").write_text("no picture")
    (images / "half.png").write_bytes((images / "TabMWP/images/1.png").read_bytes()[:40])
    Image.new("RGB", (40, 40), "red").save(images / "whole.avif")
    damaged = bytearray((images / "whole.avif").read_bytes())
    damaged[81] ^= 255                                             # Pillow: RuntimeError
    (images / "damaged.avif").write_bytes(damaged)
    for name in ("text.png", "half.png", "gone.png", "damaged.avif"):
        with pytest.raises(OSError, match=name):
            open_picture(images / name, images)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)             # a bomb: more than twice that
    with pytest.raises(OSError, match="2.png"):
        open_picture(images / "UniGeo/images/2.png", images)

# ---------------------------------------------------------------- the command

def test_check_says_what_a_file_holds(file, images):
    more = [*RECORDS, mathv360k(7, "UniGeo/images/3.bmp", "Question: what?", "a cow")]
    file.write_text(json.dumps(more))
    text = "\n".join(check_file(file, images))
    assert "6 questions on 2 different pictures, 1 files with the pixels of another" in text
    assert "{'plain number': 2, 'letter': 2, 'text': 2}" in text and "UniGeo: 2" in text
    assert "wrong: 2 pictures that cannot be opened" in text and "how much?" in text
    text = "\n".join(check_file(file, images, file))               # a testbed of the same pictures
    assert "2 of its pictures are here" in text
    assert f"1 records without an answer (the first: number 4) of {file}" in text

@pytest.mark.parametrize("content", ["", "[1, 2", '"text"', "null", "7"])
def test_a_file_that_holds_no_records_is_one_line(content, file, images):
    file.write_text(content)
    done = subprocess.run([sys.executable, "data.py", "--check", file, "--images", images],
                          cwd=Path(data.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "train.json" in done.stderr

# ---------------------------------------------------------------- the loop

SMALL = ["--preset", "test", "--labeled", "20", "--warmup_questions", "8",
         "--prm_questions", "8", "--validation", "5", "--test", "10", "--epochs", "0.25",
         "--rollouts_per_question", "4"]

def test_a_run_on_our_world_as_files_is_the_same_run(tmp_path):
    """To the bit, but for what the oracle says."""
    flags = [*SMALL, "--method", "prm", "--policy", "weights/base.safetensors",
             "--max_new_tokens", "32", "--testbed_questions", "1", "--monitor_rollouts", "2",
             "--prm_rollouts", "1", "--test", "5"]
    cfg, _ = mstar.parse(flags)
    file = write_world(data.build_world(cfg.splits), tmp_path / "files")
    ours = mstar.main([*flags, "--out", str(tmp_path / "ours")])
    theirs = mstar.main([*flags, "--out", str(tmp_path / "theirs"), "--data", str(file),
                         "--images", str(file.parent)])
    for mine, other in zip(ours["rows"], theirs["rows"], strict=True):
        assert other["unsound"] is None and set(other["readings"].values()) == {None}
        del mine["id"]["sound"], mine["ci95"]["id"]["sound"]
        for split, letters in mine["graded"].items():
            mine["graded"][split] = letters.replace("s", "c")      # which are sound, nobody knows
        assert {**mine, "unsound": None, "readings": other["readings"], "seconds": 0} == \
            {**other, "seconds": 0}
    assert any("c" in row["graded"]["test"] for row in ours["rows"])
    for mine, other in zip(ours["iterations"], theirs["iterations"], strict=True):
        assert mine.keys() - other.keys() <= {"unsound", "unsound_correct", "unsound_kept"}
        assert {**mine, **other, "seconds": 0} == {**mine, "seconds": 0}
    page = (tmp_path / "theirs/report.html").read_text()
    assert "✓ true" not in page and "✗ false" not in page and "gold answer" in page

def test_a_row_has_our_grade_and_the_score_of_mathvista(sixty, monkeypatch):
    """For which "1.5 cm" is no number."""
    world = read_world(sixty / "sixty.json", sixty, sixty / "testmini.json", SIZES)
    said = {"MathVista/1": "answer: 7", "MathVista/3": "answer: 1.5 cm"}

    def respond(policy, questions, *rest):
        texts = [said.get(question.id, "") for question in questions]
        return texts, list(map(grade, texts, questions))

    monkeypatch.setattr(evaluate, "answer_greedily", respond)
    row = evaluate.evaluate_policy("a row", None, world, 8)
    assert row["ood"] == {"GPS": 0.5, "MWP": 1.0, "all": pytest.approx(2 / 3)}
    assert row["official"]["ood"] == {"GPS": 0.5, "MWP": 0.0, "all": pytest.approx(1 / 3)}
    assert row["id"] == {"all": 0.0} and row["unparseable"] == 1.0

def test_every_stage_runs_on_public_weights_and_files(sixty, tmp_path, capsys):
    tokenizer = PublicTokenizer(Path(__file__).parent / "tokenizer.json")
    write_public(tmp_path / "public", "smolvlm", tokenizer)
    report = mstar.main([
        *SMALL, "--labeled", "16", "--policy", str(tmp_path / "public"), "--images", str(sixty),
        "--data", str(sixty / "sixty.json"), "--testbed", str(sixty / "testmini.json"),
        "--arms", "sft,vote_0,mstar", "--max_new_tokens", "8", "--out", str(tmp_path / "run")])
    assert set(report["rows"][-1]["graded"]) == {"test", "GPS", "MWP"}
    assert report["rows"][-1]["official"]["ood"].keys() == {"GPS", "MWP", "all"}
    shown = capsys.readouterr().out
    assert "unsound (of the correct) not known" in shown and "by MathVista's rules" in shown
    assert shown.splitlines()[-1].endswith("report.html")
    assert ", behind its picture: " in shown and "\nReason step by step, one step per" in shown
    evaluate.main([str(tmp_path / "run")])
    prm.main([str(tmp_path / "run")])
    assert "steps_top_2" in capsys.readouterr().out
    files = ["--data", str(sixty / "sixty.json"), "--images", str(sixty)]
    evaluate.main([str(tmp_path / "run"), *files])                 # of all 60, without a testbed
    assert "OOD" not in capsys.readouterr().out

def test_a_policy_of_direct_answers_is_asked_for_them(policy, tmp_path, monkeypatch, capsys):
    """As in its run, when it is scored again."""
    cfg, _ = mstar.parse([*SMALL, "--method", "sft"])
    write_json(tmp_path / "config.json", {**asdict(cfg), "splits": cfg.splits})
    save(tmp_path / "policy.safetensors", policy)
    was_direct, real = [], evaluate.make_prompts

    def spy(policy, questions, with_answer=False, direct=False):
        was_direct.append(direct)
        return real(policy, questions, with_answer, direct)

    monkeypatch.setattr(evaluate, "make_prompts", spy)
    evaluate.main([str(tmp_path)])
    assert was_direct and all(was_direct)

def test_words_that_the_policy_does_not_know_are_one_line(sixty, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        mstar.main([*SMALL, "--labeled", "16", "--policy", "weights/base.safetensors", "--data",
                    str(sixty / "sixty.json"), "--images", str(sixty), "--out",
                    str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "unknown symbol 'Q'" in error

@pytest.mark.parametrize("flags, words", [
    (["--data", "none.json", "--images", "."], "none.json"), (["--data", "x.json"], "--images"),
    (["--testbed", "testmini.json"], "--data"), (["--images", "x"], "--data"),
    (["--data", "x.json", "--images", ".", "--policy", "scratch"], "--policy"),
    (["--data", "requirements.txt", "--images", "."], "not JSON")])
def test_flags_that_do_not_fit_are_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        mstar.main([*SMALL, "--policy", "weights/base.safetensors", *flags, "--out",
                    str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error
