"""Comparisons: the intervals hold what they claim, luck is counted twice, and what cannot be compared is refused."""
import statistics
import json
from dataclasses import replace

import pytest
import torch

from ardm_course import ablations, recipes
from ardm_course.ablations import (compare_recipes, compare_systems, curves_of, design_effect, difference, half_width, judged_run, mean_of_runs, paired_interval, runs_interval,
                                   said_together, sentence_errors, sooner, speed_up, stored_result, verdict)
from ardm_course.core import CourseError
from ardm_course.evaluation import available, bootstrap_interval, error_rates
from ardm_course.recipes import RECIPES, held_out, prepare, recipe, speak_row, toy_shape, train

OPTIONS = {"warmup": 1, "batch_frames": 600, "minutes": None, "checkpoint_every": 100}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", replace(recipe("toy-unaligned"), model=toy_shape(48, 1, 1)))
    return RECIPES["tiny"]


def said(text, heard, **more):
    return {"text": text, "heard": {"moonshine": heard}, **more}


def losses(rate, sentences, generator, words=9.0, shared=1.0, seeds=1):
    "[S, N] errors where sentences share a hardness, and [N] words."
    hard = 1 - shared + shared * torch.empty(sentences).double().exponential_(generator=generator)
    counts = torch.full((seeds, sentences), words).double()
    return lambda r=rate: torch.binomial(counts, (r * hard).clamp(max=1).expand(seeds, -1), generator=generator), counts[0]


@pytest.mark.skipif(not available()["error rates"] or not available()["normaliser"], reason="jiwer and the normaliser are not installed")
def test_word_errors_are_those_of_jiwer():
    generator = torch.Generator().manual_seed(0)
    words = "the red lamp is under a white chair in oslo".split()
    pairs = []
    for number in range(40):  # drop, double and exchange words at random
        text = [words[k] for k in torch.randint(len(words), (7,), generator=generator)] + [f"x{number}"]
        kinds = torch.randint(6, (len(text),), generator=generator).tolist()
        heard = [word for kind, w in zip(kinds, text) for word in ([] if kind == 0 else [w, w] if kind == 1 else ["table"] if kind == 2 else [w])]
        pairs.append((" ".join(text), " ".join(heard)))
    errors, counts = torch.tensor(list(sentence_errors([said(*pair) for pair in pairs]).values())).double().T
    told = error_rates(*zip(*pairs))
    assert len(errors) == 40 and float(errors.sum() / counts.sum()) == pytest.approx(told["wer"])
    assert bootstrap_interval(errors, counts) == pytest.approx(told["intervals"]["wer"])


def test_a_sentence_said_twice_counts_once():
    assert sentence_errors([said("One two three.", "one two"), said("One two three.", "one two three")]) == {"One two three.": (0.5, 3)}
    with pytest.raises(CourseError, match="Choose one of: moonshine"): sentence_errors([said("One.", "one")], judge="whisper")


def test_only_common_sentences_are_compared():
    a = {"samples": [said("One two.", "one"), said("Three.", "three")]}
    b = {"runs": [{"samples": [said("Three.", "four"), said("One two.", "one two")]}, {"samples": [said("One two.", "")]}]}
    texts, one, other, words = said_together(a, b)
    assert texts == ["One two."] and one.tolist() == [[1]] and other.tolist() == [[0], [2]] and words.tolist() == [2]
    assert difference(a, b)[0] == pytest.approx(0.0) and difference(a, a) == (0.0, [0.0, 0.0], "cannot tell")
    for without in ({"samples": [said("Five.", "five")]}, {"wer_moonshine": 0.1}):
        with pytest.raises(CourseError, match="no sentence in common"): difference(a, without)


def test_pairs_are_narrower_where_sentences_share_their_hardness():
    generator, ratios = torch.Generator().manual_seed(0), {}
    for shared in (0.0, 1.0):
        found = []
        for _ in range(15):
            draw, words = losses(0.3, 100, generator, shared=shared)
            (one,), (other,) = draw(0.3), draw(0.25)
            (a, b), (c, d), (e, f) = paired_interval(one, other, words), bootstrap_interval(one, words), bootstrap_interval(other, words)
            found.append((b - a) / ((d - c) ** 2 + (f - e) ** 2) ** 0.5)
        ratios[shared] = statistics.mean(found)
    assert 0.92 < ratios[0.0] < 1.08 and ratios[1.0] < 0.85


def test_the_paired_interval_holds_the_truth():
    "Two equal systems: zero lies within in about 95 of 100 comparisons."
    generator, held = torch.Generator().manual_seed(1), 0
    for world in range(300):
        draw, words = losses(0.2, 60, generator)
        (one,), (other,) = draw(), draw()
        held += verdict(paired_interval(one, other, words, 300, seed=world)) == "cannot tell"
    assert 0.90 <= held / 300 <= 0.985


def test_one_training_each_is_the_paired_interval():
    draw, words = losses(0.2, 30, torch.Generator().manual_seed(2))
    one, other = draw(), draw(0.1)
    assert runs_interval(one, other, words) == pytest.approx(paired_interval(one[0], other[0], words))
    assert runs_interval(one.expand(3, -1), other.expand(2, -1), words) == pytest.approx(paired_interval(one[0], other[0], words))  # equal trainings: no second luck


def test_seeds_widen_the_interval_and_are_needed():
    "Equal recipes whose trainings differ: one seed finds differences that are not there, five hardly do."
    generator, held = torch.Generator().manual_seed(3), {1: 0, 5: 0}
    for seeds in held:
        for world in range(120):
            hard = torch.empty(40).double().exponential_(generator=generator)
            sides = []
            for _ in range(2):
                rates = 0.1 * (0.4 * torch.randn(seeds, 1, generator=generator).double()).exp()
                sides.append(torch.binomial(torch.full((seeds, 40), 9.0).double(), (rates * hard).clamp(max=1), generator=generator))
            held[seeds] += verdict(runs_interval(*sides, torch.full((40,), 9.0).double(), 200, seed=world)) == "cannot tell"
    assert held[1] / 120 < 0.65 and held[5] / 120 > 0.8


def test_verdict():
    assert [verdict(edges) for edges in ([-2, -1], [-1, 1], [1, 2], [-1, 0.0], [0.0, 1])] == ["better", "cannot tell", "worse", "cannot tell", "cannot tell"]


def test_design_effect_and_width():
    generator = torch.Generator().manual_seed(4)
    draw, words = losses(0.1, 4000, generator, shared=0.0)
    assert design_effect(draw()[0], words) == pytest.approx(1.0, abs=0.08)
    whole = torch.tensor([9.0, 0.0]).repeat(2000).double()  # a sentence is lost or not: as many independent things as sentences
    assert design_effect(whole, words) == pytest.approx(9.0, rel=0.01)
    low, high = bootstrap_interval(whole, words)
    assert (high - low) / 2 == pytest.approx(half_width(0.5, 4000, 9, 9.0), rel=0.1)


def test_sooner():
    slow = [(100, 4.0), (200, 2.0)]
    assert sooner(slow, [(50, 4.0), (100, 2.0), (150, 1.0)]) == 2.0
    assert sooner(slow, [(50, 3.0), (100, 1.0)]) == pytest.approx(200 / 75)
    assert sooner(slow, [(50, 1.0)]) == 4.0 and sooner(slow, [(50, 3.0), (400, 2.5)]) is None


def test_speed_up_over_pairs_of_runs():
    def run(*values): return {"curves": {"flow": [(10 * (k + 1), value) for k, value in enumerate(values)]}}
    found = {"rows": {"a": {"runs": [run(4, 3, 2), run(4, 3, 1)]}, "b": {"runs": [run(2, 1, 0), run(3, 2, 1)]}, "c": run(4, 4, 4)}}
    assert speed_up(found, "a", "b") == (1.5, 1.0, 3.0) and speed_up(found, "a", "c") is None
    with pytest.raises(CourseError, match="listen=10"): speed_up(found, "a", "b", "wer")
    with pytest.raises(CourseError, match="Compare the recipes again"): speed_up({"rows": {"old": {"wer_moonshine": 0.1}}}, "old", "old")


def test_a_missing_result_says_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "data_dir", lambda: tmp_path)
    assert stored_result("absent", "make it") is None and "made by: make it" in capsys.readouterr().out


def test_a_training_and_its_curves(tmp_path, monkeypatch, tiny):
    "Curves of loss and of words; a run keeps what was heard, and its means leave words and lists alone."
    class Deaf:
        def many(self, wavs, rate): return ["the"] * len(list(wavs))
    monkeypatch.setattr(recipes, "load_recogniser", lambda name: Deaf())
    monkeypatch.setattr(recipes, "measure", lambda samples: {"text": [s.text for s in samples], "moonshine": ["the"] * len(samples), "similarity": None, "mos": None})
    data = prepare(tiny, limit=4)
    tts, history = train("tiny", tmp_path / "heard", data=data, listen=1, steps=2, validate_every=1, **OPTIONS)
    told = judged_run([speak_row(tts, row, steps=1, threshold=-1.0) for row in held_out(tiny, 1)], history, 50.0)
    assert [step for step, wer in told["curves"]["wer"] if wer > 0.5] == [1, 2] and told["curves"] == curves_of(history)
    assert told["samples"] == [{"text": held_out(tiny, 1)[0]["text_normalized"], "heard": {"moonshine": "the"}}] and told["valid_flow"] == told["curves"]["flow"][-1][1]
    assert speed_up({"rows": {"a": told, "b": told}}, "a", "b")[0] in (1.0, 2.0)
    both = mean_of_runs([told, {**told, "valid_flow": told["valid_flow"] + 2}])
    assert both["valid_flow"] == pytest.approx(told["valid_flow"] + 1) and len(both["runs"]) == 2 and mean_of_runs([told]) == told


def test_recipes_are_compared_and_nothing_is_stored(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(recipes, "measure", lambda samples: {"text": [s.text for s in samples], "moonshine": [s.text if len(s.wav) % 2 else "" for s in samples], "similarity": None, "mos": None})
    monkeypatch.setattr(ablations, "speak_row", lambda tts, row, **options: speak_row(tts, row, steps=1, threshold=-1.0))
    monkeypatch.setattr(ablations, "write_json", lambda *args: pytest.fail("it stored a result"))
    small = prepare(tiny, limit=4)
    monkeypatch.setattr(recipes, "prepare", lambda chosen, corpus=None, limit=None: small)
    found = compare_recipes(("tiny",), tmp_path / "runs", count=2, seeds=2, steps=1, validate_every=1, **OPTIONS)
    runs = found["rows"]["tiny"]["runs"]
    assert len(runs) == 2 and all(len(run["samples"]) == 2 for run in runs)
    assert difference(found["rows"]["tiny"], found["rows"]["tiny"])[0] == 0.0 and (tmp_path / "runs" / "tiny-1" / "model").is_dir()


def test_a_stored_comparison_goes_on(tmp_path, monkeypatch, tiny):
    "What the file holds is not trained again; more seeds and recipes join it; other settings are refused and change nothing."
    monkeypatch.setattr(recipes, "measure", lambda samples: {"text": [s.text for s in samples], "moonshine": [s.text for s in samples], "similarity": None, "mos": None})
    monkeypatch.setattr(ablations, "speak_row", lambda tts, row, **options: speak_row(tts, row, steps=1, threshold=-1.0))
    monkeypatch.setitem(RECIPES, "other", tiny)
    trained, small = [], prepare(tiny, limit=4)
    monkeypatch.setattr(recipes, "prepare", lambda chosen, corpus=None, limit=None: small)
    monkeypatch.setattr(ablations, "train", lambda name, folder, **changes: trained.append((name, changes["seed"])) or train(name, folder, **changes))
    go = lambda names, seeds, **changes: compare_recipes(names, tmp_path / "runs", 1, tmp_path / "found.json", seeds, validate_every=1, **{"steps": 1, **OPTIONS, **changes})
    first = go(("tiny",), 1)["rows"]["tiny"]
    stored = json.loads((tmp_path / "found.json").read_text())["rows"]["tiny"]
    again, more = go(("tiny",), 1), go(("other", "tiny"), 2)
    assert trained == [("tiny", 0), ("other", 0), ("other", 1), ("tiny", 1)] and again["rows"] == {"tiny": stored} and stored["wer_moonshine"] == first["wer_moonshine"]
    assert more["rows"]["tiny"]["runs"][0] == stored and len(more["rows"]["other"]["runs"]) == 2 and "recipes tiny other --seeds 2" in more["command"]
    kept = (tmp_path / "found.json").read_bytes()
    with pytest.raises(CourseError, match="other settings"): go(("tiny",), 1, steps=2)
    assert (tmp_path / "found.json").read_bytes() == kept and len(trained) == 4


def test_all_systems_say_the_same(tmp_path, tiny):
    "A row for the recordings, one per codec and one per system; what is not in this copy is left out."
    train("tiny", tmp_path / "run", data=prepare(tiny, limit=4), steps=1, validate_every=100, **OPTIONS)
    mine = str(tmp_path / "run" / "model")
    found = compare_systems((mine, "absent"), count=1)
    assert list(found["rows"]) == ["recorded", "vocoder", mine] and found["rows"][mine]["n"] == 1
    assert found["rows"][mine]["gflops_per_s"] > 0.1 and found["rows"][mine]["parameters"] < 1e6
    assert [row["samples"][0]["text"] for row in found["rows"].values()] == [found["sentence"]] * 3
