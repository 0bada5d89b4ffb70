"""Numbers as the tables print them."""

import pytest

from scalora.ablation.report.tables import Table, as_markdown, shown
from scalora.ablation.statistics import Statistic


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Statistic(1.53512, 0.00231, 3), "1.5351 ± 0.0023"),
        (Statistic(95.961, 0.1043, 3), "95.96 ± 0.10"),
        (Statistic(1.53512, 0.0, 3), "1.535 ± 0.000"),
        (Statistic(1.53512, None, 1), "1.535"),
        (Statistic(1234.5, 56.7, 3), "1,234 ± 57"),
        (Statistic(float("inf"), None, 3, diverged=1), "diverged (1 of 3)"),
        (Statistic(float("inf"), None, 3, diverged=3), "diverged"),
        (None, "–"),
    ],
)
def test_mean_has_the_digits_that_its_error_leaves(found: Statistic | None, expected: str) -> None:
    assert shown(found) == expected


def test_difference_has_a_sign() -> None:
    assert shown(Statistic(0.0009, 0.01158, 3), signed=True) == "+0.001 ± 0.012"
    assert shown(Statistic(-89.07, 0.16, 3), signed=True) == "-89.07 ± 0.16"


def test_share_is_in_percent() -> None:
    assert shown(Statistic(0.505, 0.003, 2), percent=True) == "50.5% ± 0.3"


def test_markdown_keeps_what_a_cell_says() -> None:
    table = Table("title", ("method", "x"), [("a|b", "1")], ("a note",))
    assert as_markdown(table).splitlines() == [
        *("### title", "", "| method | x  |", "| ------ | -: |", "| a\\|b   | 1  |", "", "a note"),
    ]
