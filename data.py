"""
data.py: a small world of visual math, with pictures, questions, written reasoning, an oracle, and a tokenizer.

Paper (arXiv 2412.17451v3): the place of MathV360K (training questions, half of them unlabeled) and of MathVista
    (out-of-domain test, task types FQA, GPS, MWP, TQA, VQA). Those need a pretrained 2-8B model; this world is learned
    from nothing in minutes, and its generator knows every fact of every picture.
Read:     drawing -> scenes -> templates -> reasoning and oracle -> splits -> tokenizer   (bottom-up: parts first)
Departs:  questions are made from templates, answers are whole numbers from 1 to 99, pictures are 4 x 4 cells.
          The five task types keep MathVista's names; what is asked in each is our choice.
Run:      python data.py --preview FILE.png      (a contact sheet of all task types and testbeds)
"""
import argparse
import ast
import operator
import random
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

TASKS = ("FQA", "GPS", "MWP", "TQA", "VQA")                        # MathVista's columns
TESTBEDS = ("style", "size", "layout", "compose", "wording")       # out of domain, one shift each
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
LARGEST = 99                                                       # every number ever written lies in 1 .. LARGEST


@dataclass(frozen=True)
class Question:
    """A question about one picture, with its gold answer. `drawing` and what follows are the generator's knowledge:
    they render the picture and feed the oracle. The policy only ever sees the picture and the text."""
    id: str              # split/number
    task: str            # one of TASKS
    template: str        # name of the function below that made it
    text: str
    answer: int
    drawing: tuple       # primitives, see `render`
    facts: dict          # everything that can be read off the picture: subject -> number
    slots: dict          # letter of a route -> a fact's name, or a number of the question
    routes: tuple        # equal ways to the answer, such as "(a + b) - c"
    look: str = "plain"  # how it is drawn: plain, style or layout


# ---------------------------------------------------------------- drawing

COLOURS = {"red": (222, 45, 38), "blue": (40, 90, 215), "green": (50, 160, 70), "yellow": (245, 205, 45),
           "purple": (145, 60, 175), "orange": (245, 130, 30)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
FONT = {0: "75557", 1: "26227", 2: "71747", 3: "71717", 4: "55711", 5: "74717", 6: "74757", 7: "71122", 8: "75757", 9: "75717"}


@lru_cache(maxsize=None)
def _stamp(name, px, line=0):
    """(px, px) bool masks of a shape or digit: all of it, and its outline, `line` pixels wide. Shapes are drawn large and reduced,
    so that edges are even."""
    if name.isdigit():
        rows = [[int(octal) >> bit & 1 for bit in (2, 1, 0)] for octal in FONT[int(name)]]
        picture = Image.fromarray(np.array(rows, np.uint8) * 255).resize((px * 9 // 16, px * 14 // 16), Image.NEAREST)
        small = Image.new("L", (px, px))
        small.paste(picture, ((px - picture.width) // 2, (px - picture.height) // 2))
    else:
        big = Image.new("L", (160, 160))
        pen = ImageDraw.Draw(big)
        if name == "circle":
            pen.ellipse((8, 8, 152, 152), fill=255)
        elif name == "square":
            pen.rectangle((14, 14, 146, 146), fill=255)
        elif name == "triangle":
            pen.polygon([(80, 5), (155, 150), (5, 150)], fill=255)
        elif name == "star":
            pen.polygon([(80 + r * np.sin(k * np.pi / 5), 84 - r * np.cos(k * np.pi / 5)) for k, r in enumerate([80, 34] * 5)], fill=255)
        elif name == "heart":
            for x in (8, 76):
                pen.ellipse((x, 12, x + 76, 88), fill=255)
            pen.polygon([(11, 66), (149, 66), (80, 154)], fill=255)
        elif name == "cross":
            pen.line((18, 18, 142, 142), fill=255, width=44)
            pen.line((18, 142, 142, 18), fill=255, width=44)
        small = big.resize((px, px), Image.BOX)
    mask, inside = np.array(small) > 110, np.array(small.filter(ImageFilter.MinFilter(2 * line + 1))) > 110
    return mask, mask & ~inside


def render(question, size=128):
    """Draw a question's picture: (size, size, 3) uint8. `size` must be a multiple of 64.

    The canvas is a grid of 4 x 4 cells, each of 2 x 2 squares; a square is 8 units of size/64 pixels. Shapes and digits fill one
    square, so that what is learned about them in one kind of picture serves the others. Primitives: ("bar", column of cells,
    colour, height 1..9), ("rect", x, y, width, height, colour) in squares, ("shape", y, x, name, colour) in one square, ("item", row,
    column, name, colour, price 1..9): in one cell a shape and its price, ("cell", row, column, colour, value): a table cell.
    `look` "style" changes palette, background, line width and adds noise; "layout" shifts, rotates and rescales the whole.
    Both are random, but the same for the same question. (Their random number comes from the last four letters of the drawing's text, so
    that there are only 13 looks of each: too few, but to change it would change the pictures that all results here were measured on.)"""
    if size % 64:
        raise ValueError(f"image size {size} is not a multiple of 64")
    u, px = size // 64, size // 4
    chance = np.random.default_rng(int.from_bytes(repr(question.drawing).encode()[-4:], "big"))
    styled = question.look == "style"
    tint = chance.integers(-28, 29, (len(COLOURS), 3)) if styled else np.zeros((len(COLOURS), 3), int)
    colours = {name: np.clip(np.array(rgb) + t, 0, 255) for (name, rgb), t in zip(COLOURS.items(), tint)}
    canvas = np.empty((size, size, 3), np.uint8)
    canvas[:] = chance.integers(225, 256, 3) if styled else 255
    ink = chance.integers(0, 70, 3) if styled else np.array((20, 20, 20))
    hollow = styled and bool(chance.random() < 0.5)
    kinds = {part[0] for part in question.drawing}

    def square(y, x):
        return canvas[y * 8 * u:(y + 1) * 8 * u, x * 8 * u:(x + 1) * 8 * u]

    def draw_shape(y, x, name, colour):                            # its dark outline is the same in all colours
        mask, outline = _stamp(name, 8 * u, u if hollow else max(1, u // 2))
        square(y, x)[mask] = square(y, x)[-1, -1] if hollow else colours[colour]
        square(y, x)[outline] = colours[colour] if hollow else ink

    if "rect" in kinds:                                            # the faint grid that sides are counted on
        canvas[::8 * u] = canvas[:, ::8 * u] = 215
    for kind, *part in question.drawing:
        if kind == "bar":
            column, colour, height = part
            for level in range(height):                            # a bar is a stack of unit blocks: its height can be counted
                bottom = size - 3 * u - 6 * u * level
                canvas[bottom - 5 * u:bottom, column * px + 2 * u:column * px + 14 * u] = colours[colour]
        elif kind == "rect":
            x, y, width, height, colour = (p * 8 * u if isinstance(p, int) else p for p in part)
            canvas[y:y + height, x:x + width] = colours[colour]
            canvas[y:y + height:8 * u, x:x + width] = canvas[y:y + height, x:x + width:8 * u] = 255
        elif kind == "shape":
            draw_shape(*part)
        else:
            row, column, *_, value = part
            if kind == "item":
                draw_shape(2 * row, 2 * column, *part[2:4])
            else:
                strength = (0.6, 0.4, 0.2)[column]                # a row fades from left to right
                for y, x in ((0, 0), (0, 1), (1, 0)):
                    square(2 * row + y, 2 * column + x)[:] = strength * colours[part[2]] + (1 - strength) * 255
            square(2 * row + 1, 2 * column + 1)[_stamp(str(value), 8 * u)[0]] = ink
    if "bar" in kinds:
        canvas[size - 2 * u:size - u, :max(p[1] + 1 for p in question.drawing if p[0] == "bar") * px] = ink
    if styled:
        canvas = np.clip(canvas + chance.normal(0, 9, canvas.shape), 0, 255).astype(np.uint8)
    if question.look == "layout":
        zoom, angle = chance.uniform(0.95, 1.0), np.deg2rad(chance.uniform(-3, 3))
        cos, sin, middle = np.cos(angle) / zoom, np.sin(angle) / zoom, size / 2
        x, y = middle + chance.uniform(-0.5, 0.5, 2) * u           # where the middle of the drawing goes
        move = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
        canvas = np.array(Image.fromarray(canvas).transform((size, size), Image.AFFINE, move, Image.BILINEAR, fillcolor=(255,) * 3))
    return canvas


# ---------------------------------------------------------------- scenes
# A scene draws a picture and names what a question may speak of. It returns (drawing, facts, slots, words): facts maps what
# can be read off the picture to numbers; slots maps the letters of a template's routes to facts; words fills its wordings.

def chart(rng, extreme=False, columns=4):
    """Bars of different colours: a, b, c, d; with `extreme`, e is the highest or the lowest."""
    colours = rng.sample(list(COLOURS), columns)
    facts = {colour: rng.randint(1, 9) for colour in colours}
    drawing = [("bar", i, colour, facts[colour]) for i, colour in enumerate(colours)]
    slots = dict(zip("abcd", rng.sample(colours, columns)))
    if extreme:
        facts |= {"highest": max(facts.values()), "lowest": min(facts.values())}
        slots["e"] = rng.choice(["highest", "lowest"])
    return drawing, facts, slots, slots


def rectangles(rng, longest=4, columns=8):
    """Two rectangles on the ground: widths a and b, heights h and k."""
    drawing, facts, pair = [], {}, rng.sample(list(COLOURS), 2)
    for colour, x in zip(pair, rng.sample((0, columns // 2), 2)):
        width, height = rng.randint(1, longest), rng.randint(2, 7)
        drawing.append(("rect", x, 8 - height, width, height, colour))
        facts |= {f"{colour} width": width, f"{colour} height": height}
    return sorted(drawing), facts, dict(zip("ahbk", facts)), dict(zip("ab", pair))


def shop(rng, items=None, rows=range(4), columns=range(4)):
    """Shapes with prices: a, b, c, ...; "{as}" is the plural of a in a wording."""
    items = items or rng.randint(3, 4)
    shapes, spots = rng.sample(SHAPES, items), rng.sample([(row, column) for row in rows for column in columns], items)
    facts = {shape: rng.randint(2, 9) for shape in shapes}
    drawing = [("item", *spot, shape, rng.choice(list(COLOURS)), facts[shape]) for shape, spot in zip(shapes, spots)]
    slots = dict(zip("abcdef", shapes))
    return drawing, facts, slots, slots | {letter + "s": _plural(shape) for letter, shape in slots.items()}


def _plural(shape):
    return shape + ("es" if shape == "cross" else "s")


def table(rng, pick):
    """A table of three coloured rows, each fading from left to right. `pick` says what a, b, c are: the cells of one "row" or
    "column", or any three "cells"; with "rows", d, e, f are a second row."""
    colours, columns, first = rng.sample(list(COLOURS), 3), ("left", "middle", "right"), rng.randint(0, 1)
    facts = {f"{colour} {column}": rng.randint(1, 9) for colour in colours for column in columns}
    drawing = [("cell", first + i, j, c, facts[f"{c} {s}"]) for i, c in enumerate(colours) for j, s in enumerate(columns)]
    (r, s), column = rng.sample(colours, 2), rng.choice(columns)
    cells = {"row": [f"{r} {x}" for x in columns], "column": [f"{x} {column}" for x in colours], "cells": rng.sample(list(facts), 3),
             "rows": [f"{x} {y}" for x in (r, s) for y in columns]}[pick]
    slots = dict(zip("abcdef", cells))
    return drawing, facts, slots, slots | {"r": column if pick == "column" else r, "s": s}


def groups(rng, colours, pick, rows=range(4)):
    """Groups of one to four equal shapes, each group in a cell. `colours` says how often each colour comes. `pick`: a, b, c are any groups
    ("shape"), or the groups "in" the first colour, called x; in words they are called by their shape."""
    names = rng.sample(list(COLOURS), len(colours))
    each = rng.sample([name for name, times in zip(names, colours) for _ in range(times)], sum(colours))
    drawing, facts = [], {}
    cells = rng.sample([(row, column) for row in rows for column in range(4)], len(each))
    for (row, column), colour, shape in zip(cells, each, rng.sample(SHAPES, len(each))):
        corners = rng.sample([(0, 0), (0, 1), (1, 0), (1, 1)], rng.randint(1, 4))
        drawing += [("shape", 2 * row + y, 2 * column + x, shape, colour) for y, x in corners]
        facts[f"{colour} {shape}"] = len(corners)
    drawing.sort()
    named = [group for group in facts if pick == "shape" or group.startswith(names[0])]
    slots = dict(zip("abcd", rng.sample(named, len(named))))
    return drawing, facts, slots, {"x": names[0]} | {letter: group.split()[1] for letter, group in slots.items()}


def with_shop(rng, scene, **where):
    """Compose two task types in one picture: another scene, and a shop of two items, of which p is asked for. Items take none
    of the colours that the question may name."""
    drawing, facts, slots, words = scene(rng)
    while True:
        items, prices, shapes, _ = shop(rng, items=2, **where)
        if not {colour for *_, colour, price in items} & set(words.values()):
            break
    return drawing + items, facts | prices, slots | {"p": shapes["a"]}, words | {"p": shapes["a"]}


# ---------------------------------------------------------------- templates

class Template(NamedTuple):
    """A kind of question. `routes` are equal ways to the answer over the scene's slots and the template's numbers.
    The last of `wordings` is kept for the `wording` testbed (new sentences from known words); the others are used elsewhere."""
    task: str
    name: str
    scene: Callable
    routes: tuple
    numbers: dict
    wordings: tuple


SUM_OF_THREE = ("(a + b) + c", "(c + b) + a", "a + (b + c)")
SMALL, DIGIT, PURSE = range(2, 7), range(2, 10), range(30, 100, 10)

# Two numbers of one kind (areas, counts, prices) count differently in the answer where they can: a - b, (a * n) + (b * m). In an
# earlier world of plain sums, three in ten of pi_0's right responses held a false step, mostly such a reading the wrong way
# round: it cost nothing, and no reward that is learned from answers can find an error that costs nothing.
IN_DOMAIN = (
    Template("FQA", "bars_two_minus_one", chart, ("(a + b) - c", "(a - c) + b", "a + (b - c)"), {},
             ("how much are {a} and {b} together minus {c}?", "add {a} and {b}, then take away {c}.", "what is {a} plus {b} minus {c}?",
              "take {c} away from {a} and {b} together.")),
    Template("FQA", "bars_total", chart, ("((a + b) + c) + d", "(a + b) + (c + d)", "((d + c) + b) + a"), {},
             ("what is the total of all bars?", "how much are all bars together?", "add all the bars.",
              "all bars together, what is the total?")),
    Template("FQA", "bars_scaled", chart, ("(a + b) * n", "(a * n) + (b * n)"), dict(n=range(2, 6)),
             ("each unit is {n} cars. how many cars are {a} and {b} together?", "how many cars are {a} and {b} with {n} cars for each unit?",
              "a unit is {n} cars. add the cars of {a} and {b}.", "add {a} and {b}, {n} cars for each unit.")),
    Template("FQA", "bars_extreme", partial(chart, extreme=True), ("e * n",), dict(n=DIGIT),
             ("what is {n} times the {e} bar?", "multiply the {e} bar by {n}.", "how much is the {e} bar times {n}?",
              "take the {e} bar {n} times.")),
    Template("GPS", "perimeter", rectangles, ("(a + h) * 2", "(h + a) * 2", "(a * 2) + (h * 2)"), {},
             ("what is the perimeter of {a}?", "how long is the line around {a}?", "find the perimeter of the {a} rectangle.",
              "how long is the line around the {a} rectangle?")),
    Template("GPS", "area_of_copies", rectangles, ("(a * h) + ((b * k) * n)", "((b * k) * n) + (a * h)"), dict(n=range(2, 4)),
             ("what is the area of one {a} and {n} {b} together?", "find the area of one {a} and {n} {b}.",
              "how many squares fill one {a} and {n} {b}?", "one {a} and {n} {b} together fill how many squares?")),
    Template("GPS", "area_difference", rectangles, ("(a * h) - (b * k)", "(h * a) - (k * b)"), {},
             ("how much larger is the area of {a} than {b}?", "how many more squares fill {a} than {b}?",
              "take the area of {b} away from the area of {a}.", "what is the area of {a} minus the area of {b}?")),
    Template("MWP", "buy_two_kinds", shop, ("(a * n) + (b * m)", "(b * m) + (a * n)"), dict(n=SMALL, m=SMALL),
             ("what do {n} {as} and {m} {bs} cost?", "you buy {n} {as} and {m} {bs}. how much do you pay?", "find the cost of {n} {as} and {m} {bs}.",
              "how much do you pay for {n} {as} and {m} {bs} together?")),
    Template("MWP", "change", shop, ("m - ((a * n) + b)", "(m - (a * n)) - b", "(m - b) - (a * n)"), dict(n=SMALL, m=PURSE),
             ("you have {m} and buy {n} {as} and one {b}. how much is left?", "you pay {m} for {n} {as} and one {b}. what is the change?",
              "from {m} you buy one {b} and {n} {as}. find the change.", "what is left from {m} for one {b} and {n} {as}?")),
    Template("MWP", "buy_each", shop, ("(a + b) * n", "(a * n) + (b * n)"), dict(n=SMALL),
             ("what do {n} of each {a} and {b} cost?", "you buy {n} of each {a} and {b}. how much do you pay?",
              "find the cost of one {a} and one {b}, {n} times.", "how much do you pay for {n} of each {a} and {b}?")),
    Template("MWP", "buy_difference", shop, ("(a - b) * n", "(a * n) - (b * n)"), dict(n=range(3, 10)),
             ("how much more do {n} {as} cost than {n} {bs}?", "take the cost of {n} {bs} away from {n} {as}.",
              "find how much more you pay for {n} {as} than for {n} {bs}.", "what is the cost of {n} {as} minus the cost of {n} {bs}?")),
    Template("TQA", "row_total", partial(table, pick="row"), SUM_OF_THREE, {},
             ("what is the total of the {r} row?", "add the numbers in the {r} row.", "how much is the {r} row together?",
              "find the total of all numbers in the {r} row.")),
    Template("TQA", "column_total", partial(table, pick="column"), SUM_OF_THREE, {},
             ("what is the total of the {r} column?", "add the numbers in the {r} column.", "how much is the {r} column together?",
              "find the total of all numbers in the {r} column.")),
    Template("TQA", "multiply_add", partial(table, pick="cells"), ("(a * b) + c", "c + (a * b)"), {},
             ("multiply {a} by {b}, then add {c}.", "what is {a} times {b} plus {c}?", "find {a} times {b}, then add {c}.",
              "how much is {c} plus {a} times {b}?")),
    Template("VQA", "colour_points", partial(groups, colours=(2, 1, 1), pick="in"), ("(a * n) + (b * m)", "(b * m) + (a * n)"), dict(n=DIGIT, m=DIGIT),
             ("of the {x} shapes each {a} is {n} points and each other is {m}. how many points are there?",
              "find the points of the {x} shapes with {n} for each {a} and {m} for each other.",
              "each {x} {a} is {n} points and each other {x} shape is {m}. what is the total?",
              "how many points are the {x} shapes with {n} for each {a} and {m} for each other?")),
    Template("VQA", "shape_points", partial(groups, colours=(2, 1, 1), pick="shape"), ("(a * n) + (b * m)", "(b * m) + (a * n)"), dict(n=DIGIT, m=DIGIT),
             ("a {a} is {n} points and a {b} is {m}. how many points are there?", "find the points with {n} for each {a} and {m} for each {b}.",
              "each {a} is {n} and each {b} is {m}. what is the total?", "how many points are there with {n} for a {a} and {m} for a {b}?")),
    Template("VQA", "difference_points", partial(groups, colours=(2, 1, 1), pick="shape"), ("(a - b) * n", "(a * n) - (b * n)"), dict(n=DIGIT),
             ("each shape is {n} points. how many more points is {a} than {b}?", "find how many more points {a} is than {b} with {n} for each shape.",
              "take the points of {b} away from {a} with {n} for each.", "with {n} points for each shape, how many more is {a} than {b}?")),
)
SIZE = (                                                           # longer chains and larger numbers, one template a task
    Template("FQA", "bars_three_scaled", chart, ("((a + b) + c) * n", "((a * n) + (b * n)) + (c * n)"), dict(n=range(2, 6)),
             ("each unit is {n} cars. how many cars are {a} and {b} and {c} together?", "")),
    Template("GPS", "area_of_all_copies", rectangles, ("((a * h) * n) + ((b * k) * m)", "((b * k) * m) + ((a * h) * n)"), dict(n=range(2, 4), m=range(2, 4)),
             ("what is the area of {n} {a} and {m} {b} together?", "")),
    Template("MWP", "buy_three_kinds", partial(shop, items=6), ("((a * n) + (b * m)) + (c * k)", "(a * n) + ((b * m) + (c * k))"), dict(n=SMALL, m=SMALL, k=SMALL),
             ("what do {n} {as} and {m} {bs} and {k} {cs} cost?", "")),
    Template("TQA", "two_rows_total", partial(table, pick="rows"), ("((a + b) + c) + ((d + e) + f)", "(a + (b + c)) + (d + (e + f))"), {},
             ("what is the total of the {r} row and the {s} row?", "")),
    Template("VQA", "three_points", partial(groups, colours=(2, 1, 1), pick="shape"), ("((a * n) + (b * m)) + (c * k)", "(a * n) + ((b * m) + (c * k))"),
             dict(n=DIGIT, m=DIGIT, k=DIGIT), ("a {a} is {n} points and a {b} is {m} and a {c} is {k}. how many points are there?", "")),
)
COMPOSE = (                                                        # two hops, each of another task type; filed under the first
    Template("FQA", "bars_priced", partial(with_shop, scene=partial(chart, columns=2), columns=(2, 3)), ("(a + b) * p", "(a * p) + (b * p)"), {},
             ("for each unit of {a} and {b} you pay one {p}. how much do you pay?", "")),
    Template("GPS", "area_and_price", partial(with_shop, scene=partial(rectangles, longest=2, columns=4), columns=(2, 3)), ("(a * h) + p", "p + (a * h)"), {},
             ("what is the area of {a} plus the cost of one {p}?", "")),
    Template("VQA", "groups_priced", partial(with_shop, scene=partial(groups, colours=(2,), pick="in", rows=range(2)), rows=(2, 3)),
             ("(a + b) * p", "(a * p) + (b * p)"), {}, ("you pay one {p} for each {x} shape. how much do you pay?", "")),
)


# ---------------------------------------------------------------- reasoning and oracle

@lru_cache(maxsize=None)
def _tree(route):
    return ast.parse(route, mode="eval").body                      # a tree of BinOp, Name (a slot) and Constant


def work_out(node, value_of, write=lambda left, sign, right, result: None):
    """The value of a route's tree, or None when a result leaves 1 .. LARGEST. `value_of(letter)` gives the slots' values;
    `write` is called for every operation, operands first."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return value_of(node.id)
    left, right, sign = work_out(node.left, value_of, write), work_out(node.right, value_of, write), SIGNS[type(node.op)]
    result = OPERATIONS[sign](left, right) if left and right else 0
    if not 1 <= result <= LARGEST:
        return None
    write(left, sign, right, result)
    return result


def write_reasoning(question, rng):
    """One true reasoning text, by a route drawn with `rng` (random.Random): any of the question's routes, with all readings
    first or each when it is needed. One reading or one operation per line; the last line is "answer: N"."""
    lines = []

    def read(letter):
        subject = question.slots[letter]
        if isinstance(subject, int):
            return subject
        needed = sorted(question.facts.keys() - {"highest", "lowest"}) if subject in ("highest", "lowest") else []
        for line in [f"{name} is {question.facts[name]}" for name in [*rng.sample(needed, len(needed)), subject]]:
            if line not in lines:
                lines.append(line)
        return question.facts[subject]

    tree = _tree(rng.choice(question.routes))
    if rng.random() < 0.5:
        letters = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        for letter in rng.sample(letters, len(letters)):
            read(letter)
    answer = work_out(tree, read, lambda left, sign, right, result: lines.append(f"{left} {sign} {right} = {result}"))
    return "\n".join([*lines, f"answer: {answer}"])


def write_caption(question, rng, asked):
    """(prompt text, response text) about what can be read off the picture, worded like the readings of a reasoning text, in
    random order: all of it, or, if `asked`, two to six facts that the prompt names."""
    subjects = rng.sample(sorted(question.facts), min(rng.randint(2, 6), len(question.facts)) if asked else len(question.facts))
    prompt = "describe " + " and ".join(subjects) if asked else "describe"
    return prompt, "\n".join(f"{subject} is {question.facts[subject]}" for subject in rng.sample(subjects, len(subjects)))


READING, OPERATION, ANSWER = (re.compile(p) for p in (r"(.+) is (\d+)", r"(\d+) ([+*-]) (\d+) = (\d+)", r"answer: (\d+)"))


def oracle(question, text):
    """True or false for each line of a written text (list of bool). For audits, tests and upper bounds, never for training.

    A reading is true if the picture shows it. An operation is true if it is right and both its numbers come from somewhere:
    from the question or an earlier line (be that line true or false: an error is charged to the line that makes it).
    The answer line is true if it names the gold answer and an earlier line has worked it out. Anything else is false."""
    known = {value for value in question.slots.values() if isinstance(value, int)}
    known |= {node.value for route in question.routes for node in ast.walk(_tree(route)) if isinstance(node, ast.Constant)}
    written, verdicts = set(), []
    for line in text.split("\n"):
        true, number = False, None
        if match := OPERATION.fullmatch(line):
            left, right, number = int(match[1]), int(match[3]), int(match[4])
            true = OPERATIONS[match[2]](left, right) == number and {left, right} <= known | written
        elif match := READING.fullmatch(line):
            number = int(match[2])
            true = question.facts.get(match[1]) == number
        elif match := ANSWER.fullmatch(line):
            true = int(match[1]) == question.answer and question.answer in written
        written.add(number)
        verdicts.append(true)
    return verdicts


# ---------------------------------------------------------------- splits

def _make(rng, template, id, look="plain", unseen_wording=False):
    """One question of a template; scenes without a route inside 1 .. LARGEST are drawn again."""
    while True:
        drawing, facts, slots, words = template.scene(rng)
        numbers = {letter: rng.choice(values) for letter, values in template.numbers.items()}
        slots = slots | numbers
        answers = {route: work_out(_tree(route), lambda letter: facts.get(slots[letter], slots[letter])) for route in template.routes}
        routes = tuple(route for route in template.routes if answers[route])
        if routes:
            wording = template.wordings[-1] if unseen_wording else rng.choice(template.wordings[:-1])
            return Question(id, template.task, template.name, wording.format(**words, **numbers), answers[routes[0]], tuple(drawing), facts,
                            slots, routes, look)


def build_world(sizes, seed=0):
    """Make all splits: {name: list of Question}. `sizes` maps split names to numbers of questions, for example
    {"base": 8000, "labeled": 2000, "unlabeled": 2000, "validation": 250, "test": 750, "style": 250, ...}.

    No two questions of any split share a picture. Splits are made in a fixed order, tests first, each from its own random
    stream, so that the test questions stay the same whatever the sizes of the training splits. Task types take turns.
    ValueError names a split that is unknown, or for which there are not enough different pictures."""
    seen, world = set(), {}
    order = ("test", "validation", *TESTBEDS, "labeled", "unlabeled", "base")
    if unknown := sizes.keys() - set(order):
        raise ValueError(f"unknown split {sorted(unknown)[0]!r}; known: {', '.join(order)}")
    for split in order:
        rng = random.Random(f"{seed}/{split}")
        templates = {"size": SIZE, "compose": COMPOSE}.get(split, IN_DOMAIN)
        by_task = [group for task in TASKS if (group := [template for template in templates if template.task == task])]
        questions, in_vain = [], 0
        world[split] = questions
        while len(questions) < sizes.get(split, 0):
            number = len(questions)
            template = rng.choice(by_task[number % len(by_task)])
            question = _make(rng, template, f"{split}/{number}", split if split in ("style", "layout") else "plain", split == "wording")
            in_vain += 1
            if question.drawing not in seen:
                in_vain = 0
                seen.add(question.drawing)
                questions.append(question)
            if in_vain == 10_000:                                  # there are only 17,280 pictures of two rectangles
                raise ValueError(f"no new picture for question {number} of the split {split}: ask for fewer questions (--labeled, --base_images)")
    return world


# ---------------------------------------------------------------- tokenizer

class Tokenizer:
    """Words, numbers 0 .. 99 and signs of the world, one token each. `decode(encode(text)) == text` for every text that
    `encode` accepts: single spaces between words, none before punctuation, none around a line break."""
    PAD, BOS, SEP, EOS = range(4)                                  # padding, begin, end of prompt, end of response

    def __init__(self):
        wordings = " ".join(wording for template in (*IN_DOMAIN, *SIZE, *COMPOSE) for wording in template.wordings)
        words = set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", "", wordings)))
        words |= {*COLOURS, *SHAPES, *map(_plural, SHAPES), *"highest lowest left middle right width height is answer describe calculate".split()}
        self.symbols = ["<pad>", "<bos>", "<sep>", "<eos>", "\n", *".,:?+-*=", *map(str, range(LARGEST + 1)), *sorted(words)]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    def __len__(self):
        return len(self.symbols)

    def encode(self, text):
        """Token ids of a text. ValueError names the first symbol that is not in the vocabulary, or the spacing."""
        pieces = re.findall(r"\n|[a-z]+|\d+|[^\sa-z\d]", text)
        for piece in pieces:
            if piece not in self.ids:
                raise ValueError(f"unknown symbol {piece!r} in {text!r}")
        ids = [self.ids[piece] for piece in pieces]
        if self.decode(ids) != text:
            raise ValueError(f"spacing of {text!r} cannot be kept; write {self.decode(ids)!r}")
        return ids

    def decode(self, ids):
        """The text of token ids; <pad>, <bos>, <sep> and <eos> are left out."""
        text = " ".join(self.symbols[i] for i in ids if i > self.EOS)
        return re.sub(r" ?\n ?", "\n", re.sub(r" ([.,:?])", r"\1", text))

    def prompt(self, text, answer=None):
        """Prompt ids for a question text; with `answer`, the answer-conditioned prompt of the paper's warm-up."""
        if answer is not None:
            text = f"{text} the answer is {answer}."
        return [self.BOS, *self.encode(text), self.SEP]

    def response(self, text):
        """Response ids: the text and the end token."""
        return [*self.encode(text), self.EOS]


# ---------------------------------------------------------------- contact sheet

def write_preview(path, seed=0):
    """A contact sheet as PNG: four questions of each task type and of each testbed, with question, one reasoning text and answer."""
    sizes = dict.fromkeys(TESTBEDS, 8) | {"test": 20}
    world = build_world(sizes, seed)
    rows = [(task, [q for q in world["test"] if q.task == task][:4]) for task in TASKS]
    rows += [(bed, world[bed][:4]) for bed in TESTBEDS]
    width, height = 300, 220
    sheet = Image.new("RGB", (4 * width, len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (name, questions) in enumerate(rows):
        for x, question in enumerate(questions):
            left, top = x * width + 8, y * height + 8
            sheet.paste(Image.fromarray(render(question)), (left, top + 14))
            pen.text((left, top), f"{name} / {question.template}", fill="black")
            pen.rectangle((left - 1, top + 13, left + 128, top + 142), outline="gray")
            reasoning = write_reasoning(question, random.Random(question.id))
            pen.text((left + 136, top + 14), reasoning, fill="black", spacing=1)
            pen.text((left, top + 148 + (28 if reasoning.count("\n") > 10 else 0)), "\n".join(textwrap.wrap(question.text, 44)), fill=(0, 60, 160))
    sheet.save(path)


def main(argv=None):
    """Command line of this file: --preview FILE.png."""
    parser = argparse.ArgumentParser(description="The world of visual math: look at it.")
    parser.add_argument("--preview", metavar="FILE.png", required=True, help="write a contact sheet of all task types and testbeds")
    parser.add_argument("--seed", type=int, default=0)
    parser.error = lambda message: parser.exit(2, f"data.py: {message}; see python data.py --help\n")
    args = parser.parse_args(argv)
    path = Path(args.preview)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        parser.exit(2, f"data.py: --preview {path}: give a file name that ends in .png, in a folder that exists\n")
    write_preview(path, args.seed)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
