"""Saved results as rows of text, to the letter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeweights_peft.judge_names import explain_judge, short_judge
from safeweights_peft.study.specificity import verdict_lines
from safeweights_peft.tables import (
    comparison_rows,
    evaluation_rows,
    grid_rows,
    judge_rows,
    judged_rows,
    lay_out,
    linear_line,
    linear_rows,
    overlap_rows,
    pattern_rows,
    probe_rows,
    rate_text,
    share_rows,
    size_text,
    sweep_rows,
)
from tests.study.records import PROBE, RESULT, rate, record_of


def test_a_comparison_sets_every_figure_side_by_side() -> None:
    assert comparison_rows(RESULT) == [
        ("", "before", "after"),
        ("ASR, 100 harmful", "97 % [92, 99]", "2 % [1, 7]"),
        ("over-refusal, 112 harmless", "0 % [0, 3]", "6 % [3, 12]"),
        ("invalid answers", "1", "0"),
        ("cut before a sentence ended", "9", "4"),
        ("KL to the base, nats/token", "0.0000", "0.0123"),
        ("perplexity, base's answers", "1.23", "1.30"),
        ("weights changed", "0", "1,345,155 (1.00%)"),
        ("patch size", "", "8.1 MB"),
    ]


def test_a_picked_scale_of_0_is_the_base_which_stands_there_already() -> None:
    row = {"scale": 0.0, **RESULT["before"]}
    assert comparison_rows(RESULT | row | {"rows": [row]}) == comparison_rows(RESULT)


@given(
    st.integers(1, 5).flatmap(
        lambda columns: st.lists(
            st.tuples(*[st.text("ab/- ", max_size=90).map(str.strip)] * columns),
            min_size=1,
            max_size=4,
        )
    ),
    st.integers(48, 100),
)
def test_rows_fit_any_width_and_lose_nothing(rows: list[tuple[str, ...]], width: int) -> None:
    lines = lay_out(rows, width)
    assert max(map(len, lines)) <= width
    assert count(" ".join(lines)) == count(" ".join(map(" ".join, rows)))


def count(text: str) -> list[int]:
    return [text.count(letter) for letter in "ab/-"]


def test_a_folded_path_breaks_behind_a_slash_in_its_own_column() -> None:
    assert lay_out([("path", "models/of-all/tiny"), ("size", "8 B")], 20) == [
        "path  models/of-all/",
        "      tiny",
        "size  8 B",
    ]
    assert lay_out([("path", "models/of-all/tiny")]) == ["path  models/of-all/tiny"]


def test_an_evaluation_lists_its_figures_and_adds_up_what_was_invalid() -> None:
    evaluation = {
        "harmful": {
            "attack_success_rate": rate(97, 100, 0.9155, 0.9897),
            "invalid": 2,
            "cut_short": 5,
            "categories": {"fraud": rate(97, 100, 0.9155, 0.9897)},
        },
        "benign": {
            "over_refusal_rate": rate(0, 112, 0.0, 0.0332),
            "invalid": 1,
            "cut_short": 7,
            "categories": {"plain": rate(0, 56, 0, 0.0642), "hard": rate(7, 56, 0.0619, 0.2363)},
        },
        "utility": {"kl": 0.25, "perplexity": 12.0, "tokens": 900},
        "task": None,
    }
    assert evaluation_rows(evaluation) == [
        ("ASR, harmful requests", "97 % [92, 99] (97/100)"),
        ("over-refusal, benign requests", "0 % [0, 3] (0/112)"),
        ("  hard", "12 % [6, 24] (7/56)"),
        ("  plain", "0 % [0, 6] (0/56)"),
        ("invalid answers", "3"),
        ("cut before a sentence ended", "12"),
        ("KL to the base (nats/token)", "0.2500"),
        ("perplexity of the base's answers", "12.00"),
    ]
    harmful = evaluation["harmful"] | {"cut_in_thought": 3}
    cut = evaluation_rows(evaluation | {"harmful": harmful, "cut_requests": 2})
    assert cut[-2:] == [("cut in their thought", "3"), ("requests without their middle", "2")]
    on_a_task = evaluation_rows(evaluation | {"task": {"loss": 1.25, "tokens": 70}})
    assert on_a_task[-1] == ("loss on the task (nats/token)", "1.2500")


def test_losses_on_a_task_stand_side_by_side_where_one_was_given() -> None:
    before, after = ({**RESULT["before"], "task_loss": loss} for loss in (2.0, 1.5))
    assert judged_rows(before, after)[-1] == ("loss on the task, nats/token", "2.0000", "1.5000")
    assert len(judged_rows(RESULT["before"], RESULT["after"])) == 4
    cut = judged_rows(RESULT["before"], RESULT["after"] | {"cut_in_thought": 3})
    assert cut[-1] == ("cut in their thought", "0", "3")


def test_several_judges_stand_in_one_table_with_their_agreement() -> None:
    named = {"refusals": {"attack_success_rate": rate(9, 10, 0.6, 0.98), "invalid": 0}}
    others = {"guard:g": {"attack_success_rate": rate(8, 10, 0.49, 0.94), "invalid": 1}}
    only = {"refusals": {"over_refusal_rate": rate(0, 10, 0, 0.28), "invalid": 0}}
    pair = {"judges": ["refusals", "guard:g"], "n": 9, "same": 8, "kappa": 0.6087}
    evaluation = {
        "harmful": {"judges": named | others, "agreement": [pair]},
        "benign": {"judges": only, "agreement": []},
    }
    assert judge_rows(evaluation) == [
        ("", "judge", "rate", "invalid"),
        ("ASR", "refusals", "90 % [60, 98] (9/10)", "0"),
        ("ASR", "guard:g", "80 % [49, 94] (8/10)", "1"),
        ("over-refusal", "refusals", "0 % [0, 28] (0/10)", "0"),
        ("ASR", "refusals and guard:g", "kappa 0.61, same 8 of 9", ""),
    ]
    evaluation["harmful"]["agreement"][0]["kappa"] = None
    assert judge_rows(evaluation)[-1][2] == "same 8 of 9"
    evaluation["harmful"]["agreement"][0] |= {"n": 0, "same": 0}
    assert judge_rows(evaluation)[-1][2] == "no answer that both could judge"
    evaluation["harmful"] = {"judges": named, "agreement": []}
    assert judge_rows(evaluation) == []


def test_a_rate_is_written_with_its_interval_and_counts() -> None:
    assert rate_text(rate(1, 3, 0.0615, 0.7923)) == "33 % [6, 79] (1/3)"
    assert rate_text(rate(3, 3, 0.4385, 1.0)) == "100 % [44, 100] (3/3)"


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


def test_a_comparison_of_maps_numbers_them_and_lists_every_two() -> None:
    maps = [
        {
            "path": path,
            "artifact": "safety map",
            "base": "tiny",
            "revision": None,
            "method": None,
            "granularity": "row",
            "entries": 1500,
        }
        for path in ("a", "b", "c")
    ]
    pair = {
        "shared": 1200,
        "iou": 0.66667,
        "expected_shared": 15.0,
        "expected_iou": 0.00503,
        "expected_shared_within_tensors": 30.0,
        "expected_iou_within_tensors": 0.0101,
    }
    named, pairs = overlap_rows({"maps": maps, "same_base": True, "pairs": [pair] * 3})
    assert named[0] == ("map", "kind", "selected by", "weights", "base")
    assert named[3] == ("3: c", "safety map", "?, row", "1,500", "tiny")
    assert pairs[0] == ("maps", "shared", "IoU", "by chance", "by chance, tensor by tensor")
    assert [row[0] for row in pairs[1:]] == ["1 and 2", "1 and 3", "2 and 3"]
    assert pairs[1][1:] == ("1,200", "0.6667", "0.0050", "0.0101")


def test_a_pattern_lists_the_components_and_then_the_layers_most_enriched_first() -> None:
    components, layers = pattern_rows(record_of(layers=9))
    assert components[0] == ("component", "weights", "share", "selected", "share", "enrichment")
    assert layers[0][0] == "layer (5 of 9)"
    for table, count in ((components[1:], 4), (layers[1:], 5)):
        enrichments = [float(row[-1]) for row in table]
        assert enrichments == sorted(enrichments, reverse=True)
        assert len(enrichments) == count


def test_shares_are_written_beside_the_counts_that_they_come_from() -> None:
    cell = {
        "layer": None,
        "component": "embeddings",
        "parameters": 28_311_552,
        "eligible": 0,
        "selected": 1234,
        "parameter_share": 0.21047,
        "selected_share": 0.00092,
        "enrichment": 0.00437,
    }
    texts = ("outside layers", "embeddings", "28,311,552", "21.05%", "1,234", "0.09%", "0.00")
    assert share_rows([cell], "layer", "component")[1] == texts
    (titles, row) = share_rows([cell | {"rows": 1200, "columns": 0}], "layer", "component")
    assert (titles[-1], row) == ("rows", (*texts, "1,200"))


def test_a_grid_leaves_out_what_can_not_be_selected_and_keeps_what_is_selected_all_the_same() -> (
    None
):
    record = record_of(layers=2)
    assert grid_rows(record["cells"], "component")[0] == ("layer", "q", "down")
    for cell in record["cells"]:
        cell["selected"] += cell["component"] == "norms"
    assert grid_rows(record["cells"], "component")[0] == ("layer", "q", "down", "norms")


def test_a_grid_has_a_gap_where_a_layer_has_no_such_component() -> None:
    cells = [
        {"layer": layer, "component": component, "eligible": 1, "selected": 0, "enrichment": layer}
        for layer, component in ((0, "up"), (1, "router"))
    ]
    assert grid_rows(cells, "component") == [
        ("layer", "up", "router"),
        ("0", "0.00", ""),
        ("1", "", "1.00"),
    ]


def test_a_probe_is_laid_out_as_one_table_with_intervals() -> None:
    judged = "17 % [11, 26]", "6 % [3, 12]", "0%"
    assert probe_rows(PROBE) == [
        ("", "draws", "ASR", "over-refusal", "invalid", "KL (nats/token)"),
        ("base", "1", *judged, "0.0000"),
        ("noise, map", "5", *judged, "0.2500 ± 0.1250"),
    ]


def test_what_was_cut_is_a_column_where_anything_was() -> None:
    row = RESULT["before"] | {"scale": 0.0}
    bare = sweep_rows([row, row])
    assert sweep_rows([row, row | {"cut_in_thought": 2}]) == [
        (*cells, more) for cells, more in zip(bare, ("cut in their thought", "0", "2"), strict=True)
    ]
    assert [cells[-1] for cells in sweep_rows([row], 3)] == ["requests without their middle", "3"]
    draws = [{"cut_in_thought": 1}, {"cut_in_thought": 2}]
    probed = probe_rows(PROBE | {"rows": [PROBE["rows"][0] | {"draws": draws}], "cut_requests": 4})
    assert [cells[-2:] for cells in probed] == [
        ("cut in their thought", "requests without their middle"),
        ("3", "4"),
    ]


@pytest.mark.parametrize(
    ("name", "shown", "explained"),
    [
        ("classifier:c=safe=s=t", "classifier:c", "classifier:c: its label 's=t' means safe"),
        ("guard:g=mine.json", "guard:g=mine.json", None),
        ("refusals", "refusals", None),
    ],
)
def test_a_classifier_is_shown_without_what_its_label_means(
    name: str, shown: str, explained: str | None
) -> None:
    assert (short_judge(name), explain_judge(name)) == (shown, explained)


def test_a_classifier_that_is_read_in_two_ways_is_shown_by_its_whole_names() -> None:
    figures = {
        "attack_success_rate": rate(9, 10, 0.6, 0.98),
        "over_refusal_rate": rate(0, 10, 0, 0.28),
    }
    part = {"judges": {}, "agreement": []}

    def shown(*names: str) -> set[str]:
        judges = {name: figures | {"invalid": 0} for name in names}
        evaluation = {"harmful": part | {"judges": judges}, "benign": part | {"judges": judges}}
        return {row[1] for row in judge_rows(evaluation)[1:]}

    assert shown("refusals", "classifier:c=safe=s") == {"refusals", "classifier:c"}
    both = {"classifier:c=safe=s", "classifier:c=refused=r"}
    assert shown(*both) == both


def test_a_probes_verdicts_are_sentences() -> None:
    assert verdict_lines(PROBE) == [
        "With noise at the map's weights: specific: it rises.",
        "With the map's weights at zero: can't tell: it may rise.",
    ]


def test_a_linear_reading_is_laid_out_with_the_worst_categories_first() -> None:
    rate = PROBE["rows"][0]["over_refusal_rate"]
    worse = rate | {"rate": 0.18}
    at = {
        "asr": 0.05,
        "attack_success_rate": PROBE["rows"][0]["attack_success_rate"],
        "over_refusal_rate": worse,
        "categories": {"ordinary": rate, "looks-harmful": worse},
    }
    result = {
        "layer": 18,
        "layers": 30,
        "training": {"harmful": 310, "benign": 1877},
        "auc": {"auc": 0.9541, "low": 0.92, "high": 0.98},
        "at": [at, at | {"asr": 0.125}],
    }
    about, rows = linear_rows(result)
    assert about == [
        ("layer", "18 of 30"),
        ("learned from", "310 harmful and 1,877 harmless"),
        ("AUC", "0.954 [0.920, 0.980]"),
    ]
    assert rows[0] == ("at an ASR of at most", "5 %", "12.5 %")
    assert [row[0].strip() for row in rows[3:]] == ["looks-harmful", "ordinary"]
    assert "an ASR of 5 % on such requests to refuse about 18 % of" in linear_line(result)
