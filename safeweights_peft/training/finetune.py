"""Fine-tuning on `transformers.Trainer` while a safety map stays, and the loop that SET shares."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ModelOutput

from safeweights_peft.data import IGNORED, Example, check_lengths, shuffle_endlessly
from safeweights_peft.errors import TrainingError, UnsupportedFeatureError
from safeweights_peft.modeling.answers import find_positions, last_columns, pads_behind
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.settings import PreserveMethod, PreserveSettings, TrainSettings
from safeweights_peft.training.anchor import Anchor, AnchorLog
from safeweights_peft.training.preserve import ArtifactOrPath, preserve

# Batches sorted by length together; unsorted, a third or more of their tokens is padding.
BATCHES_SORTED = 16
SAVE_SECONDS = 60  # between checkpoints
TERMS = ("refusal", "retain", "hinge")  # of SET's loss, which its trainer logs
LEARNING_RATES = {PreserveMethod.FULL: 2e-5, PreserveMethod.LORA: 2e-4}


def make_arguments(
    settings: TrainSettings | PreserveSettings,
    work_dir: Path,
    device: torch.device,
    **options: Any,
) -> TrainingArguments:
    """Make the arguments that all trainings share; options add to them."""
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        max_steps=settings.steps,
        lr_scheduler_type="cosine",
        save_strategy="no",  # `_StepWatch` says when
        save_total_limit=1,
        seed=settings.seed,
        train_sampling_strategy="sequential",  # examples come in the order in which they were dealt
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # which would hide a lost loss from `_StepWatch`
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        **options,
    )
    # Beside a second GPU, Trainer would split each batch by torch's DataParallel, which counts a
    # loss computed outside the model once per GPU, and knows no adapters to disable.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def run_trainer(trainer: Trainer, on_step: Callable[..., None]) -> list[dict[str, float]]:
    """Train from the last checkpoint, if there is one, to the end; return the log of each step."""
    trainer.remove_callback(PrinterCallback)  # added where progress bars are off
    trainer.add_callback(_StepWatch(on_step))
    work_dir = Path(trainer.args.output_dir)
    try:
        trainer.train(resume_from_checkpoint=_find_checkpoint(work_dir))
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch's way to say that a disk is full
            raise
        raise TrainingError(
            f"{work_dir}: expected room for a checkpoint, found none; free some, and call again"
        ) from error
    trainer.model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _find_checkpoint(work_dir: Path) -> str | None:
    """Find the last whole checkpoint."""
    # A process that is killed while it saves leaves a part of one, which transformers' own search
    # takes for the last. The trainer's state is written after all else.
    folders = work_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_bytes())
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


class _StepWatch(TrainerCallback):
    """Report each step, save by time, and stop before a checkpoint if the loss is not finite."""

    def __init__(self, on_step: Callable[..., None]) -> None:
        self._on_step = on_step
        self._saved_at = time.monotonic()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # By time, as a step may take a second or minutes; and at the end, as publishing may fail.
        is_last = state.global_step >= state.max_steps
        if is_last or time.monotonic() - self._saved_at >= SAVE_SECONDS:
            control.should_save = True

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._saved_at = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if "loss" not in logs:  # the trainer's summary at the end
            return
        if not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"step {state.global_step}: expected a finite loss, found {logs['loss']}; "
                "lower --lr"
            )
        # A training that has several terms logs them beside the loss, which is their sum.
        terms = {name: logs[name] for name in TERMS if name in logs} or {"loss": logs["loss"]}
        self._on_step(state.global_step, **terms)


def fine_tune(
    model: PreTrainedModel | PeftModel,
    pad_token_id: int,
    examples: Sequence[Example],
    artifact: ArtifactOrPath | None,
    settings: PreserveSettings,
    work_dir: Path,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[..., None] = lambda step, **losses: None,
    anchor: Anchor | None = None,
) -> list[float]:
    """Train a model's LoRA, or all its weights, in place while it is kept safe by `preserve`."""
    check_lengths(examples, find_positions(model))
    # Where a batch isn't what its rows are, each is a batch of its own, and a step gathers them.
    size = settings.batch_size if pads_behind(model) else 1
    if not isinstance(model, PeftModel):
        model.requires_grad_(True)
    with preserve(model, artifact, anchor):
        arguments = make_arguments(
            settings,
            work_dir,
            model.device,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=settings.batch_size // size,
            learning_rate=settings.learning_rate or LEARNING_RATES[settings.method],
            warmup_steps=math.ceil(settings.warmup * settings.steps),
            weight_decay=settings.weight_decay,
            max_grad_norm=1.0,
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=deal(examples, settings),
            data_collator=lambda rows: collate_answers(rows, pad_token_id),
            compute_loss_func=partial(compute_answer_loss, router_weight=_weigh_routers(model)),
        )
        if anchor:
            trainer.add_callback(AnchorLog(anchor))
        return [entry["loss"] for entry in run_trainer(trainer, on_step)]


def find_linear(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Find the linear layers that LoRA trains, and the parameters of other maps that it leaves."""
    # PEFT's "all-linear" would also wrap fused experts, each of which takes a whole rank, routers,
    # and towers that text never reaches.
    maps = eligible_parameters(model)
    targets = [
        module
        for module, _, own in (name.rpartition(".") for name in maps)
        if own == "weight" and _is_linear(model.get_submodule(module))
    ]
    taken = {own for own in {name.rpartition(".")[2] for name in targets} if _is_taken(model, own)}
    targets = _find_again(model, [name for name in targets if name.rpartition(".")[2] in taken])
    head, weights = model.get_output_embeddings(), {f"{module}.weight" for module in targets}
    others = maps.keys() | {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    # By layers together, as a name for each would fill pages, unless LoRA goes on some of them.
    trained = {_without_numbers(name) for name in weights}
    left = {
        name if (short := _without_numbers(name)) in trained else short for name in others - weights
    }
    return targets, sorted(left)


def _is_linear(module: nn.Module) -> bool:
    """Return whether LoRA can stand beside a module: whether it multiplies by its weight."""
    if type(module) is nn.Linear or not isinstance(module, nn.Linear):
        return isinstance(module, nn.Linear | Conv1D)
    # A subclass may do the same in its own words, as Falcon's, or multiply in groups, as DeepSeek
    # V4's, where PEFT takes any for a plain one.
    row = torch.linspace(-1, 1, module.in_features).to(module.weight)[None, None]
    try:
        with torch.no_grad():
            expected = F.linear(row, module.weight, module.bias)
            return bool((module(row) - expected).norm() <= 1e-3 * expected.norm())
    # Its own words may want other arguments, or rows of another form, and then fail in any way.
    except Exception:
        return False


def _is_taken(model: PreTrainedModel, own: str) -> bool:
    """Return whether PEFT puts LoRA on layers of this name, as it doesn't on Mamba's out_proj."""
    stand_in = nn.Module()
    stand_in.config = model.config
    with torch.device("meta"):  # so that no random numbers are drawn
        stand_in.add_module(own, nn.Linear(1, 1))
        try:
            inject_adapter_in_model(LoraConfig(target_modules=[own]), stand_in)
        except ValueError:
            return False
    return True


def _find_again(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """List the layers that PEFT knows by their names, when it trains and when it loads."""
    # It reads names as those of transformers 4, and takes them for others: in a mixture of experts
    # any gate_proj, be it a shared expert's or a dense layer's, for a part of the fused experts.
    meant = {}
    for own in {name.rpartition(".")[2] for name in targets}:
        config = LoraConfig(target_modules=[own])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # fused with another, which isn't given
            config.target_modules = set()
        meant[own] = own in config.target_modules
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in targets}
    saved = dict.fromkeys(keys, torch.empty(1, 1))
    found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), saved)
    return [name for key, name in keys.items() if key in found and meant[name.rpartition(".")[2]]]


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def add_lora(model: PreTrainedModel, settings: PreserveSettings) -> PeftModel:
    """Wrap a model's linear layers in LoRA, but not its output, routers and experts."""
    targets, _ = find_linear(model)
    is_turned = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=targets,
        fan_in_fan_out=is_turned,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            return get_peft_model(model, config)
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise UnsupportedFeatureError(
            f"model: expected one that PEFT can put LoRA on, found a {model.config.model_type}: "
            f"{' '.join(str(error).split())[:200]}; choose another --method"
        ) from error


def deal(examples: Sequence[Example], settings: PreserveSettings) -> list[Example]:
    """Deal examples for all steps in random order, all of them before any comes again."""
    if not examples:
        raise TrainingError("examples: expected at least one, found none; give more data")
    generator = torch.Generator().manual_seed(settings.seed)
    size, total = settings.batch_size, settings.steps * settings.batch_size
    order = list(islice(shuffle_endlessly(examples, generator), total))
    dealt: list[Example] = []
    for start in range(0, total, BATCHES_SORTED * size):
        chosen = order[start : start + BATCHES_SORTED * size]
        chosen.sort(key=lambda example: len(example.prompt_ids) + len(example.answer_ids))
        # In random order, so that lengths don't grow over the batches sorted together.
        for batch in torch.randperm(len(chosen) // size, generator=generator).tolist():
            dealt += chosen[batch * size : (batch + 1) * size]
    return dealt


def collate_answers(examples: Sequence[Example], pad_token_id: int) -> dict[str, Any]:
    """Pad examples behind their ends into a batch whose labels are the answers."""
    rows = [torch.tensor(example.prompt_ids + example.answer_ids) for example in examples]
    labels = [row.clone() for row in rows]
    for example, label in zip(examples, labels, strict=True):
        label[: len(example.prompt_ids)] = IGNORED
    # Logits are computed from the first answer token of any row on, and labels cut to match.
    start = min(len(example.prompt_ids) for example in examples) - 1
    kept_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)[:, start:]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": kept_labels,
        "logits_to_keep": last_columns(kept_labels.shape[1]),
    }


# Not the model's own: some add terms, some don't shift the labels, some count other columns.
def compute_answer_loss(
    outputs: ModelOutput,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | None = None,
    router_weight: float = 0.0,
) -> torch.Tensor:
    """Compute the mean loss of answer tokens, or their part of the mean over a step's batches."""
    # Some models don't know `logits_to_keep`, and compute the logits of all columns.
    logits = outputs.logits[:, -labels.shape[1] :].flatten(0, 1)
    # Labels are shifted rather than logits, which would be a copy of them.
    tokens = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    count = (tokens != IGNORED).sum()
    # Without answers there is nothing to learn: 0, as 0 / 0 would spoil all weights.
    total = torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch).clamp(1)
    loss = F.cross_entropy(logits.float(), tokens, ignore_index=IGNORED, reduction="sum") / total
    balance = getattr(outputs, "aux_loss", None)
    # By answer tokens, so that a step's batches together weigh it once.
    return loss if balance is None else loss + router_weight * balance * (count / total)


def _weigh_routers(model: PreTrainedModel | PeftModel) -> float:
    """Find what a model's own loss weighs the balance of its experts by, where its config asks."""
    # The balance is computed under `output_router_logits` alone, by default not.
    config = model.config.get_text_config()
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return next((getattr(config, name) for name in names if hasattr(config, name)), 0.0)
