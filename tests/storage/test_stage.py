"""Keys of stages: the changes they depend on, and a fixed key that must never change by accident."""

from dataclasses import dataclass

import numpy as np
import pytest

from layerwise.storage.stage import Stage


@dataclass(frozen=True)
class Wanda:
    method: str = "wanda"


@dataclass(frozen=True)
class PruneLayer:
    layer: int
    sparsity: float
    pruner: Wanda = Wanda()


@dataclass
class Changeable:
    layer: int = 0


@dataclass(frozen=True)
class WithType:
    type: str = "a"


BASE = {
    "name": "prune-layer",
    "version": 1,
    "settings": PruneLayer(3, 0.5),
    "inputs": {"layer": "a", "states": "b"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "prune"},
        {"version": 2},
        {"settings": PruneLayer(4, 0.5)},
        {"settings": PruneLayer(3, 0.6)},
        {"inputs": {"layer": "b", "states": "a"}},
    ],
    ids=["name", "version", "layer", "sparsity", "swapped inputs"],
)
def test_the_key_depends_on_every_part_of_the_stage(change):
    assert Stage(**BASE | change).key != Stage(**BASE).key


def test_the_key_ignores_the_order_of_the_inputs():
    reversed_inputs = dict(reversed(BASE["inputs"].items()))
    assert Stage(**BASE | {"inputs": reversed_inputs}).key == Stage(**BASE).key


def test_the_key_is_the_one_of_existing_stores():
    assert Stage(**BASE).key == "prune-layer/5d141623e28c2118b1bb9fb02a3f7b45"


@pytest.mark.parametrize(
    "value",
    [print, {1, 2}, b"a", np.float64(0.5), object(), Changeable(), Changeable, WithType(), {1: 2}],
    ids=lambda value: type(value).__name__,
)
def test_settings_that_are_not_plain_are_refused(value):
    with pytest.raises(TypeError, match=r"settings"):
        _ = Stage("measure", 1, settings={"score": [value]}).key


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_a_stage_name_must_be_a_folder_name(name):
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        Stage(name, 1)


def test_the_recipe_is_the_stage_in_plain_json():
    assert Stage(**BASE).recipe == {
        "name": "prune-layer",
        "version": 1,
        "settings": {
            "type": "PruneLayer",
            "layer": 3,
            "sparsity": 0.5,
            "pruner": {"type": "Wanda", "method": "wanda"},
        },
        "inputs": {"layer": "a", "states": "b"},
    }
