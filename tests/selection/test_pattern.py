"""Where selected entries lie: what dense masks count, at places that names tell."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config, PreTrainedConfig

from safeweights_peft.selection.pattern import (
    Part,
    Place,
    count_parts,
    find_place,
    find_places,
    tabulate,
)
from tests.tiny_models import COMMON

MODELS = ["tiny_llama", "tiny_tied_llama", "tiny_mixtral", "tiny_qwen3_moe"]
Shapes = dict[str, tuple[int, ...]]


def shapes_of(config: PreTrainedConfig) -> Shapes:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.fixture(params=MODELS)
def shapes(request: pytest.FixtureRequest) -> Shapes:
    path: Path = request.getfixturevalue(request.param)
    return shapes_of(AutoConfig.from_pretrained(path))


def random_masks(shapes: Shapes) -> dict[str, np.ndarray]:
    """Dense masks of another density each; one parameter has none."""
    random = np.random.default_rng(0)
    names = list(shapes)[1:]
    return {name: random.random(shapes[name]) < random.random() for name in names}


def as_indices(masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.flatnonzero(mask).astype(np.int32) for name, mask in masks.items()}


def masked_entries(masks: dict[str, np.ndarray], layer: int | None, component: str) -> int:
    """Count a cell's selected entries in dense masks: the slow, obvious way."""
    return sum(
        int(mask.sum())
        for name, mask in masks.items()
        if (find_place(name).layer, find_place(name).component) == (layer, component)
    )


# --- places ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.self_attn.q_proj.weight", Place(12, "q")),
        ("model.layers.12.self_attn.k_proj.bias", Place(12, "k")),
        ("model.layers.0.self_attn.v_proj.weight", Place(0, "v")),
        ("model.layers.0.self_attn.o_proj.weight", Place(0, "o")),
        ("model.layers.3.mlp.gate_proj.weight", Place(3, "gate")),
        ("model.layers.3.mlp.up_proj.weight", Place(3, "up")),
        ("model.layers.3.mlp.down_proj.weight", Place(3, "down")),
        ("model.layers.3.self_attn.qkv_proj.weight", Place(3, "qkv_proj")),
        ("model.layers.3.mlp.gate_up_proj.weight", Place(3, "gate_up_proj")),
        ("model.layers.3.mlp.gate.weight", Place(3, "router")),
        ("model.layers.3.mlp.router.bias", Place(3, "router")),
        ("model.layers.3.mlp.shared_expert_gate.weight", Place(3, "router")),
        ("model.layers.3.mlp.experts.gate_up_proj", Place(3, "experts gate_up_proj")),
        ("model.layers.3.mlp.experts.down_proj", Place(3, "experts down")),
        ("model.layers.3.mlp.experts.down_proj_bias", Place(3, "experts down_proj_bias")),
        ("model.layers.3.mlp.experts.17.gate_proj.weight", Place(3, "experts gate", 17)),
        ("model.layers.3.mlp.experts.17.up_proj.weight", Place(3, "experts up", 17)),
        ("model.layers.3.mlp.shared_expert.up_proj.weight", Place(3, "shared_expert up")),
        ("model.layers.3.input_layernorm.weight", Place(3, "norms")),
        ("model.layers.3.self_attn.q_norm.weight", Place(3, "norms")),
        ("transformer.h.7.ln_1.bias", Place(7, "norms")),
        ("transformer.h.7.attn.c_attn.weight", Place(7, "c_attn")),
        ("transformer.wte.weight", Place(None, "embeddings")),
        ("model.embed_tokens.weight", Place(None, "embeddings")),
        ("model.norm.weight", Place(None, "norms")),
        ("lm_head.weight", Place(None, "lm_head")),
        ("alpha", Place(None, "alpha")),
        ("transformer.blocks.1.ffn.experts.mlp.w1", Place(1, "experts w1")),
        ("model.layers.3.mlp.gate.wg.weight", Place(3, "router")),
        ("backbone.layers.1.mixer.A_log", Place(1, "A_log")),
    ],
)
def test_a_parameter_is_placed_by_its_name(name: str, place: Place) -> None:
    assert find_place(name) == place


def test_fused_projections_of_a_dense_model_have_components_of_their_own() -> None:
    places = [find_place(name) for name in shapes_of(Phi3Config(**COMMON))]
    actual = {place.component for place in places if place.layer == 1}
    assert actual == {"qkv_proj", "o", "gate_up_proj", "down", "norms"}


def places_of(*names: str, also: tuple[str, ...] = ()) -> list[tuple[int | None, str]]:
    places = find_places(names + also, names)
    return [(place.layer, place.component) for place in places.values()]


def test_modules_of_one_name_are_told_apart_by_what_they_are_in() -> None:
    attention, mlp = "transformer.h.1.attn.c_proj.weight", "transformer.h.1.mlp.c_proj.weight"
    bias = "transformer.h.1.mlp.c_proj.bias"
    assert places_of(attention, mlp, also=(bias,)) == [
        (1, "attn c_proj"), (1, "mlp c_proj"), (1, "mlp c_proj"),
    ]  # fmt: skip
    assert places_of(attention) == [(1, "c_proj")]


def test_layers_of_other_towers_are_not_those_of_the_text() -> None:
    names = [f"model.language_model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    vision = "model.vision_tower.encoder.layers.1.self_attn.q_proj.weight"
    assert places_of(*names, also=(vision,))[1:] == [(1, "q"), (None, "vision_tower q")]


def test_a_list_of_matrices_beside_the_layers_is_no_layer() -> None:
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    found = places_of(*names, "model.altup_projections.0.weight")
    assert found[-1] == (None, "altup_projections 0")


def test_a_vector_of_all_experts_is_of_no_expert() -> None:
    name = "model.layers.0.self_attention.experts.bias"
    (part,) = count_parts({name: (8,)}, [], {})
    assert part.place.expert is None


# --- counting ----------------------------------------------------------------------------------


def test_every_cell_counts_what_dense_masks_count(shapes: Shapes) -> None:
    masks = random_masks(shapes)
    cells = tabulate(count_parts(shapes, shapes, as_indices(masks)), "layer", "component")
    everything = {name: np.ones(shape, bool) for name, shape in shapes.items()}
    assert len(cells) == len({(c["layer"], c["component"]) for c in cells})
    for cell in cells:
        assert cell["selected"] == masked_entries(masks, cell["layer"], cell["component"])
        assert cell["parameters"] == masked_entries(everything, cell["layer"], cell["component"])


@pytest.mark.parametrize("fixture", ["tiny_mixtral", "tiny_qwen3_moe"])
def test_every_expert_of_a_fused_parameter_counts_what_its_slice_of_a_dense_mask_counts(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    shapes = shapes_of(AutoConfig.from_pretrained(request.getfixturevalue(fixture)))
    masks = random_masks(shapes)
    rows = tabulate(count_parts(shapes, shapes, as_indices(masks)), "layer", "expert")
    actual = {(row["layer"], row["expert"]): row["selected"] for row in rows}
    for layer in (0, 1):
        own = [masks[n] for n in masks if n.startswith(f"model.layers.{layer}.mlp.experts.")]
        for expert in range(4):
            assert actual[layer, expert] == sum(int(mask[expert].sum()) for mask in own)


def test_experts_in_parameters_of_their_own_count_like_fused_ones() -> None:
    fused = {"layers.0.mlp.experts.down_proj": (3, 4, 5)}
    apart = {f"layers.0.mlp.experts.{expert}.down_proj.weight": (4, 5) for expert in range(3)}
    mask = np.random.default_rng(0).random((3, 4, 5)) < 0.3
    together = count_parts(fused, fused, {next(iter(fused)): np.flatnonzero(mask)})
    slices = {name: np.flatnonzero(mask[expert]) for expert, name in enumerate(apart)}
    assert count_parts(apart, apart, slices) == together


def test_the_first_and_the_last_entry_belong_to_the_first_and_the_last_expert() -> None:
    shapes = {"layers.0.experts.up_proj": (3, 2, 2)}
    parts = count_parts(shapes, shapes, {"layers.0.experts.up_proj": np.array([0, 3, 11])})
    assert [part.selected for part in parts] == [2, 0, 1]


def test_what_may_not_be_selected_is_counted_as_not_eligible() -> None:
    shapes = {"lm_head.weight": (2, 3), "layers.0.up_proj.weight": (3, 4)}
    parts = count_parts(shapes, {"layers.0.up_proj.weight"}, {})
    assert [part.eligible for part in parts] == [0, 12]


# --- shares ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [["layer"], ["component"], ["layer", "expert"], []])
def test_the_rows_of_every_table_add_up_to_the_whole_model(keys: list[str], shapes: Shapes) -> None:
    masks = random_masks(shapes)
    rows = tabulate(count_parts(shapes, list(shapes)[2:4], as_indices(masks)), *keys)
    sums: dict[str, Any] = {
        key: sum(row[key] for row in rows) for key in rows[0] if key not in keys
    }
    assert sums["parameters"] == sum(int(np.prod(shape)) for shape in shapes.values())
    assert sums["eligible"] == sum(int(np.prod(shapes[name])) for name in list(shapes)[2:4])
    assert sums["selected"] == sum(int(mask.sum()) for mask in masks.values())
    assert [sums["parameter_share"], sums["selected_share"]] == pytest.approx([1, 1])


def test_enrichment_is_share_of_the_selection_over_share_of_the_model() -> None:
    parts = [Part(Place(0, "q"), 100, 100, 30), Part(Place(0, "k"), 300, 300, 10)]
    rows = tabulate(parts, "component")
    assert [row["enrichment"] for row in rows] == pytest.approx([0.75 / 0.25, 0.25 / 0.75])
    assert [row["component"] for row in rows] == ["q", "k"]


def test_where_everything_is_selected_nothing_is_enriched(shapes: Shapes) -> None:
    everything = {name: np.arange(np.prod(shape)) for name, shape in shapes.items()}
    rows = tabulate(count_parts(shapes, shapes, everything), "layer", "component", "expert")
    assert [row["enrichment"] for row in rows] == pytest.approx([1] * len(rows))


def test_where_nothing_is_selected_every_share_is_zero(shapes: Shapes) -> None:
    rows = tabulate(count_parts(shapes, shapes, {}), "layer")
    assert {row["selected_share"] for row in rows} == {row["enrichment"] for row in rows} == {0}
