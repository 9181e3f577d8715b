"""What `make check-minimums` is about; it takes minutes and runs by itself."""

from __future__ import annotations

import pytest

pytest.importorskip("packaging")

from check_minimums import CHECKS, claimed, oldest, pinned
from packaging.requirements import Requirement


def test_every_extra_says_how_old_its_packages_may_be_and_has_a_check() -> None:
    extras = claimed()
    assert extras.keys() == CHECKS.keys()
    for extra, asked in extras.items():
        assert any("==" in oldest(one) for one in asked), extra


def test_the_oldest_version_is_the_lower_bound_unless_another_is_asked_for() -> None:
    assert oldest(Requirement("one>=1.2,<3")) == "one==1.2"
    assert oldest(Requirement("one")) == "one"
    assert pinned(["datasets"], ["datasets==4"]) == ["datasets==4"]
