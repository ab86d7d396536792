"""The files that a package is built of; `scripts/package` builds one, installs it and runs it, which takes minutes."""

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
README = (REPOSITORY / "README.md").read_text()
URL = PROJECT["project"]["urls"]["Repository"]
RAW = URL.replace("//github.com", "//raw.githubusercontent.com")
LINKS = re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', README)


@pytest.mark.parametrize("link", [markdown or html for markdown, html in LINKS])
def test_a_link_of_readme_works_from_another_site(link):
    """PyPI shows README without the files beside it."""
    assert link.startswith(("https://", "#"))
    for start in (f"{URL}/blob/main/", f"{URL}/tree/main/", f"{RAW}/main/"):
        if link.startswith(start):
            path = REPOSITORY / link.removeprefix(start)
            assert path.is_dir() if "/tree/" in start else path.is_file()
            return
    assert not link.startswith((URL, RAW))


def test_there_are_links():
    assert len(LINKS) >= 8


def test_the_changelog_begins_with_this_version():
    version = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version is not None
    assert version[1] == PROJECT["project"]["version"]


def test_sources_move_in_the_wheel_alone():
    """A wheel is made of the sdist, which therefore has the repository's own folders, and all that the wheel takes."""
    build = PROJECT["tool"]["hatch"]["build"]
    sdist, wheel = build["targets"]["sdist"], build["targets"]["wheel"]
    assert build.keys() == {"targets"}
    assert sdist.keys() == {"only-include"}
    assert {*wheel["only-include"], *wheel["force-include"]} <= {*sdist["only-include"]}
    assert "model_cards" in wheel["force-include"]
