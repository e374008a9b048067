"""Old names work and say what they are called now."""

from __future__ import annotations

import pytest

from latentgen.deprecated import renamed_arguments, warn_renamed


@renamed_arguments(width_of_image="width")
def _area(width: int, height: int = 2) -> int:
    return width * height


def test_an_argument_works_by_its_old_name_and_the_warning_names_both() -> None:
    with pytest.warns(FutureWarning, match=r"width_of_image.*\bwidth\b") as caught:
        assert _area(**{"width_of_image": 3}) == 6
    assert caught[0].filename == __file__


def test_the_new_name_warns_of_nothing_and_excludes_the_old(recwarn: pytest.WarningsRecorder) -> None:
    assert _area(width=3, height=3) == 9
    assert not recwarn.list
    with pytest.raises(TypeError, match="width_of_image"):
        _area(width=3, **{"width_of_image": 3})


def test_a_warning_points_at_the_caller_of_what_was_renamed() -> None:
    def old_function() -> None:
        warn_renamed("old_function", "new_function")

    with pytest.warns(FutureWarning, match="new_function") as caught:
        old_function()
    assert caught[0].filename == __file__
