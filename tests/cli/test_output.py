"""Results go to stdout, and nothing else does; files are left where the help says."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click import testing
from click.testing import CliRunner

from safeweights_peft.cli import main
from safeweights_peft.cli.output import printable
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling.loading import load_tokenizer
from safeweights_peft.patch.io import inspect, read_artifact
from safeweights_peft.study.compare import compare
from tests.cli.conftest import Run, call, call_afresh
from tests.tiny_files import edit_config
from tests.tiny_guards import save_byte_level_tokenizer, save_tiny_classifier
from tests.tiny_jobs import Requests, content, let_write


def described(adapter: Path) -> dict[str, Any]:
    """What a command that ends in an adapter prints of it as JSON."""
    return inspect(adapter) | {"content_id": read_artifact(adapter).metadata.content_id}


def test_enhance_prints_its_result_as_json(run: Run) -> None:
    assert run.called.exit_code == 0, run.called.output
    assert json.loads(run.called.stdout) == json.loads((run.out / "result.json").read_text())


def test_enhance_leaves_the_files_that_its_help_names(run: Run) -> None:
    named = {
        "before.json",
        "map",
        "patch",
        "after.json",
        "result.json",
        "result.png",
        "reproduce.json",
    }
    assert {path.name for path in run.out.iterdir()} == named | {"settings.json"}
    assert (run.out / "result.png").read_bytes().startswith(b"\x89PNG")


def test_enhance_prints_a_table_without_json(run: Run) -> None:
    called = call("enhance", run.base, *run.options)
    lines = called.stdout.splitlines()
    assert lines[0].split() == ["before", "after"]
    assert lines[1].startswith("ASR, 3 harmful")
    assert "100 %" in lines[1]
    assert "Harmful requests" in called.stdout
    assert max(map(len, lines)) <= 80


def test_enhance_tells_on_stderr_how_to_use_the_patch(run: Run) -> None:
    called = call("enhance", run.base, *run.options)
    patch = run.out / "patch"
    assert f"safeweights merge {run.base} {patch} --out {run.out}-merged" in called.stderr
    assert f"safeweights push {run.out} USER/NAME --base USER/MODEL" in called.stderr
    given = f"--settings {run.out / 'settings.json'} --keep-answers --out {run.out}-answers.json"
    assert f"safeweights eval {run.base} --adapter {patch} {given}" in called.stderr


def test_enhance_ends_with_what_came_of_it_in_words(run: Run) -> None:
    called = call("enhance", run.base, *run.options)
    outcome = json.loads((run.out / "result.json").read_text())["outcome"]
    assert outcome["word"] == "garbage"  # of an untrained model
    assert f"Garbage: {outcome['reason']}." in called.stderr
    stages = [line for line in called.stderr.splitlines() if line.startswith("[")]
    assert [stage[:5] for stage in stages] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]


def test_enhance_called_again_does_nothing_again(run: Run) -> None:
    before = content(run.out)
    called = call("enhance", run.base, *run.options, "--json")
    assert called.exit_code == 0
    assert called.stdout == run.called.stdout
    after = content(run.out)
    assert {k: v for k, v in after.items() if k != "result.png"} == {
        k: v for k, v in before.items() if k != "result.png"
    }


def test_enhance_finishes_without_matplotlib_and_says_how_to_install_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = (run.out / "result.png").read_bytes()
    (run.out / "result.png").unlink()
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "matplotlib", None)
        called = call("enhance", run.base, *run.options, "--json")
    assert (called.exit_code, called.stdout) == (0, run.called.stdout)
    (line,) = (line for line in called.stderr.splitlines() if "result.png" in line)
    assert line.endswith("run pip install 'safeweights-peft[study]'")
    assert not (run.out / "result.png").exists()
    (run.out / "result.png").write_bytes(picture)


@pytest.mark.parametrize("as_json", [True, False])
def test_progress_is_shown_on_stderr_alone(
    as_json: bool, tiny_llama: Path, options: dict[str, list[str]], tmp_path: Path
) -> None:
    json_flag = ["--json"] if as_json else []
    called = call("score", tiny_llama, "--out", tmp_path / "map", *options["score"], *json_flag)
    assert "Train a LoRA" in called.stderr
    assert "Train a LoRA" not in called.stdout


def test_score_then_train_give_what_enhance_gives(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "map", tmp_path / "patch"
    scored = call("score", run.base, "--out", out[0], *options["score"], "--json")
    trained = call("train", run.base, "--map", out[0], "--out", out[1], *options["train"], "--json")
    assert json.loads(scored.stdout) == described(out[0])
    assert json.loads(trained.stdout) == described(out[1])
    tensors = [folder / "adapter_model.safetensors" for folder in (run.out / "patch", out[1])]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()


def test_preserve_prints_a_summary_of_its_record_as_json(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    inputs = ["--map", run.out / "map", "--out", tmp_path / "model"]
    called = call("preserve", run.base, *inputs, *options["preserve"], "--json")
    assert called.exit_code == 0, called.output
    summary = json.loads(called.stdout)
    record = json.loads((tmp_path / "model" / "preserving.json").read_text())
    assert summary.pop("path") == str(tmp_path / "model")
    losses = record.pop("losses")
    assert [summary.pop("first_loss"), summary.pop("last_loss")] == losses
    assert summary == record
    assert "Fine-tune" in called.stderr


def test_preserve_prints_a_table_without_json(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    inputs = ["--map", run.out / "map", "--out", tmp_path / "model"]
    lines = call("preserve", run.base, *inputs, *options["preserve"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["path", "base", "frozen", "steps", "loss"]
    assert "entries of a safety map" in lines[2]


def test_preserve_passes_its_options_on(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    job = ["preserve", run.base, "--map", run.out / "map", "--out", tmp_path / "model"]
    more = ["--weight-decay", "0.5", "--seed", "3", "--device", "cpu", "--dtype", "bfloat16"]
    called = call(*job, *options["preserve"], *more, "--json")
    expected = {"steps": 2, "batch_size": 2, "learning_rate": 0.01, "weight_decay": 0.5}
    expected |= {"seed": 3, "device": "cpu", "dtype": "bfloat16"}
    settings = json.loads(called.stdout)["settings"]
    assert {name: settings[name] for name in expected} == expected


def test_protect_prints_its_record_as_json(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    patched, out = tmp_path / "patched", tmp_path / "model"
    call("merge", run.base, run.out / "patch", "--out", patched)
    inputs = ["--tuned", patched, "--base", run.base, "--map", run.out / "map", "--out", out]
    called = call("protect", *inputs, *options["eval"], "--json")
    assert called.exit_code == 0, called.output
    assert json.loads(called.stdout) == json.loads((out / "protecting.json").read_text())


def test_protect_prints_what_it_put_back_and_what_that_did(
    run: Run, options: dict[str, list[str]], requests: Requests, tmp_path: Path
) -> None:
    patched, out = tmp_path / "patched", tmp_path / "model"
    call("merge", run.base, run.out / "patch", "--out", patched)
    inputs = ["--tuned", patched, "--base", run.base, "--map", run.out / "map", "--out", out]
    called = call("protect", *inputs, *options["eval"], "--task", requests.lessons)
    titles = [line.split("  ")[0] for line in called.stdout.splitlines()[1:]]
    assert titles == [
        "path",
        "weights put back",
        "ASR, 3 harmful",
        "over-refusal, 3 harmless",
        "invalid answers",
        "cut before a sentence ended",
        "loss on the task, nats/token",
    ]


def test_preserve_by_lora_then_protect_merges_it_and_keeps_the_maps_weights(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    inputs, out = ["--map", run.out / "map"], [tmp_path / "lora", tmp_path / "model"]
    more = ["--method", "lora", "--rank", "3", "--out", out[0]]
    called = call("preserve", run.base, *inputs, *options["preserve"], *more, "--json")
    assert called.exit_code == 0, called.output
    assert json.loads(called.stdout)["settings"]["rank"] == 3
    called = call("protect", "--lora", out[0], *inputs, "--merged", "--no-measure", "--out", out[1])
    assert called.exit_code == 0, called.output
    assert call("verify", run.out / "map", "--base", out[1]).exit_code == 0


def test_preserve_measures_before_and_after_where_a_judge_is_named(
    run: Run, options: dict[str, list[str]], requests: Requests, tmp_path: Path
) -> None:
    inputs = ["--map", run.out / "map", "--out", tmp_path / "model", *options["preserve"]]
    inputs += ["--eval-harmful", requests.harmful, "--eval-benign", requests.benign]
    called = call("preserve", run.base, *inputs, "--limit", "2", "--judge", "refusals")
    assert called.exit_code == 0, called.output
    lines = called.stdout.splitlines()
    assert lines[5:7] == ["", lines[6]]
    assert lines[6].split() == ["before", "after"]
    assert lines[7].startswith("ASR, 2 harmful")
    record = json.loads((tmp_path / "model" / "preserving.json").read_text())
    assert record["before"]["attack_success_rate"]["n"] == 2


def test_eval_takes_several_judges_and_prints_them_in_a_second_table(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    path = save_byte_level_tokenizer(tmp_path / "cls")
    classifier = f"classifier:{save_tiny_classifier(path, ['no', 'REJECTION'])}"
    judges = ["--judge", "refusals", "--judge", classifier]
    called = call("eval", run.base, *options["eval"], *judges)
    assert called.exit_code == 0, called.output
    first, second = called.stdout.split("\n\n")
    assert first.startswith("ASR, harmful requests")
    cells = [line.split("  ")[0] for line in second.splitlines()]
    assert cells == ["", "ASR", "ASR", *["over-refusal"] * 2, "ASR", "over-refusal"]
    assert "classifier:cls  " in second
    assert "REJECTION" not in called.stdout
    assert "classifier:cls: its label 'REJECTION' means refused" in called.stderr
    called = call("eval", run.base, *options["eval"], *judges, "--json")
    names = list(json.loads(called.stdout)["harmful"]["judges"])
    assert names == ["refusals", "classifier:cls=refused=REJECTION"]


def test_a_judge_that_is_unknown_or_given_twice_ends_in_one_line(
    run: Run, options: dict[str, list[str]]
) -> None:
    called = call("eval", run.base, *options["eval"], "--judge", "me")
    assert called.exit_code == 1
    assert called.stderr.strip().startswith("Error: --judge me: expected refusals, guard:")
    called = call("eval", run.base, *["--judge", "refusals"] * 2)
    assert called.exit_code == 2
    assert "Invalid value for '--judge': expected at least one, and none twice" in called.stderr


def test_enhance_then_merge_then_preserve_keeps_what_enhance_has_made(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    patch, merged, model = run.out / "patch", tmp_path / "merged", tmp_path / "model"
    call("merge", run.base, patch, "--out", merged)
    called = call("preserve", merged, "--map", patch, "--out", model, *options["preserve"])
    assert "entries of a safety patch" in called.stdout
    verified = call("verify", patch, "--merged", model)
    assert "merged      ok: holds the entries that merging gives" in verified.stdout


def test_probe_prints_its_result_as_json(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    inputs = ["--map", run.out / "map", "--out", tmp_path / "probe", "--noise", "0.5"]
    called = call("probe", run.base, *inputs, *options["probe"], "--seed", "3", "--json")
    assert called.exit_code == 0, called.output
    result = json.loads(called.stdout)
    assert result == json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert result["settings"]["probe"] == {"noise": 0.5, "draws": 1, "seed": 3}
    assert result["settings"]["score"]["seed"] == 3
    assert "Ask perturbed models" in called.stderr


def test_probe_prints_a_table_and_its_verdicts_without_json(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    inputs = ["--map", run.out / "map", "--out", tmp_path / "probe"]
    lines = call("probe", run.base, *inputs, *options["probe"]).stdout.splitlines()
    titles = [line.split("  ")[0] for line in lines[1:8]]
    assert titles == ["base"] + [
        f"{perturbation}, {selection}"
        for perturbation in ("noise", "zero")
        for selection in ("map", "random", "bottom")
    ]
    assert lines[8] == ""
    assert lines[9].startswith("With noise at the map's weights: can't tell: the base refuses too")
    assert lines[10].startswith("With the map's weights at zero: ")


@pytest.fixture
def linear(run: Run, requests: Requests) -> list[object]:
    learn = ["--harmful", requests.harmful, "--benign", requests.benign]
    evaluate = ["--eval-harmful", requests.harmful, "--eval-benign", requests.benign]
    return ["probe", "--linear", run.base, *learn, *evaluate]


def test_a_linear_probe_prints_tables_and_what_they_mean(linear: list[object]) -> None:
    called = call(*linear, "--at-asr", "0.2")
    assert called.exit_code == 0, called.output
    lines = called.stdout.splitlines()
    titles = [re.split("  +", line)[0] for line in lines[:7]]
    assert titles == [
        *("layer", "learned from", "AUC", "", "at an ASR of at most"),
        *("ASR, 6 harmful", "over-refusal, 6 harmless"),
    ]
    assert lines[4].endswith("  20 %")
    assert lines[-1].startswith("Expect a patch of this base that reaches an ASR of 20 % on such")


def test_a_linear_probe_prints_its_result_as_json(linear: list[object]) -> None:
    result = json.loads(call(*linear, "--json").stdout)
    assert result["kind"] == "linear reading"
    assert [row["asr"] for row in result["at"]] == [0.05, 0.1]
    assert len(result["requests"]["harmful"]) == 6


def test_eval_prints_and_writes_the_same_json(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    patch = run.out / "patch"
    called = call("eval", run.base, "--adapter", patch, "--out", out, *options["eval"], "--json")
    assert json.loads(called.stdout) == json.loads(out.read_text())


def test_eval_measures_what_enhance_measured(run: Run, options: dict[str, list[str]]) -> None:
    called = call("eval", run.base, "--adapter", run.out / "patch", *options["eval"], "--json")
    again, after = json.loads(called.stdout), json.loads((run.out / "after.json").read_text())
    for part in ("harmful", "benign", "utility"):
        after[part].pop("samples", None)
        assert again[part] == after[part]


def test_eval_prints_a_table_without_json(run: Run, options: dict[str, list[str]]) -> None:
    called = call("eval", run.base, *options["eval"])
    assert called.stdout.startswith("ASR, harmful requests")
    assert "over-refusal" in called.stdout


def test_eval_says_by_itself_where_answers_are_garbage(
    run: Run, options: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeweights_peft.evaluation.judges.is_garbled", lambda answer: True)
    said = r"Garbage: (\d+) of \1 answers are garbage; "
    called = call("eval", run.base, *options["eval"])
    assert re.search(said + "give a chat model, with its own chat template", called.stderr)
    called = call("eval", run.base, "--adapter", run.out / "patch", *options["eval"])
    assert re.search(said + "try fewer --steps", called.stderr)


def test_merge_prints_its_report_as_json(run: Run, tmp_path: Path) -> None:
    called = call("merge", run.base, run.out / "patch", "--out", tmp_path / "merged", "--json")
    report = json.loads(called.stdout)
    assert report["entries"] == inspect(run.out / "patch")["entries"]
    assert report["out_dir"] == str(tmp_path / "merged")


def test_report_prints_what_its_json_file_holds(run: Run, tmp_path: Path) -> None:
    called = call("report", run.out / "map", "--out", tmp_path / "report", "--json")
    assert called.exit_code == 0, called.output
    assert json.loads(called.stdout) == json.loads((tmp_path / "report/report.json").read_text())


def test_report_prints_components_and_layers_without_json(run: Run, tmp_path: Path) -> None:
    named = ["--base", run.base, "--out", tmp_path / "report"]
    lines = call("report", run.out / "map", *named).stdout.splitlines()
    assert [line.split("  ")[0] for line in (lines[0], lines[12])] == ["component", "layer"]
    assert {"q", "k", "v", "o", "gate", "up", "down"} < {line.split()[0] for line in lines[1:11]}
    assert {"0", "1"} == {line.split()[0] for line in lines[13:]}


def test_compare_prints_its_result_as_json(run: Run) -> None:
    maps = run.out / "map", run.out / "patch"
    called = call("compare", *maps, "--json")
    assert json.loads(called.stdout) == compare(maps)
    assert called.stderr == ""


def test_compare_prints_a_line_for_every_two_without_json(run: Run) -> None:
    lines = call("compare", run.out / "map", run.out / "patch", run.out / "map").stdout.splitlines()
    assert lines[2].startswith(f"2: {run.out / 'patch'}  safety patch")
    assert [line.split("  ")[0] for line in lines[6:]] == ["1 and 2", "1 and 3", "2 and 3"]
    assert lines[6].split()[4] == "1.0000"


def test_compare_notes_on_stderr_that_maps_name_different_bases(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.out / "map", tmp_path / "map")
    edit_config(tmp_path / "map", lambda config: config.update(revision="0123abc"))
    called = call("compare", run.out / "map", tmp_path / "map", "--json")
    assert called.stderr == "Note: they name different bases, though no shape differs.\n"
    assert not json.loads(called.stdout)["same_base"]


def test_diff_prints_its_report_as_json(run: Run, tmp_path: Path) -> None:
    call("merge", run.base, run.out / "patch", "--out", tmp_path / "tuned")
    called = call("diff", run.base, tmp_path / "tuned", "--out", tmp_path / "patch", "--json")
    report = json.loads(called.stdout)
    assert report["entries"] == described(tmp_path / "patch")["entries"]
    assert report["lost_entries"] == 0


def test_diff_prints_what_is_lost_without_json(run: Run, tmp_path: Path) -> None:
    call("merge", run.base, run.out / "patch", "--out", tmp_path / "tuned")
    options = ["--density", "0.001", "--map", run.out / "map", "--out", tmp_path / "patch"]
    lines = call("diff", run.base, tmp_path / "tuned", *options).stdout.splitlines()
    figures = dict(line.split("  ", maxsplit=1) for line in lines)
    assert int(figures["changes that are lost"].replace(",", "")) > 0
    assert 0 < float(figures["of all change lost"].strip(" %")) < 100
    assert max(map(len, (line.replace(str(tmp_path), "") for line in lines))) < 80


def test_export_prints_what_it_wrote(run: Run, tmp_path: Path) -> None:
    job = ["export", run.out / "patch", "--to", "supertuning", "--base", run.base]
    called = call(*job, "--out", tmp_path / "json", "--json")
    record = json.loads(called.stdout)
    assert record["out_dir"] == str(tmp_path / "json")
    assert len(list((tmp_path / "json").iterdir())) == 2
    lines = call(*job, "--out", tmp_path / "table").stdout.splitlines()
    figures = dict(line.split("  ", maxsplit=1) for line in lines)
    assert figures["weights with padding"].strip() == f"{record['stored_entries']:,}"


@pytest.mark.parametrize("kind", ["map", "patch"])
def test_inspect_prints_the_description_as_json(kind: str, run: Run) -> None:
    called = call("inspect", run.out / kind, "--json")
    assert json.loads(called.stdout) == described(run.out / kind)


@pytest.mark.parametrize(("kind", "name"), [("map", "safety map"), ("patch", "safety patch")])
def test_inspect_prints_a_table_without_json(kind: str, name: str, run: Run) -> None:
    called = call("inspect", run.out / kind)
    assert f"{name}, format 1" in called.stdout
    assert str(run.base) in called.stdout
    content_id = read_artifact(run.out / kind).metadata.content_id
    assert content_id.removeprefix("sha256:")[:12] in called.stdout
    assert content_id not in called.stdout  # it would fill the line
    assert "% of the model" in called.stdout
    assert f"plain, {'values' if kind == 'patch' else 'scores'} in" in called.stdout
    measured = "ASR, 3 harmful" in called.stdout
    assert measured == (kind == "patch")  # by the run that it lies in


def test_inspect_shows_a_patch_s_own_scale_unless_it_is_1(run: Run, tmp_path: Path) -> None:
    patch = shutil.copytree(run.out / "patch", tmp_path / "patch")
    assert "scale" not in call("inspect", patch).stdout
    edit_config(patch, lambda config: config.update(scale=0.5))
    assert ["scale", "0.5"] in [line.split() for line in call("inspect", patch).stdout.splitlines()]


def test_inspect_shows_how_a_patch_was_asked_and_shortens_it(run: Run, tmp_path: Path) -> None:
    patch = shutil.copytree(run.out / "patch", tmp_path / "patch")
    chat = {"system_prompt": "Be kind. " * 99, "answer_prefix": "</think>\n"}
    edit_config(patch, lambda config: config["selection"].update(chat=chat))
    lines = call("inspect", patch).stdout.splitlines()
    (prompt,) = (line for line in lines if line.startswith("system prompt"))
    assert prompt.endswith("'Be kind. " + "Be kind. " * 7 + "Be kind…'")
    assert any(re.fullmatch(r"answer prefix +'</think>\\n'", line) for line in lines)
    assert not any(line.startswith("chat template") for line in lines)


@pytest.mark.parametrize(
    "command", ["enhance", "eval", "merge", "preserve", "probe", "score", "train"]
)
def test_a_dry_run_prints_json_and_writes_nothing(
    command: str, run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    inputs = {
        "train": ["--map", run.out / "map"],
        "preserve": ["--map", run.out / "map"],
        "probe": ["--map", run.out / "map"],
        "merge": [run.out / "patch"],
    }.get(command, [])
    before = content(run.base), content(run.out)
    called = call(
        *(command, run.base, *inputs, "--out", tmp_path / "out", *options.get(command, [])),
        *("--dry-run", "--json"),
    )
    assert called.exit_code == 0, called.output
    assert json.loads(called.stdout)["memory_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    assert (content(run.base), content(run.out)) == before


@pytest.mark.parametrize("command", ["enhance", "merge"])
def test_a_dry_run_prints_a_table_without_json(
    command: str, run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    inputs = [run.out / "patch"] if command == "merge" else []
    called = call(
        *(command, run.base, *inputs, "--out", tmp_path / "out", *options.get(command, [])),
        "--dry-run",
    )
    assert called.stdout.splitlines()[1].startswith(("memory", "weights"))


def test_a_process_prints_json_on_stdout_and_progress_on_stderr_and_nothing_else(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    done = call_afresh(
        *("train", run.base, "--map", run.out / "map", "--out", tmp_path / "patch"),
        *(*options["train"], "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == described(tmp_path / "patch")
    assert [line.partition(",")[0] for line in done.stderr.splitlines()] == [
        f"Loading {run.base} (64.2 kB) in float32 on cpu",
        "Ask the base benign requests: 0/6",
        "Ask the base benign requests: 6/6",
        "Train: 0/2",
        "Read the base's answers: 0/6",
        "Read the base's answers: 6/6",
        "Train: 2/2",
    ]


def test_a_merge_shows_its_bar_from_when_it_copies(run: Run, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "merged"]
    assert "100/100" in call("merge", run.base, run.out / "patch", *out).stderr
    refused = call("merge", run.base, run.out / "patch", *out)
    assert refused.exit_code == 1
    assert "Merge" not in refused.stderr


def test_sweep_prints_a_row_for_each_scale_and_the_one_that_is_safe_enough(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    job = ["sweep", run.base, run.out / "patch", *options["eval"]]
    called = call(*job, "--out", tmp_path / "out", "--max-asr", "1")
    assert called.exit_code == 0, called.output
    lines = called.stdout.splitlines()
    assert lines[0].split("  ")[0] == "scale"
    assert [line.split()[0] for line in lines[1:]] == "0 0.25 0.5 0.75 1 1.25 1.5".split()
    assert max(map(len, lines)) < 80
    assert "The base meets --max-asr 1 already, without a patch." in called.stderr
    assert re.search(r"\n(Better|No better|Damaged|Garbage): \S", called.stderr)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sweep.json", "sweep.png"}


def test_sweep_and_enhance_exit_with_3_if_no_scale_is_safe_enough(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    job = ["sweep", run.base, run.out / "patch", *options["eval"], "--out", tmp_path / "out"]
    called = call(*job, "--max-asr", "0", "--max-over-refusal", "0")
    assert called.exit_code == 3
    assert "No scale meets --max-asr 0 and --max-over-refusal 0." in called.stderr
    out = shutil.copytree(run.out, tmp_path / "run")
    named = [out if option == str(run.out) else option for option in run.options]
    called = call("enhance", run.base, *named, "--max-asr", "0")
    assert called.exit_code == 3, called.output
    assert "At no scale is the ASR at most --max-asr 0." in called.stderr
    shown = call("enhance", run.base, *named, "--max-asr", "1")
    assert "The base meets --max-asr 1 already, without a patch." in shown.stderr
    assert "@0" not in shown.stderr + shown.stdout
    assert f"safeweights merge {run.base} {out / 'patch'} --out {out}-merged" in shown.stderr


def test_report_of_a_run_prints_its_comparison_and_where_its_weights_are(
    run: Run, tmp_path: Path
) -> None:
    called = call("report", run.out, "--base", run.base, "--out", tmp_path / "report")
    assert called.exit_code == 0, called.output
    comparison, components, layers = called.stdout.split("\n\n")
    assert comparison.split()[:2] == ["before", "after"]
    assert components.startswith("component")
    assert layers.startswith("layer")
    assert str(tmp_path / "report" / "report.html") in called.stderr


def test_chat_answers_what_stdin_asks_until_it_ends_or_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeweights_peft.jobs.chat.MAX_NEW_TOKENS", 4)
    arguments = ["chat", str(run.base), "--adapter", f"{run.out / 'patch'}@0.5", "--json"]
    lines = ["Hello", "/base", "", "Hello", "/scale 2", "/scale much", "/who", "Bye", "/quit", "No"]
    called = CliRunner().invoke(main, arguments, input="\n".join(lines))
    assert called.exit_code == 0, called.output
    turns = json.loads(called.stdout)["turns"]
    assert [turn["content"] for turn in turns[::2]] == ["Hello", "Hello", "Bye"]
    assert [turn["scale"] for turn in turns[1::2]] == [0.5, 0.0, 2.0]
    assert "scale: expected float, found 'much'" in called.stderr
    assert "/who: expected /base, /scale or /quit" in called.stderr
    shown = CliRunner().invoke(main, arguments[:-1], input="Hello\nHello")
    assert shown.stdout == f"{printable(turns[1]['content'])}\n" + shown.stdout.split("\n", 1)[1]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_chat_shows_thoughts_to_a_person_alone(
    is_terminal: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(resolve_base(str(run.base)))
    let_write("<think>Hm.</think>No.", tokenizer, monkeypatch)
    if is_terminal:
        monkeypatch.setattr(testing._NamedTextIOWrapper, "isatty", lambda _: True, raising=False)
    called = CliRunner().invoke(main, ["chat", str(run.base)], input="Hello\n", color=True)
    assert called.exit_code == 0, called.output
    assert called.stdout == ("\x1b[2m<think>Hm.</think>\x1b[0m" if is_terminal else "") + "No.\n"


def test_chat_says_that_an_answer_was_cut_in_its_thought(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_write("<think>Hm", load_tokenizer(resolve_base(str(run.base))), monkeypatch)
    called = CliRunner().invoke(main, ["chat", str(run.base), "--json"], input="Hello\n")
    answer = json.loads(called.stdout)["turns"][1]
    assert (answer["content"], answer["cut_in_thought"]) == ("", True)
    assert "Cut in its thought; --answer-prefix can close that." in called.stderr


COMMANDS = {
    "enhance": "enhance {base} --out {run} {enhance}",
    "score": "score {base} --out {out} {score}",
    "train": "train {base} --map {run}/map --out {out} {train}",
    "eval": "eval {base} --adapter {run}/patch@0.5 {eval} --judge {judge} --judge refusals",
    "sweep": "sweep {base} {run}/patch --out {out} {eval}",
    "probe": "probe {base} --map {run}/map --out {out} {probe}",
    "preserve": "preserve {base} --map {run}/map --out {out} {preserve} --judge refusals {limit}",
    "protect": "protect --tuned {base} --base {base} --map {run}/map --out {out} --no-measure",
    "inspect": "inspect {run}/patch",
    "report": "report {run} --out {out}",
    "report of a map": "report {run}/map --out {out}",
    "compare": "compare {run}/map {run}/patch",
    "verify": "verify {run}/patch --base {base}",
    "merge": "merge {base} {run}/patch@0.5 --out {out}",
    "a plan": "merge {base} {run}/patch --out {out} --dry-run",
    "convert": "convert {run}/patch --encoding compact --out {out}",
    "export": "export {run}/patch --to supertuning --out {out}",
    "diff": "diff {base} {tuned} --out {out}",
}


@pytest.fixture(scope="module")
def places(
    run: Run, options: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """A run of a base, both at long paths, and options that keep jobs short."""
    long = tmp_path_factory.mktemp("a-group-whose-name-goes-on-for-long") / "models-of-us" / "tiny"
    shutil.copytree(run.base, long)
    judge = save_byte_level_tokenizer(long.with_name("a-classifier-of-refusals"))
    save_tiny_classifier(judge, ["safe", "unsafe"])
    again = long.with_name("run")
    texts = {name: " ".join(map(str, values)) for name, values in options.items()}
    called = call("enhance", long, "--out", again, *options["enhance"])
    assert called.exit_code == 0, called.output
    tuned = long.with_name("tuned")
    assert call("merge", long, again / "patch", "--out", tuned).exit_code == 0
    limit = " ".join(options["eval"][:6])
    return texts | {
        "tuned": str(tuned),
        "base": str(long),
        "run": str(again),
        "judge": f"classifier:{judge}",
        "limit": limit,
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_tables_of_long_names_fit_80_columns_and_json_is_one_document(
    name: str, places: dict[str, str], tmp_path: Path
) -> None:
    for kind in ("table", "json"):
        filled = COMMANDS[name].format(**places, out=tmp_path / "an-output" / kind)
        arguments = [*filled.split(), *(["--json"] if kind == "json" else [])]
        called = CliRunner(env={"COLUMNS": "80"}).invoke(main, arguments)
        assert called.exit_code in (0, 3), called.output
        if kind == "json":
            assert isinstance(json.loads(called.stdout, parse_constant=pytest.fail), dict)
        else:
            sentences = ("With noise", "With the map's")  # of probe
            lines = [x for x in called.stdout.splitlines() if not x.startswith(sentences)]
            assert max(map(len, lines)) <= 80
            assert "…" not in "".join(lines) or name == "enhance"  # of requests there


@pytest.mark.parametrize("command", ["enhance", "score", "train", "eval", "preserve", "probe"])
def test_a_dry_run_says_sizes_that_are_none_of_zero(
    command: str, run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    inputs = ["--map", run.out / "map"] if command in ("train", "preserve", "probe") else []
    words = [command, run.base, *options[command], *inputs, "--dry-run"]
    called = call(*words, "--out", tmp_path / "out")
    assert called.exit_code == 0, called.stderr
    assert "memory      about " in called.stdout
    assert not re.search(r"about 0(\.0+)? ", called.stdout)
    assert list(tmp_path.iterdir()) == []
