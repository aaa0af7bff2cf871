"""Times as text for people."""


def duration(seconds: float) -> str:
    """Return an estimated time with two significant digits in its largest unit, such as "40 s", "3.5 min", "12 h"."""
    for unit, length, limit in (("s", 1, 60), ("min", 60, 120), ("h", 3600, 72)):
        count = float(f"{seconds / length:.2g}")
        if count < limit:
            return f"{count:g} {unit}"
    return f"{float(f'{seconds / 86400:.2g}'):g} days"
