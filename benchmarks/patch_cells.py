"""Train one row of the patch study in memory, scale what it changes, and measure that."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.data import IGNORED, Example, collate
from safeweights_peft.delta import WEIGHT_DTYPES, Array
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.evaluation.judges import RefusalJudge, Verdict
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.score import score
from safeweights_peft.jobs.train import read_requests
from safeweights_peft.merging.convert import convert
from safeweights_peft.modeling.answers import answer_logits, find_layout
from safeweights_peft.modeling.layout import total_parameters
from safeweights_peft.patch.artifacts import SafetyMap
from safeweights_peft.patch.io import file_bytes, read_map
from safeweights_peft.patch.records import Encoding
from safeweights_peft.settings import (
    Granularity,
    Method,
    PreserveSettings,
    RunSettings,
    ScoreSettings,
    TrainSettings,
)
from safeweights_peft.sources import LOOKS_HARMFUL, Row, data_digest
from safeweights_peft.training.finetune import add_lora, find_linear
from safeweights_peft.training.losses import compute_losses, compute_targets
from safeweights_peft.training.refuse import deal_steps, find_learning_rate
from safeweights_peft.tuner.adapter import create_adapter, round_values
from safeweights_peft.tuner.layer import layers

TENSORS = "adapter_model.safetensors"
Change = Mapping[str, Tensor]
"""What a method adds to each parameter that it changes: float32, of the parameter's shape."""


class Choice(NamedTuple):
    """What a row trains, such as `fisher-entry-0.2` (per cent of all weights) or `lora-4`."""

    kind: str  # a score, or another method
    size: float  # a density in [0, 1], or a rank
    granularity: Granularity = Granularity.ENTRY

    @classmethod
    def parse(cls, name: str) -> "Choice":
        """Read the name of a row."""
        kind, *granularity, size = name.split("-")
        if kind in tuple(Method):
            return cls(kind, _read_per_cent(size), Granularity(granularity[0]))
        return cls(kind, _read_per_cent(size) if kind == "supertuning" else float(size))


def _read_per_cent(text: str) -> float:
    """Read a number of per cent, as the same float that the fraction itself is read as."""
    return float(Fraction(text) / 100)


class Lessons(NamedTuple):
    """What all rows learn from: examples, and the base's predictions at the benign ones."""

    harmful: list[Example]
    benign: list[Example]
    boundary: list[Example]
    targets: Any
    places: dict[Example, int]  # rows of the targets


class Study:
    """A base in memory, on which rows are trained and measured one after another."""

    def __init__(
        self,
        job: Job,
        recipe: RunSettings,
        choices: Sequence[Choice],
        out: Path,
        tokens: int,
        batch: int,
    ) -> None:
        """Take what all rows share; `tokens` limits answers, `batch` the requests asked at once."""
        self.job, self.recipe, self.choices, self.out = job, recipe, choices, out
        self._tokens, self._batch = tokens, batch
        self._answers: dict[str, list[Example]] = {}
        self.map_seed: int | None = None  # of all selections; None for each training's own

    @cached_property
    def lessons(self) -> Lessons:
        """The training examples, as the training job makes them."""
        settings, job = self.recipe.train, self.job
        harmful_rows, benign_rows = read_requests(settings)
        harmful = job.chat.encode_rows(harmful_rows, settings.refusal_tokens)
        answers = job.ask("the base benign", benign_rows, settings.benign_tokens, self._batch)
        pairs = [*zip(benign_rows, answers, strict=True)]
        is_drawn = settings.boundary_fraction is not None
        boundary = [a for row, a in pairs if is_drawn and row.category == LOOKS_HARMFUL]
        benign = [a for row, a in pairs if not (is_drawn and row.category == LOOKS_HARMFUL)]
        kept = list(dict.fromkeys(answers))
        targets = compute_targets(job.model, job.tokenizer, kept, settings, harmful)
        places = {example: place for place, example in enumerate(kept)}
        return Lessons(harmful, benign, boundary, targets, places)

    # --- adapters ---

    @contextmanager
    def adapted(self, choice: Choice, seed: int) -> Iterator[PeftModel]:
        """Put a new adapter on the base for a while; the same one for the same arguments."""
        model = self._build(choice, seed)
        try:
            yield model.train()
        finally:
            model.unload()
            self.job.model.eval()

    def _build(self, choice: Choice, seed: int) -> PeftModel:
        base = self.job.model
        if choice.kind in tuple(Method):
            return self._build_patch(choice, seed)
        if choice.kind == "lora":
            return add_lora(base, PreserveSettings(rank=int(choice.size), seed=seed))
        targets, _ = find_linear(base)
        if choice.kind == "shira":
            rank = int(choice.size)
            return get_peft_model(
                base, ShiraConfig(r=rank, target_modules=targets, random_seed=seed)
            )
        numel = sum(base.get_submodule(name).weight.numel() for name in targets)
        sparsity = 1 - choice.size * total_parameters(base) / numel
        return get_peft_model(base, SupertuningConfig(sparsity=sparsity, target_modules=targets))

    def _build_patch(self, choice: Choice, seed: int) -> PeftModel:
        found = self.find_map(choice, seed)
        model = create_adapter(self.job.model, found.metadata, found.indices)
        # As the training job stores values.
        dtypes = {record.dtype for record in found.metadata.tensors.values()}
        config = model.peft_config["default"]
        config.values_dtype = "float32" if "float32" in dtypes else "bfloat16"
        return model

    def find_map(self, choice: Choice, seed: int) -> SafetyMap:
        """Score and select, unless that is done."""
        kind, size, granularity = choice
        seed = seed if self.map_seed is None else self.map_seed
        # Selections of the same scores are nested: the largest has all that a smaller one has. But
        # which side `auto` takes depends on the density.
        alike = [c.size for c in self.choices if (c.kind, c.granularity) == (kind, granularity)]
        density = size if granularity is Granularity.AUTO else max([size, *alike])
        path = self.out / "maps" / f"{kind}-{granularity}-{100 * density:g}-seed-{seed}"
        if not path.exists():
            settings = pick_scoring(self.recipe.score, Method(kind))
            settings = replace(settings, granularity=granularity, density=density, seed=seed)
            score(self.job, path, settings)
        found = read_map(path)
        return found if density == size else narrow(found, granularity, size)

    def train(self, choice: Choice, gain: float, seed: int, path: Path) -> dict[str, Any]:
        """Train a row by steps of a gain in nats; its values, in 16 bits, are left at a path."""
        settings = replace(self.recipe.train, learning_rate=None, step_gain=gain, seed=seed)
        lessons = self.lessons
        with self.adapted(choice, seed) as model:
            rate = find_learning_rate(model, self.job.tokenizer, lessons.harmful, settings)
            # A LoRA has no differences that could be taken back, but factors, of which one starts
            # at random values.
            shrink = 0.0 if choice.kind == "lora" else settings.shrink
            losses = self._train(model, replace(settings, shrink=shrink), rate)
            if choice.kind in tuple(Method):
                round_values(model)
            tensors = {}
            for name, parameter in trained(model):
                if choice.kind not in tuple(Method):
                    parameter.data.copy_(parameter.data.bfloat16())
                tensors[name] = parameter.detach().cpu().clone()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        values = sum(tensor.numel() for tensor in tensors.values())
        return {"rate": rate, "values": values, "losses": losses}

    def _train(self, model: PeftModel, settings: TrainSettings, rate: float) -> dict[str, float]:
        """Train what requires a gradient; return the last step's losses."""
        lessons, pad = self.lessons, self.job.tokenizer.pad_token_id
        parameters = [parameter for _, parameter in trained(model)]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=settings.shrink / rate)
        schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
        layout = find_layout(model)
        steps = deal_steps(lessons.harmful, lessons.benign, lessons.boundary, settings)
        for refusals, answers in steps:
            batch = collate(refusals + answers, pad, layout).to(model.device)
            targets = lessons.targets.pick([lessons.places[example] for example in answers])
            losses = compute_losses(model, batch, targets.to(model.device), settings)
            losses.weigh(settings).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        terms = losses._asdict().items()
        return {name: loss.item() for name, loss in terms if loss is not None}

    def restore(self, choice: Choice, seed: int, path: Path, out: Path | None = None) -> Change:
        """Compute what a trained row changes; with a directory, leave the adapter there."""
        tensors = load_file(path)
        with self.adapted(choice, seed) as model:
            with torch.no_grad():
                for name, parameter in trained(model):
                    parameter.copy_(tensors[name])
                if choice.kind in tuple(Method):
                    round_values(model)
            if out is not None:
                self._save(model, choice, out)
            return find_change(model)

    def _save(self, model: PeftModel, choice: Choice, out: Path) -> None:
        """Save an adapter as small as it can be stored: compact, or in 16 bits."""
        if choice.kind in tuple(Method):
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                convert(folder, "compact", out, self.job.base.path, overwrite=True)
            return
        model.save_pretrained(str(out))
        tensors = {
            name: tensor.bfloat16() if tensor.is_floating_point() else tensor
            for name, tensor in load_file(out / TENSORS).items()
        }
        save_file(tensors, out / TENSORS)

    # --- measuring ---

    @contextmanager
    def scaled(self, change: Change, scale: float) -> Iterator[None]:
        """Add a change to the base for a while."""
        model, before = self.job.model, {}
        try:
            for name, added in change.items():
                parameter = model.get_parameter(name)
                before[parameter] = parameter.data
                parameter.data = (parameter.data.float() + scale * added).to(parameter.dtype)
            yield
        finally:
            for parameter, data in before.items():
                parameter.data = data

    def find_refused(self, rows: Sequence[Row], change: Change, scale: float) -> list[bool]:
        """Find which requests the changed base refuses."""
        with self.scaled(change, scale):
            answers = self._ask(rows)
        pairs = [
            (row.instruction, self.job.read(answer))
            for row, answer in zip(rows, answers, strict=True)
        ]
        return [verdict is Verdict.REFUSED for verdict in RefusalJudge().judge(pairs)]

    def answer(self, rows: Sequence[Row]) -> list[Example]:
        """Let the base answer requests, once."""
        digest = data_digest(rows)
        if digest not in self._answers:
            self._answers[digest] = self._ask(rows)
        return self._answers[digest]

    def _ask(self, rows: Sequence[Row]) -> list[Example]:
        return generate_answers(
            *(self.job.model, self.job.chat, rows),
            max_new_tokens=self._tokens,
            batch_size=self._batch,
        )

    @torch.inference_mode()
    def measure_kl(
        self, answers: Sequence[Example], change: Change, scales: Sequence[float]
    ) -> Array:
        """Sum KL(base || changed) over the tokens of each answer; (scales, answers), in nats."""
        model, pad = self.job.model, self.job.tokenizer.pad_token_id
        layout, sums = find_layout(model), np.zeros((len(scales), len(answers)))
        order = sorted(range(len(answers)), key=lambda row: len(answers[row].prompt_ids))
        size = max(1, self._batch // 2)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = collate([answers[row] for row in rows], pad, layout).to(model.device)
            scored = batch.answer_ids != IGNORED
            base = F.log_softmax(answer_logits(model, batch)[scored], -1)
            for place, scale in enumerate(scales):
                with self.scaled(change, scale):
                    tuned = F.log_softmax(answer_logits(model, batch)[scored], -1)
                parts = F.kl_div(tuned, base, reduction="none", log_target=True).sum(-1)
                by_token = torch.zeros(scored.shape, device=parts.device)
                by_token[scored] = parts
                sums[place, rows] = by_token.double().sum(1).cpu().numpy()
        return sums

    def count_changed(self, change: Change, scale: float) -> dict[str, float]:
        """Compute the fractions of the base's weights and bits, as stored, that a merge changes."""
        total = total_parameters(self.job.model)
        reader, weights, bits, width = CheckpointReader(self.job.base.path), 0, 0, 0
        for name, added in change.items():
            block = self.job.layout[name].blocks[0]
            key = reader.find_key(block.key) or block.key
            dtype = WEIGHT_DTYPES[reader.info(key).dtype]
            base = self.job.model.get_parameter(name).detach().float()
            merged = (base + scale * added).cpu().numpy().astype(dtype)
            unsigned = np.dtype(f"u{dtype.itemsize}")
            before = base.cpu().numpy().astype(dtype).view(unsigned)
            flipped = before ^ merged.view(unsigned)
            weights += int(np.count_nonzero(flipped))
            bits += int(np.bitwise_count(flipped).sum())
            width = 8 * dtype.itemsize
        return {"weights_changed": weights / total, "bits_changed": bits / (total * width)}


def pick_scoring(recipe: ScoreSettings, method: Method) -> ScoreSettings:
    """Pick from a recipe of all methods what one of them reads; it refuses the others'."""
    own: dict[str, Any] = {"method": method}
    if method is Method.MOVEMENT:
        own["layers_per_pass"] = None
    else:
        own["movement_steps"] = ScoreSettings.movement_steps
    if method not in (Method.FISHER, Method.MOVEMENT):
        own["benign_examples"] = ScoreSettings.benign_examples
    return replace(recipe, **own)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List what is trained, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@torch.no_grad()
def find_change(model: PeftModel) -> dict[str, Tensor]:
    """Compute what an adapter adds to each parameter."""
    base, change = model.get_base_model(), {}
    for layer in layers(base, "default"):
        parameter = base.get_parameter(layer.name)
        added = torch.zeros(parameter.numel(), device=parameter.device)
        added[layer.indices["default"].long()] = layer["default"].detach().float()
        change[layer.name] = added.view(parameter.shape)
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight"):
            change[f"{name}.weight"] = module.get_delta_weight("default").float()
    return change


def adapter_bytes(path: Path) -> int:
    """Count the bytes of an adapter's config and tensors."""
    return sum(file_bytes(path))


def narrow(found: SafetyMap, granularity: Granularity, density: float) -> SafetyMap:
    """Take from a map what a lower density would have selected: its best entries or groups."""
    method = Method(found.metadata.selection["method"])
    limit = round(density * found.metadata.selection["total_parameters"])
    sign = 1 if method is Method.BOTTOM else -1
    names = sorted(found.indices)
    units, starts, sizes, scores = [], [], [], []
    for name in names:
        indices, shape = found.indices[name].astype(np.int64), found.metadata.tensors[name].shape
        numbers = _number_groups(indices, shape, granularity)
        unit, first, size = np.unique(numbers, return_index=True, return_counts=True)
        units.append((numbers, unit))
        starts.append(len(unit))
        sizes.append(size)
        scores.append(found.scores[name][first])
    # A stable sort leaves ties in order of names and numbers, in which they stand.
    ranks = np.argsort(sign * np.concatenate(scores), kind="stable")
    fitting = np.searchsorted(np.concatenate(sizes)[ranks].cumsum(), limit, side="right")
    is_kept = np.zeros(len(ranks), bool)
    is_kept[ranks[:fitting]] = True
    kept = dict(zip(names, np.split(is_kept, np.cumsum(starts)[:-1]), strict=True))
    masks = {
        name: kept[name][np.searchsorted(unit, numbers)]
        for name, (numbers, unit) in zip(names, units, strict=True)
    }
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    # Digests are of all the entries; an adapter made of the map gets its own.
    records = {
        name: replace(
            found.metadata.tensors[name],
            encoding=Encoding.PLAIN,
            streams={},
            count=0,
            digest=None,
            content_digest=None,
            base_digest=None,
        )
        for name in masks
    }
    return SafetyMap(
        replace(found.metadata, tensors=records),
        {name: found.indices[name][mask] for name, mask in masks.items()},
        {name: found.scores[name][mask] for name, mask in masks.items()},
    )


def _number_groups(indices: Array, shape: Sequence[int], granularity: Granularity) -> Array:
    """Find the number of the row, column or entry of each flat index, matrix by matrix."""
    rows, columns = shape[-2:]
    if granularity is Granularity.ROW:
        return indices // columns
    if granularity is Granularity.COLUMN:
        return indices // (rows * columns) * columns + indices % columns
    return indices
