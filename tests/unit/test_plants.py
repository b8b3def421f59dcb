"""The faults that `make plants` plants must still be where it looks for them."""

import pytest

from tests.plants import PLANTS, ROOT, Plant


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_plant_finds_its_place_once_and_tests_that_exist(plant: Plant) -> None:
    assert all((ROOT / plant.file).read_text().count(sound) == 1 for sound, _ in ((plant.sound, ""), *plant.also))
    assert plant.broken not in (ROOT / plant.file).read_text() or plant.broken in plant.sound
    assert all((ROOT / test.partition("::")[0]).is_file() for test in plant.tests)
