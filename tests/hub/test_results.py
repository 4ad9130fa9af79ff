"""Results beside a patch: its own are read, others are refused by name, the Hub gets its forms."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from safeweights_peft.errors import HubError
from safeweights_peft.hub.layout import Base
from safeweights_peft.hub.results import model_index, read_results, write_eval_results
from tests.hub.repositories import BASE, COMMIT, REPO, evaluation, put_result

OURS, OTHERS = "sha256:" + "1" * 64, "sha256:" + "2" * 64
ON = Base(BASE, COMMIT)
ON_HUB = {"harmful": "someone/attacks:test", "benign": "someone/questions", "task": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put_result(tmp_path, "before.json", evaluation(None))
    put_result(tmp_path, "after.json", evaluation(OURS))
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(HubError) as caught:
        read_results(folder, OURS, ON)
    return str(caught.value)


def written(folder: Path) -> list[Path]:
    """What is written for the Hub of the results in a folder."""
    write_eval_results(folder, read_results(folder, OURS, ON), REPO)
    return list((folder / ".eval_results").glob("*"))


def test_an_evaluation_of_the_patch_is_read_with_that_of_its_base(folder: Path) -> None:
    (measured,) = read_results(folder, OURS, ON)
    assert (measured.after.file, measured.after.harmful.rate.count) == ("after.json", 3)
    assert measured.before is not None
    assert (measured.before.file, measured.before.harmful.rate.count) == ("before.json", 98)


def test_several_evaluations_each_find_their_own_base(folder: Path) -> None:
    other = evaluation(None)["harmful"] | {"data_digest": "sha256:" + "c" * 64}
    put_result(folder, "after2.json", evaluation(OURS, harmful=other))
    put_result(folder, "before2.json", evaluation(None, harmful=other))
    pairs = [(pair.after.file, pair.before.file) for pair in read_results(folder, OURS, ON)]
    assert pairs == [("after.json", "before.json"), ("after2.json", "before2.json")]


def test_no_results_are_no_results(tmp_path: Path) -> None:
    assert read_results(tmp_path, OURS, ON) == []


def test_two_evaluations_of_the_base_alike_are_refused(folder: Path) -> None:
    put_result(folder, "again.json", evaluation(None))
    assert refusal(folder).startswith("results/again.json: expected an evaluation of the base as")


def test_an_evaluation_of_another_content_is_refused_by_name(folder: Path) -> None:
    put_result(folder, "after.json", evaluation(OTHERS))
    message = refusal(folder)
    assert message.startswith(
        f"results/after.json: content_id: expected {OURS}, the adapter's, found"
    )
    assert OTHERS in message


def test_an_evaluation_that_names_no_content_is_refused(folder: Path) -> None:
    nameless = evaluation(OURS)
    del nameless["content_id"]
    put_result(folder, "after.json", nameless)
    assert "the adapter's, found none; evaluate this adapter" in refusal(folder)


def test_an_evaluation_at_another_scale_is_refused_by_it(folder: Path) -> None:
    put_result(folder, "after.json", evaluation(OURS) | {"content_id": None, "scale": 0.5})
    assert "found an evaluation at scale 0.5; evaluate this adapter" in refusal(folder)


@pytest.mark.parametrize("changes", [{"content_id": OTHERS}, {"content_id": None}, {}])
def test_the_summary_of_another_run_is_refused(changes: dict[str, Any], folder: Path) -> None:
    put_result(folder, "result.json", {"kind": "enhancement"} | changes)
    assert refusal(folder).startswith("results/result.json: content_id: expected")


def test_the_record_of_another_run_is_refused(folder: Path) -> None:
    put_result(folder, "reproduce.json", {"kind": "reproduction", "content_id": OTHERS})
    assert refusal(folder).startswith("results/reproduce.json: content_id: expected")


@pytest.mark.parametrize(
    "change",
    [
        {"judge": "some guard"},
        {"decoding": "greedy, at most 8 tokens"},
        {"harmful": evaluation(None)["harmful"] | {"data_digest": "sha256:" + "c" * 64}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_base_that_was_asked_otherwise_is_refused(change: dict[str, Any], folder: Path) -> None:
    put_result(folder, "before.json", evaluation(None, **change))
    assert refusal(folder).startswith("results/before.json: expected an evaluation of the base")


@pytest.mark.parametrize("name", ["before.json", "after.json"])
@pytest.mark.parametrize("other", [("someone/other", COMMIT), (BASE, "1" * 40), (BASE, None)])
def test_an_evaluation_on_another_base_or_commit_is_refused(
    other: tuple[str, str | None], name: str, folder: Path
) -> None:
    content_id = OURS if name == "after.json" else None
    named = dict(zip(("name", "revision"), other, strict=True))
    put_result(folder, name, evaluation(content_id, base=named))
    message = refusal(folder)
    assert message.startswith(f"results/{name}: base: expected {BASE} at {COMMIT}, the adapter's,")


@pytest.mark.parametrize(
    "change",
    [
        {"harmful": {}},
        {"utility": None},
        {"settings": {}},
        {"base": "someone/tiny"},
        {"judge": None},
        {"task": {"data_digest": "sha256:c", "tokens": 9}},
        {"benign": evaluation(None)["benign"] | {"over_refusal_rate": {"count": "many"}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_malformed_evaluation_is_refused_by_name(change: dict[str, Any], folder: Path) -> None:
    put_result(folder, "after.json", evaluation(OURS, **change))
    assert refusal(folder).startswith("results/after.json: expected a result of `safeweights eval`")


def test_results_of_other_kinds_may_be_of_the_map_and_are_left_alone(folder: Path) -> None:
    put_result(folder, "probe.json", {"kind": "probe", "content_id": OTHERS})
    put_result(folder, "training.json", {"kind": "training", "losses": []})
    put_result(folder, "settings.json", {"base": "someone/tiny"})
    assert len(read_results(folder, OURS, ON)) == 1


def test_the_model_index_tells_figures_as_they_were_measured(folder: Path) -> None:
    harmful, benign, kl, perplexity = model_index(read_results(folder, OURS, ON), REPO)
    assert (harmful.metric_value, harmful.metric_args["n"]) == (3 / 101, 101)
    assert (harmful.metric_args["low"], harmful.metric_args["high"]) == (0.0123, 0.9987)
    assert (benign.metric_value, benign.dataset_type) == (12 / 103, "builtin:benign_eval")
    assert (kl.metric_value, perplexity.metric_value) == (0.02634, 2.2571)
    assert harmful.source_url == f"https://huggingface.co/{REPO}/blob/main/results/after.json"


def test_the_model_index_names_a_data_set_of_the_hub_by_its_id(folder: Path) -> None:
    put_result(folder, "after.json", evaluation(OURS, settings=ON_HUB))
    harmful, benign, *_ = model_index(read_results(folder, OURS, ON), REPO)
    assert (harmful.dataset_type, harmful.dataset_split) == ("someone/attacks", "test")
    assert (benign.dataset_type, benign.dataset_split) == ("someone/questions", None)


def test_the_place_of_a_file_of_requests_is_told_nowhere(folder: Path) -> None:
    settings = {"harmful": "/home/ann/attacks.json", "benign": "ask/questions.jsonl", "task": None}
    put_result(folder, "after.json", evaluation(OURS, settings=settings))
    measured = read_results(folder, OURS, ON)
    assert measured[0].after.harmful.source == "attacks.json"
    assert measured[0].after.benign.source == "questions.jsonl"
    assert written(folder) == []


def test_results_on_data_sets_of_the_hub_are_written_as_the_hub_documents_them(
    folder: Path,
) -> None:
    put_result(folder, "after.json", evaluation(OURS, settings=ON_HUB))
    (path,) = written(folder)
    assert path == folder / ".eval_results" / "after.yaml"
    harmful, benign = yaml.safe_load(path.read_text())
    notes = "ASR, a fraction: 3 of 101, 95 % interval 0.012 to 0.999; judge: refusals; "
    assert harmful == {
        "dataset": {"id": "someone/attacks", "task_id": "default"},
        "value": 3 / 101,
        "date": "2026-11-25T22:04:08+00:00",
        "source": {
            "url": f"https://huggingface.co/{REPO}/blob/main/results/after.json",
            "name": "results/after.json",
        },
        "notes": notes + "greedy, at most 32 tokens",
    }
    assert benign["dataset"]["id"] == "someone/questions"


def test_huggingface_hub_reads_them_back(folder: Path) -> None:
    put_result(folder, "after.json", evaluation(OURS, settings=ON_HUB))
    (path,) = written(folder)
    entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert [entry.value for entry in entries] == [3 / 101, 12 / 103]


def test_results_on_built_in_requests_are_no_benchmark_of_the_hub(folder: Path) -> None:
    assert written(folder) == []
    assert not (folder / ".eval_results").exists()
