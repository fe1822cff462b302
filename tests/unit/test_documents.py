"""What the documents point at is there."""

import re

import pytest

from tests.stack import PROJECT

DOCUMENTS = ["README.md", "ARCHITECTURE.md"]
# `…::test_x` is in the file that the same line named last, and of `test_x_…` the name goes on.
_TEST = re.compile(r"`([\w/]+\.py|…)::(\w+)(…?)`")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_test_that_is_named_is_in_the_file_that_is_named(document: str) -> None:
    for line in (PROJECT / document).read_text(encoding="utf-8").splitlines():
        named = ""
        for file, name, more in _TEST.findall(line):
            named = named if file == "…" else file
            assert named, f"{file}::{name} follows no file"
            files = (PROJECT / "tests").glob(f"**/{named.removeprefix('tests/')}")
            begun = name if more else rf"{name}\b"
            pattern = re.compile(rf"^(async def|def|class) {begun}|^{begun} = ", re.MULTILINE)
            assert any(pattern.search(each.read_text(encoding="utf-8")) for each in files), f"{named}::{name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_link_leads_somewhere(document: str) -> None:
    for link in _LINK.findall((PROJECT / document).read_text(encoding="utf-8")):
        assert (PROJECT / link).exists(), link
