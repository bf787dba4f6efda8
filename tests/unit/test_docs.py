"""What the documentation names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]


def test_every_file_and_name_in_life_of_a_request_exists() -> None:
    text = (ROOT / "docs" / "life-of-a-request.md").read_text()
    named = re.findall(r"`(tinsmith/[\w/]+\.py)`(?: `([\w.]+)`)?", text)
    assert len(named) >= 7
    for file, name in named:
        source = (ROOT / file).read_text()
        for part in filter(None, name.split(".")):
            assert re.search(rf"(?:def|class) {part}\b", source), f"{file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"(docs/{page.name}" not in text] == []


def test_the_tests_that_the_page_on_correctness_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "correctness.md").read_text()))
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 20
    assert {name for name in named if f"def {name}(" not in sources} == set()
