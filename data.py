"""
data.py: a small world of visual math, with pictures, questions, written reasoning, an oracle, and a tokenizer.

Paper (arXiv 2412.17451v3): the place of MathV360K (training questions, half of them unlabeled) and of MathVista
    (out-of-domain test, task types FQA, GPS, MWP, TQA, VQA). Those need a pretrained 2-8B model; this world is learned
    from nothing in minutes, and its generator knows every fact of every picture.
Read:     drawing -> templates -> reasoning and oracle -> splits -> tokenizer   (bottom-up: parts first)
Departs:  questions are made from templates, answers are whole numbers from 1 to 99, pictures are 4 x 4 cells.
          The five task types keep MathVista's names; what is asked in each is our choice.
Run:      python data.py --preview FILE.png      (a contact sheet of all task types and testbeds)
"""
import argparse
import operator
import random
import re
import sys
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

TASKS = ("FQA", "GPS", "MWP", "TQA", "VQA")                        # MathVista's columns
TESTBEDS = ("style", "size", "layout", "compose", "wording")       # out of domain, one shift each
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
LARGEST = 99                                                       # every number ever written lies in 1 .. LARGEST


@dataclass(frozen=True)
class Question:
    """A question about one picture, with its gold answer. `drawing`, `facts` and `trees` are the generator's knowledge:
    they render the picture and feed the oracle. The policy only ever sees the picture and the text."""
    id: str              # split/number
    task: str            # one of TASKS
    template: str        # name of the function below that made it
    text: str
    answer: int
    drawing: tuple       # primitives, see `render`
    facts: dict          # everything that can be read off the picture: subject -> number
    trees: tuple         # equal-valued expressions that lead to the answer, see `write_reasoning`
    look: str = "plain"  # how it is drawn: plain, style or layout


# ---------------------------------------------------------------- drawing

COLOURS = {"red": (222, 45, 38), "blue": (40, 90, 215), "green": (50, 160, 70), "yellow": (245, 205, 45),
           "purple": (145, 60, 175), "orange": (245, 130, 30)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
FONT = {0: "75557", 1: "26227", 2: "71747", 3: "71717", 4: "55711", 5: "74717", 6: "74757", 7: "71122", 8: "75757", 9: "75717"}


@lru_cache(maxsize=None)
def _stamp(name, px, hollow):
    """(px, px) bool mask of a shape or digit in one cell. Shapes are drawn large and reduced, so that edges are even."""
    if name.isdigit():
        rows = [[int(octal) >> bit & 1 for bit in (2, 1, 0)] for octal in FONT[int(name)]]
        picture = Image.fromarray(np.array(rows, np.uint8) * 255).resize((px * 9 // 16, px * 14 // 16), Image.NEAREST)
        cell = Image.new("L", (px, px))
        cell.paste(picture, ((px - picture.width) // 2, (px - picture.height) // 2))
        return np.array(cell) > 127
    big = Image.new("L", (160, 160))
    pen = ImageDraw.Draw(big)
    paint = dict(fill=0 if hollow else 255, outline=255, width=26)
    if name == "circle":
        pen.ellipse((15, 15, 145, 145), **paint)
    elif name == "square":
        pen.rectangle((20, 20, 140, 140), **paint)
    elif name == "triangle":
        pen.polygon([(80, 10), (150, 145), (10, 145)], **paint)
    elif name == "star":
        spokes = [(80 + r * np.sin(k * np.pi / 5), 84 - r * np.cos(k * np.pi / 5)) for k, r in enumerate([76, 32] * 5)]
        pen.polygon(spokes, **paint)
    elif name == "heart":
        for x in (12, 72):
            pen.ellipse((x, 18, x + 76, 94), fill=255)
        pen.polygon([(14, 70), (146, 70), (80, 150)], fill=255)
        if hollow:
            pen.polygon([(45, 62), (115, 62), (80, 108)], fill=0)
    elif name == "cross":
        pen.rectangle((58, 12, 102, 148), fill=255)
        pen.rectangle((12, 58, 148, 102), fill=255)
        if hollow:
            pen.rectangle((68, 68, 92, 92), fill=0)
    return np.array(big.resize((px, px), Image.BOX)) > 110


def render(question, size=128):
    """Draw a question's picture: (size, size, 3) uint8. `size` must be a multiple of 64.

    Primitives, in cells of size/4 or units of size/64 pixels: ("bar", column, colour, height 1..9),
    ("rect", x, y, width, height, colour) on a grid of 8 x 8, ("shape", row, column, name, colour), ("item", row, column, name,
    colour, price 1..9): a small shape with its price beside it in one cell, ("cell", row, column, colour, value): a table cell.
    `look` "style" changes palette, background, line width and adds noise; "layout" shifts, rotates and rescales the whole.
    Both are random, but the same for the same question."""
    if size % 64:
        raise ValueError(f"image size {size} is not a multiple of 64")
    u, px = size // 64, size // 4
    chance = np.random.default_rng(int.from_bytes(repr(question.drawing).encode()[-400:], "big") % 2**32)
    styled = question.look == "style"
    tint = chance.integers(-28, 29, (len(COLOURS), 3)) if styled else np.zeros((len(COLOURS), 3), int)
    colours = {name: np.clip(np.array(rgb) + t, 0, 255) for (name, rgb), t in zip(COLOURS.items(), tint)}
    canvas = np.empty((size, size, 3), np.uint8)
    canvas[:] = chance.integers(225, 256, 3) if styled else 255
    ink = chance.integers(0, 70, 3) if styled else np.array((20, 20, 20))
    hollow = styled and bool(chance.random() < 0.5)
    kinds = {part[0] for part in question.drawing}
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
            row, column, name, colour = part
            canvas[row * px:(row + 1) * px, column * px:(column + 1) * px][_stamp(name, px, hollow)] = colours[colour]
        else:
            row, column, *_, value = part
            square = canvas[row * px:(row + 1) * px, column * px:(column + 1) * px]
            if kind == "item":
                square[:9 * u, :9 * u][_stamp(part[2], 9 * u, hollow)] = colours[part[3]]
                square[8 * u:, 8 * u:][_stamp(str(value), 8 * u, False)] = ink
            else:
                strength = (0.7, 0.45, 0.2)[column]                # a row fades from left to right
                square[u // 2:-u // 2, u // 2:-u // 2] = strength * colours[part[2]] + (1 - strength) * 255
                square[_stamp(str(value), px, False)] = ink
    if "bar" in kinds:
        canvas[size - 2 * u:size - u, :max(p[1] + 1 for p in question.drawing if p[0] == "bar") * px] = ink
    if styled:
        canvas = np.clip(canvas + chance.normal(0, 9, canvas.shape), 0, 255).astype(np.uint8)
    if question.look == "layout":
        zoom, angle = chance.uniform(0.86, 1.0), np.deg2rad(chance.uniform(-5, 5))
        cos, sin, middle = np.cos(angle) / zoom, np.sin(angle) / zoom, size / 2
        x, y = middle + chance.uniform(-3, 3, 2) * u               # where the middle of the drawing goes
        move = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
        canvas = np.array(Image.fromarray(canvas).transform((size, size), Image.AFFINE, move, Image.BILINEAR, fillcolor=(255,) * 3))
    return canvas


# ---------------------------------------------------------------- templates
# A template draws a scene and returns (drawing, facts, words for the question text, trees). A tree is an expression over
# facts (strings) and numbers of the question (ints); all trees of a question have the same value by different routes.

def _chart(rng, columns=4, first=0):
    colours = rng.sample(list(COLOURS), columns)
    facts = {colour: rng.randint(1, 9) for colour in colours}
    return [("bar", first + i, colour, facts[colour]) for i, colour in enumerate(colours)], facts


def bars_two_minus_one(rng):
    drawing, facts = _chart(rng)
    a, b, c = rng.sample(list(facts), 3)
    return drawing, facts, dict(a=a, b=b, c=c), [("-", ("+", a, b), c), ("+", ("-", a, c), b), ("+", a, ("-", b, c))]


def bars_total(rng):
    drawing, facts = _chart(rng)
    a, b, c, d = facts
    return drawing, facts, {}, [("+", ("+", ("+", a, b), c), d), ("+", ("+", a, b), ("+", c, d)), ("+", ("+", ("+", d, c), b), a)]


def bars_scaled(rng):
    drawing, facts = _chart(rng)
    (a, b), n = rng.sample(list(facts), 2), rng.randint(2, 5)
    return drawing, facts, dict(a=a, b=b, n=n), [("*", ("+", a, b), n), ("+", ("*", a, n), ("*", b, n))]


def bars_extreme(rng):
    drawing, facts = _chart(rng)
    end, n = rng.choice(["highest", "lowest"]), rng.randint(2, 9)
    facts |= {"highest": max(facts.values()), "lowest": min(facts.values())}
    return drawing, facts, dict(end=end, n=n), [("*", end, n)]


def bars_three_scaled(rng):                                        # size: a longer chain
    drawing, facts = _chart(rng)
    (a, b, c), n = rng.sample(list(facts), 3), rng.randint(2, 5)
    return drawing, facts, dict(a=a, b=b, c=c, n=n), [("*", ("+", ("+", a, b), c), n),
                                                      ("+", ("+", ("*", a, n), ("*", b, n)), ("*", c, n))]


def _rectangle(rng, sides=(1, 2, 3, 4), heights=(2, 3, 4, 5, 6, 7), columns=8):
    (a, b), (w, v), h = rng.sample(list(COLOURS), 2), (rng.choice(sides), rng.choice(sides)), rng.choice(heights)
    x, y = rng.randint(0, columns - w - v), rng.randint(0, 8 - h)
    return [("rect", x, y, w, h, a), ("rect", x + w, y, v, h, b)], {f"{a} width": w, f"{b} width": v, "height": h}, a, b


def area(rng):
    drawing, facts, a, b = _rectangle(rng)
    w, v = f"{a} width", f"{b} width"
    return drawing, facts, dict(a=a, b=b), [("*", ("+", w, v), "height"), ("+", ("*", w, "height"), ("*", v, "height"))]


def perimeter(rng):
    drawing, facts, a, b = _rectangle(rng)
    wide = ("+", f"{a} width", f"{b} width")
    return drawing, facts, dict(a=a, b=b), [("*", ("+", wide, "height"), 2), ("+", ("*", wide, 2), ("*", "height", 2))]


def area_difference(rng):
    drawing, facts, a, b = _rectangle(rng)
    w, v = f"{a} width", f"{b} width"
    return drawing, facts, dict(a=a, b=b), [("*", ("-", w, v), "height"), ("-", ("*", w, "height"), ("*", v, "height"))]


def tiled_area(rng):                                               # size: a longer chain
    drawing, facts, words, _ = area(rng)
    w, v = (f"{words[side]} width" for side in "ab")
    n = rng.randint(2, 5)
    return drawing, facts, words | dict(n=n), [("*", ("*", ("+", w, v), "height"), n), ("*", ("+", w, v), ("*", "height", n))]


def _tags(rng, items, places):
    shapes, spots = rng.sample(SHAPES, items), rng.sample(places, items)
    facts = {shape: rng.randint(2, 9) for shape in shapes}
    return [("item", *spot, shape, rng.choice(list(COLOURS)), facts[shape]) for shape, spot in zip(shapes, spots)], facts


def _cells(rows=range(4), columns=range(4)):
    return [(row, column) for row in rows for column in columns]


SHOP = _cells()                                                    # an item may hang anywhere


def _plural(shape):
    return shape + ("es" if shape == "cross" else "s")


def buy_two_kinds(rng):
    drawing, facts = _tags(rng, rng.randint(3, 4), SHOP)
    (a, b), n, m = rng.sample(list(facts), 2), rng.randint(2, 6), rng.randint(2, 6)
    return drawing, facts, dict(a=_plural(a), b=_plural(b), n=n, m=m), [("+", ("*", a, n), ("*", b, m)), ("+", ("*", b, m), ("*", a, n))]


def change(rng):
    drawing, facts = _tags(rng, rng.randint(3, 4), SHOP)
    (a, b), n, m = rng.sample(list(facts), 2), rng.randint(2, 6), rng.choice([30, 40, 50, 60, 70, 80, 90])
    return drawing, facts, dict(a=_plural(a), b=b, n=n, m=m), [("-", m, ("+", ("*", a, n), b)), ("-", ("-", m, ("*", a, n)), b),
                                                               ("-", ("-", m, b), ("*", a, n))]


def buy_each(rng):
    drawing, facts = _tags(rng, rng.randint(3, 4), SHOP)
    (a, b), n = rng.sample(list(facts), 2), rng.randint(2, 6)
    return drawing, facts, dict(a=a, b=b, n=n), [("*", ("+", a, b), n), ("+", ("*", a, n), ("*", b, n))]


def buy_difference(rng):
    drawing, facts = _tags(rng, rng.randint(3, 4), SHOP)
    (a, b), n = rng.sample(list(facts), 2), rng.randint(3, 9)
    return drawing, facts, dict(a=_plural(a), b=_plural(b), n=n), [("*", ("-", a, b), n), ("-", ("*", a, n), ("*", b, n))]


def buy_three_kinds(rng):                                          # size: more objects, a longer chain
    drawing, facts = _tags(rng, 6, SHOP)
    (a, b, c), n, m, k = rng.sample(list(facts), 3), rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 6)
    terms = [("*", a, n), ("*", b, m), ("*", c, k)]
    return (drawing, facts, dict(a=_plural(a), b=_plural(b), c=_plural(c), n=n, m=m, k=k),
            [("+", ("+", terms[0], terms[1]), terms[2]), ("+", terms[0], ("+", terms[1], terms[2]))])


def _table(rng):
    colours, columns, first = rng.sample(list(COLOURS), 3), ("left", "middle", "right"), rng.randint(0, 1)
    facts = {f"{colour} {column}": rng.randint(1, 9) for colour in colours for column in columns}
    drawing = [("cell", first + i, j, c, facts[f"{c} {s}"]) for i, c in enumerate(colours) for j, s in enumerate(columns)]
    return drawing, facts, colours, columns


def _sums(terms):
    a, b, c = terms
    return [("+", ("+", a, b), c), ("+", ("+", c, b), a), ("+", a, ("+", b, c))]


def row_total(rng):
    drawing, facts, colours, columns = _table(rng)
    r = rng.choice(colours)
    return drawing, facts, dict(r=r), _sums([f"{r} {column}" for column in columns])


def column_total(rng):
    drawing, facts, colours, columns = _table(rng)
    r = rng.choice(columns)
    return drawing, facts, dict(r=r), _sums([f"{colour} {r}" for colour in colours])


def multiply_add(rng):
    drawing, facts, *_ = _table(rng)
    a, b, c = rng.sample(list(facts), 3)
    return drawing, facts, dict(a=a, b=b, c=c), [("+", ("*", a, b), c), ("+", c, ("*", a, b))]


def two_rows_total(rng):                                           # size: twice as long a chain
    drawing, facts, colours, columns = _table(rng)
    r, s = rng.sample(colours, 2)
    red, blue = ([f"{colour} {column}" for column in columns] for colour in (r, s))
    return drawing, facts, dict(r=r, s=s), [("+", x, y) for x in _sums(red) for y in _sums(blue)]


def _scene(rng, colours, shapes, rows=range(4), columns=4):
    """Each row holds one group of equal objects; all (colour, shape) pairs differ, so a group can be named."""
    drawing, facts = [], {}
    for row, colour, shape in zip(rows, colours, shapes):
        places = rng.sample(range(columns), rng.randint(1, columns))
        drawing += [("shape", row, column, shape, colour) for column in sorted(places)]
        facts[f"{colour} {shape}"] = len(places)
    return drawing, facts


def colour_points(rng):
    (red, *others), shapes, n = rng.sample(list(COLOURS), 3), rng.sample(SHAPES, 4), rng.randint(2, 9)
    colours = rng.sample([red, red, *others], 4)
    drawing, facts = _scene(rng, colours, shapes)
    a, b = [group for group in facts if group.startswith(red)]
    return drawing, facts, dict(c=red, n=n), [("*", ("+", a, b), n), ("*", ("+", b, a), n), ("+", ("*", a, n), ("*", b, n))]


def shape_points(rng):
    shapes, n, m = rng.sample(SHAPES, 4), rng.randint(2, 9), rng.randint(2, 9)
    drawing, facts = _scene(rng, rng.choices(list(COLOURS), k=4), shapes)
    a, b = rng.sample(list(facts), 2)
    (_, s), (_, t) = a.split(), b.split()
    return drawing, facts, dict(a=s, b=t, n=n, m=m), [("+", ("*", a, n), ("*", b, m)), ("+", ("*", b, m), ("*", a, n))]


def not_colour(rng):
    (red, *others), shapes = rng.sample(list(COLOURS), 4), rng.sample(SHAPES, 4)
    drawing, facts = _scene(rng, rng.sample([red, *others], 4), shapes)
    return drawing, facts, dict(c=red), _sums([group for group in facts if not group.startswith(red)])


def three_points(rng):                                             # size: a longer chain
    shapes, (n, m, k) = rng.sample(SHAPES, 4), (rng.randint(2, 9) for _ in range(3))
    drawing, facts = _scene(rng, rng.choices(list(COLOURS), k=4), shapes)
    groups = rng.sample(list(facts), 3)
    words = dict(zip("abc", (group.split()[1] for group in groups)), n=n, m=m, k=k)
    return drawing, facts, words, _sums([("*", group, points) for group, points in zip(groups, (n, m, k))])


RIGHT = _cells(columns=(2, 3))                                     # compose: the right half is a shop


def bars_priced(rng):
    drawing, facts = _chart(rng, columns=2)
    a, b = facts
    tags, prices = _tags(rng, 2, RIGHT)
    p = rng.choice(list(prices))
    return drawing + tags, facts | prices, dict(a=a, b=b, p=p), [("*", ("+", a, b), p), ("+", ("*", a, p), ("*", b, p))]


def area_and_price(rng):
    drawing, facts, a, b = _rectangle(rng, sides=(1, 2), columns=4)
    tags, prices = _tags(rng, 2, RIGHT)
    p = rng.choice(list(prices))
    return drawing + tags, facts | prices, dict(a=a, p=p), [("+", ("*", f"{a} width", "height"), p), ("+", p, ("*", f"{a} width", "height"))]


def groups_priced(rng):
    shapes = rng.sample(SHAPES, 2)
    drawing, facts = _scene(rng, rng.sample(list(COLOURS), 2), shapes, rows=range(2))
    a, b = facts
    tags, prices = _tags(rng, 2, _cells(rows=(2, 3)))
    p = rng.choice(list(prices))
    return drawing + tags, facts | prices, dict(a=a.split()[0], b=b.split()[0], p=p), [("*", ("+", a, b), p), ("+", ("*", a, p), ("*", b, p))]


# (task, template, wordings): the last wording is kept for the `wording` testbed, the others are used everywhere else.
# Testbed wordings are new sentences from known words.
IN_DOMAIN = (
    ("FQA", bars_two_minus_one, ("how much are {a} and {b} together minus {c}?", "add {a} and {b}, then take away {c}.",
                                 "what is {a} plus {b} minus {c}?", "take {c} away from {a} and {b} together.")),
    ("FQA", bars_total, ("what is the total of all bars?", "how much are all bars together?", "add all the bars.",
                         "all bars together, what is the total?")),
    ("FQA", bars_scaled, ("each unit is {n} cars. how many cars are {a} and {b} together?", "how many cars are {a} and {b} with {n} cars for each unit?",
                          "a unit is {n} cars. add the cars of {a} and {b}.", "add {a} and {b}, {n} cars for each unit.")),
    ("FQA", bars_extreme, ("what is {n} times the {end} bar?", "multiply the {end} bar by {n}.", "how much is the {end} bar times {n}?",
                           "take the {end} bar {n} times.")),
    ("GPS", area, ("what is the area of the whole rectangle?", "how many squares fill the whole rectangle?", "find the area of {a} and {b} together.",
                   "{a} and {b} together fill how many squares?")),
    ("GPS", perimeter, ("what is the perimeter of the whole rectangle?", "how long is the line around the rectangle?",
                        "find the perimeter of {a} and {b} together.", "how long is the line around {a} and {b} together?")),
    ("GPS", area_difference, ("how much larger is the area of {a} than {b}?", "how many more squares fill {a} than {b}?",
                              "take the area of {b} away from the area of {a}.", "what is the area of {a} minus the area of {b}?")),
    ("MWP", buy_two_kinds, ("what do {n} {a} and {m} {b} cost?", "you buy {n} {a} and {m} {b}. how much do you pay?",
                            "find the cost of {n} {a} and {m} {b}.", "how much do you pay for {n} {a} and {m} {b} together?")),
    ("MWP", change, ("you have {m} and buy {n} {a} and one {b}. how much is left?", "you pay {m} for {n} {a} and one {b}. what is the change?",
                     "from {m} you buy one {b} and {n} {a}. find the change.", "what is left from {m} for one {b} and {n} {a}?")),
    ("MWP", buy_each, ("what do {n} of each {a} and {b} cost?", "you buy {n} of each {a} and {b}. how much do you pay?",
                       "find the cost of one {a} and one {b}, {n} times.", "how much do you pay for {n} of each {a} and {b}?")),
    ("MWP", buy_difference, ("how much more do {n} {a} cost than {n} {b}?", "take the cost of {n} {b} away from {n} {a}.",
                             "find how much more you pay for {n} {a} than for {n} {b}.", "what is the cost of {n} {a} minus the cost of {n} {b}?")),
    ("TQA", row_total, ("what is the total of the {r} row?", "add the numbers in the {r} row.", "how much is the {r} row together?",
                        "find the total of all numbers in the {r} row.")),
    ("TQA", column_total, ("what is the total of the {r} column?", "add the numbers in the {r} column.", "how much is the {r} column together?",
                           "find the total of all numbers in the {r} column.")),
    ("TQA", multiply_add, ("multiply {a} by {b}, then add {c}.", "what is {a} times {b} plus {c}?", "find {a} times {b}, then add {c}.",
                           "how much is {c} plus {a} times {b}?")),
    ("VQA", colour_points, ("each {c} shape is {n} points. how many points are there?", "how many points are the {c} shapes, {n} for each?",
                            "find the points of the {c} shapes with {n} for each.", "how many points are {c} shapes with {n} points each?")),
    ("VQA", shape_points, ("a {a} is {n} points and a {b} is {m}. how many points are there?", "find the points with {n} for each {a} and {m} for each {b}.",
                           "each {a} is {n} and each {b} is {m}. what is the total?", "how many points are there with {n} for a {a} and {m} for a {b}?")),
    ("VQA", not_colour, ("how many shapes are not {c}?", "add all shapes that are not {c}.", "find the total of shapes that are not {c}.",
                         "what is the total of all shapes, not the {c}?")),
)
SIZE = (
    ("FQA", bars_three_scaled, ("each unit is {n} cars. how many cars are {a} and {b} and {c} together?", "")),
    ("GPS", tiled_area, ("what is {n} times the area of the whole rectangle?", "")),
    ("MWP", buy_three_kinds, ("what do {n} {a} and {m} {b} and {k} {c} cost?", "")),
    ("TQA", two_rows_total, ("what is the total of the {r} row and the {s} row?", "")),
    ("VQA", three_points, ("a {a} is {n} points and a {b} is {m} and a {c} is {k}. how many points are there?", "")),
)
COMPOSE = (                                                        # two hops, each in another task type; filed under the first
    ("FQA", bars_priced, ("for each unit of {a} and {b} you pay one {p}. how much do you pay?", "")),
    ("GPS", area_and_price, ("what is the area of {a} plus the cost of one {p}?", "")),
    ("VQA", groups_priced, ("you pay one {p} for each {a} and {b} shape. how much do you pay?", "")),
)


# ---------------------------------------------------------------- reasoning and oracle

def _value(tree, facts):
    """The tree's value, or None when a partial result leaves 1 .. LARGEST."""
    if not isinstance(tree, tuple):
        return facts.get(tree, tree)
    left, right = (_value(branch, facts) for branch in tree[1:])
    result = None if left is None or right is None else OPERATIONS[tree[0]](left, right)
    return result if result is not None and 1 <= result <= LARGEST else None


def _leaves(tree):
    return [tree] if not isinstance(tree, tuple) else _leaves(tree[1]) + _leaves(tree[2])


def write_reasoning(question, rng):
    """One true reasoning text, by a route drawn with `rng` (random.Random): any of the question's trees, with all readings
    first or each when it is needed. One reading or one operation per line; the last line is "answer: N"."""
    lines = []

    def read(subject):
        if subject in ("highest", "lowest"):                       # needs every bar, in any order
            for bar in rng.sample(sorted(question.facts.keys() - {"highest", "lowest"}), len(question.facts) - 2):
                read(bar)
        line = f"{subject} is {question.facts[subject]}"
        if line not in lines:
            lines.append(line)

    def work_out(tree):
        if isinstance(tree, int):
            return tree
        if isinstance(tree, str):
            read(tree)
            return question.facts[tree]
        left, right = work_out(tree[1]), work_out(tree[2])
        result = OPERATIONS[tree[0]](left, right)
        lines.append(f"{left} {tree[0]} {right} = {result}")
        return result

    tree = rng.choice(question.trees)
    if rng.random() < 0.5:
        subjects = [leaf for leaf in _leaves(tree) if isinstance(leaf, str)]
        for subject in rng.sample(subjects, len(subjects)):
            read(subject)
    answer = work_out(tree)
    return "\n".join([*lines, f"answer: {answer}"])


def write_caption(question, rng):
    """Up to four things that can be read off the picture, in random order, worded like the readings of a reasoning text."""
    return "\n".join(f"{subject} is {question.facts[subject]}" for subject in rng.sample(sorted(question.facts), min(4, len(question.facts))))


READING, OPERATION, ANSWER = (re.compile(p) for p in (r"(.+) is (\d+)", r"(\d+) ([+*-]) (\d+) = (\d+)", r"answer: (\d+)"))


def oracle(question, text):
    """True or false for each line of a written text (list of bool). For audits, tests and upper bounds, never for training.

    A reading is true if the picture shows it. An operation is true if it is right and both its numbers come from somewhere:
    from the question or an earlier line (be that line true or false: an error is charged to the line that makes it).
    The answer line is true if it names the gold answer and an earlier line has worked it out. Anything else is false."""
    known = {leaf for tree in question.trees for leaf in _leaves(tree) if isinstance(leaf, int)}
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

def _make(rng, kind, id, look="plain", unseen_wording=False):
    """One question of `kind` = (task, template, wordings); scenes without a route inside 1 .. LARGEST are drawn again."""
    task, template, wordings = kind
    while True:
        drawing, facts, words, trees = template(rng)
        trees = tuple(tree for tree in trees if _value(tree, facts) is not None)
        if trees:
            wording = wordings[-1] if unseen_wording else rng.choice(wordings[:-1])
            return Question(id, task, template.__name__, wording.format(**words), _value(trees[0], facts), tuple(drawing), facts, trees, look)


def build_world(sizes, seed=0):
    """Make all splits: {name: list of Question}. `sizes` maps split names to numbers of questions, for example
    {"base": 8000, "labeled": 2000, "unlabeled": 2000, "validation": 250, "test": 750, "style": 250, ...}.

    No two questions of any split share a picture. Splits are made in a fixed order, tests first, each from its own random
    stream, so that the test questions stay the same whatever the sizes of the training splits. Task types take turns."""
    seen, world = set(), {}
    order = ("test", "validation", *TESTBEDS, "labeled", "unlabeled", "base")
    if unknown := sizes.keys() - set(order):
        raise ValueError(f"unknown split {sorted(unknown)[0]!r}; known: {', '.join(order)}")
    for split in order:
        rng = random.Random(f"{seed}/{split}")
        kinds = {"size": SIZE, "compose": COMPOSE}.get(split, IN_DOMAIN)
        by_task = [[kind for kind in kinds if kind[0] == task] for task in TASKS]
        by_task = [group for group in by_task if group]
        questions = world[split] = []
        while len(questions) < sizes.get(split, 0):
            number = len(questions)
            kind = rng.choice(by_task[number % len(by_task)])
            question = _make(rng, kind, f"{split}/{number}", split if split in ("style", "layout") else "plain", split == "wording")
            if question.drawing not in seen:
                seen.add(question.drawing)
                questions.append(question)
    return world


# ---------------------------------------------------------------- tokenizer

class Tokenizer:
    """Words, numbers 0 .. 99 and signs of the world, one token each. `decode(encode(text)) == text` for every text that
    `encode` accepts: single spaces between words, none before punctuation, none around a line break."""
    PAD, BOS, SEP, EOS = range(4)                                  # padding, begin, end of prompt, end of response

    def __init__(self):
        wordings = " ".join(w for group in (IN_DOMAIN, SIZE, COMPOSE) for _, _, ws in group for w in ws)
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
    """A contact sheet as PNG: two questions of each task type and of each testbed, with question, one reasoning text and answer."""
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
    args = parser.parse_args(argv)
    path = Path(args.preview)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        parser.exit(2, f"data.py: --preview {path}: give a file name that ends in .png, in a folder that exists\n")
    write_preview(path, args.seed)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
