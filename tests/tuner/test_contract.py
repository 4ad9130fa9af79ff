"""PEFT's surface that this room relies on, name by name: a PEFT that changes it fails here first.

Most of these are internal to PEFT. When one changes, read how PEFT calls it now, adapt the file
that is named, then this list.
"""

import inspect
from importlib.metadata import version

import peft.functional
import peft.mapping
import pytest
from packaging.version import Version
from peft import PeftModel, PeftModelForCausalLM
from peft.config import PeftConfigMixin
from peft.tuners import tuners_utils
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import save_and_load
from torch import nn

from safeweights_peft.tuner.layer import SafeWeightsLayer
from safeweights_peft.tuner.model import SafeWeightsModel

# What PEFT calls and we define: model.py.
MODEL_HOOKS = {
    "inject_adapter": "model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict",
    "_prepare_adapter_config": "peft_config model_config",
    "_check_target_module_exists": "peft_config key",
    "_create_and_replace": (
        "peft_config adapter_name target target_name parent current_key parameter_name"
    ),
    "merge_adapter": "adapter_names safe_merge",
    "_unload_and_optionally_merge": "merge progressbar safe_merge adapter_names",
    "_check_merge_allowed": "",
    "_get_adapter_state_dict": "model config adapter_name state_dict unwanted_adapter_names",
    "_remove_adapter_name_from_key": "key adapter_name",
    "_remap_adapter_state_dict_for_load": "model config adapter_name state_dict",
    "_convert_state_dict_for_initial_model": (
        "peft_model peft_config path_initial_model_for_weight_conversion output_state_dict kwargs"
    ),
}
# What PEFT calls and we define: layer.py.
LAYER_HOOKS = {
    "set_adapter": "adapter_names inference_mode",
    "enable_adapters": "enabled",
    "delete_adapter": "adapter_name",
    "merge": "safe_merge adapter_names",
    "unmerge": "",
    "_get_base_layer_device_and_dtype": "base_layer",
    "set_requires_grad": "adapter_names requires_grad",
    "get_base_layer": "",
}
# What we call.
CALLS = [
    (tuners_utils, "check_adapters_to_merge", "module adapter_names"),
    (BufferDict, "__init__", "buffers persistent"),
    (PeftModelForCausalLM, "__init__", "model peft_config adapter_name kwargs"),
    (
        PeftModelForCausalLM,
        "add_adapter",
        "adapter_name peft_config low_cpu_mem_usage autocast_adapter_dtype",
    ),
    (PeftModelForCausalLM, "set_adapter", "adapter_name inference_mode"),
    (PeftModelForCausalLM, "get_base_model", ""),
    (PeftConfigMixin, "_split_kwargs", "kwargs"),
]
# What model.py wraps.
WRAPPED = [
    (PeftConfigMixin, "from_pretrained", "pretrained_model_name_or_path subfolder kwargs"),
    (
        PeftModel,
        "save_pretrained",
        "save_directory safe_serialization selected_adapters save_embedding_layers "
        "is_main_process path_initial_model_for_weight_conversion kwargs",
    ),
    (peft.functional, "delete_adapter", "model adapter_name prefix layer_cls"),
    (save_and_load, "_get_adapter_state_dict_key_prefixes", "model"),
]
# Tables that model.py writes to.
TABLES = ["CONFIG", "PREFIX", "TUNER"]
# Torch's hooks that layer.py overrides, and by which it watches modules.
TORCH_HOOKS = {
    "_apply": "fn recurse",
    "_load_from_state_dict": (
        "state_dict prefix local_metadata strict missing_keys unexpected_keys error_msgs"
    ),
    "register_state_dict_pre_hook": "hook",
    "_register_state_dict_hook": "hook",
    "register_load_state_dict_pre_hook": "hook",
    "register_load_state_dict_post_hook": "hook",
}


def parameters(owner, name):
    return [name for name in inspect.signature(getattr(owner, name)).parameters if name != "self"]


def test_peft_is_of_a_version_that_was_tried():
    assert Version("0.21") <= Version(version("peft")) < Version("0.22")


@pytest.mark.parametrize("name", MODEL_HOOKS)
def test_peft_has_the_hook_of_the_model(name):
    assert parameters(BaseTuner, name) == MODEL_HOOKS[name].split()
    assert name in vars(SafeWeightsModel)


@pytest.mark.parametrize("name", LAYER_HOOKS)
def test_peft_has_the_hook_of_the_layer(name):
    assert parameters(BaseTunerLayer, name) == LAYER_HOOKS[name].split()
    assert name in vars(SafeWeightsLayer)


@pytest.mark.parametrize(("owner", "name", "expected"), CALLS + WRAPPED)
def test_peft_has_what_is_called(owner, name, expected):
    assert parameters(owner, name) == expected.split()


@pytest.mark.parametrize("name", TORCH_HOOKS)
def test_torch_has_the_hook_of_the_layer(name):
    assert parameters(nn.Module, name) == TORCH_HOOKS[name].split()


@pytest.mark.parametrize("name", TABLES)
def test_peft_looks_methods_up_in_a_table_by_name(name):
    table = getattr(peft.mapping, f"PEFT_TYPE_TO_{name}_MAPPING")
    assert type(table) is dict
    assert "LORA" in table


def test_peft_calls_the_hooks_for_loading_saving_and_running():
    load = inspect.getsource(save_and_load.set_peft_model_state_dict)
    save = inspect.getsource(save_and_load.get_peft_model_state_dict)
    assert "_remap_adapter_state_dict_for_load(" in load
    assert "_get_adapter_state_dict(" in save
    assert "_remove_adapter_name_from_key(k, adapter_name)" in save
    run = inspect.getsource(PeftModel._enable_peft_forward_hooks)
    assert "self.base_model._enable_peft_forward_hooks(*args, **kwargs)" in run


def test_peft_keeps_the_state_of_a_layer_in_these_attributes():
    assert BaseTunerLayer.adapter_layer_names == ()
    assert BaseTunerLayer.other_param_names == ()
    assert BaseTunerLayer._active_adapter == "default"
    assert BaseTunerLayer._disable_adapters is False
    assert BaseTunerLayer.merged_adapters == []
    for name in ("active_adapters", "disable_adapters", "merged"):
        assert isinstance(getattr(BaseTunerLayer, name), property)
