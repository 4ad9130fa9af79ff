"""Records and their JSON: what may stand in adapter_config.json."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import (
    CorruptAdapterError,
    FormatError,
    SafeWeightsWarning,
    UnsupportedVersionError,
)
from safeweights_peft.patch.metadata import AdapterMetadata, record_from_json, record_to_json
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import Mode, TensorRecord, tensor_key

NAME = "model.layers.0.mlp.up_proj.weight"
DIGEST = "sha256:" + "0a" * 32
OTHER_DIGEST = "sha256:" + "0b" * 32

texts = st.text(min_size=1, max_size=9)
checkpoint_keys = texts.filter(lambda key: key.isprintable() and all(key.split(".")))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def metadatas(draw: st.DrawFn) -> AdapterMetadata:
    mode = draw(st.sampled_from(Mode))
    keys = draw(st.lists(checkpoint_keys, min_size=3, max_size=6, unique=True))
    tensors = {}
    for number, key in enumerate(keys[:2]):
        shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
        tensors[f"m{number}.{draw(st.sampled_from(['weight', 'bias', 'gate_up_proj']))}"] = (
            TensorRecord(
                shape=shape,
                dtype=draw(st.sampled_from(list(DTYPES))),
                count=draw(st.integers(0, 1)),
                blocks=(Block.dense(key, shape),),
                tied_keys=tuple(keys[2:]) if number == 0 else (),
                digest=DIGEST,
                base_digest=DIGEST,
                merged_digest=DIGEST if mode is Mode.SET else None,
            )
        )
    return AdapterMetadata(
        mode=mode,
        base_model_name_or_path=draw(st.none() | texts),
        revision=draw(st.none() | texts),
        values_dtype=draw(st.sampled_from(list(DTYPES))) if mode is Mode.SET else "float32",
        scale=draw(st.floats(-1e30, 1e30)),
        transformers_version=draw(st.none() | texts),
        selection=draw(st.dictionaries(texts, json_values, max_size=3)),
        tensors=tensors,
    )


@settings(deadline=None)
@given(metadatas())
def test_metadata_survive_json(metadata: AdapterMetadata) -> None:
    config = json.loads(json.dumps(metadata.to_config(), allow_nan=False))
    assert AdapterMetadata.from_config(config, "here") == metadata


def sound_config() -> dict[str, Any]:
    record = TensorRecord(
        shape=(4, 6),
        dtype="bfloat16",
        count=3,
        blocks=(Block.dense("w", (4, 6)),),
        tied_keys=("t",),
        digest=DIGEST,
        base_digest=DIGEST,
        merged_digest=DIGEST,
    )
    return AdapterMetadata(mode=Mode.SET, tensors={NAME: record}).to_config()


def test_keys_of_peft_are_ignored() -> None:
    config = sound_config() | {"peft_version": "0.21.2", "auto_mapping": None, "r": 8}
    assert AdapterMetadata.from_config(config, "here").tensors[NAME].count == 3


def test_the_config_holds_what_peft_asks_for() -> None:
    config = sound_config()
    assert config["peft_type"] == "SAFEWEIGHTS"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] is None
    assert config["inference_mode"] is True


def at(*path: Any, put: Any) -> Callable[[dict[str, Any]], None]:
    """Make an edit that puts a value at a path."""

    def edit(config: dict[str, Any]) -> None:
        for step in path[:-1]:
            config = config[step]
        config[path[-1]] = put

    return edit


def in_record(*path: Any, put: Any) -> Callable[[dict[str, Any]], None]:
    return at("tensors", NAME, *path, put=put)


def without(*path: Any) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        for step in path[:-1]:
            config = config[step]
        del config[path[-1]]

    return edit


def rename_parameter(config: dict[str, Any]) -> None:
    config["tensors"] = {"weight": config["tensors"][NAME]}


def hide_in_name(config: dict[str, Any]) -> None:
    config["tensors"] = {"a.\x1b[2Jb": config["tensors"][NAME]}


def long_name(config: dict[str, Any]) -> None:
    config["tensors"] = {"a." + "b" * 1000: config["tensors"][NAME]}


def second_parameter(config: dict[str, Any]) -> None:
    config["tensors"]["a.b"] = copy.deepcopy(config["tensors"][NAME])


def as_map(config: dict[str, Any]) -> None:
    config["mode"] = "spa"


CORRUPTIONS = [
    (without("format_version"), "format_version: expected int, found nothing"),
    (at("format_version", put="1"), "format_version: expected int, found str"),
    (at("format_version", put=True), "format_version: expected int, found bool"),
    (at("mode", put="lora"), "mode: expected one of set, spa, found 'lora'"),
    (without("mode"), "mode: expected str, found nothing"),
    (at("scale", put="1"), "scale: expected a number"),
    (at("scale", put=True), "scale: expected a number"),
    (at("scale", put=float("nan")), "scale: expected a number that is finite"),
    (at("scale", put=1e39), "scale: expected a number that is finite"),
    (at("scale", put=10**400), "scale: expected a number that is finite"),
    (without("scale"), "scale: expected a number"),
    (at("values_dtype", put="float64"), "values_dtype: expected one of float32, bfloat16"),
    (at("base_model_name_or_path", put=3), "base_model_name_or_path: expected str, found int"),
    (at("revision", put=[]), "revision: expected str, found list"),
    (at("transformers_version", put=5), "transformers_version: expected str"),
    (at("selection", put=None), "selection: expected dict, found NoneType"),
    (at("tensors", put={}), "tensors: expected at least one parameter"),
    (at("tensors", put=[]), "tensors: expected dict, found list"),
    (at("tensors", NAME, put=None), f"{NAME}: expected a JSON object, found NoneType"),
    (rename_parameter, "weight: expected a parameter of a named module"),
    (hide_in_name, r"tensors: expected printable names .* found 'a.\\x1b\[2Jb'"),
    (long_name, "tensors: expected printable names of at most 1000"),
    (second_parameter, "'w': expected each checkpoint key once, found 2 uses"),
    (as_map, "expected no merged_digest"),
    (in_record("extra", put=1), "'extra': expected only base_digest"),
    (in_record("shape", put=[4, 0]), "shape: expected at most 64 integers of at least 1"),
    (in_record("shape", put=[4, True]), "shape: expected"),
    (in_record("shape", put=[4, 6.0]), "shape: expected"),
    (in_record("shape", put=[1] * 65), "shape: expected at most 64"),
    (in_record("shape", put="46"), "shape: expected list, found str"),
    (in_record("shape", put=[2**40, 2**40]), r"shape: expected fewer than 2\*\*63 entries"),
    (in_record("dtype", put="int8"), "dtype: expected one of float32"),
    (in_record("count", put=25), "count: expected at most 24, found 25"),
    (in_record("count", put=-1), "count: expected at least 0, found -1"),
    (in_record("count", put=3.0), "count: expected int, found float"),
    (in_record("digest", put=None), "expected a digest and a base_digest, found null"),
    (in_record("base_digest", put=None), "expected a digest and a base_digest, found null"),
    (in_record("merged_digest", put=None), "expected a merged_digest, found None"),
    (in_record("digest", put="md5:00"), "digest: expected sha256: and 64 hexadecimal"),
    (in_record("digest", put=DIGEST.upper()), "digest: expected sha256"),
    (in_record("digest", put=DIGEST + "\n"), "digest: expected sha256"),
    (in_record("blocks", put=None), "blocks: expected list"),
    (in_record("blocks", put=[]), "tied_keys: expected none beside several blocks"),
    (in_record("blocks", 0, put="w"), r"blocks\[0\]: expected a JSON object, found str"),
    (in_record("blocks", 0, "more", put=1), r"blocks\[0\]: 'more': expected only key"),
    (in_record("blocks", 0, "key", put=7), "key: expected str, found int"),
    (in_record("blocks", 0, "offset", put=-1), "offset: expected at least 0"),
    (in_record("blocks", 0, "offset", put=1), "block 'w': expected entries below 24"),
    (in_record("blocks", 0, "shape", put=[0, 6]), "shape: expected at most 64 integers"),
    (in_record("blocks", 0, "strides", put=[6, 0]), "strides: expected at most 64 integers"),
    (in_record("blocks", 0, "strides", put=[6, -1]), "strides: expected at most 64 integers"),
    (in_record("blocks", 0, "strides", put=[6]), "expected one stride per size"),
    (in_record("blocks", 0, "strides", put=[2, 1]), "expected strides that reach"),
    (in_record("tied_keys", put=["w"]), "'w': expected each checkpoint key once"),
    (in_record("tied_keys", put=[""]), "tied_keys: expected non-empty strings"),
    (in_record("tied_keys", put="t"), "tied_keys: expected list"),
]


@pytest.mark.parametrize(("edit", "message"), CORRUPTIONS, ids=[text for _, text in CORRUPTIONS])
def test_a_broken_config_is_refused(edit: Callable[[dict[str, Any]], None], message: str) -> None:
    config = sound_config()
    edit(config)
    with pytest.raises(CorruptAdapterError, match=message):
        AdapterMetadata.from_config(config, "here")


def test_messages_name_the_file_and_the_parameter_and_stay_short() -> None:
    config = sound_config()
    config["tensors"][NAME]["dtype"] = "x" * 10_000
    with pytest.raises(CorruptAdapterError, match=rf"^a/config: {NAME}: dtype: ") as caught:
        AdapterMetadata.from_config(config, "a/config")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("version", [0, 2, 10**100])
def test_another_format_version_is_refused_before_anything_else(version: int) -> None:
    config = {"peft_type": "SAFEWEIGHTS", "format_version": version}
    with pytest.raises(UnsupportedVersionError, match="format_version: expected 1, found"):
        AdapterMetadata.from_config(config, "here")


def test_an_unknown_encoding_asks_for_a_newer_package() -> None:
    config = sound_config()
    config["tensors"][NAME]["encoding"] = "gaps"
    with pytest.raises(
        UnsupportedVersionError, match=r"expected one of plain, compact, rows, columns, found .gaps"
    ):
        AdapterMetadata.from_config(config, "here")


@pytest.mark.parametrize("peft_type", ["LORA", None, 3])
def test_the_config_of_another_method_is_refused(peft_type: object) -> None:
    config = sound_config() | {"peft_type": peft_type}
    with pytest.raises(FormatError, match="peft_type: expected SAFEWEIGHTS"):
        AdapterMetadata.from_config(config, "here")


def test_a_safety_map_has_float32_scores_and_no_merged_digest() -> None:
    config = sound_config() | {"mode": "spa", "values_dtype": "bfloat16"}
    with pytest.raises(CorruptAdapterError, match="values_dtype: expected one of float32, found"):
        AdapterMetadata.from_config(config, "here")
    config["values_dtype"] = "float32"
    config["tensors"][NAME]["merged_digest"] = None
    assert AdapterMetadata.from_config(config, "here").mode is Mode.SPA


def test_a_record_in_training_needs_no_digests() -> None:
    record = TensorRecord(shape=(2,), dtype="float32", blocks=(Block.dense("w", (2,)),))
    assert record_from_json(record_to_json(record), "here") == record
    assert replace(record, tied_keys=("t",)).keys == ("w", "t")


def test_tensor_names_are_those_of_the_format() -> None:
    for kind in ("indices", "values", "scores"):
        expected = f"base_model.model.lm_head.safeweights_{kind}__weight"
        assert tensor_key("lm_head.weight", kind) == expected


@pytest.mark.parametrize("parameter", ["weight", ".weight", "module.", ""])
def test_a_parameter_without_a_module_is_refused(parameter: str) -> None:
    with pytest.raises(CorruptAdapterError, match="expected a parameter of a named module"):
        tensor_key(parameter, "indices")


def sound_compact() -> dict[str, Any]:
    """A config whose one record says how its streams are laid out."""
    config = sound_config()
    streams = {
        "indices": {"coding": "gaps8", "escapes": 1, "bytes": [12]},
        "values": {"coding": "plain", "escapes": 0, "bytes": []},
    }
    config["tensors"][NAME].update(encoding="compact", streams=streams)
    return config


def test_compact_records_survive_json() -> None:
    metadata = AdapterMetadata.from_config(sound_compact(), "here")
    again = json.loads(json.dumps(metadata.to_config()))
    assert again["tensors"][NAME]["streams"] == sound_compact()["tensors"][NAME]["streams"]
    assert AdapterMetadata.from_config(again, "there") == metadata


def test_a_newer_minor_version_is_read_with_a_warning_and_what_is_new_ignored() -> None:
    config = sound_compact() | {"format_minor": 7}
    known = AdapterMetadata.from_config(sound_compact(), "here")
    for record in config["tensors"].values():
        record["importance"] = {"of": "the future"}
    with pytest.warns(
        SafeWeightsWarning, match="format_minor: expected at most 2, found 7"
    ) as warned:
        found = AdapterMetadata.from_config(config, "here")
    assert len(warned) == 1
    assert found == known


def test_a_known_minor_version_has_no_unknown_fields() -> None:
    for minor in (0, 1):
        config = sound_config() | {"format_minor": minor}
        config["tensors"][NAME]["importance"] = 1
        with pytest.raises(CorruptAdapterError, match="'importance': expected only base_digest"):
            AdapterMetadata.from_config(config, "here")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"encoding": "bitmask"}, UnsupportedVersionError),
        ({"streams": {"indices": {"coding": "rice", "escapes": 0, "bytes": [1]}}}, FormatError),
        (
            {"blocks": [{"key": "w", "shape": [2], "offset": 0, "strides": [1], "new": 1}]},
            FormatError,
        ),
    ],
)
def test_a_newer_minor_version_cannot_change_what_is_known(
    change: dict[str, Any], error: type[FormatError]
) -> None:
    config = sound_compact() | {"format_minor": 7}
    config["tensors"][NAME].update(change)
    with pytest.warns(SafeWeightsWarning), pytest.raises(error):
        AdapterMetadata.from_config(config, "here")


def identified(**changes: Any) -> AdapterMetadata:
    """Metadata with every digest, and some of it changed."""
    config = sound_config()
    config["tensors"][NAME]["content_digest"] = DIGEST
    for key, value in changes.items():
        (config if key in config else config["tensors"][NAME])[key] = value
    return AdapterMetadata.from_config(config, "here")


def test_the_content_id_is_the_digest_of_what_the_format_says() -> None:
    metadata = identified(scale=0.5)
    (record,) = metadata.tensors.values()
    shape = json.dumps(list(record.shape)).replace(" ", "")
    text = (
        "safeweights 1 set 3f000000\n"
        f"{NAME} {shape} {record.dtype} {DIGEST} {record.base_digest} {record.merged_digest}\n"
    )
    assert metadata.content_id == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 0.25},
        {"shape": [24], "blocks": [], "tied_keys": []},
        {"dtype": "float16"},
        {"content_digest": OTHER_DIGEST},
        {"base_digest": OTHER_DIGEST},
        {"merged_digest": OTHER_DIGEST},
    ],
)
def test_the_content_id_changes_with_all_that_decides_the_result(change: dict[str, Any]) -> None:
    assert identified(**change).content_id != identified().content_id


@pytest.mark.parametrize(
    "change",
    [
        {"digest": OTHER_DIGEST},
        {"revision": "another"},
        {"selection": {"seed": 9}},
        {"values_dtype": "bfloat16"},
        {"tied_keys": []},
    ],
)
def test_the_content_id_stays_where_the_result_does(change: dict[str, Any]) -> None:
    assert identified(**change).content_id == identified().content_id


def test_a_file_of_format_1_0_has_no_content_id_in_its_config() -> None:
    assert AdapterMetadata.from_config(sound_config(), "here").content_id is None
