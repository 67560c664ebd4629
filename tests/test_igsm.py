"""data/igsm and experiments/igsm.py: right solutions, a grader that finds errors, unseen tests."""

import random
import re

from data.igsm import prepare as igsm
from experiments import igsm as experiment

import pytest
from conftest import texts


@pytest.mark.parametrize("setting", ["paper", "full"])
def test_the_grader_agrees_with_every_generated_solution_and_finds_every_changed_number(setting):
    rng = random.Random(0)
    for _ in range(400):
        n_op = rng.randint(4, 15)
        problem, solution = igsm.draw_problem(rng, setting, n_op, n_op)
        assert igsm.grade(problem, solution) == (True, True)
        head, answer = solution.rsplit(" Answer ")
        numbers = [*re.finditer(r"(?<== )\d+(?= [;.])", head)]
        assert len(numbers) == n_op
        changed = rng.choice(numbers)
        wrong = str((int(changed[0]) + 1) % 23)
        head = head[: changed.start()] + wrong + head[changed.end() :]
        assert igsm.grade(problem, f"{head} Answer {answer}") == (True, False)
        wrong = str((int(answer.split()[0]) + 1) % 23)
        assert igsm.grade(problem, solution.rsplit(" ", 2)[0] + f" {wrong} .") == (False, False)
    assert igsm.grade(problem, "Solution : no . Answer .") == (False, False)


def test_the_same_seed_gives_the_same_problems_and_no_template_is_in_both_splits(tmp_path, call):
    options = ["--problems=1000", "--max_op=6", "--workers=1"]
    for name in ("a", "b"):
        call(igsm.main, *options, f"--name={tmp_path / name}")
    assert texts(tmp_path / "a") == texts(tmp_path / "b")
    train, val = ([document.split("? ")[1].strip() for document in text.split("<end>")
                   if "?" in document] for text in texts(tmp_path / "a"))
    assert 600 < len(train) < 850 and len(train) + len(val) == 1000
    assert {igsm.template_split(s) for s in train} == {"train"}
    assert {igsm.template_split(s) for s in val} == {"val"}


def test_a_model_that_knows_its_problems_is_graded_as_right(tmp_path, call, fit, monkeypatch):
    rng = random.Random(1)
    pairs = [igsm.draw_problem(rng, "paper", 4, 4) for _ in range(4)]
    monkeypatch.setattr(igsm, "draw_problem", lambda *args: rng.choice(pairs))
    monkeypatch.setattr(igsm, "template_split",
                        lambda solution: rng.choice(["train", "train", "val"]))
    call(igsm.main, "--problems=1000", "--max_op=4", "--workers=1", f"--name={tmp_path / 'data'}")
    fit(tmp_path / "run", dataset=tmp_path / "data", n_layer=1, n_embd=64, block_size=128,
        dropout=0, batch_size=8, max_steps=150, learning_rate=1e-2, lr_schedule="cosine",
        eval_every=150, checkpoint_every=150)
    monkeypatch.setattr(experiment, "draw_problem", lambda *args: pairs[args[0].randrange(4)])
    monkeypatch.setattr(experiment, "template_split", lambda solution: "val")
    arguments = [tmp_path / "run", "--problems=8", "--beyond=0", f"--results={tmp_path}/results",
                 f"--out={tmp_path}/a.png"]
    out, _ = call(experiment.main, *arguments)
    assert "4 operations: answers 100%, solutions 100%" in out and (tmp_path / "a.png").exists()
    again, _ = call(experiment.main, *arguments)
    assert "operations:" not in again and "| kv_shift=kv, answers" in again  # from the results


def test_bad_options_are_one_line_and_exit_code_2(call):
    call(igsm.main, "--max_op=3", error="max_op=3 must be in [4, 24]")
    call(igsm.main, "--problems=1", error="problems must be at least 1000")
