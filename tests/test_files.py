"""Questions from files: MathV360K's and MathVista's records, their answers and pictures. The data
sets themselves could not be had; records are written here as their files hold them."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import check_file, normal_answer, open_picture, read_questions

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
    ("-0.50", (), "-1/2"), (".5", (), "1/2"), ("Yes", (), "yes"), ("10^4", (), "10^4"),
    ("b", CHOICES, "B"), ("(B)", CHOICES, "B"), ("14  CM", CHOICES, "B"), ("no.", CHOICES, "C"),
    ("d", CHOICES, "d"), ("b", (), "b"), ("1,00", (), "1,00"), ("", (), "")])
def test_what_means_the_same_has_one_form(text, choices, expected):
    assert normal_answer(text, choices) == expected

def test_records_of_mathv360k(file, images):
    questions, wrong = read_questions(file, images)
    assert [(q.id, q.task, q.answer) for q in questions] == [
        ("identity_0", "TabMWP", "1000"), ("identity_1", "TabMWP", "B"),
        ("identity_2", "UniGeo", "B"), ("identity_6", "VizWiz", "yes")]
    assert questions[1].text == CHOOSE and questions[1].choices == CHOICES
    assert questions[1].image == f"{images}/TabMWP/images/1.png"
    assert wrong == {"pictures outside the folder": 1, "records without an answer": 1,
                     "records of another shape": 1}

def test_a_record_per_line_is_the_same(file, images):
    lines = file.with_suffix(".jsonl")
    lines.write_text("\n".join(map(json.dumps, RECORDS)))
    assert read_questions(lines, images) == read_questions(file, images)

def test_records_of_mathvista(tmp_path, images):
    about = {"task": "geometry problem solving"}
    record = {"question": "how long?", "image": "TabMWP/images/1.png", "choices": None,
              "unit": None, "answer": "1.20", "pid": "1", "metadata": about}
    records = {"1": record,
               "2": {**record, "pid": "2", "choices": list(CHOICES), "answer": "14 cm",
                     "unit": "g"}}
    (tmp_path / "testmini.json").write_text(json.dumps(records))
    (free, choice), wrong = read_questions(tmp_path / "testmini.json", images)
    assert not wrong and (free.task, free.answer, free.text) == ("GPS", "6/5", "how long?")
    assert choice.answer == "B" and choice.text == (
        "how long? (Unit: g)\nChoices:\n(A) 12 cm\n(B) 14 cm\n(C) no")

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

def test_nothing_outside_the_folder_is_opened(images, tmp_path):
    os.symlink(tmp_path / "outside.png", images / "link.png")
    for path in (images / "link.png", images / "../outside.png"):
        with pytest.raises(ValueError, match="outside"):
            open_picture(path, images)

def test_what_is_no_picture_is_named(images, monkeypatch):
    (images / "text.png").write_text("no picture")
    (images / "half.png").write_bytes((images / "TabMWP/images/1.png").read_bytes()[:40])
    for name in ("text.png", "half.png", "gone.png"):
        with pytest.raises(ValueError, match=name):
            open_picture(images / name, images)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)            # a bomb: 200 pixels, or more
    with pytest.raises(ValueError, match="2.png"):
        open_picture(images / "UniGeo/images/2.png", images)

# ---------------------------------------------------------------- the command

def test_check_says_what_a_file_holds(file, images):
    more = [*RECORDS, mathv360k(7, "UniGeo/images/3.bmp", "Question: what?", "a cow")]
    file.write_text(json.dumps(more))
    text = "\n".join(check_file(file, images))
    assert "5 questions on 2 different pictures, 1 files with the pixels of another" in text
    assert "{'letter': 2, 'text': 2, 'number': 1}" in text and "UniGeo: 2" in text
    assert "left out: 1 pictures that cannot be opened" in text
    assert "left out: 1 pictures outside the folder" in text and "how much?" in text

@pytest.mark.parametrize("content", ["", "[1, 2", '"text"', "null", "7"])
def test_a_file_that_holds_no_records_is_one_line(content, file, images):
    file.write_text(content)
    done = subprocess.run([sys.executable, "data.py", "--check", file, "--images", images],
                          cwd=Path(data.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "train.json" in done.stderr
