"""Every exercise's check is tested three ways: the reference passes, the stub fails kindly, each mutant hears its own sentence."""
import contextlib
import re
import sys

import pytest

from ardm_course import checks, core
from ardm_course.checks import (CheckResult, Mistake, Progress, Raised, check, difference, exercises_of, find, judge, observations, progress, remembered, shelves,
                                solution, source_of, stub_of, use)
from ardm_course.core import CourseError

EXERCISES = [exercise for number in sorted(shelves()) for exercise in exercises_of(number)]
MUTANTS = [(exercise, mistake) for exercise in EXERCISES for mistake in exercise.mistakes]


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path))


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_reference_passes(exercise):
    result = judge(exercise, exercise.reference)
    assert result, repr(result)
    assert len(result.tested) >= 2 and result.failure is None and result.mistake is None


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_stub_fails_kindly(exercise):
    names = {**vars(sys.modules[exercise.reference.__module__])}
    exec(stub_of(exercise), names)
    result = judge(exercise, names[exercise.reference.__name__])
    assert result.state == "not started" and "write the body" in repr(result) and "Traceback" not in repr(result)


@pytest.mark.parametrize(("exercise", "mistake"), MUTANTS, ids=[f"{exercise.id}-{exercise.mistakes.index(mistake)}" for exercise, mistake in MUTANTS])
def test_every_mutant_hears_its_own_sentence(exercise, mistake):
    result = judge(exercise, mistake.function)
    assert result.state == "failed" and result.failure, f"{exercise.id}: the mutant {mistake.message!r} passes"
    assert result.mistake == mistake.message, f"{exercise.id}: the mutant {mistake.message!r} hears {result.mistake!r}; add a case that tells them apart"


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_an_exercise_is_complete(exercise):
    assert len(exercise.mistakes) >= 3 and len({mistake.message for mistake in exercise.mistakes}) == len(exercise.mistakes)
    assert len(exercise.hints) == 2 and all(len(hint.split()) >= 4 for hint in exercise.hints) and exercise.hints[0] != exercise.hints[1]
    assert exercise.difficulty in (1, 2, 3) and exercise.importance in (1, 2, 3) and 1 <= exercise.minutes <= 60
    assert 12 <= len(exercise.task.split()) <= 160, f"{exercise.id}: {len(exercise.task.split())} words in the task"
    assert exercise.reference.__doc__ and len(source_of(exercise.reference).splitlines()) <= 30
    package = {name for module in list(sys.modules.values()) if getattr(module, "__name__", "").startswith("ardm_course.") and ".exercises" not in module.__name__
               for name in getattr(module, "__all__", ())}
    assert exercise.reference.__name__ not in package, f"{exercise.id}: {exercise.reference.__name__} is a name of the package; call it my_{exercise.reference.__name__}"


def test_ids_are_in_order():
    for number in shelves():
        assert [exercise.id for exercise in exercises_of(number)] == [f"{number}.{place}" for place in range(1, len(exercises_of(number)) + 1)]


# ---- the machinery

def test_unknown_ids_say_what_there_is():
    with pytest.raises(CourseError, match="00b.1, 00b.2"): find("00b.9")
    with pytest.raises(CourseError, match="notebooks 00, 00b"): find("99.1")


def test_a_value_instead_of_a_function():
    with pytest.raises(CourseError, match=r"check\('00b.1', close\)"): check("00b.1", True)


@pytest.mark.parametrize(("function", "words"), [(lambda a, b, tolerance: None, "got None, wanted True"), (lambda a: 1, "TypeError"), (lambda a, b, tolerance: 1 / 0, "ZeroDivisionError")])
def test_whatever_comes_back_is_answered(function, words):
    result = check("00b.1", function)
    assert result.state == "failed" and words in result.failure and result.mistake


def test_an_endless_loop_is_stopped():
    def endless(a, b, tolerance):
        while True: pass
    seen = observations(find("00b.1"), endless, limit=0.2)
    assert len(seen) == 1 and seen[0][1].kind == "TimeoutError" and "does your loop end" in str(seen[0][1])


def test_nothing_returned():
    exercise = find("00b.1")
    raw = checks.Exercise(**{**vars(exercise), "observe": lambda close: iter([("one", close(1.0, 1.0, 0.1))])})
    assert "return" in judge(raw, lambda a, b, tolerance: None).mistake


def test_html_is_escaped():
    result = CheckResult("1.1", "<b>", "failed", ("<script>",), "<i>", "a & b")
    assert "<script>" not in result._repr_html_() and "a &amp; b" in result._repr_html_()
    assert "#" in repr(Progress({"01": {"01.1": "passed"}})) and "1 of 1" in Progress({"01": {"01.1": "passed"}})._repr_html_()


def test_progress_is_kept_and_a_pass_stays():
    exercise = find("00b.1")
    assert progress().states["00b"]["00b.1"] == "not started"
    check("00b.1", exercise.mistakes[0].function)
    assert progress().states["00b"]["00b.1"] == "failed" and remembered()["00b.1"]["tries"] == 1
    check("00b.1", exercise.reference)
    check("00b.1", exercise.mistakes[0].function)
    assert progress().states["00b"]["00b.1"] == "passed" and remembered()["00b.1"]["tries"] == 3


def test_a_damaged_progress_file_is_started_again(tmp_path):
    (tmp_path / "progress.json").write_text("{")
    assert remembered() == {} and check("00b.1", find("00b.1").reference) and remembered()["00b.1"]["state"] == "passed"


def test_no_place_to_write(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path / "file"))
    assert check("00b.1", find("00b.1").reference)


def test_a_solution_waits_for_a_try():
    with pytest.raises(CourseError, match="Try exercise 00b.1"): solution("00b.1")
    check("00b.1", lambda a, b, tolerance: None)
    assert "def close(" in repr(solution("00b.1"))


def test_random_numbers_start_from_the_same_seed():
    import torch
    exercise = checks.Exercise(**{**vars(find("00b.1")), "observe": lambda function: iter([("noise", function())]), "reference": lambda: torch.randn(3)})
    before = torch.get_rng_state()
    assert judge(exercise, lambda: torch.randn(3)) and torch.equal(before, torch.get_rng_state())


def test_difference():
    import torch
    assert difference(torch.ones(2, 2), torch.tensor([[1.0, 1.0], [1.0, 2.0]]), 1e-6) == "got 1, wanted 2 at [1, 1]"
    assert difference(float("nan"), float("nan"), 0) is None and difference(float("nan"), 1.0, 1.0) == "got nan, wanted 1"
    assert difference(Raised("A", "b"), 1.0, 1e-6) == "got A: b, wanted 1" and difference([torch.ones(1)], [torch.ones(1)], 0) is None
    assert difference([torch.ones(1)], [torch.ones(1), torch.ones(1)], 0) == "got 1 values, wanted 2" and difference(torch.zeros(0), torch.zeros(0), 0) is None


# ---- the learner's part in the system

def test_use_replaces_everywhere_and_restores():
    from ardm_course import flow, sampling  # modules that share functions, and tables of functions
    original = sampling.euler
    mine = lambda *arguments, **options: original(*arguments, **options)
    with pytest.raises(KeyError), use(euler=mine):
        assert sampling.euler is mine and mine in sampling.SOLVERS.values()
        raise KeyError
    assert sampling.euler is original and original in sampling.SOLVERS.values() and mine not in sampling.SOLVERS.values()


def test_use_refuses_what_does_not_fit():
    with pytest.raises(CourseError, match="Take the same arguments"), use(human=lambda: ""): pass
    with pytest.raises(CourseError, match="No function 'nothing'"), use(nothing=lambda: ""): pass
    with contextlib.suppress(CourseError), use(human=lambda n: "x", nothing=lambda: ""): pass
    assert core.human(1) == "1"
