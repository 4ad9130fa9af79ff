"""Reports: figures that dense masks confirm, published whole, on a page where nothing runs."""

import json
import shutil
import subprocess
import sys
from base64 import b64decode
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, JetMoeConfig, PreTrainedModel

from safeweights_peft.errors import BaseMismatchError, ModelError, ReportError
from safeweights_peft.fetching import BaseModel
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.sweep import sweep
from safeweights_peft.merging.convert import convert
from safeweights_peft.modeling.layout import eligible_parameters, total_parameters
from safeweights_peft.patch.artifacts import SafetyMap
from safeweights_peft.patch.groups import Group, spread_groups
from safeweights_peft.patch.io import inspect, write_map
from safeweights_peft.selection.scores import build_map
from safeweights_peft.selection.topk import Selected
from safeweights_peft.study.report import render_page, report_map, report_run
from tests.cli.conftest import call
from tests.jobs.conftest import Run
from tests.study.records import record_of
from tests.tiny_files import edit_config
from tests.tiny_jobs import Requests, content
from tests.tiny_models import COMMON, save_tiny_llama
from tests.training.maps import DOWN, UP, load, make_map

MODELS = ["tiny_llama", "tiny_tied_llama", "tiny_mixtral", "tiny_qwen3_moe"]
DENSE_FILES = {"report.json", "report.html", "heatmap.png", "components.png", "layers.png"}
MATRICES = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "mlp.gate": "router",
    "mlp.experts.gate_up_proj": "experts gate_up_proj",
    "mlp.experts.down_proj": "experts down",
}


@pytest.fixture
def safety_map(tiny_llama: Path, tmp_path: Path) -> Path:
    write_map(tmp_path / "map", make_map(tiny_llama, [UP]))
    return tmp_path / "map"


def masks_of(model: PreTrainedModel, safety_map: SafetyMap) -> dict[str, torch.Tensor]:
    """Makes a dense mask of every parameter."""
    masks = {name: torch.zeros_like(each, dtype=bool) for name, each in model.named_parameters()}
    for name, indices in safety_map.indices.items():
        masks[name].view(-1)[torch.from_numpy(indices).long()] = True
    return masks


def test_experts_of_which_none_is_eligible_have_no_table(tmp_path: Path) -> None:
    """JetMoE's attention has a bias of all experts, and its matrices go by other names."""
    config = JetMoeConfig(**COMMON, kv_channels=8, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    matrix = "model.layers.0.mlp.input_linear.weight"
    write_map(tmp_path / "map", make_map(tmp_path / "base", [matrix]))
    record = report_map(tmp_path / "map", tmp_path / "report")
    assert record["experts"] == []
    assert "experts input_linear" in {row["component"] for row in record["components"]}


# --- figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", MODELS)
def test_every_matrix_has_the_counts_and_shares_of_its_dense_mask(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(fixture)
    safety_map, model = make_map(base), load(base)
    write_map(tmp_path / "map", safety_map)
    record = report_map(tmp_path / "map", tmp_path / "report")
    masks = masks_of(model, safety_map)
    total, selected = total_parameters(model), sum(int(mask.sum()) for mask in masks.values())
    assert (record["parameters"], record["selected"]) == (total, selected)
    cells = {(cell["layer"], cell["component"]): cell for cell in record["cells"]}
    for layer in (0, 1):
        for module, component in MATRICES.items():
            name = f"model.layers.{layer}.{module}"
            mask = masks.get(name, masks.get(f"{name}.weight"))
            assert (mask is None) == ((layer, component) not in cells)
            if mask is not None:
                cell, count = cells[layer, component], int(mask.sum())
                assert (cell["parameters"], cell["selected"]) == (mask.numel(), count)
                enrichment = (count / selected) / (mask.numel() / total)
                assert cell["enrichment"] == pytest.approx(enrichment)


def test_whole_rows_and_columns_are_counted_whatever_the_encoding(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = load(tiny_llama)
    names = [UP, "model.layers.0.self_attn.q_proj.weight", DOWN, "model.norm.weight"]
    kinds: list[Group | None] = ["row", "row", "column", None]
    selected = {}
    for name, group in zip(names, kinds, strict=True):
        shape = tuple(model.get_parameter(name).shape)
        indices = spread_groups(np.array([1, 4, 5]), group, shape) if group else np.arange(2)
        scores = np.ones(indices.size, np.float32)
        selected[name] = Selected(indices.astype(np.int32), scores)
    selection = {"method": "esi", "granularity": "auto"}
    base = BaseModel(str(tiny_llama), tiny_llama, None)
    write_map(tmp_path / "map", build_map(model, base, selected, selection))
    record = report_map(tmp_path / "map", tmp_path / "report")
    assert (record["rows"], record["columns"]) == (6, 3)
    counts = [(3, 0), (3, 0), (0, 3), (0, 0)]
    assert [(own["rows"], own["columns"]) for own in map(record["tensors"].get, names)] == counts
    components = {row["component"]: (row["rows"], row["columns"]) for row in record["components"]}
    assert [components[key] for key in ("up", "q", "down", "norms")] == counts
    layers = {row["layer"]: (row["rows"], row["columns"]) for row in record["layers"]}
    assert layers == {None: (0, 0), 0: (6, 0), 1: (0, 3)}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<tr><td>whole rows</td><td>6</td></tr>" in page
    assert "<th>rows</th><th>columns</th>" in page
    convert(tmp_path / "map", "compact", tmp_path / "compact")
    assert inspect(tmp_path / "compact")["rows"] == 0
    again = report_map(tmp_path / "compact", tmp_path / "again")
    assert again | {"map": record["map"]} == record
    shown = call("inspect", tmp_path / "map").stdout.split()
    assert " ".join(shown).count("whole rows 6 whole columns 3") == 1
    shown = call("inspect", tmp_path / "compact").stdout.split()
    assert "`safeweights report` counts them" in " ".join(shown)


@pytest.mark.parametrize("fixture", ["tiny_mixtral", "tiny_qwen3_moe"])
def test_every_expert_has_the_counts_of_its_slices(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(fixture)
    safety_map = make_map(base)
    write_map(tmp_path / "map", safety_map)
    record = report_map(tmp_path / "map", tmp_path / "report")
    masks = masks_of(load(base), safety_map)
    found = {(row["layer"], row["expert"]): row["selected"] for row in record["experts"]}
    assert found == {
        (layer, expert): sum(
            int(masks[f"model.layers.{layer}.mlp.experts.{own}"][expert].sum())
            for own in ("gate_up_proj", "down_proj")
        )
        for layer in (0, 1)
        for expert in range(4)
    }


def test_tied_parameters_are_counted_once(tiny_tied_llama: Path, tmp_path: Path) -> None:
    write_map(tmp_path / "map", make_map(tiny_tied_llama, [UP]))
    record = report_map(tmp_path / "map", tmp_path / "report")
    assert "lm_head" not in {row["component"] for row in record["components"]}
    assert record["parameters"] == total_parameters(load(tiny_tied_llama))


def test_the_enrichment_at_random_is_that_of_selecting_every_eligible_entry(
    tiny_llama: Path, safety_map: Path, tmp_path: Path
) -> None:
    record = report_map(safety_map, tmp_path / "report")
    eligible = sum(each.numel() for each in eligible_parameters(load(tiny_llama)).values())
    assert record["eligible"] == eligible
    assert record["random_enrichment"] == record["parameters"] / eligible


# --- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixture", "names"),
    [("tiny_llama", DENSE_FILES), ("tiny_mixtral", DENSE_FILES | {"experts.png"})],
)
def test_a_report_has_pictures_a_page_and_all_figures(
    fixture: str, names: set[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    write_map(tmp_path / "map", make_map(request.getfixturevalue(fixture)))
    record = report_map(tmp_path / "map", tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == record
    html = (tmp_path / "report" / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(names) - 2


def test_a_patch_is_reported_like_the_map_it_was_trained_on(run: Run, tmp_path: Path) -> None:
    records = [report_map(run.out / kind, tmp_path / kind) for kind in ("map", "patch")]
    assert [record["artifact"] for record in records] == ["safety map", "safety patch"]
    assert records[0]["cells"] == records[1]["cells"]


def test_an_existing_report_is_refused_unless_it_may_be_replaced(
    safety_map: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    out.mkdir()
    (out / "file").write_text("old")
    with pytest.raises(ReportError, match="expected an empty directory or none, found files"):
        report_map(safety_map, out)
    assert content(out) == {"file": b"old"}
    report_map(safety_map, out, overwrite=True)
    assert set(content(out)) == DENSE_FILES


def test_a_report_never_takes_the_place_of_its_map(safety_map: Path, tmp_path: Path) -> None:
    before = content(tmp_path)
    for out in (safety_map, safety_map / "report"):
        with pytest.raises(ReportError, match="expected a directory apart from the map"):
            report_map(safety_map, out, overwrite=True)
    assert content(tmp_path) == before


def test_a_report_that_fails_half_way_leaves_nothing(
    safety_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safeweights_peft.study.report.render_page", fail)
    with pytest.raises(KeyboardInterrupt):
        report_map(safety_map, tmp_path / "report")
    assert list(tmp_path.iterdir()) == [safety_map]


def test_without_matplotlib_a_report_is_refused_and_nothing_is_written(
    safety_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"^matplotlib: expected to be installed"):
        report_map(safety_map, tmp_path / "report")
    assert list(tmp_path.iterdir()) == [safety_map]


def test_a_path_that_is_not_unicode_makes_a_page_all_the_same(
    tiny_llama: Path, safety_map: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "map\udcff"
    safety_map.rename(odd)
    report_map(odd, tmp_path / "report")
    assert "map&#56575;" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


# --- a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def swept(run: Run, requests: Requests, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run with a sweep of its patch put into its directory."""
    out = shutil.copytree(run.out, tmp_path_factory.mktemp("swept") / "run")
    sweep(Job(run.base), out / "patch", out / "sweep", requests.evaluate())
    return run._replace(out=out)


def test_a_run_is_one_page_with_what_came_of_it_first(swept: Run, tmp_path: Path) -> None:
    report = report_run(swept.out, tmp_path / "report")
    names = DENSE_FILES | {"result.png", "sweep.png"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    html = (tmp_path / "report" / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 5
    order = [
        *(swept.result["outcome"]["word"].capitalize(), "ASR, 6 harmful", "Rates before and after"),
        *("The patch at several scales", "answers to harmful", "Answers to harmless"),
        *("Where the weights are", "Enrichment by layer", "<summary>Settings", "train.steps"),
    ]
    places = [html.index(text) for text in order]
    assert places == sorted(places)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "a"}
    assert not any("open" in attributes for _, attributes in page.tags)
    shown = report["result"]["answers"]["harmful"][0]["after"]["answer"]
    assert shown.split()[0] in unescape(html)


def test_a_run_without_a_sweep_has_a_page_too_and_another_patchs_sweep_is_not_its(
    run: Run, swept: Run, tmp_path: Path
) -> None:
    assert report_run(run.out, tmp_path / "report")["result"]["sweep"] is None
    assert not (tmp_path / "report" / "sweep.png").exists()
    out = shutil.copytree(swept.out, tmp_path / "run")
    path = out / "sweep" / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"content_id": "sha256:0"}))
    assert report_run(out, tmp_path / "other")["result"]["sweep"] is None


@pytest.mark.parametrize(
    ("picked", "sentence"),
    [
        ({"max_asr": 0.5, "scale": 0.75}, "at this scale the ASR is at most 0.5."),
        ({"max_asr": 1.0, "scale": 0.0}, "Of the base, without a patch, the ASR is at most 1"),
        ({"max_over_refusal": 0.1, "scale": 0.5}, "at this scale over-refusal is at most 0.1."),
    ],
)
def test_a_page_says_at_which_scale_the_limits_are_met(
    picked: dict[str, float], sentence: str, swept: Run, tmp_path: Path
) -> None:
    out = shutil.copytree(swept.out, tmp_path / "run")
    path = out / "sweep" / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | picked))
    report_run(out, tmp_path / "report")
    html = " ".join((tmp_path / "report" / "report.html").read_text().split())
    assert sentence in html
    assert ("Use it as <b>" in html) == bool(picked["scale"])


def test_a_result_of_something_else_is_no_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"kind": "probe"}')
    with pytest.raises(ReportError, match="expected the result of `safeweights enhance`"):
        report_run(tmp_path, tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


LATER = ("answers", "outcome", "sweep", "content_id")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_result_of_an_earlier_version_has_a_page_with_what_follows_from_its_figures(
    run: Run, tmp_path: Path
) -> None:
    out = shutil.copytree(run.out, tmp_path / "run")
    kept = {k: v for k, v in run.result.items() if k not in LATER}
    (out / "result.json").write_text(json.dumps(kept))
    result = report_run(out, tmp_path / "report")["result"]
    assert result == run.result | {"answers": {}, "sweep": None, "content_id": None}
    assert run.result["outcome"]["word"].capitalize() in (
        (tmp_path / "report" / "report.html").read_text()
    )


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("result.json", {"before": {}}, "before: expected attack_success_rate, .* found no "),
        ("result.json", {"after": None}, "after: expected attack_success_rate, .* found None"),
        ("result.json", {"patch": {}}, "patch: expected entries, path, .*, found none"),
        ("result.json", {"settings": None}, "settings: expected base, .*, found none"),
        ("patch/training.json", {"losses": [{"step": 1}]}, "expected losses, each with refusal"),
        ("patch/training.json", {"losses": [1]}, "expected losses, each with refusal"),
        ("patch/training.json", {"losses": None}, "expected losses, each with refusal"),
    ],
)
def test_a_run_that_lacks_figures_is_refused_in_one_line_that_says_what_to_run(
    file: str, changes: dict[str, Any], message: str, run: Run, tmp_path: Path
) -> None:
    out = shutil.copytree(run.out, tmp_path / "run")
    edit(out / file, **changes)
    with pytest.raises(ReportError, match=message) as error:
        report_run(out, tmp_path / "report")
    assert str(error.value).endswith("run `safeweights enhance` again, with another --out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["run", "map"])
def test_a_browser_shows_the_page_without_an_error_and_nothing_outside_the_view(
    kind: str, scheme: str, width: int, swept: Run, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    if kind == "run":
        report_run(swept.out, out)
    else:
        report_map(swept.out / "map", out)
    # The page runs nothing, so a page around it measures it; without its own policy, which
    # would keep the frame from being read. A frame has the width that a window can't be so narrow.
    html = (out / "report.html").read_text().replace("<details", "<details open")
    policy = html[html.index("<meta http-equiv") : html.index("<title>")]
    (out / "inner.html").write_text(html.replace(policy, ""))
    (out / "outer.html").write_text(MEASURE.replace("WIDTH", str(width)))
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
        *("--allow-file-access-from-files", "--enable-logging=stderr", "--disable-dev-shm-usage"),
        *("--virtual-time-budget=10000", f"--user-data-dir={tmp_path / 'profile'}"),
        *(["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []),
    ]
    shown = subprocess.run(
        [*command, (out / "outer.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = json.loads(shown.stdout.split("<pre>")[1].split("</pre>")[0])
    assert found["scrolled"] <= width
    assert found["outside"] == []
    assert found["pictures"] == html.count("<img")
    assert "CONSOLE" not in shown.stderr
    assert found["dark"] == (scheme == "dark")
    direct = subprocess.run(
        [*command, (out / "report.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in direct.stderr


MEASURE = """<!DOCTYPE html><body style="margin: 0">
<iframe id="page" src="inner.html" style="width: WIDTHpx; height: 2000px; border: 0"></iframe>
<script>
const frame = document.getElementById("page")
frame.onload = () => {
  const inner = frame.contentDocument, width = inner.documentElement.clientWidth, outside = []
  for (const element of inner.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect()
    // Wide tables scroll in a box of their own.
    if (!element.closest(".wide table") && (box.right > width + 1 || box.left < -1))
      outside.push(element.tagName + " " + box.left + " " + box.right)
  }
  const images = [...inner.images], pre = document.createElement("pre")
  pre.textContent = JSON.stringify({
    outside, scrolled: inner.documentElement.scrollWidth,
    pictures: images.filter((image) => image.naturalWidth > 0).length,
    dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches,
  })
  document.body.append(pre)
}
</script></body>
"""


# --- the base ----------------------------------------------------------------------------------


def test_a_base_needs_its_config_alone(tiny_llama: Path, safety_map: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    shutil.copy(tiny_llama / "config.json", tmp_path / "base")
    record = report_map(safety_map, tmp_path / "report", str(tmp_path / "base"))
    assert record["base"] == str(tmp_path / "base")
    assert record["cells"] == report_map(safety_map, tmp_path / "other")["cells"]


def test_of_a_base_on_the_hub_only_the_config_at_the_maps_revision_is_fetched(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safety_map = make_map(tiny_llama, [UP])
    metadata = replace(safety_map.metadata, base_model_name_or_path="a/b", revision="0123abc")
    write_map(tmp_path / "map", replace(safety_map, metadata=metadata))
    asked = []

    def download(source: str, **options: Any) -> str:
        asked.append((source, options))
        return str(tiny_llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    report_map(tmp_path / "map", tmp_path / "report")
    report_map(tmp_path / "map", tmp_path / "other", "c/d")
    assert asked == [
        ("a/b", {"revision": "0123abc", "allow_patterns": ["config.json"]}),
        ("c/d", {"revision": None, "allow_patterns": ["config.json"]}),
    ]


def test_a_map_that_names_no_base_needs_one(
    tiny_llama: Path, safety_map: Path, tmp_path: Path
) -> None:
    edit_config(safety_map, lambda config: config.update(base_model_name_or_path=None))
    with pytest.raises(
        ModelError, match="base_model_name_or_path: expected the name of its base, found none"
    ):
        report_map(safety_map, tmp_path / "report")
    assert report_map(safety_map, tmp_path / "report", str(tiny_llama))["selected"]


def test_a_base_of_other_shapes_is_refused_by_name(safety_map: Path, tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 52}))
    message = rf"{UP}: expected shape \[48, 32\], found \[52, 32\]; give the map's base, not {base}"
    with pytest.raises(BaseMismatchError, match=message):
        report_map(safety_map, tmp_path / "report", str(base))
    assert not (tmp_path / "report").exists()


def test_a_base_without_a_parameter_of_the_map_is_refused_by_name(
    tiny_mixtral: Path, safety_map: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseMismatchError, match=f"{UP}: .* found no such parameter; give the map"):
        report_map(safety_map, tmp_path / "report", str(tiny_mixtral))
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "no-such-model"},
        {"model_type": "vit"},
        {"model_type": "llama", "hidden_size": "64"},
        {"model_type": "llama", "num_attention_heads": 0},
    ],
    ids=str,
)
def test_a_base_that_transformers_can_not_build_is_refused_by_name(
    config: dict[str, str], safety_map: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="expected the config of a causal language model") as error:
        report_map(safety_map, tmp_path / "report", str(tmp_path / "base"))
    assert str(tmp_path / "base") in str(error.value)


def test_a_base_without_layers_is_refused_by_name(
    tiny_llama: Path, safety_map: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    config = json.loads((tiny_llama / "config.json").read_text()) | {"num_hidden_layers": 0}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="expected a model with matrices beside its embeddings"):
        report_map(safety_map, tmp_path / "report", str(tmp_path / "base"))


# --- the page ----------------------------------------------------------------------------------

EVIL = "<script>alert(1)</script>\"'&{x}"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would make of a page.

    Attributes:
        tags: every tag that opens, with its attributes.
        cells: the text of every cell of a table.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in {"td", "th"}:
            self.cells[-1] += data


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    paths = {f"picture {n}": tmp_path / f"{n}.png" for n in range(2)}
    for number, path in enumerate(paths.values()):
        path.write_bytes(bytes([number, 255, 10, 13]))
    return paths


def test_a_page_holds_every_picture_byte_for_byte(pictures: dict[str, Path]) -> None:
    page = Page(render_page(record_of(2), pictures))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == list(pictures)
    for image, path in zip(images, pictures.values(), strict=True):
        kind, _, data = str(image["src"]).partition(",")
        assert (kind, b64decode(data)) == ("data:image/png;base64", path.read_bytes())


def test_a_page_loads_nothing_and_runs_nothing(pictures: dict[str, Path]) -> None:
    html = render_page(record_of(2, experts=2), pictures)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "a"}
    names = {name for _, attributes in page.tags for name in attributes}
    assert names <= {
        *("lang", "charset", "http-equiv", "name", "content", "class", "src", "alt", "open")
    }
    assert "://" not in html
    assert "url(" not in html


def test_a_page_tells_what_was_selected_and_how(pictures: dict[str, Path]) -> None:
    cells = Page(render_page(record_of(2), pictures)).cells
    facts = dict(pairwise(cells))
    assert facts["safety map"] == "run/map"
    assert facts["base"] == "someone/tiny"
    assert facts["selection: method"] == "esi"
    assert facts["selection: density"] == "0.01"
    assert "revision" not in facts


def test_a_page_has_every_component_and_every_layer(pictures: dict[str, Path]) -> None:
    cells = Page(render_page(record_of(12), pictures)).cells
    assert {"q", "down", "norms", "embeddings", "outside layers"} <= set(cells)
    assert {str(layer) for layer in range(12)} <= set(cells)


@pytest.mark.parametrize(("experts", "listed"), [(0, 0), (4, 8), (90, 20)])
def test_a_page_lists_the_experts_most_enriched(
    experts: int, listed: int, pictures: dict[str, Path]
) -> None:
    record = record_of(2, experts)
    html = render_page(record, pictures)
    assert html.count("experts most enriched") == bool(listed)
    if listed:
        rows = html.split("experts most enriched")[1].split("</table>")[0].count("<tr>") - 1
        best = max(cell["enrichment"] for cell in record["experts"])
        assert rows == listed
        assert f"<td>{best:.2f}</td></tr>" in html.split("experts most enriched")[1]


@pytest.mark.parametrize(
    "change",
    [
        {"map": EVIL},
        {"base": EVIL},
        {"base_revision": EVIL},
        {"selection": {EVIL: 1}},
        {"selection": {"method": EVIL}},
        {"selection": {"method": [{EVIL: EVIL}]}},
    ],
)
def test_what_comes_from_files_stays_text(
    change: dict[str, Any], pictures: dict[str, Path]
) -> None:
    page = Page(render_page(record_of(2) | change, pictures))
    assert "script" not in {tag for tag, _ in page.tags}
    assert any("<script>alert(1)</script>" in cell for cell in page.cells)


def test_names_of_components_and_titles_of_pictures_stay_text_too(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"")
    record = record_of(2)
    record["components"][0]["component"] = record["cells"][1]["component"] = EVIL
    page = Page(render_page(record, {EVIL: tmp_path / "p.png"}))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.cells.count(EVIL) == 2
    assert EVIL in [attributes.get("alt") for _, attributes in page.tags]
