"""The README and ``examples/guide``: their code runs, their links lead somewhere."""

import contextlib
import io
import re
import runpy
import sys
import unicodedata
import warnings
from pathlib import Path

import lightning
import pytest
import torch

from lightning_hpo import strategy

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDE = sorted((ROOT / "examples" / "guide").glob("*.md"))
PAGES = [README, *GUIDE]
# The trainings of the pages are cut down to so many epochs, of 5 steps each.
EPOCHS = 3


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def without_numbers(text: str) -> str:
    """Returns the text in one line, with every number as a #."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(
        r"\d[\d ]*(?:\.\d+)?(?:e[+-]?\d+)?", lambda m: "#" + " " * m[0].endswith(" "), text
    )


def outputs(page: Path) -> list[str]:
    """Returns what a page shows as printed: blocks marked as ``text``."""
    return re.findall(r"^```text\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def shortened(code: str) -> str:
    """Cuts the trainings down; it is all that is changed."""
    code = re.sub(r"\bmax_epochs=\d+", f"max_epochs={EPOCHS}", code)
    return re.sub(r"\bfor epochs in \([\d, ]+\)", f"for epochs in ({EPOCHS},)", code)


def run(page: Path, names: dict) -> None:
    """Runs the blocks of a page one after the other, in one namespace."""
    for number, block in enumerate(blocks(page), start=1):
        lightning.seed_everything(0, verbose=False)
        exec(compile(shortened(block), f"{page.name}, block {number}", "exec"), names)


@pytest.fixture(autouse=True)
def _as_a_user_has_it(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)  # which conftest puts back
    monkeypatch.chdir(tmp_path)  # for logs, checkpoints and pictures


@pytest.fixture
def readme():
    """The names that the README's example leaves."""
    names = {"__name__": "guide"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of trainings that are so short
        run(README, names)
        yield names


def test_the_readme_is_one_page():
    assert len(README.read_text().splitlines()) <= 120


def test_the_example_of_the_readme(readme):
    """It is complete, and its second training has tuned λ."""
    (block,) = blocks(README)
    assert shortened(block).count(f"max_epochs={EPOCHS}") == 1
    marked = [line for line in block.splitlines() if "# +" in line]
    assert len(marked) == 5
    module = readme["module"]
    (name,) = readme["callbacks"][0].history[-1].values
    assert name == "l2"
    assert module.l2().item() != pytest.approx(1e-4)
    assert readme["trainer"].global_step == EPOCHS * 5


def test_what_is_marked_is_all_that_is_added():
    """Without what is marked, the example is an ordinary training."""
    (block,) = blocks(README)
    lines = []
    for line in block.splitlines():
        if line.startswith("from lightning_hpo") or "register_l2" in line:
            assert "# +" in line
            continue
        if "# +" in line:
            line = line.replace("L2Mixin, ", "").replace("OnlineHPOCallback()", "")
            line = line.replace(" to {module.l2().item():.1e}", "")
        lines.append(line)
    names = {"__name__": "plain"}
    exec(compile(shortened("\n".join(lines)), "README without", "exec"), names)
    assert not any("lightning_hpo" in getattr(v, "__module__", "") for v in names.values())
    assert names["trainer"].global_step == EPOCHS * 5


@pytest.mark.parametrize("page", GUIDE, ids=[page.stem for page in GUIDE])
def test_the_code_of_a_page_runs(page, readme):
    """Pages go on from the README's example; each by itself, in any order."""
    run(page, readme)


def test_every_page_of_the_guide_has_code():
    without = {page.name for page in GUIDE if not blocks(page)}
    assert without <= {"README.md", "limits.md"}


WRONG = ROOT / "examples" / "guide" / "when_it_goes_wrong.md"

# Each kind of warning of the diagnosis, and how its words begin.
WARNINGS = {
    "same data": "the held-out data are training data",
    "many": "carries forward tangents of",
    "no update": "there was no update",
    "dead": "the network is dead",
    "skipped": "updates were skipped",
    "bound": "λ sits at a bound",
    "radius": "the tangent sits at the radius of ClipR",
    "effect": "λ has no measurable effect",
    "overfitted": "λ is fitted to its held-out data",
    "direct": "the held-out loss is computed with λ itself",
}


def test_every_warning_of_the_diagnosis_is_explained():
    source = (ROOT / "lightning_hpo" / "diagnosis.py").read_text()
    assert set(re.findall(r'\.warn\(\s*"([a-z ]+)"', source)) == set(WARNINGS)
    text = re.sub(r"\s+", " ", WRONG.read_text().replace("\n> ", " "))
    for words in WARNINGS.values():
        assert words in re.sub(r'"\s+f?"', "", source)
        assert text.count(words) >= 2, words  # in the table, and in a section of its own


def sections(page: Path) -> list[str]:
    return re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]


def quoted(section: str) -> str:
    """Returns the first quotation of a section."""
    found = re.search(r"^>.*?(?=\n\n)", section, re.DOTALL | re.MULTILINE)
    return re.sub(r"^> ?", "", found[0], flags=re.MULTILINE)


@pytest.mark.parametrize("kind", WARNINGS)
def test_each_warning_is_quoted_and_drawn_as_a_training_gives_it(
    kind, monkeypatch, tmp_path, capsys
):
    """The script itself asserts that the mended training is not warned."""
    name = kind.replace(" ", "_")
    (section,) = [text for text in sections(WRONG) if f"]({name}.png)" in text]
    picture = WRONG.parent / f"{name}.png"
    command = ["pictures.py", "--only", name, "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(WRONG.parent / "pictures.py"), run_name="__main__")
    said = capsys.readouterr().out.removeprefix(f"{name}: OnlineHPOCallback: ")
    assert without_numbers(said).startswith(without_numbers(quoted(section)).rstrip("."))
    assert 5_000 < (tmp_path / picture.name).stat().st_size < 40_000
    assert 5_000 < picture.stat().st_size < 40_000


def test_a_start_that_was_replaced_is_quoted_as_it_is_said(monkeypatch):
    (section,) = [text for text in sections(WRONG) if text.startswith("My start was replaced")]
    said = []
    monkeypatch.setattr(strategy, "rank_zero_info", said.append)
    (block,) = blocks(README)
    code = block.replace("register_l2(1e-4)", "register_l2(1e-6)")
    exec(code.replace("max_epochs=300", "max_epochs=60"), {"__name__": "guide"})
    assert [without_numbers(text) for text in said] == [without_numbers(quoted(section))]


# ------------------------------------------------------------------------------ what pages print

FIRST = ROOT / "examples" / "guide" / "first_run.md"
CHOOSING = ROOT / "examples" / "guide" / "choosing.md"


def printed(action) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        action()
    return out.getvalue()


@pytest.mark.slow
def test_the_first_run_prints_what_it_shows(readme):
    """At its full length: whether λ is settled belongs to what is compared."""

    def whole():
        for number, block in enumerate(blocks(FIRST), start=1):
            lightning.seed_everything(0, verbose=False)
            exec(compile(block, f"first_run.md, block {number}", "exec"), readme)

    said = without_numbers(printed(whole))
    shown = [without_numbers(text) for text in outputs(FIRST)]
    assert len(shown) == 3
    ends = [said.index(text) for text in shown]
    assert ends == sorted(ends)


@pytest.mark.parametrize("page", [p for p in GUIDE if p != FIRST], ids=lambda page: page.stem)
def test_other_pages_show_no_output_that_is_not_compared(page):
    assert not outputs(page)
    fences = re.findall(r"^```(.*)\n(.*)", page.read_text(), re.MULTILINE)[::2]
    for language, line in fences:
        assert language == "python" or (language == "" and line.startswith("python ")), line


def test_comments_beside_prints_say_what_is_printed(readme):
    """Such as ``print(tune(WithL2()))  # {'l2': ...}``."""
    page = ROOT / "examples" / "guide" / "what_can_be_tuned.md"
    shown = re.findall(r"^print\(.*\)  # (\{.*\})$", page.read_text(), re.MULTILINE)
    lines = [line for line in printed(lambda: run(page, readme)).splitlines() if line[0] == "{"]
    assert len(shown) == len(lines) >= 5
    for comment, line in zip(shown, lines, strict=True):
        assert re.fullmatch(re.escape(comment).replace(r"\.\.\.", ".+"), line), (comment, line)


def test_the_table_of_what_is_chosen(readme):
    """It says in other words what the code above it prints."""
    code = next(block for block in blocks(CHOOSING) if "choose_estimators" in block)
    lines = re.findall(
        r"(\d+) steps, (\d) λ: (\w+), (\d+) updates", printed(lambda: exec(code, readme))
    )
    table = re.findall(r"^\| ([\d ]+) steps \| (.*) \|$", CHOOSING.read_text(), re.MULTILINE)
    rows = []
    for steps, cells in table:
        for count, cell in zip("1256", cells.split(" | "), strict=True):
            estimator, updates = re.fullmatch(r"(\S+), ([\d ]+?)(?: updates)?", cell).groups()
            rows.append((steps, count, estimator.strip("`"), updates))
    assert [tuple(cell.replace(" ", "") for cell in row) for row in rows] == [
        (steps, count, estimator.replace("ClipR", "tangents"), updates)
        for steps, count, estimator, updates in lines
    ]


# ------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """Returns those that GitHub makes of the headings."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        kept = [c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
        found.add("".join(kept).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_index():
    index = (ROOT / "examples" / "guide" / "README.md").read_text()
    for page in GUIDE:
        assert page.name == "README.md" or f"({page.name})" in index, page.name


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_paths_in_the_text_are_there(page):
    """Such as `tests/test_resume.py` or `examples/noise.py`, in commands, too."""
    for path in re.findall(r"\b(?:examples|tests|lightning_hpo)/[\w/]+\.\w+", page.read_text()):
        assert (ROOT / path).exists(), path
