"""Tokens of the calibration windows that a calibration uses: all, or those of responses in conversations."""

from typing import Literal

CalibrateOn = Literal["all", "responses"]


def only_if_masked(calibrate_on: CalibrateOn) -> dict[str, str]:
    """Return the setting as part of a key. It is left out for all tokens, as older keys do not have it."""
    return {} if calibrate_on == "all" else {"calibrate_on": calibrate_on}
