"""
data.py: a small world of visual math: pictures, questions, reasoning texts, an oracle, a tokenizer.

Paper (arXiv 2412.17451v3): the place of MathV360K (training questions, half of them unlabeled) and
    of MathVista (out-of-domain test, task types FQA, GPS, MWP, TQA, VQA). Those need a pretrained
    2-8B model; this world is learned from nothing in minutes, and its generator knows every fact
    of every picture. Files of the two can take its place: see read_world.
Read:     drawing -> scenes -> templates -> reasoning and oracle -> splits -> questions from files
          (skip at first) -> tokenizer   (bottom-up)
Departs:  questions are made from templates, answers are whole numbers from 1 to 99, pictures are
          4 x 4 cells. The five task types keep MathVista's names; what each asks is our choice.
Run:      python data.py --preview FILE.png      (a contact sheet of all task types and testbeds)
          python data.py --check FILE --images DIR [--testbed FILE2]      (what FILE holds)
"""
import argparse
import ast
import hashlib
import itertools
import json
import math
import operator
import random
import re
import textwrap
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TASKS = ("FQA", "GPS", "MWP", "TQA", "VQA")                        # MathVista's columns
TESTBEDS = ("style", "size", "layout", "compose", "wording")       # out of domain, one shift each
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
LARGEST = 99                                                       # all numbers lie in 1 .. LARGEST

@dataclass(frozen=True)
class Question:
    """A question about one picture, with its gold answer. The policy sees the picture and the text
    only; `drawing` to `look` render the picture and feed the oracle."""
    id: str              # split/number; of a file: its own
    task: str            # one of TASKS; of MathV360K: the source, such as TabMWP
    template: str        # name of the template that made it
    text: str
    answer: int          # of a file: text in the form of `normal_answer`
    drawing: tuple = ()  # primitives, see `render`
    facts: dict = field(default_factory=dict)  # what can be read off the picture: subject -> number
    slots: dict = None   # letter of a route -> a fact's name, or a number of the question
    routes: tuple = ()   # equal ways to the answer, such as "(a + b) - c"
    look: str = "plain"  # how it is drawn: plain, style or layout
    # of a question from a file, which has no drawing and no known facts
    image: str = field(default="", repr=False)                     # path of its picture
    choices: tuple = ()  # the answers to choose from
    record: dict = field(default=None, repr=False)                 # MathVista's, for its own score

# ---------------------------------------------------------------- drawing

COLOURS = {"red": (222, 45, 38), "blue": (40, 90, 215), "green": (50, 160, 70),
           "yellow": (245, 205, 45), "purple": (145, 60, 175), "orange": (245, 130, 30)}

def _around(*corners):
    """Corners (distance from the middle, angle clockwise from the top) in a square of 1 x 1."""
    return [(0.5 + distance * math.sin(math.radians(angle)),
             0.5 - distance * math.cos(math.radians(angle))) for distance, angle in corners]

CORNERS = {
    "circle": _around(*[(0.44, angle) for angle in range(0, 360, 15)]),
    "square": _around(*[(0.56, angle) for angle in range(45, 360, 90)]),
    "triangle": _around((0.5, 0), (0.6, 128), (0.6, 232)),
    "star": _around(*[(0.2 if k % 2 else 0.5, 36 * k) for k in range(10)]),
    "heart": _around((0.2, 0), (0.43, 25), (0.5, 48), (0.44, 80), (0.46, 180), (0.44, 280),
                     (0.5, 312), (0.43, 335)),
    "cross": _around(*[(0.2 if k % 3 == 0 else 0.56, 90 * (k // 3) + (0, 30, 60)[k % 3])
                       for k in range(12)]),
}
SHAPES = tuple(CORNERS)

def render(question, size=128):
    """Draw a question's picture: (size, size, 3) uint8. `size` is a multiple of 32.

    The canvas has 4 x 4 cells, each of 2 x 2 squares; a square is 8 units of size/64 pixels. Shapes
    and digits fill one square: what is learned about them in one kind of picture serves the others.
        ("bar", column of cells, colour, height 1..9)
        ("rect", x, y, width, height, colour)         in squares
        ("shape", y, x, name, colour)                 in one square
        ("item", row, column, name, colour, price)    in one cell (rows first), price 1..9
        ("cell", row, column, colour, value)          a table cell
    `look` "style" changes palette, background and ink, may leave only outlines, and adds noise;
    "layout" turns and shifts the whole: at random, but the same for the same drawing."""
    chance = np.random.default_rng(zlib.crc32(repr(question.drawing).encode()))
    colours, background, ink, hollow = dict(COLOURS), (255, 255, 255), (20, 20, 20), False
    if question.look == "style":
        for name, rgb in COLOURS.items():                          # another palette
            colours[name] = tuple(np.clip(rgb + chance.integers(-50, 51, 3), 0, 255).tolist())
        background = tuple(chance.integers(225, 256, 3).tolist())
        ink = tuple(chance.integers(0, 70, 3).tolist())
        hollow = bool(chance.random() < 0.5)                       # only outlines
    canvas = Image.new("RGB", (2 * size, 2 * size), background)    # then reduced: smooth edges
    _paint(ImageDraw.Draw(canvas), question.drawing, size // 32, colours, ink, hollow)
    canvas = canvas.reduce(2)
    if question.look == "layout":
        shift = tuple(chance.uniform(-1, 1, 2) * size / 64)        # by up to a unit
        canvas = canvas.rotate(chance.uniform(-3, 3), Image.BILINEAR, translate=shift,
                               fillcolor=background)
    pixels = np.array(canvas)                                      # rows, columns, colours
    if question.look == "style":
        pixels = np.clip(pixels + chance.normal(0, 16, pixels.shape), 0, 255).astype(np.uint8)
    return pixels

def _paint(pen, drawing, u, colours, ink, hollow):
    """Put the primitives of a drawing on a canvas of 64 x 64 units of `u` pixels."""
    font = ImageFont.load_default(8 * u)

    def box(x, y, width, height, colour):                          # in units
        pen.rectangle((x * u, y * u, (x + width) * u - 1, (y + height) * u - 1), colour)

    def shape(y, x, name, colour):                                 # in squares; its edge is dark
        corners = [((x + right) * 8 * u, (y + down) * 8 * u) for right, down in CORNERS[name]]
        fill, edge = (None, colours[colour]) if hollow else (colours[colour], ink)
        pen.polygon(corners, fill, edge, width=u if hollow else u // 2)

    if any(kind == "rect" for kind, *_ in drawing):                # a grid, to count sides on
        for k in range(8):
            box(8 * k, 0, 0.5, 64, (215, 215, 215))
            box(0, 8 * k, 64, 0.5, (215, 215, 215))
    for kind, *part in drawing:
        if kind == "bar":
            column, colour, height = part
            for level in range(height):                            # a stack of blocks, to count
                box(16 * column + 2, 56 - 6 * level, 12, 5, colours[colour])
            box(0, 62, 16 * (column + 1), 1, ink)                  # the ground
        elif kind == "rect":
            x, y, width, height, colour = part
            for right, down in itertools.product(range(width), range(height)):
                box(8 * (x + right) + 0.5, 8 * (y + down) + 0.5, 7.5, 7.5, colours[colour])
        elif kind == "shape":                                      # a member of a group
            shape(*part)
        else:
            row, column, *_, value = part
            if kind == "item":                                     # a shape and its price
                shape(2 * row, 2 * column, *part[2:4])
            else:
                strength = (0.6, 0.4, 0.2)[column]                 # a row fades to the right
                faded = [round(255 - strength * (255 - c)) for c in colours[part[2]]]
                for x, y in ((0, 0), (8, 0), (0, 8)):              # three of the four squares
                    box(16 * column + x, 16 * row + y, 8, 8, tuple(faded))
            middle = (16 * column + 12) * u, (16 * row + 12) * u   # of the last square
            pen.text(middle, str(value), ink, font, anchor="mm")   # a price or a value

# ---------------------------------------------------------------- scenes
# A scene draws a picture and names what a question may speak of. It returns (drawing, facts, slots,
# names): facts maps what can be read off the picture to numbers; slots maps the letters of a
# template's routes to facts; names fills the braces of its wordings.

def chart(rng, extreme=False, columns=4):
    """Bars of different colours: a, b, c, d; with `extreme`, e is the highest or the lowest."""
    colours = rng.sample(list(COLOURS), columns)                   # each once
    facts = {colour: rng.randint(1, 9) for colour in colours}      # heights
    drawing = [("bar", i, colour, facts[colour]) for i, colour in enumerate(colours)]
    slots = dict(zip("abcd", rng.sample(colours, columns)))
    if extreme:
        facts |= {"highest": max(facts.values()), "lowest": min(facts.values())}
        slots["e"] = rng.choice(["highest", "lowest"])
    return drawing, facts, slots, slots

def rectangles(rng, widest=4, columns=8):
    """Two rectangles on the ground: widths a and b, heights h and k."""
    drawing, facts = [], {}
    pair = rng.sample(list(COLOURS), 2)                            # two colours
    for colour, x in zip(pair, rng.sample((0, columns // 2), 2)):
        width, height = rng.randint(1, widest), rng.randint(2, 7)
        drawing.append(("rect", x, 8 - height, width, height, colour))
        facts |= {f"{colour} width": width, f"{colour} height": height}
    slots = dict(zip("ahbk", facts))           # width a and height h of one, b and k of the other
    return sorted(drawing), facts, slots, dict(zip("ab", pair))

def _plural(shape):
    return shape + ("es" if shape == "cross" else "s")

def shop(rng, items=None, rows=range(4), columns=range(4)):
    """Shapes with prices: a, b, c, ...; "{as}" is the plural of a in a wording."""
    items = items or rng.randint(3, 4)
    shapes = rng.sample(SHAPES, items)
    cells = rng.sample(list(itertools.product(rows, columns)), items)
    facts = dict(zip(shapes, rng.sample(range(2, 10), items)))     # prices, all different
    drawing = [("item", *cell, shape, rng.choice(list(COLOURS)), facts[shape])
               for shape, cell in zip(shapes, cells)]
    slots = dict(zip("abcdef", shapes))
    plurals = {letter + "s": _plural(shape) for letter, shape in slots.items()}
    return drawing, facts, slots, slots | plurals

def table(rng, pick="cells", rows=3):
    """A table of coloured rows, each fading from left to right. `pick` says what a, b, c are: the
    cells of one "row" or "column", or any three "cells"."""
    colours, columns = rng.sample(list(COLOURS), rows), ("left", "middle", "right")
    first = rng.randint(0, 4 - rows)                               # its first row of cells
    facts = {f"{colour} {column}": rng.randint(1, 9) for colour in colours for column in columns}
    drawing = [("cell", first + i, j, colour, facts[f"{colour} {column}"])
               for i, colour in enumerate(colours) for j, column in enumerate(columns)]
    r, _ = rng.sample(colours, 2)              # two: all later draws depend on it
    c = rng.choice(columns)
    cells = rng.sample(list(facts), 3)         # drawn for every pick, as well
    if pick == "row":
        cells = [f"{r} {column}" for column in columns]
    elif pick == "column":
        cells = [f"{colour} {c}" for colour in colours]
    slots = dict(zip("abc", cells))
    return drawing, facts, slots, slots | {"r": c if pick == "column" else r}

def groups(rng, colours=(2, 1, 1), pick="shape", rows=range(4)):
    """Groups of one to four equal shapes, each group in a cell. colours: how many groups each
    colour has. a, b, ... are groups, which a wording calls by their shape: any of them (pick
    "shape"), or those of the first colour, which a wording calls x (pick "colour")."""
    names = rng.sample(list(COLOURS), len(colours))
    number, drawing, facts = sum(colours), [], {}
    group_colours = rng.sample(names, number, counts=colours)
    cells = rng.sample(list(itertools.product(rows, range(4))), number)
    shapes = rng.sample(SHAPES, number)
    counts = rng.sample(range(1, 5), 4) + rng.sample(range(1, 5), 4)   # up to four all differ
    for (row, column), colour, shape, count in zip(cells, group_colours, shapes, counts):
        corners = rng.sample([(0, 0), (0, 1), (1, 0), (1, 1)], count)
        drawing += [("shape", 2 * row + y, 2 * column + x, shape, colour) for y, x in corners]
        facts[f"{colour} {shape}"] = count
    drawing.sort()                             # equal pictures have equal drawings
    named = [group for group in facts if pick == "shape" or group.startswith(names[0])]
    slots = dict(zip("abcd", rng.sample(named, len(named))))
    shape_names = {letter: group.split()[1] for letter, group in slots.items()}
    return drawing, facts, slots, {"x": names[0]} | shape_names

def compose(scene, beside, rng):
    """Two scenes in one picture; the question is about the first. Nothing of the second has a
    colour or a shape that the question may name."""
    drawing, facts, slots, names = scene(rng)
    named = set(" ".join(names.values()).split())                  # "red left": red, and left
    while True:
        more, other_facts, _, _ = beside(rng)
        if named.isdisjoint(itertools.chain(*more)):
            return drawing + more, facts | other_facts, slots, names

# ---------------------------------------------------------------- templates

class Template(NamedTuple):
    """A kind of question. `routes`: equal ways to the answer over the scene's slots and `numbers`.
    The last of the `wordings` is kept for the `wording` testbed: new sentences from known words."""
    task: str
    name: str
    scene: Callable
    routes: tuple
    numbers: dict
    wordings: tuple

SMALL, DIGIT, PURSE = range(2, 7), range(2, 10), range(30, 100, 10)
SUM_OF_THREE = ("(a + b) + c", "(c + b) + a", "a + (b + c)")
TWO_PRODUCTS = ("(a * n) + (b * m)", "(b * m) + (a * n)")
SUM_SCALED = ("(a + b) * n", "(a * n) + (b * n)")
DIFFERENCE_OF_PRODUCTS = ("(a * n) - (b * m)",)

# If a wrong reading still gives the right answer, no reward learned from answers can notice.
# So this is made rare: two numbers of one kind (areas, counts, prices) count differently in the
# answer where they can, a * n - b * m with n and m different, and no two prices or counts in a
# picture are equal (of more than four groups, some are). In earlier worlds a reading the wrong way
# round, or the price of another item, often was as good: of pi_0's correct responses to some
# templates, three in four were unsound.
IN_DOMAIN = (
    Template("FQA", "bars_two_minus_one", chart,
             ("(a + b) - c", "(a - c) + b", "a + (b - c)"), {}, (
        "how much are {a} and {b} together minus {c}?", "add {a} and {b}, then take away {c}.",
        "what is {a} plus {b} minus {c}?", "take {c} away from {a} and {b} together.")),
    Template("FQA", "bars_total", chart,
             ("((a + b) + c) + d", "(a + b) + (c + d)", "((d + c) + b) + a"), {}, (
        "what is the total of all bars?", "how much are all bars together?",
        "add all the bars.", "you buy all the bars. how much do you pay?")),
    Template("FQA", "bars_scaled", chart, SUM_SCALED, {"n": range(2, 6)}, (
        "each unit is {n} cars. how many cars are {a} and {b} together?",
        "how many cars are {a} and {b} with {n} cars for each unit?",
        "a unit is {n} cars. add the cars of {a} and {b}.",
        "you have {n} cars for each unit. how many for {a} and {b} together?")),
    Template("FQA", "bars_extreme", partial(chart, extreme=True), ("e * n",), {"n": DIGIT}, (
        "what is {n} times the {e} bar?", "multiply the {e} bar by {n}.",
        "how much is the {e} bar times {n}?",
        "you buy the {e} bar {n} times. how much do you pay?")),
    Template("GPS", "perimeter", rectangles,
             ("(a + h) * 2", "(h + a) * 2", "(a * 2) + (h * 2)"), {}, (
        "what is the perimeter of {a}?", "how long is the line around {a}?",
        "find the perimeter of the {a} rectangle.",
        "you find one {a} rectangle. how long is the line around?")),
    Template("GPS", "area_of_copies", rectangles,
             ("(a * h) + ((b * k) * n)", "((b * k) * n) + (a * h)"), {"n": range(2, 4)}, (
        "what is the area of one {a} and {n} {b} together?",
        "find the area of one {a} and {n} {b}.", "how many squares fill one {a} and {n} {b}?",
        "one {a} and {n} {b} together fill how many squares?")),
    Template("GPS", "area_difference", rectangles, ("(a * h) - (b * k)", "(h * a) - (k * b)"), {}, (
        "how much larger is the area of {a} than {b}?", "how many more squares fill {a} than {b}?",
        "take the area of {b} away from the area of {a}.",
        "you have {a} and take {b} away. how many squares are left?")),
    Template("MWP", "buy_two_kinds", shop, TWO_PRODUCTS, {"n": SMALL, "m": SMALL}, (
        "what do {n} {as} and {m} {bs} cost?",
        "you buy {n} {as} and {m} {bs}. how much do you pay?",
        "find the cost of {n} {as} and {m} {bs}.",
        "how much do you pay for {n} {as} and {m} {bs} together?")),
    Template("MWP", "change", shop, ("m - (a + b)", "(m - a) - b", "(m - b) - a"), {"m": PURSE}, (
        "you have {m} and buy one {a} and one {b}. how much is left?",
        "you pay {m} for one {a} and one {b}. what is the change?",
        "from {m} you buy one {b} and one {a}. find the change.",
        "what is left from {m} for one {a} and one {b}?")),
    Template("MWP", "buy_each", shop, SUM_SCALED, {"n": SMALL}, (
        "what do {n} of each {a} and {b} cost?",
        "you buy {n} of each {a} and {b}. how much do you pay?",
        "find the cost of one {a} and one {b}, {n} times.",
        "how much are {n} {as} together with {n} {bs}?")),
    Template("MWP", "buy_difference", shop, DIFFERENCE_OF_PRODUCTS,
             {"n": range(3, 10), "m": range(3, 10)}, (
        "how much more do {n} {as} cost than {m} {bs}?",
        "take the cost of {m} {bs} away from {n} {as}.",
        "find how much more you pay for {n} {as} than for {m} {bs}.",
        "you have {n} {as} and take {m} {bs} away. what is the cost?")),
    Template("TQA", "row_total", partial(table, pick="row"), SUM_OF_THREE, {}, (
        "what is the total of the {r} row?", "add the numbers in the {r} row.",
        "how much is the {r} row together?",
        "you buy all numbers in the {r} row. how much do you pay?")),
    Template("TQA", "column_total", partial(table, pick="column"), SUM_OF_THREE, {}, (
        "what is the total of the {r} column?", "add the numbers in the {r} column.",
        "how much is the {r} column together?",
        "you buy all numbers in the {r} column. how much do you pay?")),
    Template("TQA", "multiply_add", table, ("(a * b) + c", "c + (a * b)"), {}, (
        "multiply {a} by {b}, then add {c}.", "what is {a} times {b} plus {c}?",
        "find {a} times {b}, then add {c}.", "how much is {c} plus {a} times {b}?")),
    Template("VQA", "colour_points", partial(groups, pick="colour"), TWO_PRODUCTS,
             {"n": DIGIT, "m": DIGIT}, (
        "of the {x} shapes each {a} is {n} points and each other is {m}. "
        "how many points are there?",
        "find the points of the {x} shapes with {n} for each {a} and {m} for each other.",
        "each {x} {a} is {n} points and each other {x} shape is {m}. what is the total?",
        "how many points are the {x} shapes with {n} for each {a} and {m} for each other?")),
    Template("VQA", "shape_points", groups, TWO_PRODUCTS, {"n": DIGIT, "m": DIGIT}, (
        "a {a} is {n} points and a {b} is {m}. how many points are there?",
        "find the points with {n} for each {a} and {m} for each {b}.",
        "each {a} is {n} and each {b} is {m}. what is the total?",
        "how many points are there with {n} for a {a} and {m} for a {b}?")),
    Template("VQA", "difference_points", groups, DIFFERENCE_OF_PRODUCTS, {"n": DIGIT, "m": DIGIT}, (
        "a {a} is {n} points and a {b} is {m}. how many more points is {a} than {b}?",
        "find how many more points {a} is than {b} with {n} for each {a} and {m} for each {b}.",
        "take the points of {b} away from {a} with {n} for each {a} and {m} for each {b}.",
        "with {n} points for a {a} and {m} for a {b}, how many more is {a} than {b}?")),
)

def _variant(of, name, wording=0, **changes):
    """A template of the training with other fields, in one of its wordings."""
    template = next(template for template in IN_DOMAIN if template.name == of)
    wordings = (template.wordings[wording], "")                    # `_make` never draws the last
    return template._replace(name=name, wordings=wordings, **changes)

# Testbed `size`: questions of the training with multipliers just beyond those of training, or with
# more in the picture.
SIZE = (
    _variant("bars_scaled", "bars_scaled_more", numbers={"n": range(6, 8)}),
    _variant("area_of_copies", "area_of_more_copies", 1, numbers={"n": range(4, 6)}),
    _variant("buy_two_kinds", "buy_more", numbers={"n": range(7, 10), "m": range(7, 10)}),
    _variant("row_total", "row_of_four_total", scene=partial(table, pick="row", rows=4)),
    _variant("shape_points", "points_among_six", scene=partial(groups, colours=(2, 1, 1, 1, 1))),
)
# Testbed `compose`: questions of the training about one of two scenes that are composed in one
# picture, which training never does.
TWO_BARS = partial(chart, columns=2)
NARROW = partial(rectangles, widest=2, columns=4)
TWO_GROUPS = partial(groups, colours=(2,), pick="colour", rows=range(2))
ITEMS_RIGHT = partial(shop, items=2, columns=(2, 3))
ITEMS_AT_EDGE = partial(shop, items=2, columns=(3,))
ITEMS_BELOW = partial(shop, items=2, rows=(2, 3))
COMPOSE = (
    _variant("bars_scaled", "bars_beside_shop", scene=partial(compose, TWO_BARS, ITEMS_RIGHT)),
    _variant("area_difference", "area_beside_shop", scene=partial(compose, NARROW, ITEMS_RIGHT)),
    _variant("buy_two_kinds", "shop_beside_bars", scene=partial(compose, ITEMS_RIGHT, TWO_BARS)),
    _variant("multiply_add", "cells_beside_shop", 1, scene=partial(compose, table, ITEMS_AT_EDGE)),
    _variant("colour_points", "points_beside_shop", 2,
             scene=partial(compose, TWO_GROUPS, ITEMS_BELOW)),
)

# ---------------------------------------------------------------- reasoning and oracle

@lru_cache(maxsize=None)
def _tree(route):
    return ast.parse(route, mode="eval").body                      # BinOp, Name (a slot), Constant

def work_out(node, slots, read, operate):
    """The value of a route's tree, operands first. `read(name)` gives the value of a fact,
    `operate(left, sign, right)` that of an operation; a number is itself."""
    if isinstance(node, ast.BinOp):
        left = work_out(node.left, slots, read, operate)
        right = work_out(node.right, slots, read, operate)
        return operate(left, SIGNS[type(node.op)], right)          # +, - or *
    subject = slots[node.id] if isinstance(node, ast.Name) else node.value
    return subject if isinstance(subject, int) else read(subject)  # a number, or a fact's name

def answer_by(route, facts, slots):
    """The answer by a route, or None if a result on the way leaves 1 .. LARGEST."""
    def operate(left, sign, right):
        result = OPERATIONS[sign](left, right) if left and right else 0
        return result if 1 <= result <= LARGEST else None

    return work_out(_tree(route), slots, facts.get, operate)

def write_reasoning(question, rng):
    """One true reasoning text, by a route drawn with `rng` (random.Random), all readings first or
    each when it is needed. One reading or operation per line; the last line is "answer: N"."""
    lines = []

    def read(subject):
        subjects = [subject]
        if subject in ("highest", "lowest"):                       # first all bars
            bars = sorted(question.facts.keys() - {"highest", "lowest"})
            subjects = [*rng.sample(bars, len(bars)), subject]
        for name in subjects:
            line = f"{name} is {question.facts[name]}"
            if line not in lines:                                  # each is read once
                lines.append(line)
        return question.facts[subject]

    def operate(left, sign, right):
        result = OPERATIONS[sign](left, right)
        lines.append(f"{left} {sign} {right} = {result}")
        return result

    tree = _tree(rng.choice(question.routes))
    if rng.random() < 0.5:                                         # all readings first
        leaves = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        for leaf in rng.sample(leaves, len(leaves)):
            work_out(leaf, question.slots, read, operate)
    answer = work_out(tree, question.slots, read, operate)         # reads what is missing
    return "\n".join([*lines, f"answer: {answer}"])

READING = re.compile(r"(.+) is (\d+)")
OPERATION = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")
ANSWER = re.compile(r"answer: (\d+)\.?")

def given_numbers(question):
    """The numbers that a question states, and those that its routes bring along."""
    numbers = {value for value in question.slots.values() if isinstance(value, int)}
    for route in question.routes:
        numbers |= {node.value for node in ast.walk(_tree(route)) if isinstance(node, ast.Constant)}
    return numbers

def oracle(question, text):
    """True or false for each line of a written text (list of bool). Never for training.

    A reading is true if the picture shows it. An operation is true if it is right and both its
    numbers come from the question or an earlier line (be that line true or false: an error is
    charged to the line that makes it). The answer line is true if it names the gold answer and an
    earlier line, true or false, ends in that number; an empty line behind it is true, too. Anything
    else is false. All true is not yet a derivation: see `sound`."""
    known, written = given_numbers(question), set()                # numbers of the lines so far
    verdicts, answered = [], False
    for line in text.split("\n"):
        is_true, number = False, None
        if match := OPERATION.fullmatch(line):
            left, right, number = int(match[1]), int(match[3]), int(match[4])
            is_true = (OPERATIONS[match[2]](left, right) == number
                       and {left, right} <= known | written)
        elif match := READING.fullmatch(line):
            number = int(match[2])
            is_true = question.facts.get(match[1]) == number
        elif match := ANSWER.fullmatch(line):
            is_true = int(match[1]) == question.answer and question.answer in written
            answered = is_true
        elif not line:
            is_true = answered                                     # as `grade` sees it
        written.add(number)                                        # be it true or false
        verdicts.append(is_true)
    return verdicts

def oracle_of_steps(question, text, steps):
    """`oracle` for each of the steps into which a tokenizer cuts a text. One may hold empty lines,
    too (a token of public weights may be two line breaks): they are left out."""
    lines, of_steps = zip(text.split("\n"), oracle(question, text)), []
    for step in steps:
        own = list(itertools.islice(lines, max(1, step.count("\n"))))      # its lines
        verdicts = [is_true for line, is_true in own if line] or [own[0][1]]
        of_steps.append(all(verdicts))
    return of_steps

def sound(question, text):
    """Is a response a valid derivation of the answer: are all its lines true, and would they lead
    to the answer if the picture showed other numbers, too? So it is worked out once more with a
    random number of 64 bits for every fact: in any order, by any true detour, it must come to what
    a route comes to. (That another combination of facts does, too, has a chance of about 1e-18.)

    A written number may stand for several things (two readings of 7; 3 + 4 and a 7 of the
    question): the response is sound if one way to understand it is. So that no text takes long, 200
    of them are kept (more than a text of `write_reasoning` has), and none that is much larger than
    the goal, as products of more facts than the route's are."""
    if not all(oracle(question, text)):
        return False
    meanings = defaultdict(set)                # written number -> what it may be with the others

    def in_another_picture(fact):
        return random.Random(fact).randrange(2**63, 2**64)         # another number

    def operate(left, sign, right):
        return OPERATIONS[sign](left, right)

    route = _tree(question.routes[0])          # all routes come to the same
    goal = work_out(route, question.slots, in_another_picture, operate)
    for number in given_numbers(question):
        meanings[number].add(number)
    for line in text.split("\n"):
        if match := OPERATION.fullmatch(line):
            pairs = itertools.product(meanings[int(match[1])], meanings[int(match[3])])
            results = {operate(left, match[2], right) for left, right in pairs}
            results = {one for one in results if abs(one) < abs(goal) << 32}
            results |= meanings[int(match[4])]
            meanings[int(match[4])] = set(sorted(results)[:200])
        elif match := READING.fullmatch(line):
            meanings[int(match[2])].add(in_another_picture(match[1]))
    return goal in meanings[question.answer]

# ---------------------------------------------------------------- splits

def _make(rng, template, id, look="plain", unseen_wording=False):
    """One question of a template; scenes without a route inside 1 .. LARGEST are drawn again."""
    while True:
        drawing, facts, slots, names = template.scene(rng)
        numbers = {letter: rng.choice(values) for letter, values in template.numbers.items()}
        slots = slots | numbers
        routes = [route for route in template.routes if answer_by(route, facts, slots)]
        if routes and len(set(numbers.values())) == len(numbers):  # n = m would not tell a from b
            break
    wording = template.wordings[-1] if unseen_wording else rng.choice(template.wordings[:-1])
    text = wording.format(**names, **numbers)
    answer = answer_by(routes[0], facts, slots)                    # all are equal
    return Question(id, template.task, template.name, text, answer, tuple(drawing), facts, slots,
                    tuple(routes), look)

FULL_SIZES = {"test": 750, "validation": 250, **dict.fromkeys(TESTBEDS, 250)}          # of tests
SPLITS = (*FULL_SIZES, "labeled", "unlabeled", "base")

def build_world(sizes, seed=0):
    """Make all splits: {name: list of Question}. `sizes`: {split: number of questions}. No two
    questions share a picture. Tests come first, each split from its own random stream: they stay
    the same whatever the sizes of the training splits. Smaller tests are beginnings of the full
    ones, whose pictures no base has seen. ValueError: too few different pictures."""
    seen, world = set(), {}                                        # drawings of all splits
    for split in SPLITS:
        rng = random.Random(f"{seed}/{split}")                     # its own stream
        templates = SIZE if split == "size" else COMPOSE if split == "compose" else IN_DOMAIN
        look = split if split in ("style", "layout") else "plain"
        questions = []
        for number in range(max(sizes.get(split, 0), FULL_SIZES.get(split, 0))):
            task = TASKS[number % len(TASKS)]                      # the tasks take turns
            for _ in range(10_000):                                # of rectangles there are 17,280
                template = rng.choice([one for one in templates if one.task == task])
                question = _make(rng, template, f"{split}/{number}", look, split == "wording")
                if question.drawing not in seen:
                    break
            else:
                raise ValueError(f"no new picture for question {number} of the split {split}: ask "
                                 "for fewer questions (--labeled)")
            seen.add(question.drawing)
            questions.append(question)
        world[split] = questions[:sizes.get(split, 0)]
    return world

# ---------------------------------------------------------------- questions from files

def world_of(config):
    """The world of a run, {split: list of Question}, from what its config.json says: our own, or
    questions from files. Errors: as of build_world and read_world."""
    if not config["data"]:
        return build_world(config["splits"], config["world_seed"])
    return read_world(config["data"], config["images"], config["testbed"], config["splits"],
                      config["world_seed"], config["skip_missing"])

def read_world(file, images, testbed, sizes, seed=0, skip_missing=False):
    """Splits like those of `build_world`, of the questions in a file (MathV360K's) and, if named,
    those of a `testbed` (MathVista's testmini.json), whose five tasks become testbeds. By picture,
    so that none is in two splits: first test and validation, then half of the rest labeled, half
    unlabeled, as in the paper. Pictures of the testbed (equal pixels) are left out. Records whose
    ids name a split (test/0) stay there, in order. Raises OSError, or ValueError, which says what
    is missing or wrong; with `skip_missing` that is left out."""
    questions, tests, checksums, wrong = read_files(file, images, testbed)
    if any(question.record is None for question in tests):
        raise ValueError(f"{testbed}: not MathVista's testmini.json")
    if wrong and not skip_missing:
        raise ValueError(f"{file} {testbed}: {dict(wrong)}; leave them out by --skip_missing 1")
    questions = [q for q in questions if q.image in checksums]     # whose picture can be opened
    tests = [q for q in tests if q.image in checksums]
    if testbed and not tests:
        raise ValueError(f"{testbed}: none of its pictures can be opened")
    tested = {checksums[q.image] for q in tests}
    usable = [q for q in questions if checksums[q.image] not in tested]
    splits = split_by_picture(usable, checksums, sizes, seed)
    used = sum(map(len, splits.values()))
    print(f"data      {file}: {used:,} questions are used, {len(questions) - len(usable):,} are on "
          f"pictures of the testbed, {len(usable) - used:,} are more than asked for or on pictures "
          f"of another split; wrong: {dict(wrong)}", flush=True)
    for task in TASKS:
        splits[task] = [q for q in tests if q.task == task]
    for split, size in sizes.items():
        least = 1 if size == math.inf else size                    # inf: all that there are
        if len(splits[split]) < least and split not in (*TESTBEDS, "base"):
            raise ValueError(f"{file}: {len(splits[split]):,} questions for the split {split}, and "
                             f"not {least:,}: ask for fewer (--test, --validation, --labeled)")
    return {split: some for split, some in splits.items() if some}

def split_by_picture(questions, checksums, sizes, seed):
    """{split: questions}: those whose ids name one, then the others by picture, in random order.
    ValueError: a picture in two named splits."""
    splits = {split: [] for split in SPLITS}
    split_of = {}                                                  # picture -> the named split
    by_picture = defaultdict(list)                                 # of all other questions
    for question in questions:
        split, picture = question.id.partition("/")[0], checksums[question.image]
        if split not in SPLITS:
            by_picture[picture].append(question)
        elif split_of.setdefault(picture, split) != split:
            raise ValueError(f"{question.id}: its picture is in the split {split_of[picture]}, too")
        else:
            splits[split].append(question)
    pictures = sorted(by_picture.keys() - split_of)                # none of a named split's
    pictures = random.Random(f"{seed}/files").sample(pictures, len(pictures))
    for split in ("test", "validation"):
        while len(splits[split]) < sizes.get(split, 0) and pictures:
            splits[split] += by_picture[pictures.pop()]
    for i, picture in enumerate(pictures):
        splits[("labeled", "unlabeled")[i % 2]] += by_picture[picture]
    return {split: some[:min(len(some), sizes.get(split, 0))] for split, some in splits.items()}

def read_files(file, images, testbed=""):
    """(questions of a file, those of a testbed, {path: checksum of the pixels} of their pictures, a
    Counter of what is wrong). Each picture is opened once, on all cores."""
    questions, wrong = read_questions(file, images)
    tests, wrong_tests = read_questions(testbed, images) if testbed else ([], {})
    wrong += Counter({f"{fault} of {testbed}": number for fault, number in wrong_tests.items()})

    def checksum(path):
        try:
            pixels = open_picture(path, images)
            # the height, too: equal bytes may be of another shape
            return hashlib.sha256(b"%d %b" % (len(pixels), pixels.tobytes())).digest()
        except OSError as error:
            return str(error)

    paths = sorted({question.image for question in questions + tests})     # each once
    with ThreadPoolExecutor() as pool:
        results = dict(zip(paths, pool.map(checksum, paths)))
    checksums = {path: result for path, result in results.items() if isinstance(result, bytes)}
    if bad := [result for result in results.values() if isinstance(result, str)]:
        wrong[f"pictures that cannot be opened (the first: {bad[0]})"] = len(bad)
    return questions, tests, checksums, wrong

def read_questions(file, images):
    """The questions of a file, with pictures in the folder `images`: MathV360K's (a JSON list, or
    a record per line of a .jsonl) or MathVista's testmini.json (a dict). Returns (list of Question,
    a Counter of what is wrong with the other records). OSError; ValueError: it is no JSON."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        if Path(file).suffix == ".jsonl":                          # a record per line
            text = "[" + ",\n".join(filter(str.strip, text.split("\n"))) + "]"
        records = json.loads(text)                                 # an error names the line
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if is_mathvista := isinstance(records, dict):
        records = list(records.values())
    if not isinstance(records, list) or is_mathvista and list in map(type, records):
        raise ValueError(f"{file}: neither a list of records nor MathVista's dict of them")
    questions, faults = [], defaultdict(list)                      # fault -> numbers of records
    for number, record in enumerate(records):
        try:
            question = (_of_mathvista if is_mathvista else _of_mathv360k)(record, images)
            (question.text + question.image + question.answer).encode()    # no half of a character
        except (KeyError, TypeError, AttributeError, IndexError, ValueError):
            faults["records of another shape"].append(number)
            continue
        if not question.answer:
            faults["records without an answer"].append(number)
        elif question.choices and not question.answer.isupper():
            faults["answers that are none of the choices"].append(number)
        else:
            questions.append(question)
    return questions, Counter({f"{fault} (the first: number {numbers[0]})": len(numbers)
                               for fault, numbers in faults.items()})

def _of_mathv360k(record, images):
    """{id, image, conversations: [{value: question, after "<image>", with hint and choices},
    {value: "The answer is B"}]}; the source is the first folder of the image's path."""
    image = record["image"]
    if isinstance(image, list):                                    # LLaVA
        image, = image                                             # ValueError: several pictures
    asked, said = [turn for turn in record["conversations"] if turn.get("from") != "system"][:2]
    text = asked["value"].replace("<image>", "").strip()
    listed = " ".join(text.partition("Choices:")[2].split())       # (A) 5 (B) 6, in lines or not
    lettered = re.findall(r"(?<!\S)\(([A-Z])\)(.*?)(?= \([A-Z]\)|$)", listed)
    choices = tuple(choice.strip() for _, choice in lettered)
    in_order = [letter for letter, _ in lettered] == [chr(65 + i) for i in range(len(lettered))]
    if not (in_order and all(choices)):                            # their texts are in the picture
        choices = ()
    gold = re.sub(r"^the answer is:?", "", said["value"].strip(), flags=re.I)
    source = image.split("/")[0].replace(" ", "_") if "/" in image else "unknown"
    return Question(str(record["id"]), source, "", text, normal_answer(gold, choices),
                    image=f"{images}/{image}", choices=choices)

HINTS = {                                      # MathVista's, by type of answer and precision
    "text": "and provide the correct option letter, e.g., A, B, C, D,",
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3,",
    "float1": "requiring a floating-point number with one decimal place and provide the final "
              "value, e.g., 1.2, 1.3, 1.4,",
    "float2": "requiring a floating-point number with two decimal places and provide the final "
              "value, e.g., 1.23, 1.34, 1.45,",
    "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
            "[1.2, 1.3, 1.4],"}

def _of_mathvista(record, images):
    """A record of testmini.json, asked in the order of its query.json (hint, question, unit,
    choices). Its gold answer is the text of the right choice; here it becomes its letter."""
    task = "".join(word[0] for word in record["metadata"]["task"].split()).upper()     # initials
    choices, gold = tuple(record["choices"] or ()), record["answer"]
    kind = record["answer_type"]
    if task not in TASKS or bool(choices) != (record["question_type"] == "multi_choice"):
        raise ValueError("another task, or choices, but not to choose from them")
    if kind == "float":
        kind += str(int(record["precision"]))
    text = f"Hint: Please answer the question {HINTS['text' if choices else kind]} at the end."
    text += f"\nQuestion: {record['question']}"
    if record["unit"]:
        text += f" (Unit: {record['unit']})"
    if choices:
        lettered = [f"({chr(65 + i)}) {choice}" for i, choice in enumerate(choices)]
        text += "\nChoices:\n" + "\n".join(lettered)
        gold = chr(65 + choices.index(gold))
    return Question(f"MathVista/{record['pid']}", task, "", text, normal_answer(gold, choices),
                    image=f"{images}/{record['image']}", choices=choices, record=record)

MARKUP = re.compile(r"(?<!\w)\*+|\*+(?!\w)|`+|\\boxed\{([^{}]*)\}")   # **5**, \boxed{5}, no 3*4

def normal_answer(text, choices=()):
    """One form for what means the same: with choices "(b).", "B. 5 cm" and the text of choice B ->
    "B" (the first of equal choices); "1,000" and "1000.0" -> "1000"; other text in lower case,
    without MARKUP: " Yes " -> "yes", "(b)" -> "b"."""
    def plain(text):
        text = MARKUP.sub(r"\1", text).strip() or text             # "*" may be a choice
        return " ".join(text.split()).rstrip(".。").strip("$ ")

    written, texts = plain(text), list(map(plain, choices))
    text, in_lower = written.lower(), [choice.lower() for choice in texts]
    letter = re.fullmatch(r"\(?([a-z])\)?|\(?([a-z])[).:].*", text)
    if letter and (letter[1] or text not in in_lower):             # "C. elegans" may be choice A
        number = ord(letter[1] or letter[2]) - ord("a")
        if number < len(choices):
            return chr(ord("A") + texts.index(texts[number]))
    for one, among in ((written, texts), (text, in_lower)):        # FF, Ff and ff are three choices
        if one in among:
            return chr(ord("A") + among.index(one))
    if re.fullmatch(r"[+-]?(\d{1,3}(,\d{3}){1,8}|\d{1,28})(\.\d*)?|[+-]?\.\d+", text, re.ASCII):
        return f"{Decimal(text.replace(',', '')).normalize():f}"
    return re.sub(r"^\((\w)\)$", r"\1", text)

def open_picture(path, images=None, size=None, longest=None):
    """The picture at `path`, (height, width, 3) uint8, transparent parts white: its longest side
    brought to `longest` (SmolVLM: 2048), then squashed to `size` x `size` (512), where they are
    given. As SmolVLM's processor does, it leaves turned photographs turned, and makes those of 16
    bits too bright. OSError: one that is missing, outside of `images`, broken, or too large."""
    try:
        if images and not Path(path).resolve().is_relative_to(Path(images).resolve()):
            raise ValueError(f"leads outside of {images} (by a link, or ..)")
        picture = Image.open(path).convert("RGBA")                 # bombs: Pillow's own limit
    except (OSError, ValueError, SyntaxError, RuntimeError, TypeError,    # of AVIF, of TIFF
            Image.DecompressionBombError) as error:
        raise OSError(f"{path}: {error}") from error
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    if longest:
        ratio = picture.width / picture.height
        shorter = int(longest / ratio if ratio >= 1 else longest * ratio)
        shorter = max(2, shorter + shorter % 2)                    # even, as their processor does
        sides = (longest, shorter) if ratio >= 1 else (shorter, longest)
        picture = picture.resize(sides, Image.LANCZOS)
    if size:                                   # LANCZOS: SmolVLM's way, BILINEAR: nanoVLM's
        picture = picture.resize((size, size), Image.LANCZOS if longest else Image.BILINEAR)
    return np.array(picture)

@lru_cache(maxsize=4096)                                           # 3 GB at 512 pixels
def picture_of(path, size):
    """A picture from a file as a policy of this image size sees it. SmolVLM, of 512 pixels, was
    trained on pictures that were first brought to 2048. OSError: as of open_picture."""
    return open_picture(path, size=size, longest=2048 if size == 512 else None)

def check_file(file, images, testbed=""):
    """Say what a file of questions holds and what is wrong with it: lines of text."""
    questions, tests, checksums, wrong = read_files(file, images, testbed)
    kinds = Counter()
    for question in questions:
        is_number = re.fullmatch(r"-?\d+(\.\d+|/\d+)?", question.answer)
        kinds["plain number" if is_number else "letter" if question.choices else "text"] += 1
    paths = {question.image for question in questions} & checksums.keys()
    pictures = {checksums[path] for path in paths}
    lines = [f"{len(questions):,} questions on {len(pictures):,} different pictures, "
             f"{len(paths) - len(pictures):,} files with the pixels of another; answers: "
             f"{dict(kinds.most_common())}"]
    sources = Counter(question.task for question in questions)
    lines += [f"  {source}: {n:,}" for source, n in sources.most_common()]
    lines += [f"wrong: {n:,} {what}" for what, n in wrong.items()]
    if testbed:
        shared = pictures & {checksums.get(question.image) for question in tests}
        lines.append(f"{testbed}: {len(tests):,} questions, {len(shared):,} of its pictures are "
                     "here")
    if questions:
        lines += [f"for example {questions[0].id}, {questions[0].image}:", questions[0].text,
                  f"gold answer: {questions[0].answer}"]
    return lines

# ---------------------------------------------------------------- tokenizer

class Tokenizer:
    """Words, numbers 0 .. 99 and signs of the world, one token each. `decode(encode(text)) == text`
    for texts with single spaces, none of them before punctuation or line breaks."""
    PAD, BOS, SEP, EOS = range(4)                                  # SEP: end of the prompt

    def __init__(self):
        words = {*COLOURS, *SHAPES, *map(_plural, SHAPES)}         # words of facts
        words |= set("highest lowest left middle right width height".split())
        words |= set("is answer describe calculate".split())
        for template in IN_DOMAIN:                                 # testbeds have no other words
            for wording in template.wordings:
                words |= set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", "", wording)))
        self.symbols = ["<pad>", "<bos>", "<sep>", "<eos>", "\n", *".,:?+-*=",
                        *map(str, range(LARGEST + 1)), *sorted(words)]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}  # the same, backwards
        self.breaks = {self.ids["\n"]}                             # tokens that end a step

    def __len__(self):
        return len(self.symbols)

    def encode(self, text):
        """Token ids of a text. ValueError names the first unknown symbol."""
        pieces = re.findall(r"\n|[a-z]+|\d+|[^\sa-z\d]", text)
        if unknown := [piece for piece in pieces if piece not in self.ids]:
            raise ValueError(f"unknown symbol {unknown[0]!r} in {text!r}")
        return [self.ids[piece] for piece in pieces]

    def decode(self, ids):
        """The text of token ids; <pad>, <bos>, <sep> and <eos> are left out."""
        text = " ".join(self.symbols[i] for i in ids if i > self.EOS)
        return re.sub(r" ?\n ?", "\n", re.sub(r" ([.,:?])", r"\1", text))

    def prompt(self, text, answer=None, direct=False):
        """Prompt ids of a question's text; with `answer`, the prompt of the paper's warm-up.
        `direct`, the answer alone, changes nothing: our base has no words for it."""
        if answer is not None:
            text = f"{text} the answer is {answer}."
        return [self.BOS, *self.encode(text), self.SEP]

    def response(self, text):
        """Response ids: the text and the end token."""
        return [*self.encode(text), self.EOS]

    def text_of(self, tokens):
        """The text of a response; of one that was cut off, too: a number is one token, so whole."""
        return self.decode(tokens)

    def step_ends(self, tokens):
        """Where the steps of a response end: at its line breaks and its last token."""
        last = len(tokens) - 1
        return [i for i, token in enumerate(tokens) if token in self.breaks or i == last]

    def steps(self, tokens):
        """The texts of a response's steps."""
        ends = [0, *(end + 1 for end in self.step_ends(tokens))]
        return [self.decode(tokens[start:end]) for start, end in zip(ends, ends[1:])]

# ---------------------------------------------------------------- contact sheet

def write_preview(path):
    """A contact sheet as PNG: a question of each template, and five of each testbed, with a
    reasoning text. OSError as of open(); ValueError: not the name of a picture."""
    world = build_world({**dict.fromkeys(TESTBEDS, 5), "test": 200})
    rows = {task: [] for task in TASKS}
    for question in {question.template: question for question in world["test"]}.values():
        rows[question.task].append(question)                       # one of each template
    rows |= {bed: world[bed] for bed in TESTBEDS}
    width, height = 300, 220                                       # of one question
    longest = max(map(len, rows.values()))
    sheet = Image.new("RGB", (longest * width, len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (name, questions) in enumerate(rows.items()):
        for x, question in enumerate(questions):
            left, top = x * width + 8, y * height + 8
            sheet.paste(Image.fromarray(render(question)), (left, top + 14))
            pen.rectangle((left - 1, top + 13, left + 128, top + 142), outline="gray")
            pen.text((left, top), f"{name} / {question.template}", fill="black")
            reasoning = write_reasoning(question, random.Random(question.id))
            pen.text((left + 136, top + 14), reasoning, fill="black", spacing=1)
            pen.text((left, top + 176), textwrap.fill(question.text, 44), fill=(0, 60, 160))
    sheet.save(path)

def main(argv=None):
    """Command line of this file: --preview FILE.png, or --check FILE --images DIR."""
    parser = argparse.ArgumentParser(description="The world of visual math: look at it.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preview", metavar="FILE.png",
                      help="write a contact sheet of all task types and testbeds")
    what.add_argument("--check", metavar="FILE", help="say what a file of questions holds: of "
                      "MathV360K (.json, .jsonl) or MathVista's testmini.json")
    parser.add_argument("--images", metavar="DIR", default=".", help="where its pictures are")
    parser.add_argument("--testbed", metavar="FILE", default="", help="count the pictures that are "
                        "in this file, too")
    parser.error = lambda message: parser.exit(2, f"data.py: {message}; see --help\n")
    flags = parser.parse_args(argv)
    try:
        if flags.check:
            print("\n".join(check_file(flags.check, flags.images, flags.testbed)))
        else:
            write_preview(flags.preview)
            print(f"wrote {flags.preview}")
    except (OSError, ValueError) as error:                         # a full disk, a folder's name
        name = "" if flags.check else f"{flags.preview}: "         # errors of --check name the file
        parser.exit(2, f"data.py: {name}{error}\n")

if __name__ == "__main__":
    main()
