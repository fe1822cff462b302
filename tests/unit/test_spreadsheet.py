"""A cell of a CSV file is never run as a formula, and loses nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.spreadsheet import cell

FORMULAS = ["=1+1", "+49 30 1234", "-94", "@SUM(A1)", "\t=1+1", "\r=1+1", "\n=1+1", "＝1+1"]  # noqa: RUF001


@pytest.mark.parametrize("text", FORMULAS)
def test_what_a_spreadsheet_would_run_gets_a_mark_in_front(text: str) -> None:
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "user_1", "a=1", "überall 🛤", '"quoted"', "1-1"])
def test_any_other_text_is_left_as_it_is(text: str) -> None:
    assert cell(text) == text


@given(st.text() | st.sampled_from([*FORMULAS, "'", "'=1+1", "''"]))
def test_without_the_mark_a_cell_is_the_text_again(text: str) -> None:
    assert cell(text).removeprefix("'") == text
