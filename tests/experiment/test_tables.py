"""Which rows a table has, and what makes a row another one."""

from __future__ import annotations

import re

import pytest

from raccgan.errors import InputError
from raccgan.experiment.tables import BENCHMARKS, VARIANTS, trials


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_variant_of_every_table_is_a_configuration(name: str) -> None:
    found = trials(name, variants=list(VARIANTS))
    assert len(found) == 3 * len(VARIANTS) * len(BENCHMARKS[name].normal)
    assert len({row.key for row in found}) == len({row.folder for row in found}) == len(found)


def test_every_class_comes_once_before_one_comes_twice() -> None:
    assert [row.normal for row in trials("mnist")][:11] == [*"0123456789", "0"]


def test_a_variant_changes_what_it_says_and_nothing_else() -> None:
    default, plain = (
        trials("digits", variants=[name], normal=["3"], seeds=[0])[0] for name in ("default", "dense-convolution")
    )
    differ = {n for n, v in default.config.to_dict().items() if plain.config.to_dict()[n] != v}
    assert differ == {"convolution"}


def test_a_row_is_another_one_where_its_result_would_be() -> None:
    (row,) = trials("digits", normal=["3"], seeds=[0])
    (slower,) = trials("digits", normal=["3"], seeds=[0], settings={"kernels": "reference", "threads": 2})
    (longer,) = trials("digits", normal=["3"], seeds=[0], settings={"gan_steps": 7})
    assert row.key == slower.key
    assert row.key != longer.key


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "mnits"}, "no experiment called 'mnits'; did you mean 'mnist'"),
        ({"name": "digits", "variants": ["dense"]}, "no variant called 'dense'"),
        ({"name": "fashion-mnist", "normal": ["boot"]}, "fashion-mnist has no row for 'boot'"),
        ({"name": "digits", "settings": {"image_size": 9}}, "image_size 9 is not 4 times a power of two"),
    ],
)
def test_what_is_not_there_is_said(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        trials(**arguments)  # type: ignore[arg-type]
