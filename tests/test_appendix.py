"""The appendix's tables point at notebooks, slides, config fields and figures; a reference that leads nowhere fails here."""
import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
NUMBERED = sorted(NBS.glob("[0-9]*.ipynb"))
EVERY = [*NUMBERED, NBS / "index.ipynb", *sorted((NBS / "appendix").glob("*.ipynb"))]
GLOSSARY, SYMBOLS, SLIDES = (NBS / "appendix" / f"{name}.ipynb" for name in ("glossary", "symbols", "slides"))
TO_COME = ("18_vibevoice", "19_uniaudio")
CJK = re.compile(r"[\u3400-\u9fff]+")
EXAMPLES = {"天"}  # characters that a notebook shows, not terms it uses


def notebook(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def prose(path):
    return "\n\n".join("".join(cell["source"]) for cell in notebook(path) if cell["cell_type"] == "markdown")


def printed(path):
    "Everything a notebook's saved outputs say in words."
    outputs = [output for cell in notebook(path) if cell["cell_type"] == "code" for output in cell["outputs"]]
    return "\n".join("".join(output.get("text") or output.get("data", {}).get("text/plain", "")) for output in outputs)


def headings(path):
    return re.findall(r"^#+ (.+)$", prose(path), re.M)


def anchors(path):
    "As Jupyter makes them: blanks become dashes."
    return {head.replace(" ", "-") for head in headings(path)}


def section(text, title):
    "The part of a notebook's prose under one heading, up to the next heading of any level."
    found = re.search(rf"^#+ {re.escape(title)}$(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    assert found, f"there is no section {title!r}"
    return found[1]


def rows(text):
    "The rows of all tables in a text, without their heads."
    tables = re.findall(r"^\|[^\n]*\|\n\|[-|]+\|\n((?:\|[^\n]*\|\n?)*)", text, re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for table in tables for line in table.splitlines()]


def terms():
    return rows(prose(GLOSSARY))


def slides():
    return [row for row in rows(prose(SLIDES)) if len(row) == 5]


def claimed(path):
    "The slides that a notebook's head names, such as '3 to 6, 14' or '7–8'."
    table = re.search(r"^\| level .*\n\|[-|]+\|\n(.+)$", prose(path), re.M)
    cell = table[1].strip("|").split("|")[-1]
    return {number for first, last in re.findall(r"(\d+)(?:\s*(?:to|–|-)\s*(\d+))?", cell) for number in range(int(first), int(last or first) + 1)}


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_links_and_anchors(path):
    for name, anchor in re.findall(r"\]\(([^)\s#:]*\.ipynb)?(?:#([^)\s]+))?\)", prose(path)):
        target = (path.parent / name) if name else path
        assert target.exists(), f"{path.name}: the link {name} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{path.name}: {target.name} has no heading #{anchor}"


@pytest.mark.parametrize("path", [GLOSSARY, SLIDES], ids=lambda path: path.stem)
def test_notebooks_to_come(path):
    for name in re.findall(r"arrives with `([^`]*)`", prose(path)):
        assert name in TO_COME, f"{path.name}: no notebook {name} is planned"
        assert not (NBS / f"{name}.ipynb").exists(), f"{path.name}: {name} is here now; link to its section instead of 'arrives with'"


def test_glossary_rows():
    assert len(terms()) >= 120
    for row in terms():
        assert len(row) == 4 and all(row), f"a row of the glossary is not complete: {row}"
        term, chinese, meaning, built = row
        assert re.search("[A-Za-z]", term) and not CJK.search(term), f"{term}: the first column is English"
        assert CJK.search(chinese), f"{term}: the second column is Chinese"
        assert meaning.endswith((".", "!")), f"{term}: a meaning is a sentence, not {meaning!r}"
        assert re.search(r"\]\(.*\.ipynb|arrives with `", built), f"{term}: nobody says where it is built"


def test_glossary_order():
    names = [row[0].casefold() for row in terms()]
    assert names == sorted(names), f"{next(b for a, b in zip(names, names[1:]) if a > b)!r} is out of order"
    assert len(set(names)) == len(names), "a term stands twice in the glossary"
    for letter in (head for head in headings(GLOSSARY) if len(head) == 1):
        assert all(row[0].upper().startswith(letter) for row in rows(section(prose(GLOSSARY), letter))), f"a term under {letter} begins with another letter"


@pytest.mark.parametrize("path", [path for path in EVERY if path != GLOSSARY], ids=lambda path: path.stem)
def test_house_terms_are_in_the_glossary(path):
    known = prose(GLOSSARY)
    missing = sorted({word for word in CJK.findall(prose(path)) if word not in known} - EXAMPLES)
    assert not missing, f"{path.name} uses {', '.join(missing)}; add a row to nbs/appendix/glossary.ipynb"


def test_every_slide_once_in_order():
    assert [row[0] for row in slides()] == [str(number) for number in range(1, 41)]
    for number, says, paper, built, measured in slides():
        assert says and paper and measured, f"slide {number}: an empty cell"
        assert CJK.search(says), f"slide {number}: the Chinese key term is missing"
        assert re.search(r"\]\(.*\.ipynb|arrives with `", built), f"slide {number}: nobody says where it is built"


@pytest.mark.parametrize("path", [path for path in EVERY if "| level" in prose(path)], ids=lambda path: path.stem)
def test_claimed_slides_exist(path):
    known = {int(row[0]) for row in slides()}
    unknown = sorted(claimed(path) - known)
    assert not unknown, f"{path.name}: its head names slides {unknown}, which the deck does not have"


def test_slides_named_in_prose_exist():
    for path in EVERY:
        for first, last in re.findall(r"\bslides? (\d+)(?:(?:,| and| to|–) ?(\d+))?", prose(path)):
            assert 1 <= int(first) <= 40 and (not last or 1 <= int(last) <= 40), f"{path.name} names slide {first} {last}"


def test_measured_figures_are_in_the_saved_outputs():
    quotes = [(row[0], *quote) for row in slides() for quote in re.findall(r"`([^`]+)` \(\[[^\]]+\]\(([^)#]+)", row[4])]
    assert len(quotes) >= 10
    for number, figure, link in quotes:
        assert figure in printed(SLIDES.parent / link), f"slide {number}: {Path(link).name} no longer prints {figure!r}; quote what it prints now"


def test_config_fields_are_in_the_symbols():
    text = prose(SYMBOLS)
    kinds = re.findall(r"^### (\w+)$", section_after(text, "Config fields"), re.M)
    assert {"MelConfig", "TransformerConfig", "HeadConfig", "ARDMConfig", "TrainConfig"} <= set(kinds)
    for kind in kinds:
        part = section(text, kind)
        stem = re.search(r"\(\.\./([\w.]+)\.ipynb", part)[1]
        module = re.search(r"default_exp (\w+)", (NBS / f"{stem}.ipynb").read_text(encoding="utf-8"))[1]
        config = getattr(importlib.import_module(f"ardm_course.{module}"), kind)
        listed = {name.strip("`"): default.strip("`") for name, default, _ in rows(part)}
        assert list(listed) == [field.name for field in dataclasses.fields(config)], f"{kind}: the table in symbols.ipynb lists other fields"
        for field in dataclasses.fields(config):
            if field.default is not dataclasses.MISSING:
                assert listed[field.name] == repr(field.default), f"{kind}.{field.name}: the default is {field.default!r}"


def section_after(text, title):
    "Everything under a heading up to the next of its level."
    return re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def test_batch_fields_are_in_the_symbols():
    from ardm_course.ardm import Batch
    listed = [row[0] for row in rows(section(prose(SYMBOLS), "A batch, field by field"))]
    assert listed == [field.name for field in dataclasses.fields(Batch)]
