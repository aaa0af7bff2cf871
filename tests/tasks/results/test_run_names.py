"""Run names: the last part of a model's name, and the first betas."""

import pytest

from layerwise.tasks.results.run_names import points_title, title_of, windows_title


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("demo", "demo"),
        ("HuggingFaceTB/SmolLM2-135M@12fd25f77366fa6b3b4b768ec3050bf629380bac", "SmolLM2-135M"),
        ("/home/somebody/models/mistral-7b/", "mistral-7b"),
        ("s3://bucket/models/small.gguf", "small.gguf"),
        ("https://host/models/small.gguf?versionId=12", "small.gguf"),
        ("/models/tuned@home", "tuned@home"),
    ],
)
def test_a_title_is_the_last_part_of_a_model_s_name(source, title):
    assert title_of(source) == title


def test_few_betas_are_named_and_many_are_counted():
    def title(*betas):
        return points_title([(beta, 0.0) for beta in betas])

    assert title(0.0) == "beta 0"
    assert title(0.0, 0.00459770, 0.1) == "beta 0, 0.004598, 0.1"
    assert title(0.0, 0.1, 0.2, 0.3, 0.4) == "beta 0, 0.1, 0.2 ... (5)"


def test_offsets_are_named_if_there_are_any():
    assert points_title([(0.0, 0.0), (0.1, -0.05)]) == "beta 0 +0, 0.1 -0.05"


def test_a_part_of_the_windows_is_named():
    assert windows_title(None) == ""
    assert windows_title((8, 16)) == ", windows 8 to 15"
