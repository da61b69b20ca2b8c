"""Codes of labels: what a source says of the classes that it does not label."""

from __future__ import annotations

import numpy as np
import pytest

from geoseg.errors import ConfigError
from geoseg.train.codes import UNLABELLED, LabelCodes

BACKGROUND, BUILDING, ROAD = range(3)
CODES = LabelCodes.for_sources(3, [(BUILDING, ROAD), (BUILDING,), (ROAD,), (BUILDING,)])


def test_beside_all_that_a_source_labels_is_what_it_does_not_label() -> None:
    assert CODES.background_of((BUILDING, ROAD)) == BACKGROUND
    for labelled, other in (((BUILDING,), ROAD), ((ROAD,), BUILDING)):
        code = CODES.background_of(labelled)
        assert code not in (BACKGROUND, BUILDING, ROAD, UNLABELLED)
        assert set(np.flatnonzero(CODES.possible[code])) == {BACKGROUND, other}


def test_a_class_is_that_class_and_an_unlabelled_pixel_may_be_any() -> None:
    assert CODES.possible[:3].tolist() == np.eye(3, dtype=bool).tolist()
    assert CODES.possible[UNLABELLED].all()


def test_codes_do_not_depend_on_the_order_of_the_sources() -> None:
    assert LabelCodes.for_sources(3, [(ROAD,), (ROAD, BUILDING), (BUILDING,)]) == CODES


def test_more_classes_than_codes_are_refused() -> None:
    with pytest.raises(ConfigError, match="255 codes"):
        LabelCodes(255, ((0, 1),))
