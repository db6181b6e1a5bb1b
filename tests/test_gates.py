"""Rules that every notebook keeps. A notebook that breaks one fails here with a message that says which and where."""
import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from ardm_course.checks import exercises_of
from ardm_course.editions import with_exercises

ROOT = Path(__file__).parent.parent
NUMBERED = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
NOTEBOOKS = NUMBERED + sorted((ROOT / "nbs" / "appendix").glob("*.ipynb"))
SPINE = ["Why", "The idea", "Build it", "Listen and look", "Exercises", "Where it breaks", "In the papers", "Recap and next"]
FORBIDDEN = re.compile(r"/wo" r"rk/|/ro" r"ot/|/tm" r"p/|\.li" r"brary")


def cells(path, kind=None):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def module_of(path):
    found = re.search(r"^#\|\s*default_exp\s+(\w+)", "\n".join(map(source, cells(path, "code"))), re.M)
    return found and found[1]


def names(paths):
    return [path.stem for path in paths]


@pytest.mark.parametrize("path", NUMBERED, ids=names(NUMBERED))
def test_spine(path):
    heads = re.findall(r"^## (.+)$", "\n".join(map(source, cells(path, "markdown"))), re.M)
    assert heads == SPINE, f"{path.name}: its H2 sections are {heads}, they must be {SPINE}"


@pytest.mark.parametrize("path", NUMBERED, ids=names(NUMBERED))
def test_head(path):
    first, second = cells(path)[:2]
    assert "default_exp" in source(first), f"{path.name}: the first cell must hold #| default_exp"
    text = source(second)
    assert re.match(r"# .+\n+> .+", text), f"{path.name}: the second cell must be an H1 and a one-line '> summary'"
    for column in ("level", "CPU minutes", "needs", "exports", "exercises", "slides"):
        assert f"{column}" in text, f"{path.name}: the table under the title lacks '{column}'"


@pytest.mark.parametrize("path", NUMBERED, ids=names(NUMBERED))
def test_proportions(path):
    every = [cell for cell in cells(path) if "exercise" not in cell["metadata"].get("tags", [])]  # exercises come on top
    code = [cell for cell in every if cell["cell_type"] == "code"]
    lines = [len([line for line in source(cell).splitlines() if line.strip()]) for cell in code]
    assert 40 <= len(every) <= 80, f"{path.name}: {len(every)} cells, between 40 and 80 are wanted"
    assert max(lines) <= 30, f"{path.name}: code cell {lines.index(max(lines))} has {max(lines)} lines, 30 is the limit"
    share = 1 - len(code) / len(every)
    assert 0.33 <= share <= 0.52, f"{path.name}: {share:.0%} of the cells are markdown, 35-50 % is wanted"
    asserts = sum(len(re.findall(r"\bassert\b", source(cell))) for cell in code)
    assert asserts >= 8, f"{path.name}: {asserts} asserts, at least 8 are wanted"
    figures = sum("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])
    assert figures >= 4, f"{path.name}: {figures} figures in its outputs, at least 4 are wanted (were the outputs saved?)"


@pytest.mark.parametrize("path", NUMBERED, ids=names(NUMBERED))
def test_exercises(path):
    number = path.stem.split("_")[0]
    known = exercises_of(number)
    assert 3 <= len(known) <= 6, f"{path.name} has {len(known)} exercises, three to six are wanted; its answer sheet belongs to nbs/exercises/{path.name}"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert with_exercises(notebook, number) == notebook, f"{path.name}: its exercises are not those of nbs/exercises/{path.name}; run `make exercises`"
    row = source(cells(path)[1]).splitlines()[-1].strip("| ").split("|")
    assert row[4].strip() == str(len(known)), f"{path.name}: the table under its title says {row[4].strip()} exercises, there are {len(known)}"
    for cell in cells(path, "code"):
        if "check" in cell["metadata"].get("tags", []):
            assert "passed" in json.dumps(cell["outputs"]), f"{path.name}: the saved answer of {source(cell).splitlines()[0]} is not a pass; run the notebook again"


def test_answer_sheets_use_nothing_from_later_notebooks():
    order = [module_of(path) for path in NUMBERED]
    for path in NUMBERED:
        sheet = ROOT / "ardm_course" / "exercises" / f"e{path.stem}.py"
        if not sheet.exists(): continue
        for node in ast.walk(ast.parse(sheet.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert node.module in {"checks", *order[:order.index(module_of(path)) + 1]}, f"{sheet.name} imports {node.module}, which {path.name} comes before"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_size_and_paths(path):
    assert path.stat().st_size < 2_000_000, f"{path.name} is over 2 MB: shorten its sounds or pictures"
    found = FORBIDDEN.search(path.read_text(encoding="utf-8"))
    assert not found, f"{path.name} names a path of the machine it was written on: {found[0]}"
    errors = [source(cell)[:80] for cell in cells(path, "code") for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors, f"{path.name}: a saved output is an error, in the cell that begins {errors[0]!r}"


def test_no_import_from_a_later_notebook():
    exporting = [path for path in NOTEBOOKS if module_of(path) or path in NUMBERED]  # appendix tables need no module
    order = [module_of(path) for path in exporting]
    for place, (path, module) in enumerate(zip(exporting, order)):
        text = (ROOT / "ardm_course" / f"{module}.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                for needed in [node.module] if node.module else [name.name for name in node.names]:
                    assert needed in order[:place], f"{path.name}: module {module} imports {needed}, which no earlier notebook exports"


WIDGETS = {"01_audio": "mel settings", "02_corpus": "corpus browser", "04_training": "loss", "05b_neural": "pitch and breath", "05c_adversarial": "a judge's view", "06_wavevae": "KL weight", "07_flow": "trajectories", "08_sampling": "steps and guidance",
           "10_locdit": "history", "11_ardm": "stop threshold", "11b_tts": "playground", "13_fsq": "width and scale", "13b_cascade": "temperature and nucleus", "14_voxcpm": "grid and guidance", "15_mela": "crop length and voice mixing", "17_streaming": "timeline", "17b_page": "lead and jitter", "21b_ablations": "sentences and width"}


@pytest.mark.parametrize("stem", WIDGETS)
def test_widgets(stem):
    text = "\n".join(source(cell) for cell in cells(ROOT / "nbs" / f"{stem}.ipynb", "code"))
    assert re.search(r"^explore\(", text, re.M), f"{stem}: it owes a widget ({WIDGETS[stem]}); call core.explore"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_alternative_text(path):
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                alt = output["metadata"].get("image/png", {}).get("alt", "")
                assert len(alt) > 8, f"{path.name}: a figure has no alternative text (draw through core.panels or show_figure), in the cell that begins {source(cell)[:60]!r}"


@pytest.mark.parametrize("path", NUMBERED, ids=names(NUMBERED))
def test_sound_comes_in_pairs(path):
    sounds = ["".join(output.get("data", {}).get("text/html", "")).count("<audio") for cell in cells(path, "code") for output in cell["outputs"]]
    assert not any(sounds) or max(sounds) >= 2, f"{path.name}: it plays sound but never two beside each other (core.compare)"


TERMS = {r"\b[Pp]ytorch\b|\bPyTORCH\b": "PyTorch", r"\bLibri[Tt]ts\b|\bLibriTts\b": "LibriTTS", r"\bnumpy\b": "NumPy", r"\blog mel\b|\blogmel\b": "log-mel",
         r"\bmelspectrogram\b": "mel spectrogram", r"\bclassifier free\b": "classifier-free", r"\bJupyter[Ll]ab\b(?<!JupyterLab)": "JupyterLab", r"\bGriffin Lim\b": "Griffin-Lim",
         r"\bauto-regressive\b": "autoregressive", r"\b[Ll]oc[Dd]it\b(?<!LocDiT)(?!\.)": "LocDiT", r"\bstop-head\b": "stop head", r"\bVoxCpm\b|\bvoxCPM\b": "VoxCPM"}
EMOJI = re.compile("[\U0001F300-\U0001FAFF\u2705\u274C\u2728]")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_spelling_of_house_terms(path):
    for cell in cells(path, "markdown"):
        prose = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$|\]\([^)]*\)", " ", source(cell), flags=re.S)
        for wrong, right in TERMS.items():
            found = re.search(wrong, prose)
            assert not found, f"{path.name}: write {right}, not {found[0]!r}, in {prose.strip()[:60]!r}"
        assert not EMOJI.search(prose), f"{path.name}: no emoji, in {prose.strip()[:60]!r}"


def test_the_fast_run_of_all_notebooks_is_short():
    timing = json.loads((ROOT / "data" / "results" / "timing.json").read_text(encoding="utf-8"))
    known = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert set(timing["seconds"]) == known, f"run `make timing` again: {sorted(set(timing['seconds']) ^ known)}"
    assert timing["total_s"] <= 20 * 60 and max(timing["seconds"].values()) <= 90, timing


def test_every_module_has_a_notebook():
    modules = {path.stem for path in (ROOT / "ardm_course").glob("[a-z]*.py")}
    orphans = modules - {module_of(path) for path in NOTEBOOKS}
    assert not orphans, f"no notebook exports {sorted(orphans)}"


def test_links_resolve():
    for path in NOTEBOOKS + [ROOT / "nbs" / "index.ipynb"]:
        for link in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", "\n".join(map(source, cells(path, "markdown")))):
            assert (path.parent / link).exists(), f"{path.name}: the link {link} leads nowhere"


def test_the_tree_can_be_cloned_by_anybody():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    largest = sorted(sizes, key=sizes.get)[-5:]
    assert sum(sizes.values()) < 56e6, f"{sum(sizes.values()) / 1e6:.1f} MB, 56 is the limit; the largest files: {', '.join(largest)}"
