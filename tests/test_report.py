"""Tables and pictures of saved results, to the letter."""

import copy
import struct
from pathlib import Path
from typing import Any

import pytest

from safeweights_peft.report import (
    comparison_rows,
    evaluation_rows,
    judged_rows,
    plot_probe,
    plot_run,
    probe_rows,
    rate_text,
    size_text,
    verdict_lines,
)


def rate(count: int, n: int, low: float, high: float) -> dict[str, Any]:
    return {"count": count, "n": n, "rate": count / n, "low": low, "high": high}


RESULT: dict[str, Any] = {
    "before": {
        "attack_success_rate": rate(97, 100, 0.9155, 0.9897),
        "over_refusal_rate": rate(0, 112, 0.0, 0.0332),
        "invalid": 1,
        "kl": 0.0,
        "perplexity": 1.2345,
        "task_loss": None,
    },
    "after": {
        "attack_success_rate": rate(2, 100, 0.0055, 0.07),
        "over_refusal_rate": rate(7, 112, 0.0306, 0.1234),
        "invalid": 0,
        "kl": 0.012345,
        "perplexity": 1.301,
        "task_loss": None,
    },
    "patch": {"entries": 1_345_155, "share_of_weights": 0.01, "size_bytes": 8_072_000},
}
LOSSES = [{"step": step, "refusal": 2.0 / step, "retain": 0.0} for step in range(1, 6)]


def test_a_comparison_sets_every_figure_side_by_side() -> None:
    assert comparison_rows(RESULT) == [
        ("ASR, harmful requests", "97.0 % [91.5, 99.0] (97/100)", "2.0 % [0.5, 7.0] (2/100)"),
        ("over-refusal, benign requests", "0.0 % [0.0, 3.3] (0/112)", "6.2 % [3.1, 12.3] (7/112)"),
        ("invalid answers", "1", "0"),
        ("KL to the base (nats/token)", "0.0000", "0.0123"),
        ("perplexity of the base's answers", "1.23", "1.30"),
        ("weights changed", "0", "1,345,155 (1.000%)"),
        ("patch size", "", "8.1 MB"),
    ]


def test_an_evaluation_lists_its_figures_and_adds_up_what_was_invalid() -> None:
    evaluation = {
        "harmful": {"attack_success_rate": rate(97, 100, 0.9155, 0.9897), "invalid": 2},
        "benign": {"over_refusal_rate": rate(0, 112, 0.0, 0.0332), "invalid": 1},
        "utility": {"kl": 0.25, "perplexity": 12.0, "tokens": 900},
        "task": None,
    }
    assert evaluation_rows(evaluation) == [
        ("ASR, harmful requests", "97.0 % [91.5, 99.0] (97/100)"),
        ("over-refusal, benign requests", "0.0 % [0.0, 3.3] (0/112)"),
        ("invalid answers", "3"),
        ("KL to the base (nats/token)", "0.2500"),
        ("perplexity of the base's answers", "12.00"),
    ]
    on_a_task = evaluation_rows(evaluation | {"task": {"loss": 1.25, "tokens": 70}})
    assert on_a_task[-1] == ("loss on the task (nats/token)", "1.2500")


def test_losses_on_a_task_stand_side_by_side_where_one_was_given() -> None:
    before, after = ({**RESULT["before"], "task_loss": loss} for loss in (2.0, 1.5))
    assert judged_rows(before, after)[-1] == ("loss on the task (nats/token)", "2.0000", "1.5000")
    assert len(judged_rows(RESULT["before"], RESULT["after"])) == 3


def test_a_rate_is_written_with_its_interval_and_counts() -> None:
    assert rate_text(rate(1, 3, 0.0615, 0.7923)) == "33.3 % [6.2, 79.2] (1/3)"
    assert rate_text(rate(3, 3, 0.4385, 1.0)) == "100.0 % [43.9, 100.0] (3/3)"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1250, "1.2 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (8_072_000, "8.1 MB"),
        (10**9, "1.0 GB"),
        (999_960_000_000, "1.0 TB"),
        (4.5e15, "4500.0 TB"),
    ],
)
def test_a_size_is_written_in_the_largest_unit_that_leaves_at_least_1(
    size_bytes: float, text: str
) -> None:
    assert size_text(size_bytes) == text


def test_a_run_is_drawn_as_a_png_picture(tmp_path: Path) -> None:
    plot_run(RESULT, LOSSES, tmp_path / "run.png")
    content = (tmp_path / "run.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert width > height > 100


def test_a_run_of_no_steps_is_drawn_too(tmp_path: Path) -> None:
    plot_run(RESULT, [], tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_drawing_and_writing_leave_the_result_as_it_is(tmp_path: Path) -> None:
    result, losses = copy.deepcopy(RESULT), copy.deepcopy(LOSSES)
    comparison_rows(result)
    plot_run(result, losses, tmp_path / "run.png")
    assert (result, losses) == (RESULT, LOSSES)


def probed(perturbation: str | None, selection: str, draws: int, **kl: float | None) -> dict:
    return {
        "perturbation": perturbation,
        "selection": selection,
        "attack_success_rate": rate(17, 100, 0.1092, 0.2555),
        "over_refusal_rate": rate(7, 112, 0.0306, 0.1234),
        "invalid_rate": rate(1, 200, 0.0009, 0.0278),
        "kl": {"mean": 0.0, "low": None, "high": None} | kl,
        "draws": [{}] * draws,
    }


PROBE: dict[str, Any] = {
    "rows": [
        probed(None, "base", 1),
        probed("noise", "map", 5, mean=0.25, low=0.125, high=0.375),
    ],
    "verdicts": {
        "noise": {"verdict": "specific", "reason": "it rises"},
        "zero": {"verdict": "can't tell", "reason": "it may rise"},
    },
}


def test_a_probe_is_laid_out_as_one_table_with_intervals() -> None:
    judged = "17.0 % [10.9, 25.6]", "6.2 % [3.1, 12.3]", "0.5 % [0.1, 2.8]"
    assert probe_rows(PROBE) == [
        ("", "draws", "ASR", "over-refusal", "invalid answers", "KL (nats/token)"),
        ("base", "1", *judged, "0.0000"),
        ("noise, map", "5", *judged, "0.2500 [0.1250, 0.3750]"),
    ]


def test_a_probes_verdicts_are_sentences() -> None:
    assert verdict_lines(PROBE) == [
        "With noise at the map's weights: specific: it rises.",
        "With the map's weights at zero: can't tell: it may rise.",
    ]


def test_a_probe_is_drawn_as_a_png_picture(tmp_path: Path) -> None:
    before = copy.deepcopy(PROBE)
    plot_probe(PROBE, tmp_path / "probe.png")
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert before == PROBE
