"""Grade-school math problems (iGSM, arXiv 2407.20311) with solutions, word by word, modulo 23.

    python data/igsm/prepare.py --setting=paper --max_op=12    the easier task of the paper
    python data/igsm/prepare.py --setting=full --max_op=15     closer to iGSM itself

Each document is a problem and its solution, here of --setting=full with 5 operations:

    Basket Notebook equals 22 . Backpack Stapler equals Basket Notebook . Basket Crayon equals
    Backpack Things . How many Things does Basket have ? Solution : Basket Notebook : u = 22 .
    Backpack Stapler : b = u = 22 . Backpack Things : Y = b = 22 . Basket Crayon : X = Y = 22 .
    Basket Things : P = X + u = 22 + 22 = 21 . Answer 21 .

paper: independent categories; every quantity is stated and solved. full: layers of items, where an
"each" quantity counts items of the next layer, and quantities of a whole category are not stated
but follow from those; the solution has only what is needed. A problem with n operations has n
equations. Solutions whose template (letters in order, names and numbers left out) has a hash in
the last six of 23 classes are val: no template is in both splits.
"""

import hashlib
import itertools
import math
import operator
import random
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_letters
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import parse, run
from data import FOLDER
from data.tokenizing import Job, write_corpus

CHAIN = {  # category -> its items: each item contains items of the next category
    "Schools": "North South Hill River Lake Forest".split(),
    "Rooms": "Studio Library Workshop Kitchen Hall Gym".split(),
    "Bags": "Backpack Suitcase Basket Satchel Trunk Pouch".split(),
    "Things": "Pen Ruler Eraser Notebook Stapler Crayon".split()}
CATEGORY = {item: category for category, items in CHAIN.items() for item in items}
WORDS = ["<end>", *CHAIN, *CATEGORY, *ascii_letters, *map(str, range(23)), *"=+-*.;,?:", *(
    "equals more less than times the sum difference product of and How many does have Solution "
    "Answer").split()]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
JOB_SIZE = 10_000  # problems


@dataclass
class PrepareConfig:
    setting: Literal["paper", "full"] = "paper"  # kind of problem
    max_op: int = 12  # most operations of a problem
    problems: int = 200_000  # number of problems
    seed: int = 0  # of the random draws
    name: str = "igsm"  # the corpus is written to data/NAME
    workers: int = 0  # processes; 0: one for each core

    def __post_init__(self):
        if not 4 <= self.max_op <= 24:
            raise ValueError(f"max_op={self.max_op} must be in [4, 24]")
        if self.problems < 1000 or self.seed < 0:
            raise ValueError("problems must be at least 1000, and seed not negative")


def main():
    c = parse(PrepareConfig)
    options = {"setting": c.setting, "max_op": c.max_op, "problems": c.problems, "seed": c.seed}
    jobs = [Job(min(JOB_SIZE, c.problems - i), partial(read, c, i))
            for i in range(0, c.problems, JOB_SIZE)]
    write_corpus(FOLDER / c.name, {"kind": "words", "words": WORDS}, options, jobs, c.workers)


def read(c: PrepareConfig, first: int):
    rng = random.Random(f"{c.seed} {first}")
    for _ in range(min(JOB_SIZE, c.problems - first)):
        problem, solution = draw_problem(rng, c.setting, 1, c.max_op)
        yield template_split(solution), f"{problem} {solution}".encode(), True


def draw_problem(rng, setting: str, min_op: int, max_op: int) -> tuple[str, str]:
    """A problem and its solution, with min_op to max_op operations."""
    while True:
        stated, derived, asked = (draw_paper if setting == "paper" else draw_full)(rng, max_op)
        solution, n_op = solve(rng, stated | derived, asked, setting == "paper")
        if min_op <= n_op <= max_op:
            sentences = [f"{name} equals {in_words(formula)} ." for name, formula in stated.items()]
            rng.shuffle(sentences)
            owner, item = asked.split()
            return f"{' '.join(sentences)} How many {item} does {owner} have ?", solution


# A formula is a number, a name such as "North Library", or (operation, formula, formula, ...).


def draw_paper(rng, max_op: int):
    """Formulas by name: four categories, one quantity per item, 0 to 3 inputs drawn before it."""
    sizes = [1] * 4
    for _ in range(rng.randint(0, min(max_op, 24) - 4)):
        sizes[rng.choice([i for i, size in enumerate(sizes) if size < 6])] += 1
    names = [f"{category} {item}" for category, size in zip(CHAIN, sizes, strict=True)
             for item in rng.sample(CHAIN[category], size)]
    rng.shuffle(names)
    stated = {}
    for i, name in enumerate(names):
        inputs = rng.sample(names[:i], min(i, rng.randint(0, 3)))
        number, op = rng.randint(1, 22), rng.choice("+-*")
        if len(inputs) == 1:
            inputs = [*inputs, number] if op == "-" else [number, *inputs]
        stated[name] = (op, *inputs) if inputs else number
    return stated, {}, names[-1]


def draw_full(rng, max_op: int):
    """Formulas by name, stated and derived ones, and the quantity to ask for."""
    n_layers = rng.randint(2, 4)
    first = rng.randint(0, 4 - n_layers)
    categories = list(CHAIN)[first : first + n_layers]
    layers = [rng.sample(CHAIN[category], rng.randint(2, 4)) for category in categories]
    edges = [(rng.choice(above), item) for above, below in itertools.pairwise(layers)
             for item in below]
    others = [(a, b) for above, below in itertools.pairwise(layers)
              for a in above for b in below if (a, b) not in edges]
    edges += rng.sample(others, rng.randint(0, len(others) // 2))
    derived = derived_formulas(edges)
    rng.shuffle(edges)
    stated, available, unused = {}, [], set()
    for owner, item in edges:
        inputs = rng.sample(available, min(len(available), rng.randint(0, 3)))
        if inputs and unused and not unused & {*inputs}:
            inputs[0] = rng.choice(sorted(unused))
        unused -= {*inputs}
        formula = (inputs[0] if len(inputs) == 1 else
                   (rng.choice("+-") if len(inputs) == 2 else "+", *inputs))
        if not inputs:
            formula = rng.randint(0, 22)
        elif rng.random() < 0.5:
            formula = (rng.choice("+*"), rng.randint(0, 22), formula)
        stated[f"{owner} {item}"] = formula
        ready = [name for name, f in derived.items() if name not in available
                 and needed(f) <= {*stated, *available}]
        available += [f"{owner} {item}", *ready]
        unused |= {f"{owner} {item}", *ready}
    return stated, derived, available[-1]


def derived_formulas(edges) -> dict:
    """"A Category" counts all items of a category inside A: the sum over the items B in A, of
    "A B" in the next category, of "A B" times "B Category" in deeper ones. Deepest owners first."""
    order, derived = list(CHAIN), {}
    for owner in sorted({a for a, _ in edges}, key=lambda a: -order.index(CATEGORY[a])):
        inside = sorted(b for a, b in edges if a == owner)
        derived[f"{owner} {CATEGORY[inside[0]]}"] = ("+", *(f"{owner} {b}" for b in inside))
        for category in order[order.index(CATEGORY[owner]) + 2 :]:
            terms = [("*", f"{owner} {b}", f"{b} {category}") for b in inside
                     if f"{b} {category}" in derived]
            if terms:
                derived[f"{owner} {category}"] = ("+", *terms)
    return derived


def needed(formula) -> set[str]:
    if isinstance(formula, tuple):
        return set().union(*map(needed, formula[1:]))
    return {formula} if isinstance(formula, str) else set()


def in_words(formula) -> str:
    if not isinstance(formula, tuple):
        return str(formula)
    op, *inputs = formula
    if isinstance(inputs[0], int):
        return f"{inputs[0]} {'more than' if op == '+' else 'times'} {in_words(inputs[1])}"
    if isinstance(inputs[-1], int):
        return f"{inputs[1]} less than {inputs[0]}"
    kind = {"+": "sum", "-": "difference", "*": "product"}[op]
    return f"the {kind} of {' , '.join(inputs[:-1])} and {inputs[-1]}"


def solve(rng, formulas: dict, asked: str, everything: bool) -> tuple[str, int]:
    """The solution in words, and its number of equations. Everything, or only what is needed."""
    letters, known = itertools.cycle(rng.sample(ascii_letters, 52)), {}  # known: letter and value
    parts, n_op = [], 0

    def compute(formula, equations):
        if not isinstance(formula, tuple):
            return known.get(formula) or (str(formula), formula)
        op, first, *others = formula
        letter, value = compute(first, equations)
        for a, v in (compute(other, equations) for other in others):
            result = OPERATIONS[op](value, v) % 23
            new = next(letters)
            equations.append(f"{new} = {letter} {op} {a} = {value} {op} {v} = {result}")
            letter, value = new, result
        return letter, value

    def define(name):
        nonlocal n_op
        if name in known:
            return
        for other in sorted(needed(formulas[name])):
            define(other)
        equations = []
        letter, value = compute(formulas[name], equations)
        if not equations:  # a number, or another quantity
            new = next(letters)
            equations = [f"{new} = {value}" if letter.isdigit() else f"{new} = {letter} = {value}"]
            letter = new
        known[name] = letter, value
        parts.append(f"{name} : {' ; '.join(equations)} .")
        n_op += len(equations)

    for name in formulas if everything else [asked]:
        define(name)
    return f"Solution : {' '.join(parts)} Answer {known[asked][1]} .", n_op


def template_split(solution: str) -> str:
    """train or val, by the solution without names and numbers, its letters in order of use."""
    order = {}
    words = re.sub(r"[A-Z]\w+ [A-Z]\w+ :|\d+", "_", solution).split()
    words = [order.setdefault(word, f"x{len(order)}") if len(word) == 1 and word.isalpha() else word
             for word in words]
    digest = hashlib.sha256(" ".join(words).encode()).digest()
    return "train" if int.from_bytes(digest[:8], "big") % 23 < 17 else "val"


# --- grading


def grade(problem: str, solution: str) -> tuple[bool, bool]:
    """Whether the answer is right, and whether all of the solution is, by the problem's words."""
    *sentences, question = problem.split(" . ")
    stated = dict(sentence.split(" equals ") for sentence in sentences)
    item, owner = re.fullmatch(r"How many (\w+) does (\w+) have \?", question).groups()

    def value(name):
        if name in stated:
            return evaluate(stated[name])
        owner, category = name.split()  # derived: through the items inside the owner
        total = 0
        for b in [other.split()[1] for other in stated if other.split()[0] == owner]:
            n = 1 if CATEGORY[b] == category else value(f"{b} {category}")
            if n:  # else the number of b is not needed, and may depend on this one
                total += n * value(f"{owner} {b}")
        return total % 23

    def evaluate(words):
        if match := re.fullmatch(r"(\d+) (more than|less than|times) (.*)", words):
            n, x = int(match[1]), evaluate(match[3])
            return {"more than": n + x, "less than": x - n, "times": n * x}[match[2]] % 23
        if match := re.fullmatch(r"the (\w+) of (.*)", words):
            first, *others = map(value, re.split(" , | and ", match[2]))
            return {"sum": first + sum(others), "difference": first - sum(others),
                    "product": first * math.prod(others)}[match[1]] % 23
        return int(words) if words.isdigit() else value(words)

    answer = str(value(f"{owner} {item}"))
    right, letters = solution.endswith(f" Answer {answer} ."), {}
    try:
        for part in solution.removeprefix("Solution : ").split(" . ")[:-1]:
            name, equations = part.split(" : ")
            for equation in equations.split(" ; "):
                letter, *sides, result = equation.split(" = ")
                for side in sides:
                    numbers = [int(letters.get(word, word)) for word in side.split()[::2]]
                    n = OPERATIONS[side.split()[1]](*numbers) if len(numbers) == 2 else numbers[0]
                    if n % 23 != int(result):
                        return right, False
                letters[letter] = result
            if int(result) != value(name):
                return right, False
    except (ValueError, LookupError):  # the words make no solution
        return right, False
    return right, right


if __name__ == "__main__":
    run(main)
