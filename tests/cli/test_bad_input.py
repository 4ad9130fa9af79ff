"""What is wrong with an input is said in one line, at once, and nothing is left behind."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.numpy import load_file, save_file

from safeweights_peft.cli.failures import describe_failure
from safeweights_peft.errors import DataError
from safeweights_peft.files import lock
from tests.cli.conftest import Run, call
from tests.tiny_jobs import Requests, content
from tests.tiny_models import save_tiny_llama, save_tiny_tokenizer

WEIGHTS = "model.safetensors"


def lines_of(called: Result) -> list[str]:
    """List what is said beside what is being done."""
    return [line for line in called.stderr.splitlines() if line and not line.startswith("Loading ")]


# --- what is tried: files of every broken kind, made once ---

REQUESTS: dict[str, bytes] = {
    "empty.json": b"",
    "none.json": b"[]",
    "broken.json": b'[{"instruction": ',
    "object.json": b'{"instruction": "Go"}',
    "latin.json": '[{"instruction": "Öffne die Tür"}]'.encode("latin-1"),
    "utf16.json": '[{"instruction": "Go"}]'.encode("utf-16"),
    "number.json": b'[{"instruction": 7}]',
    "lists.jsonl": b"[1]\n",
    "blank.json": b'[{"instruction": " "}]',
    "strings.json": b'["Go"]',
    "half.json": b'[{"instruction": "\\ud800"}]',
    "open.csv": b'goal\n"Go',
    "nameless.csv": b"id,size\n1,2\n",
    "page.xml": b"<rows/>",
}


def _edit(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def _break_models(base: Path, folder: Path) -> None:
    whole = (base / WEIGHTS).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    broken = {"lfs": pointer, "cut": whole[:-100], "short": whole[:100], "hollow": b""}
    for name, raw in broken.items():
        model = shutil.copytree(base, folder / name)
        (model / WEIGHTS).write_bytes(raw)
    names = "pickled weightless configless misconfigured unknown custom tokenless templateless"
    names += " refusing misspelt padless missing nan sharded"
    models = {name: shutil.copytree(base, folder / name) for name in names.split()}
    for name in ("pickled", "weightless"):
        (models[name] / WEIGHTS).unlink()
    (models["pickled"] / "pytorch_model.bin").write_bytes(b"no pickle")
    (models["configless"] / "config.json").unlink()
    (models["misconfigured"] / "config.json").write_text("{")
    _edit(models["unknown"] / "config.json", model_type="nonesuch", architectures=["Nonesuch"])
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    _edit(models["custom"] / "config.json", model_type="own", auto_map=code)
    (models["custom"] / "code.py").write_text("raise SystemExit('ran')")
    for path in models["tokenless"].glob("*token*"):
        path.unlink()
    templates = {"templateless": None, "misspelt": "{% for %}"}
    templates["refusing"] = "{{ raise_exception('never') }}"
    for name, template in templates.items():
        path = models[name] / "chat_template.jinja"
        path.unlink()
        if template:
            path.write_text(template)
    _edit(models["padless"] / "tokenizer_config.json", pad_token=None, eos_token=None)
    tensors = load_file(base / WEIGHTS)
    key = "model.layers.0.mlp.up_proj.weight"
    meta = {"format": "pt"}
    save_file({k: v for k, v in tensors.items() if k != key}, models["missing"] / WEIGHTS, meta)
    save_file(tensors | {key: tensors[key] * np.float32(np.nan)}, models["nan"] / WEIGHTS, meta)
    (models["sharded"] / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1-of-1.safetensors")}
    (models["sharded"] / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def _break_patches(patch: Path, folder: Path) -> None:
    names = ("cut_patch", "tensorless_patch", "misconfigured_patch", "nan_patch", "lora")
    patches = {name: shutil.copytree(patch, folder / name) for name in names}
    file = "adapter_model.safetensors"
    (patches["cut_patch"] / file).write_bytes((patch / file).read_bytes()[:-9])
    (patches["tensorless_patch"] / file).unlink()
    (patches["misconfigured_patch"] / "adapter_config.json").write_text("{")
    (patches["lora"] / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    raw = (patch / file).read_bytes()
    (patches["nan_patch"] / file).write_bytes(raw[:-4] + b"\xff\xff\xff\x7f")


@pytest.fixture(scope="session")
def places(
    run: Run,
    tiny_llama: Path,
    requests: Requests,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """What the table below names in braces."""
    folder = tmp_path_factory.mktemp("broken")
    for name, raw in REQUESTS.items():
        (folder / name).write_bytes(raw)
    _break_models(tiny_llama, folder)
    _break_patches(run.out / "patch", folder)
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "unanswered.jsonl").write_text('{"prompt": "Go", "reply": "I went"}')
    (folder / "bare").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("years of work")
    save_tiny_tokenizer(save_tiny_llama(folder / "other", seed=1))
    save_tiny_llama(folder / "another", dtype=torch.bfloat16, seed=1)
    call("merge", run.base, run.out / "patch", "--out", folder / "merged")
    broken = {path.name.partition(".")[0]: str(path) for path in folder.iterdir()}
    own = {"harmful": requests.harmful, "benign": requests.benign, "lessons": requests.lessons}
    kept = {"map": str(run.out / "map"), "patch": str(run.out / "patch"), "run": str(run.out)}
    wide = {"wide": str(tiny_llama)}  # in float32
    return broken | own | kept | wide | {"base": str(run.base), "folder": str(folder)}


# --- the table ---


class Bad(NamedTuple):
    """One wrong call: what is wrong, the arguments, and what its one line says."""

    what: str
    arguments: str
    line: str
    code: int = 1


_ASK = "--eval-harmful {harmful} --eval-benign {benign} --limit 2 --max-new-tokens 4"
_EVAL = f"eval {{}} {_ASK}"
_ENHANCE = (
    "enhance {} --out {{out}} --harmful {{harmful}} --benign {{benign}} --density 0.1 --steps 2 "
    "--eval-harmful {{harmful}} --eval-benign {{benign}} --limit 2"
)
_SCORE = "score {} --out {{out}} --harmful {{harmful}} --examples 4 --density 0.1"
_TRAIN = "train {} --out {{out}} --harmful {{harmful}} --benign {{benign}} --steps 1"
_PRESERVE = "preserve {} --map {{map}} --data {{lessons}} --steps 1 --no-anchor --out {{out}}"


def bad(
    what: str, start: str, arguments: str = "", line: str = "", code: int = 1, base: str = "base"
) -> Bad:
    """A row: a command on a base, and what is wrong in it."""
    filled = start.replace("{{", "{").replace("}}", "}").replace("{}", f"{{{base}}}", 1)
    return Bad(what, f"{filled} {arguments}".strip(), line, code)


def _each(what: str, command: str, arguments: str, values: str, line: str, code: int) -> list[Bad]:
    return [
        bad(f"{what} {value}", command, arguments.format(value), line, code)
        for value in values.split()
    ]


MODELS = {
    "lfs": "expected a safetensors file, found a git-lfs pointer, .* run `git lfs pull`",
    "cut": "expected [0-9]+ bytes, as its header says, found",
    "short": "expected a safetensors header, found",
    "hollow": "expected a safetensors header, found",
    "pickled": "found only pickled weights",
    "weightless": "found neither; give the directory of a model",
    "sharded": "expected a shard that .* names, found no file",
    "configless": "expected a Hugging Face model with config.json",
    "misconfigured": "not a valid JSON file",
    "unknown": "nonesuch",
    "custom": "trust_remote_code|custom code|own",
    "tokenless": "expected a tokenizer",
    "templateless": "expected a chat template, found none",
    "refusing": "expected a chat template that renders a request, found TemplateError: never",
    "misspelt": "expected a chat template that renders a request, found TemplateSyntaxError",
    "padless": "expected a padding or end token",
    "missing": "up_proj",
}

TABLE = [
    # 1 to 5: names and options
    bad("no adapter", "inspect nowhere", line="'nowhere' does not exist", code=2),
    bad("no base", _ENHANCE.replace("{}", "./nowhere"), line="expected a model directory or a Hub"),
    *_each("density", _SCORE, "--density {}", "-0.1 2 nan 1%", "density", 2),
    bad("no steps", _TRAIN, "--map {map} --steps 0", "steps.* at least 1", 2),
    bad("a percentage", _EVAL, "--max-asr 50", "at most 1", 2),
    bad("a dtype", _EVAL, "--dtype fp16", "fp16", 2),
    bad("an option", _ENHANCE, "--step 10", "Did you mean .*--steps", 2),
    bad("a command", "enhanse {}", line="Did you mean.*enhance", code=2),
    *(
        bad(f"{command.split()[0]} too {how}", command, f"--density {density}", line)
        for command in (_ENHANCE, _SCORE)
        for how, density, line in (
            ("dense", "0.9", "--density: expected 1 to .*choose a density of at most 0"),
            ("sparse", "1e-9", "--density: expected 1 to .* found 0"),
        )
    ),
    # 6: requests
    *(
        bad(f"requests {name}", _EVAL, f"--eval-harmful {{{name.partition('.')[0]}}}", name)
        for name in REQUESTS
    ),
    bad("no requests", _ENHANCE, "--harmful nowhere.json", "nowhere.json: expected a file"),
    bad("no such set", _ENHANCE, "--benign builtin:nope", "builtin:nope: expected one of"),
    bad("a directory of requests", _EVAL, "--eval-harmful {bare}", "contain any data files"),
    # 13: settings without their partner
    bad("nothing to contrast", _SCORE, "--contrast-density 0.1", "--contrast-density: expected"),
    bad("temperature alone", _SCORE, "--temperature 1", "--temperature: expected --guard or"),
    bad(
        "data without answers",
        *(
            _PRESERVE,
            "--data {unanswered}",
            "column of answers .*output.*found prompt, reply; give",
        ),
    ),
    bad("a rank of nothing", _PRESERVE, "--rank 2", "--rank: expected --method lora"),
    bad("a guard alone", _SCORE, "--guard {wide}", "--guard: expected --guard-profile"),
    bad(
        "no profile",
        _SCORE,
        "--method esi --guard {wide} --guard-profile nope",
        "nope: expected a JSON file",
    ),
    bad(
        "no label of a guard",
        *(
            _SCORE,
            "--method esi --guard {wide} --guard-profile wildguard",
            "label ' no' to be one token",
        ),
    ),
    bad(
        "a label",
        _SCORE,
        "--method esi --classifier {wide} --classifier-label x",
        "expected safe=LABEL",
    ),
    bad(
        "a strange label",
        *(
            _SCORE,
            "--method esi --classifier {wide} --classifier-label safe=x",
            "expected one of its labels",
        ),
    ),
    # 15 to 21: merges and targets
    bad("no number", "merge {} {patch}@nan --out {out}", line="nan", code=2),
    bad("no scale", "merge {} {patch}@half --out {out}", line="half", code=2),
    bad("a huge scale", "merge {} {patch}@1e30 --out {out}", line="at least -10 and", code=2),
    bad("a scale of eval", _EVAL, "--adapter {patch}@1e30", "found 1e.30", code=2),
    bad("no scale of eval", _EVAL, "--adapter {patch}@nan", "found nan", code=2),
    bad("a scale of a map", "inspect {map}@0.5", line="a scale means nothing here", code=2),
    bad("a patch twice", "merge {} {patch} {patch} --out {out}", line="expected different patches"),
    bad("a run", "merge {} {run} --out {out}", line="found a run; give .*patch or .*map"),
    bad("a map", "merge {} {map} --out {out}", line="found a safety map, which has no values"),
    bad(
        "swapped",
        "merge {} {base} --out {out}",
        line="found a model; .* model before",
        base="patch",
    ),
    bad("a LoRA", "merge {} {lora} --out {out}", line="peft_type"),
    bad("eval of a run", _EVAL, "--adapter {run}", "adapter_config.json"),
    bad("eval of a map", _EVAL, "--adapter {map}", "expected a safety patch, found a safety map"),
    bad("training a patch", _TRAIN, "--map {patch}", "expected a safety map, found a safety patch"),
    *(
        bad(f"{command.split()[0]} {name}", command, f"{more} --out {{{name}}}", line)
        for command, more in (
            *((_SCORE, ""), (_TRAIN, "--map {map}"), (_PRESERVE, "")),
            *(("merge {} {patch}", ""), ("convert {patch} --encoding plain", "")),
        )
        for name, line in (
            ("full", "expected an empty directory or none, found files; give --overwrite"),
            ("object", "expected a directory or nothing, found a file"),
        )
    ),
    *(
        bad(f"{command.split()[0]} into its {what}", command, f"{more} --out {place}/run", line)
        for command, more, what, place, line in (
            (_ENHANCE, "", "base", "{base}", "apart from the base"),
            (_SCORE, "", "base", "{base}", "apart from the base"),
            (_TRAIN, "--map {map}", "map", "{map}", "apart from the map"),
            ("merge {} {patch}", "", "patch", "{patch}", "apart from the patch"),
            ("merge {} {patch}", "", "base", "{base}", "apart from the base"),
        )
    ),
    # 22 to 24: a run's directory
    *(
        bad(f"a run in {place}", _ENHANCE, f"--out={place}", "found something else; give another")
        for place in ("{object}", "{full}", ".", "")
    ),
    *(
        bad(f"{command.split()[0]} here", command, f"{more} --out .", "found the current one; give")
        for command, more in (
            *((_SCORE, ""), (_TRAIN, "--map {map}"), (_PRESERVE, ""), ("merge {} {patch}", "")),
        )
    ),
    bad("a file for eval", _EVAL, "--out {object}", "expected no file there, found one"),
    bad("a file below a file", _EVAL, "--out {object}/r.json", "expected a path below directories"),
    # 25 to 31: models
    *(
        bad(f"{command.split()[0]} a {name} model", command, "", line, base=name)
        for command in (_EVAL, _ENHANCE, _SCORE)
        for name, line in MODELS.items()
    ),
    # 34: bases that are none
    bad("a file as base", _EVAL, line="is a file|model directory", base="object"),
    bad("an adapter as base", _EVAL, line="config.json", base="patch"),
    bad("a GGUF file", _EVAL, line="model directory", base="model"),
    # 35: adapters
    *(
        bad(f"{command.split()[0]} {name}", command, f"{option} {{{name}}}", line)
        for command, option in (
            *((_EVAL, "--adapter"), ("merge {} --out {out}", "")),
            ("convert --encoding plain --out {out}", ""),
        )
        for name, line in (
            ("cut_patch", "adapter_model.safetensors: expected [0-9]+ bytes"),
            ("tensorless_patch", "expected adapter_model.safetensors, found none"),
            ("misconfigured_patch", "adapter_config.json: expected JSON"),
            ("nan_patch", "adapter_model|digest|finite"),
        )
    ),
    *(
        bad(f"inspect {name}", f"inspect {{{name}}}", line=line)
        for name, line in (
            ("cut_patch", "adapter_model.safetensors: expected [0-9]+ bytes"),
            ("tensorless_patch", "expected adapter_model.safetensors, found none"),
            ("misconfigured_patch", "adapter_config.json: expected JSON"),
            ("lora", "peft_type: expected SAFEWEIGHTS, found 'LORA'"),
        )
    ),
    # 36: another base
    bad("merge on another base", "merge {} {patch} --out {out}", line="use ", base="other"),
    bad("preserving another base", _PRESERVE, line="; use ", base="wide"),
    bad("preserving a patch that isn't merged", _PRESERVE, "--map {patch}", "found it without"),
    bad("eval on another base", _EVAL, "--adapter {patch}", "use ", base="other"),
    bad("training on another base", _TRAIN, "--map {map}", "use ", base="other"),
    *(
        bad(
            f"{command.split()[0]} on a base of other values",
            *(command, "", "in [^ ]*another the values with digest [0-9a-f]{12} .* model.; use "),
            base="another",
        )
        for command in (
            "merge {} {patch} --out {out}",
            "convert {patch} --encoding compact --base {} --out {out}",
        )
    ),
    bad(
        "converting on another base",
        *("convert {patch} --encoding compact --base {} --out {out}", "", "found .*; use "),
        base="wide",
    ),
    bad(
        "probing with the run's map",
        *("probe {} --map {map} --out {out} --limit 2", "", "give the patch as --map"),
        base="merged",
    ),
    # 37: a base that is merged already
    *(
        bad(f"{command.split()[0]} on a merged base", command, more, line, base="merged")
        for command, more, line in (
            ("merge {} {patch} --out {out}", "", "found .* already merged into it; use it as"),
            (_EVAL, "--adapter {patch}", "found .* already merged into it; use it as it is"),
            (_TRAIN, "--map {map}", "another model.; use "),
            (_PRESERVE, "", "or give the patch as --map"),
        )
    ),
    # 2: a dtype that loses what training starts from
    *(
        bad(f"{command.split()[0]} in {dtype}", command, f"--dtype {dtype}", line, base="wide")
        for command, dtype, line in (
            (_ENHANCE, "bfloat16", "--dtype bfloat16: expected one that holds the weights"),
            (_ENHANCE, "float16", "--dtype float16: expected one that holds the weights"),
        )
    ),
    bad("preserving in float16", _PRESERVE, "--dtype float16", "expected an accelerator"),
    bad("a device", _EVAL, "--device cuda:99", "--device cuda:99: expected a torch device"),
    # 38: nothing to undo
    bad("unmerging a base", "unmerge {}", line="expected the undo journal .* found none"),
    # 48 and 49: the Hub, which these tests don't reach
    *(
        bad(
            f"offline {start.split()[0]}", start, line="HF_HUB_OFFLINE set; unset it to ask the Hub"
        )
        for start in (
            *("eval nobody/nothing", "merge nobody/nothing {patch} --out {out}"),
            *("pull nobody/nothing --out {out}", "inspect nobody/nothing"),
            "list --base nobody/nothing",
        )
    ),
    bad("offline data", _SCORE, "--harmful nobody/data:train", "nobody/data:train: expected"),
    bad("a revision of a directory", _EVAL, "--revision main", "which has no revisions; leave it"),
    bad("a repository without owner", "push {run} mine --base a/b", line="expected USER/NAME"),
    # 51: the rest
    bad("comparing a model", "compare {map} {other}", line="found a model; give the directory of"),
    bad("comparing a run", "compare {map} {run}", line="found a run; give .*patch or .*map"),
    bad("reproducing nothing", "reproduce nowhere --out {out}", line="does not exist", code=2),
    bad("reproducing a patch", "reproduce {patch} --out {out}", line="found none; give .*/run"),
    bad("a key that is none", "sign {patch} --key {object}", line="expected an elliptic-curve key"),
    bad("no such key", "sign {patch} --key nowhere", line="'nowhere' does not exist", code=2),
    bad("no signature", "verify-signature {patch} --key {object}", line="expected a signature"),
    bad("a choice", "convert {patch} --encoding short --out {out}", line="short", code=2),
    bad("signing without a key", "sign {patch}", line="--key", code=2),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.what.replace(" ", "_"))
def test_bad_input_is_refused_at_once_in_one_line(
    row: Bad, places: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = content(Path(places["folder"]))
    called = call(*row.arguments.format_map(places | {"out": str(out)}).split())
    assert called.exit_code == row.code, called.output
    assert called.stdout == ""
    lines = lines_of(called)
    # Nothing was computed, or the bars would have been here.
    assert len(lines) == 1 or row.code == 2, called.stderr
    assert lines[-1].startswith("Error: ")
    assert re.search(row.line, lines[-1]), lines[-1]
    assert list(tmp_path.iterdir()) == []
    assert content(Path(places["folder"])) == before


def fill(command: str, places: dict[str, str], out: Path, base: str = "base") -> list[str]:
    """The words of a command of the table."""
    return bad("", command, base=base).arguments.format_map(places | {"out": str(out)}).split()


def test_weights_that_are_no_numbers_are_said_with_what_to_do(
    places: dict[str, str], tmp_path: Path
) -> None:
    called = call(*fill(_EVAL, places, tmp_path, base="nan"))
    assert called.exit_code == 1
    assert "expected finite" in lines_of(called)[-1]


# --- requests that only look wrong ---

READ: dict[str, bytes] = {
    "mark.json": b'\xef\xbb\xbf[{"instruction": "Go"}, {"instruction": "Run"}]',
    "mark.jsonl": b'\xef\xbb\xbf{"instruction": "Go"}\n{"instruction": "Run"}',
    "windows.jsonl": b'{"instruction": "Go"}\r\n\r\n{"instruction": "Run"}\r\n',
    "nul.json": b'[{"instruction": "G\\u0000o"}, {"instruction": "Run"}]',
    "thrice.json": b'[{"instruction": "Go"}, {"instruction": "Go"}, {"instruction": "Go"}]',
    "table.csv": b"goal\nGo\nRun\n",
    "lines.txt": b"Go\nRun\n",
    "LOUD.JSON": b'[{"instruction": "Go"}, {"instruction": "Run"}]',
}


@pytest.mark.parametrize("name", READ)
def test_requests_of_other_programs_are_read(
    name: str, places: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(READ[name])
    words = [*fill(_EVAL, places, tmp_path), "--eval-harmful", tmp_path / name]
    called = call(*words)
    assert called.exit_code == 0, called.stderr
    assert re.search(r"ASR, harmful requests .*/2\)\n", called.stdout)


def test_a_request_that_is_too_long_loses_its_middle_and_that_is_said(
    places: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("x" * 25_000)
    called = call(*fill(_EVAL, places, tmp_path), "--eval-harmful", tmp_path / "long.txt")
    assert called.exit_code == 0, called.stderr
    assert "model's positions, lose their middle: 1" in called.stderr
    assert re.search(r"requests without their middle +1\n", called.stdout)


def test_what_ruins_a_model_or_says_little_of_others_is_said(
    places: dict[str, str], tmp_path: Path
) -> None:
    called = call(*fill(_ENHANCE, places, tmp_path / "run"), "--lr", "1e9")
    assert called.exit_code == 0, called.stderr
    assert "4 of the 4 requests to measure on are learned from as well" in called.stderr
    assert re.search("\n(Garbage|No better|Damaged): ", called.stderr)


# --- a run's directory ---


def test_a_directory_that_a_wrong_command_was_given_takes_the_corrected_one(
    places: dict[str, str], tmp_path: Path
) -> None:
    words = fill(_ENHANCE, places, tmp_path / "run")
    assert call(*words, "--density", "0.9").exit_code == 1
    assert list(tmp_path.iterdir()) == []
    assert call(*words).exit_code == 0


def test_a_run_that_has_only_measured_its_base_takes_other_settings_of_what_is_to_come(
    run: Run, places: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("settings.json", "before.json"):
        shutil.copy(run.out / name, out / name)
    before = (out / "before.json").read_bytes()
    words = ["enhance", run.base, *run.options[2:], "--out", out]
    refused = call(*words, "--limit", "2")
    assert refused.exit_code == 1
    assert "other evaluate.limit (3 there, 2 here)" in lines_of(refused)[-1]
    done = call(*words, "--density", "0.05", "--steps", "1")
    assert done.exit_code == 0, done.stderr
    assert (out / "before.json").read_bytes() == before
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["score"]["density"], settings["train"]["steps"]) == (0.05, 1)
    again = call(*words, "--density", "0.1", "--steps", "1")
    assert "other score.density (0.05 there, 0.1 here)" in lines_of(again)[-1]


def test_a_run_that_was_interrupted_while_it_trained_takes_no_other_settings_of_training(
    run: Run, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    words = ["enhance", run.base, *run.options[2:], "--out", out]

    def interrupt(*arguments: Any, **_: Any) -> None:
        (arguments[5] / "checkpoint-1").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("safeweights_peft.jobs.train.train_to_refuse", interrupt)
        assert call(*words, "--steps", "3").exit_code == 130
    left = content(out)
    refused = call(*words, "--steps", "5")
    assert refused.exit_code == 1
    (line,) = lines_of(refused)
    assert "other train.steps (3 there, 5 here); the same command as then resumes it" in line
    assert "another --out or deleting that directory starts anew" in line
    assert content(out) == left
    done = call(*words, "--steps", "3")
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("name", ["before.json", "settings.json"])
def test_a_broken_file_of_a_run_is_said_with_what_to_do(
    name: str, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for file in ("settings.json", "before.json"):
        shutil.copy(run.out / file, out / file)
    (out / name).write_text("{")
    called = call("enhance", run.base, *run.options[2:], "--out", out)
    assert called.exit_code == 1
    assert re.search(rf"{name}: expected JSON, found .*; delete", lines_of(called)[-1])


@pytest.mark.parametrize("command", [_ENHANCE, _SCORE, _TRAIN + " --map {map}", _PRESERVE])
def test_a_result_that_another_process_makes_is_refused_at_once(
    command: str, places: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with lock(out, DataError):
        called = call(*fill(command, places, out))
    assert called.exit_code == 1
    (line,) = lines_of(called)
    assert line.startswith(f"Error: {out}: expected no other process at work on it")
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_locks_nothing(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from safeweights_peft.files import lock\n"
        "from safeweights_peft.errors import DataError\n"
        f"with lock(Path({str(tmp_path / 'out')!r}), DataError): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    with lock(tmp_path / "out", DataError):
        pass
    assert list(tmp_path.iterdir()) == []


# --- the system ---


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeweights_peft.files.os.access", lambda path, mode: False)
    for command in (_EVAL + " --out {out}", _ENHANCE, _SCORE, "merge {} {patch} --out {out}"):
        called = call(*fill(command, places, tmp_path / "out"))
        assert called.exit_code == 1
        (line,) = lines_of(called)
        assert "expected a writable place" in line
    assert list(tmp_path.iterdir()) == []


OUT_OF_MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate"),
    RuntimeError("unable to mmap 538090408 bytes from file: Cannot allocate memory (12)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:30] or "memory")
def test_too_little_memory_is_one_line_with_ways_to_need_less(
    error: Exception, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise error

    monkeypatch.setattr("safeweights_peft.jobs.job.load_model", load)
    for command, way in ((_SCORE, "--layers-per-pass 1"), (_EVAL, "a smaller --batch-size")):
        called = call(*fill(command, places, tmp_path / "out"))
        assert called.exit_code == 1
        (line,) = lines_of(called)
        assert line.startswith("Error: memory: expected enough for this job, found too little")
        assert way in line
    assert call("--debug", *fill(_EVAL, places, tmp_path)).exception is error


def test_a_base_larger_than_the_memory_is_refused_before_it_is_loaded(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeweights_peft.jobs.job.find_memory", lambda device: 100_000)
    called = call(*fill(_ENHANCE, places, tmp_path / "out"))
    assert called.exit_code == 1
    (line,) = lines_of(called)
    assert "expected weights of at most 100.0 kB, the memory of cpu, found 128.4 kB" in line
    assert list(tmp_path.iterdir()) == []


def test_each_failure_of_a_library_is_said_in_one_line() -> None:
    import pickle

    import jinja2
    from safetensors import SafetensorError

    for error, line in (
        (SafetensorError("header too large"), "expected a whole one, found header too large"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "out: expected to"),
        (pickle.UnpicklingError("invalid load key, 'v'."), "expected weights, found invalid load"),
        (jinja2.TemplateSyntaxError("unexpected '%'", 3), "expected one that renders a request"),
        (OSError(errno.ENOSPC, "full"), "out: expected to be read or written, found full; free"),
        (OSError(errno.EROFS, "fixed", "place"), "place: expected to be read or written"),
        (OSError("place: expected to be written, was not"), "place: expected to be written"),
    ):
        assert line in str(describe_failure(error, "out", ()))
    assert describe_failure(ValueError("a bug"), "out", ()) is None
    assert describe_failure(RuntimeError("a bug"), "out", ()) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("words", [["--help"], ["inspect"], ["merge", "--help"]], ids=" ".join)
def test_output_that_cannot_be_written_is_one_line(words: list[str], run: Run) -> None:
    arguments = [*words, run.out / "map"] if words == ["inspect"] else words
    command = [sys.executable, "-m", "safeweights_peft", *map(str, arguments)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: stdout: expected to be read or written, found No space")
    assert len(done.stderr.splitlines()) == 1


WRITERS = [
    *("merge {} {patch} --out {out}", "convert {patch} --encoding plain --out {out}", _SCORE),
    *(_TRAIN + " --map {map}", _PRESERVE, _ENHANCE),
    *("export {patch} --to supertuning --out {out}", "report {run} --out {out}"),
    *("diff {} {merged} --out {out}", "merge {own} {patch} --in-place"),
]


@pytest.mark.parametrize("command", WRITERS, ids=lambda command: " ".join(command.split()[:2]))
def test_a_disk_that_is_full_is_one_line_and_nothing_half_written(
    command: str, places: dict[str, str], tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    own, out = shutil.copytree(places["base"], tmp_path / "own"), tmp_path / "out"
    words = fill(command, places | {"own": str(own)}, out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # Python ignores the signal
    try:
        called = call(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert called.exit_code == 1, called.output
    assert lines_of(called)[-1].startswith("Error: ")
    assert content(own) == content(Path(places["base"]))
    left = [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".lock")]
    assert left == []
    done = call(*words)
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("ending", "lines"), [("| head -1", 1), (">&-", 0), ("2>&-", 9), ("<&-", 9)]
)
def test_a_stream_that_is_closed_is_no_error(ending: str, lines: int, run: Run) -> None:
    command = shlex.join(
        [sys.executable, "-m", "safeweights_peft", "inspect", str(run.out / "map")]
    )
    done = subprocess.run(
        ["sh", "-c", f"{command} {ending}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == lines


@pytest.mark.parametrize(
    "changes",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        {"HOME": "/nonexistent"},
        {"HOME": None},
    ],
    ids=str,
)
def test_the_surroundings_of_a_process_are_no_error(
    changes: dict[str, str | None], places: dict[str, str], tmp_path: Path
) -> None:
    patch = shutil.copytree(places["patch"], tmp_path / "a pätch")
    command = [sys.executable, "-m", "safeweights_peft", "merge", places["base"], str(patch)]
    environment = {k: v for k, v in (os.environ | changes).items() if v is not None}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "süß")],
        capture_output=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "süß" / WEIGHTS).is_file()


# --- Ctrl-C ---


@pytest.mark.parametrize(
    ("command", "resumes"),
    [
        *((_ENHANCE, True), (_SCORE, True), (_PRESERVE, True), (_EVAL, False)),
        ("probe --linear {}", False),
    ],
)
def test_an_interrupted_command_says_whether_it_goes_on(
    command: str,
    resumes: bool,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("job", "preserve"):
        monkeypatch.setattr(f"safeweights_peft.jobs.{name}.load_model", interrupt)
    called = call(*fill(command, places, tmp_path / "out"))
    assert called.exit_code == 130
    (line,) = lines_of(called)
    says = ": the same command goes on from where it stopped." if resumes else "."
    assert line == f"Interrupted{says}"


@pytest.mark.parametrize(
    ("name", "during", "code", "says"),
    [
        ("safeweights", "wrapt", -signal.SIGINT, ""),  # the package itself
        ("-m", "lazy_loader", -signal.SIGINT, ""),
        ("safeweights", "click", 130, "Interrupted.\n"),
        ("mine.py", "wrapt", -signal.SIGINT, "KeyboardInterrupt\n"),  # another's program
    ],
)
def test_an_interruption_of_the_imports_shows_no_traceback(
    name: str, during: str, code: int, says: str
) -> None:
    script = (
        "import os, signal, sys\n"
        # Which a shell has ignored for what it starts in the background.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.argv[0] = {name!r}\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {during!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from safeweights_peft.__main__ import main\n"
        "main()"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.endswith(says)
    assert ("Traceback" in done.stderr) == (name == "mine.py")


def test_a_conversation_takes_bytes_that_are_no_text(run: Run) -> None:
    command = [sys.executable, "-m", "safeweights_peft", "chat", str(run.base), "--json"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        command, input=b"h\xff\xfei\n", capture_output=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["turns"][0]["content"] == "h\ufffd\ufffdi"


def test_an_interruption_while_arguments_are_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safeweights_peft.cli._Group.parse_args", interrupt)
    called = call("inspect", "nowhere")
    assert (called.exit_code, called.stdout, called.stderr) == (130, "", "Interrupted.\n")
