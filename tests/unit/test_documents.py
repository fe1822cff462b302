"""What the documents point at is there."""

import re

import pytest

from tests.stack import PROJECT

DOCUMENTS = ["README.md", "ARCHITECTURE.md"]
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_test_that_is_named_is_in_the_file_that_is_named(document: str) -> None:
    for file, name in _TEST.findall((PROJECT / document).read_text(encoding="utf-8")):
        source = (PROJECT / file).read_text(encoding="utf-8")
        assert re.search(rf"^(async def|def|class) {name}\b|^{name} = ", source, re.MULTILINE), f"{file}::{name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_link_leads_somewhere(document: str) -> None:
    for link in _LINK.findall((PROJECT / document).read_text(encoding="utf-8")):
        assert (PROJECT / link).exists(), link
