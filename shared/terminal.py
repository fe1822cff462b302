"""What others wrote, as it is shown to people."""


def printable(text: str) -> str:
    """On one line, whatever is in it, and nothing that a terminal would obey: all else is escaped, as \\u202e."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
