"""Saved results as pictures: PNG files that leave what they show as it is."""

import copy
import struct
import sys
from pathlib import Path

import pytest

from safeweights_peft.errors import ReportError
from safeweights_peft.study.pictures import (
    check_installed,
    plot_pattern,
    plot_probe,
    plot_run,
    plot_sweep,
)
from safeweights_peft.tables import comparison_rows
from tests.study.records import LOSSES, PROBE, RESULT, SWEEP, record_of


def size_of(path: Path) -> tuple[int, int]:
    """Reads width and height off a PNG file's header."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_a_run_is_drawn_as_a_png_picture(tmp_path: Path) -> None:
    plot_run(RESULT, LOSSES, tmp_path / "run.png")
    width, height = size_of(tmp_path / "run.png")
    assert height > width > 100  # a phone is narrow


def test_a_run_of_no_steps_is_drawn_too(tmp_path: Path) -> None:
    plot_run(RESULT, [], tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000


@pytest.mark.parametrize("scale", [0.5, None])
def test_a_sweep_is_drawn_whether_a_scale_was_picked_or_not(
    scale: float | None, tmp_path: Path
) -> None:
    plot_sweep(SWEEP | {"scale": scale}, tmp_path / "sweep.png")
    width, height = size_of(tmp_path / "sweep.png")
    assert height > width > 100


def test_drawing_and_writing_leave_the_result_as_it_is(tmp_path: Path) -> None:
    result, losses = copy.deepcopy(RESULT), copy.deepcopy(LOSSES)
    comparison_rows(result)
    plot_run(result, losses, tmp_path / "run.png")
    assert (result, losses) == (RESULT, LOSSES)


@pytest.mark.parametrize(
    ("experts", "names"),
    [
        (0, ["components.png", "heatmap.png", "layers.png"]),
        (3, ["components.png", "experts.png", "heatmap.png", "layers.png"]),
    ],
)
def test_a_pattern_is_drawn_as_pictures_of_experts_only_where_there_are_some(
    experts: int, names: list[str], tmp_path: Path
) -> None:
    written = plot_pattern(record_of(layers=2, experts=experts), tmp_path)
    assert sorted(path.name for path in written.values()) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(min(size_of(path)) > 100 for path in written.values())


def test_a_heatmap_grows_with_the_model_and_a_huge_one_stays_a_picture(tmp_path: Path) -> None:
    heights = []
    for layers, experts in ((2, 0), (20, 0), (100, 300)):
        plot_pattern(record_of(layers, experts), tmp_path)
        heights.append(size_of(tmp_path / "heatmap.png")[1])
    assert heights[0] < heights[1] < heights[2] < 2000
    assert max(size_of(tmp_path / "experts.png")) < 2000


def test_a_selection_of_nothing_is_drawn_too(tmp_path: Path) -> None:
    record = record_of(layers=2)
    for cell in (*record["cells"], *record["layers"], *record["components"]):
        cell |= {"selected": 0, "selected_share": 0.0, "enrichment": 0.0}
    plot_pattern(record, tmp_path)
    assert size_of(tmp_path / "heatmap.png")


def test_drawing_a_pattern_leaves_the_record_as_it_is(tmp_path: Path) -> None:
    record = record_of(layers=2, experts=2)
    before = copy.deepcopy(record)
    plot_pattern(record, tmp_path)
    assert record == before


def test_a_pattern_is_drawn_to_the_same_bytes_a_second_time(tmp_path: Path) -> None:
    record = record_of(layers=2)
    first = {path: path.read_bytes() for path in plot_pattern(record, tmp_path).values()}
    second = {path: path.read_bytes() for path in plot_pattern(record, tmp_path).values()}
    assert first == second


def test_a_probe_is_drawn_as_a_png_picture(tmp_path: Path) -> None:
    before = copy.deepcopy(PROBE)
    plot_probe(PROBE, tmp_path / "probe.png")
    width, height = size_of(tmp_path / "probe.png")
    assert width > height > 100
    assert before == PROBE


def test_without_matplotlib_drawing_says_in_one_line_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = r"^matplotlib: expected .*; run pip install 'safeweights-peft\[study\]'$"
    with pytest.raises(ReportError, match=message):
        plot_run(RESULT, LOSSES, tmp_path / "run.png")
    assert list(tmp_path.iterdir()) == []


def test_every_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("matplotlib", "scipy"):
        check_installed(package)
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ReportError, match=r"^matplotlib, scipy: expected to be installed"):
        check_installed("numpy", "matplotlib", "scipy")
