"""Text on its way into a CSV file, which people open with a spreadsheet."""

_MARK = "'"
# What a spreadsheet takes for the beginning of a formula (OWASP, CSV injection), and the mark itself.
_MARKED = frozenset("=+-@\t\r\n＝＋－＠" + _MARK)  # noqa: RUF001 - full-width: some take these, too


def cell(text: str) -> str:
    """The text as a cell that no spreadsheet runs: with a ' in front where it begins like a formula, or with a '.

    Lossless: a cell that begins with ' is the text behind it.
    """
    return _MARK + text if text[:1] in _MARKED else text
