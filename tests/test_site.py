"""The documentation site and the slides: complete, self-contained, every link alive."""
import importlib
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

from ardm_course import site
from ardm_course.core import CourseError

ROOT = Path(__file__).parent.parent


def soup(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    "A site of three notebooks."
    home = site.make_docs(tmp_path_factory.mktemp("docs"), ["00_setup", "07_flow", "11b_tts"])
    return home.parent


@pytest.fixture(scope="module")
def pages(docs):
    return {path.relative_to(docs).as_posix(): soup(path) for path in docs.rglob("*.html")}


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A checkout of three tiny notebooks, one of them an exercise; the first has slides."
    def notebook(name, *cells):
        path = tmp_path / "nbs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)

    text, code, output = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell, nbformat.v4.new_output
    notebook("index.ipynb", text("# Home\n\n[one](01_one.ipynb#Why) [two](appendix/two.ipynb) [gone](gone.ipynb) [away](https://example.org/)"))
    notebook("01_one.ipynb", text("# One", metadata={"tags": ["slide"]}), text("## Why\n\nuntagged prose"),
             text("A fact.", metadata={"tags": ["subslide"]}),
             code("secret = 6 * 7\nprint(secret)", metadata={"tags": ["fragment", "hide-input"]}, outputs=[output("stream", text="42")]),
             code("shown = 1", metadata={"tags": ["fragment"]}))
    notebook("appendix/two.ipynb", text("# Appendix: two\n\n[up](../01_one.ipynb)"))
    notebook("exercises/01_one.ipynb", text("# Solutions\n\nzyzzyva"))
    monkeypatch.setattr(site, "checkout", lambda: tmp_path)
    return tmp_path


def test_pages(pages):
    expected = {"index.html", "00_setup.html", "07_flow.html", "11b_tts.html", "api/core.html", "api/flow.html", "api/tts.html"}
    assert expected <= set(pages)
    for address, page in pages.items():
        assert page.title.get_text().strip() and page.html["lang"] == "en", address
        assert page.select('meta[name="viewport"]'), f"{address} would be tiny on a phone"
        ids = [tag["id"] for tag in page.select("[id]")]
        assert len(ids) == len(set(ids)), f"{address}: two elements have one id: {sorted({i for i in ids if ids.count(i) > 1})}"


def test_nothing_from_outside(docs, pages):
    for address, page in pages.items():
        loaded = [tag.get(name) for name in ("src", "srcset", "poster", "data") for tag in page.select(f"[{name}]")]
        loaded += [tag["href"] for tag in page.select("link[href]")]
        for item in loaded:
            assert not re.match(r"(\w+:)?//", item), f"{address} loads {item[:80]}"
            if not item.startswith("data:"):
                assert ((docs / address).parent / item).exists(), f"{address} loads {item}, which is not there"
        styles = " ".join(tag.get_text() for tag in page("style")) + " ".join(tag["style"] for tag in page.select("[style]"))
        assert "url(" not in styles and "@import" not in styles, address
    style = (docs / "assets" / "style.css").read_text()
    script = (docs / "assets" / "site.js").read_text()
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|https?:", script)


def test_links_and_anchors(docs, pages):
    known = {(docs / address).resolve(): {tag["id"] for tag in page.select("[id]")} for address, page in pages.items()}
    seen = 0
    for address, page in pages.items():
        for link in page.select("a[href]"):
            target, _, anchor = link["href"].partition("#")
            if re.match(r"\w+:", target):
                continue
            file = ((docs / address).parent / target).resolve() if target else (docs / address).resolve()
            assert file in known, f"{address} links to {link['href']}, which is not there"
            assert not anchor or anchor in known[file], f"{address} links to {link['href']}, an anchor that is not there"
            seen += 1
    assert seen > 100
    assert not any(".ipynb" in link["href"] for page in pages.values() for link in page.select("a[href]"))


def test_pictures_players_formulas(pages):
    flow = pages["07_flow.html"]
    pictures = [picture for page in pages.values() for picture in page("img")]
    assert len(pictures) > 20 and all(picture.get("alt", "").strip() for picture in pictures)
    assert sum("A figure drawn by" in picture["alt"] for picture in pictures) == 0, "a figure has no description of its own"
    assert flow("audio") and all(player["src"].startswith("data:audio") and player.has_attr("controls") for player in flow("audio"))
    assert len(flow("math")) > 40
    prose = [item for item in flow.main.find_all(string=re.compile(r"\$")) if not item.find_parent(["pre", "code"])]
    assert not prose, f"a formula was not translated: {prose[0]!r}"


def test_directives_are_gone(pages):
    for address, page in pages.items():
        assert not any(line.startswith("#|") for code in page("pre") for line in code.get_text().splitlines()), address
    assert pages["07_flow.html"].select(".celltag_exported")


@pytest.mark.parametrize("module", ["core", "flow", "tts"])
def test_reference_is_complete(pages, module):
    page, code = pages[f"api/{module}.html"], importlib.import_module(f"ardm_course.{module}")
    ids = {tag["id"] for tag in page.select("[id]")}
    assert set(code.__all__) <= ids, f"missing on the page of {module}: {set(code.__all__) - ids}"
    assert len(page.select("p.source a")) >= len(code.__all__)


def test_reference_says_what_the_docments_say(pages):
    heading = pages["api/flow.html"].find(id="flow_loss")
    table = heading.find_next("table")
    rows = {row.th.get_text(): [cell.get_text() for cell in row("td")] for row in table.tbody("tr")}
    assert rows["path"] == ["Path", "", "how data and noise are mixed"]
    assert rows["times"][:2] == ["Tensor | None", "None"]
    assert rows["returns"][2].startswith("[B]")
    methods = {tag["id"] for tag in pages["api/tts.html"].select("h3[id]")}
    assert {"TTS.stream", "TTS.from_pretrained", "TTS.__call__"} <= methods


def test_names_in_prose_link_to_the_reference(pages):
    links = {link["href"] for link in pages["07_flow.html"].select("a.name")}
    assert "api/flow.html#flow_loss" in links


def test_search_index(docs):
    text = (docs / "assets" / "index.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("const INDEX = ").rstrip(";\n"))
    found = {word: [entry[2] for entry in index if word in entry[4].split()] for word in ("flow_loss", "velocity", "atomic_write", "zyzzyva")}
    assert "api/flow.html#flow_loss" in found["flow_loss"] and any(address.startswith("07_flow.html") for address in found["flow_loss"])
    assert found["velocity"] and "api/core.html#atomic_write" in found["atomic_write"] and not found["zyzzyva"]


def test_small_site(small):
    out = site.make_docs(small / "out").parent
    home = soup(out / "index.html")
    links = {link.get_text(): link["href"] for link in home.main.select("a:not(.anchor-link)")}
    assert links == {"one": "01_one.html#Why", "two": "appendix/two.html", "away": "https://example.org/"}
    assert "gone" in home.main.get_text()
    menu = [link["href"] for link in home.nav("a")]
    assert menu == ["index.html", "01_one.html", "appendix/two.html"], "exercises are not in the menu"
    assert (out / "exercises" / "01_one.html").exists()
    assert "zyzzyva" not in (out / "assets" / "index.js").read_text()
    assert soup(out / "appendix" / "two.html").main.select("a:not(.anchor-link)")[0]["href"] == "../01_one.html"


def test_slides(small):
    out = site.make_slides(small / "slides").parent
    assert sorted(path.name for path in out.glob("*.html")) == ["01_one.html", "index.html"]
    deck = soup(out / "01_one.html")
    assert len(deck.select(".slides > section > section")) == 2 and len(deck.select(".fragment")) == 2
    text = deck.get_text()
    assert "42" in text and "shown" in text and "A fact." in text
    assert "secret" not in text and "untagged" not in text
    for page in (deck, soup(out / "index.html")):
        loaded = [tag.get("src") or tag["href"] for tag in page.select("[src], link[href]")]
        assert all(item.startswith("data:") or (out / item).exists() for item in loaded)
    assert "reveal.js" in (out / "reveal" / "reveal.js").read_text(encoding="utf-8")[:200] and (out / "reveal" / "LICENSE").exists()
    assert soup(out / "index.html").find("a", href="01_one.html")


def test_slides_of_a_notebook_without_tags(small):
    shutil.copy(small / "nbs" / "appendix" / "two.ipynb", small / "nbs" / "02_two.ipynb")
    with pytest.raises(CourseError, match="02_two.ipynb has no slides"):
        site.make_slides(small / "slides", ["02_two"])


def test_slides_without_reveal(small, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CourseError, match="pip install --no-deps sphinx-revealjs"):
        site.make_slides(small / "slides")


def test_unknown_notebook(small):
    with pytest.raises(CourseError, match="There is no notebook 99_none. Choose from: index, 01_one"):
        site.make_docs(small / "out", ["99_none"])


def test_installed_package_has_no_notebooks(tmp_path, monkeypatch):
    import ardm_course
    monkeypatch.setattr(ardm_course, "__file__", str(tmp_path / "ardm_course" / "__init__.py"))
    with pytest.raises(CourseError, match="checkout"):
        site.checkout()


@pytest.mark.parametrize("latex", [r"\sqrt", r"\left(", r"\velocity{x}"])
def test_bad_formula(latex):
    with pytest.raises(CourseError, match="plainer LaTeX"):
        site.markdown_to_html(f"Here: ${latex}$.")


def test_solutions_are_folded(pages):
    folded = pages["11b_tts.html"].select("details.solution")
    assert len(folded) == 5 and all(fold.summary.string == "Solution" and "def " in fold.get_text() for fold in folded)
