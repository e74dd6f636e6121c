"""Words that messages of all packages share."""


def count_of(number: int, thing: str, several: str | None = None) -> str:
    """Write how many there are: 1 subject, 2 subjects; what is not made plural by an s is given whole."""
    return f"{number} {thing if number == 1 else several or thing + 's'}"
