"""The files that name a version name the same one."""

import re
from pathlib import Path

import yaml

from lightning_hpo import __version__

ROOT = Path(__file__).parents[1]


def test_the_changelog_begins_with_this_version():
    heads = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[0] == ("Unreleased", "")
    assert heads[1][0] == __version__


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    dates = dict(re.findall(r"^## \[(.+?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M))
    assert citation["version"] == __version__
    assert str(citation["date-released"]) == dates[__version__]
    assert len(citation["references"]) == 9
