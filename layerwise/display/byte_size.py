"""Numbers of bytes as text for people, in tables, messages and reports."""

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "GiB": 2**30}
DECIMAL = ("B", "kB", "MB", "GB", "TB")


def size(count: float) -> str:
    """Return ``count`` bytes with three significant digits and a decimal unit, such as "1.24 GB"; "" for zero."""
    if not count:
        return ""
    for unit in DECIMAL[:-1]:
        digits = f"{count / UNITS[unit]:.3g}"
        if float(digits) < 1000:  # after rounding: 999.6 kB is "1 MB"
            return f"{digits} {unit}"
    return f"{count / UNITS['TB']:.3g} TB"


def size_in(unit: str, count: float, digits: int = 0) -> str:
    """Return ``count`` bytes in a fixed unit, such as "1.2 GiB".

    Args:
        unit: a key of ``UNITS``.
        digits: number of digits after the decimal point.
    """
    return f"{count / UNITS[unit]:.{digits}f} {unit}"
