"""Random controls: as many entries as a map has, in rows and columns where it has those."""

from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.delta import Array
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.patch.groups import Group, count_groups, find_groups, spread_groups
from safeweights_peft.study.controls import count_entries, draw_control, draw_lines
from tests.tuner.patches import load_base, random_content

UP = "model.layers.0.mlp.up_proj.weight"


def count_by_matrix(indices: Array, shape: tuple[int, ...], group: Group) -> list[int]:
    """Counts the lines in each matrix, of entries that are nothing else."""
    found = find_groups(indices, shape)
    assert found is not None
    assert found[0] == group
    size = shape[-2 if group == "row" else -1]
    counts: list[int] = np.bincount(
        found[1] // size, minlength=count_groups(shape, group)[0] // size
    )
    return list(counts)


@pytest.mark.parametrize("group", ["row", "column"])
@pytest.mark.parametrize("base", ["tiny_llama", "tiny_mixtral"])
def test_lines_are_as_many_others_of_each_matrix(
    base: str, group: Group, request: pytest.FixtureRequest
) -> None:
    model = load_base(request.getfixturevalue(base))
    names = [*eligible_parameters(model)]
    taken, _ = random_content(model, density=0.2, names=names, group=group)
    drawn = draw_control(model, taken, 5, 1)
    assert [*drawn] == [*taken]
    for name, indices in taken.items():
        shape = tuple(model.get_parameter(name).shape)
        assert not np.intersect1d(drawn[name], indices).size
        expected = count_by_matrix(indices, shape, group)
        assert count_by_matrix(drawn[name], shape, group) == expected
    again, other = draw_control(model, taken, 5, 1), draw_control(model, taken, 5, 2)
    assert all(np.array_equal(again[name], drawn[name]) for name in taken)
    assert any(not np.array_equal(other[name], drawn[name]) for name in taken)


def test_every_other_line_is_drawn_as_often() -> None:
    shape, counts = (10, 6), np.zeros(10)
    taken = {"a.b": spread_groups(np.array([2, 7]), "row", shape)}
    for draw in range(400):
        group, numbers = find_groups(draw_lines({"a.b": shape}, taken, draw)["a.b"], shape)
        assert (group, numbers.size) == ("row", 2)
        counts[numbers] += 1
    assert counts[[2, 7]].sum() == 0
    others = np.delete(counts, [2, 7])
    assert (abs(others - 100) < 5 * np.sqrt(400 * 0.25 * 0.75)).all()


def test_what_a_matrix_has_too_few_of_is_drawn_as_single_entries(tiny_llama: Path) -> None:
    model = load_base(tiny_llama)
    shape = tuple(model.get_parameter(UP).shape)
    taken = {UP: spread_groups(np.arange(shape[0] - 3), "row", shape)}
    drawn = draw_control(model, taken, 0)
    assert count_entries(drawn) == count_entries(taken)
    assert np.array_equal(drawn[UP], np.arange((shape[0] - 3) * shape[1], shape[0] * shape[1]))
    assert len(drawn) > 1
    for indices in drawn.values():
        assert (np.diff(indices) > 0).all()


def test_a_full_matrix_leaves_no_line_to_draw() -> None:
    taken = {"a.b": np.arange(12, dtype=np.int32)}
    assert draw_lines({"a.b": (3, 4)}, taken, 0) == {}
