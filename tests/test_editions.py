"""The journey: a learner's edition runs unfilled with kind stubs, and filled with the solutions, notebook by notebook in fresh interpreters."""
from pathlib import Path

import pytest

from ardm_course.checks import exercises_of
from ardm_course.core import CourseError
from ardm_course.editions import (cell, count, course_table, exercise_cells, filled, instructor, learner, make_editions, number_of, read_notebook, run_notebook, section, tags,
                                  text, with_exercises, write_notebook)

ROOT = Path(__file__).parent.parent
NUMBERED = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
OTHERS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if path not in NUMBERED and ".ipynb_checkpoints" not in path.parts)


def learners(path, tmp_path, fill):
    "The learner's edition of one notebook, in a folder that stands beside the data like nbs/."
    notebook, number = learner(read_notebook(path)), number_of(path)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "data").symlink_to(ROOT / "data")
    write_notebook(tmp_path / "nbs" / path.name, filled(notebook, number) if fill else notebook)
    return tmp_path / "nbs" / path.name


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_filled_with_the_solutions_it_passes(path, tmp_path):
    run_notebook(learners(path, tmp_path, fill=True), ROOT)


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_unfilled_only_the_stubs_fail_kindly(path, tmp_path):
    run_notebook(learners(path, tmp_path, fill=False), ROOT)


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.relative_to(ROOT / "nbs").with_suffix("").as_posix())
def test_the_other_notebooks_run(path):
    run_notebook(path.relative_to(ROOT), ROOT)


def test_editions(tmp_path):
    make_editions(tmp_path, ROOT / "nbs")
    mine, theirs = tmp_path / "learner", tmp_path / "instructor"
    assert (mine / "00b_checks.ipynb").exists() and not (mine / "exercises").exists() and (theirs / "exercises" / "00b_checks.ipynb").exists()
    for path in mine.glob("[0-9]*.ipynb"):
        cells = read_notebook(path)["cells"]
        assert not any("solution" in tags(cell) for cell in cells), path.name
        assert not any(cell.get("outputs") for cell in cells if {"stub", "check", "listen"} & set(tags(cell))), path.name
        assert sum("stub" in tags(cell) for cell in cells) == len(exercises_of(number_of(path))), path.name
    solved = read_notebook(theirs / "00b_checks.ipynb")["cells"]
    assert not any(cell["metadata"].get("jupyter") for cell in solved) and sum("instructor" in tags(cell) for cell in solved) == len(exercises_of("00b"))


def test_an_authors_cells_survive_and_outputs_stay():
    draft = {"cells": [cell("## Exercises\n\nRead.", kind="markdown"), cell("mine"), cell("## Recap", kind="markdown")]}
    once = with_exercises(draft, "00b")
    place = next(place for place, part in enumerate(once["cells"]) if "check" in tags(part))
    once["cells"][place]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["kept"]}]
    again = with_exercises(once, "00b")
    assert again == once and text(again["cells"][1]) == "mine" and with_exercises(draft, "99")["cells"] == draft["cells"]
    with pytest.raises(CourseError, match="## Exercises"): section([cell("## Why", kind="markdown")], "Exercises")


def test_listen_cell_runs_only_after_a_pass():
    exercise = exercises_of("00b")[0]
    heard = exercise_cells(type(exercise)(**{**vars(exercise), "listen": "with use(human=close):\n    play(1)"}))
    assert text(heard[-1]).splitlines()[0].startswith("if answer:") and text(heard[-1]).splitlines()[2] == "        play(1)"


def test_instructor_note_names_the_mistakes():
    full = with_exercises({"cells": [cell("## Exercises", kind="markdown")]}, "00b")
    notes = [text(part) for part in instructor(full, "00b")["cells"] if "instructor" in tags(part)]
    assert len(notes) == len(exercises_of("00b")) and all(mistake.message in note for note, exercise in zip(notes, exercises_of("00b")) for mistake in exercise.mistakes)


def test_course_table():
    counted = count(ROOT / "nbs" / "00b_checks.ipynb")
    assert counted["exercises"] == 3 and counted["mutants"] >= 9 and counted["figures"] >= 4 and counted["widgets"] >= 1
    assert course_table(ROOT / "nbs").count("\n") == len(NUMBERED) + 2
