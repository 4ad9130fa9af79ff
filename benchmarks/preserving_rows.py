"""Train one row of the preserving study, or change what was trained, and measure what is left."""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from preserving_times import time_anchor
from safer_start import write_model
from torch.nn import functional as F
from transformers import PreTrainedModel

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.writer import draft_copy
from safeweights_peft.data import IGNORED, Example, collate
from safeweights_peft.delta import Array
from safeweights_peft.evaluation.judges import RefusalJudge, Verdict
from safeweights_peft.files import write_json
from safeweights_peft.jobs.evaluate import TASK_TOKENS
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.load import load_patched
from safeweights_peft.jobs.preserve import preserve_model
from safeweights_peft.jobs.repair import repair
from safeweights_peft.jobs.score import score
from safeweights_peft.jobs.work import once
from safeweights_peft.merging.merge import merge
from safeweights_peft.merging.protect import protect
from safeweights_peft.modeling.answers import answer_logits, find_layout
from safeweights_peft.modeling.loading import load_model
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.schema import to_json
from safeweights_peft.settings import (
    ComputeSettings,
    EvaluateSettings,
    Method,
    PreserveMethod,
    PreserveSettings,
    RunSettings,
    ScoreSettings,
    TrainSettings,
)
from safeweights_peft.sources import Row, data_digest
from safeweights_peft.training.finetune import fine_tune

RAW_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'user' %}{{ 'Question: ' + message.content + '\\n' }}
{%- else %}{{ 'Answer: ' + message.content + (eos_token or '') }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"""
"""The text without a chat template on which the published code trains."""

BFLOAT16_RATE = 3e-5  # the published code's, with the weights themselves in bfloat16
MIXED_FRACTION = 0.05
NOTHING, SAFETY = "nothing", "safety"
ANCHOR_SETTINGS = ("anchor", "harmful", "benign", "boundary", "stop_above")


@dataclass(frozen=True)
class Training:
    """What a row trains on, how, and what it keeps."""

    method: PreserveMethod = PreserveMethod.FULL
    frozen: str = NOTHING  # or SAFETY, or a key of a plan's selections
    anchor: bool = False
    is_mixed: bool = False  # one row in twenty is harmful
    control: str = ""  # "raw" text, or weights in "bf16"


LORA = PreserveMethod.LORA
TRAININGS: Mapping[str, Training] = {
    "nothing": Training(),
    "frozen": Training(frozen=SAFETY),
    "random": Training(frozen="random"),
    "frozen-30": Training(frozen="esi-30"),
    "anchor": Training(anchor=True),
    "anchor-frozen": Training(frozen=SAFETY, anchor=True),
    "lora-nothing": Training(LORA),
    "lora-frozen": Training(LORA, SAFETY),
    "lora-anchor": Training(LORA, anchor=True),
    "lora-anchor-frozen": Training(LORA, SAFETY, anchor=True),
    "mixed-nothing": Training(is_mixed=True),
    "mixed-anchor": Training(anchor=True, is_mixed=True),
    "mixed-anchor-frozen": Training(frozen=SAFETY, anchor=True, is_mixed=True),
    "raw": Training(control="raw"),
    "bf16": Training(control="bf16"),
}
REPAIRS, ADDED = (30, 100), (0.25, 0.5, 1.0)
# Of the model that "nothing" trained.
AFTERWARDS = (
    *(f"repair-{steps}" for steps in REPAIRS),
    "protect",
    *(f"add-{weight:g}" for weight in ADDED),
)
TIMES = {"time-full": Training(anchor=True), "time-lora": Training(LORA, anchor=True)}
ROWS = ("before", *TRAININGS, *AFTERWARDS, *TIMES)


@dataclass(frozen=True)
class Plan:
    """How long all rows train, and on how much."""

    steps: int = 1000
    batch_size: int = 2
    answer_tokens: int = 64  # learned of each answer
    new_tokens: int = 32  # of each answer that is judged
    problems: int = 1600
    instructions: int = 800
    tests: int = 100  # rows of each kind that measure the task loss
    examples: int = 64  # that select weights, or make an anchor whose time is measured
    blocks: int = 10  # of steps that are timed, from one with the anchor to the next
    least_density: float = 1e-7  # as good as nothing frozen
    seed: int = 0

    @classmethod
    def tiny(cls, steps: int) -> "Plan":
        """Shrink everything, to try whether it runs."""
        return cls(steps, 2, 8, 4, 6, 4, 2, 4, 2, 1e-3)

    def select(self, name: str) -> ScoreSettings:
        """Return how a selection is made: of the safety weights, of others, or of next to none."""
        method, density = {
            NOTHING: (Method.RANDOM, self.least_density),
            "random": (Method.RANDOM, 0.01),
            SAFETY: (Method.ESI, 0.01),
            "esi-30": (Method.ESI, 0.3),
        }[name]
        return ScoreSettings(method=method, density=density, examples=self.examples, seed=self.seed)


class Data(NamedTuple):
    """What is learned, and what is asked, by all rows."""

    task: list[Row]
    tests: list[Row]
    harmful: list[Row]
    benign: list[Row]
    mixed: Callable[[], list[Row]]  # the task with harmful rows, which a complying model answers
    mixed_id: str  # of what these are made from

    def identify(self) -> dict[str, str]:
        """Name all that every row depends on."""
        parts = {"task": self.task, "tests": self.tests, "harmful": self.harmful}
        return {name: data_digest(rows) for name, rows in {**parts, "benign": self.benign}.items()}


@dataclass(frozen=True)
class Start:
    """A safe model, what it was made from, and the patch by which, if it was by one."""

    name: str
    path: Path
    base: Path
    patch: Path | None = None

    @cached_property
    def digests(self) -> dict[str, str]:
        """The digests of both models' weights."""
        return {"start": digest_files(self.path), "base": digest_files(self.base)}


class Study:
    """One start model, its rows, and where they are kept."""

    def __init__(
        self, start: Start, plan: Plan, data: Data, out: Path, compute: ComputeSettings
    ) -> None:
        """Take what all rows share; what is computed on changes no row's name."""
        self.start, self.plan, self.data = start, plan, data
        self.out, self.compute = out / start.name, compute
        self._is_fast = str(compute.device).startswith("cuda")

    # --- names ---

    def identify(self, row: str) -> dict[str, Any]:
        """Name all that a row's figures depend on."""
        identity: dict[str, Any] = {
            "row": row,
            **self.start.digests,
            "data": self.data.identify(),
            "dtype": self.compute.dtype,
            "new_tokens": self.plan.new_tokens,
        }
        if row == "before":
            return identity
        training = {**TRAININGS, **TIMES}.get(row, TRAININGS[NOTHING])
        identity |= {
            "plan": asdict(self.plan),
            "training": asdict(training),
            "mixed": self.data.mixed_id if training.is_mixed else None,
        }
        if training.anchor:
            settings = to_json(self.make_settings(training))
            identity["anchor"] = {
                key: value for key, value in settings.items() if key.startswith(ANCHOR_SETTINGS)
            }
        if training.frozen == SAFETY or row == "protect" or row.startswith("repair"):
            patch = self.start.patch
            identity["patch"] = read_artifact(patch).metadata.content_id if patch else None
        return identity

    def find_path(self, row: str) -> Path:
        """Find where a row's figures are, or will be; other settings are another file."""
        return self.out / f"{row}-{short_digest(self.identify(row))}.json"

    def make_settings(self, training: Training) -> PreserveSettings:
        """Make the settings of a row's training."""
        plan = self.plan
        return PreserveSettings(
            method=training.method,
            steps=plan.steps,
            batch_size=plan.batch_size,
            max_answer_tokens=plan.answer_tokens,
            learning_rate=BFLOAT16_RATE if training.control == "bf16" else None,
            anchor=training.anchor,
            seed=plan.seed,
        )

    # --- rows ---

    def run(self, row: str) -> dict[str, Any]:
        """Make a row and measure it, unless that is done."""
        return once(self.find_path(row), partial(self._run, row))

    def _run(self, row: str) -> dict[str, Any]:
        started = time.perf_counter()
        figures: dict[str, Any] = {"row": row, "identity": self.identify(row)}
        if row in TIMES:
            settings = self.make_settings(TIMES[row])
            job, plan = Job(self.start.path, self.compute), self.plan
            figures["device"] = str(job.device)
            times = time_anchor(job, self.data.task, settings, plan.examples, plan.blocks)
            return {**figures, "times": times}
        if row == "before":
            made = self.start.path
        elif row in TRAININGS:
            made = self.tune(row)
            training = TRAININGS[row]
            if training.method is PreserveMethod.FULL:
                map_dir = self._pick_map(training)
                figures |= count_moved(self.start.path, made, map_dir) if map_dir else {}
        else:
            made = self.change(row)
        trained = time.perf_counter()
        by_lora = row in TRAININGS and TRAININGS[row].method is LORA
        figures |= self.measure(self.start.path if by_lora else made, made if by_lora else None)
        figures |= {
            "seconds": round(trained - started, 1),
            "measuring_seconds": round(time.perf_counter() - trained, 1),
        }
        print(f"{self.start.name}: {row}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        if row not in ("before", NOTHING):  # which rows that come afterwards need
            shutil.rmtree(made)
        return figures

    def find_model(self, row: str) -> Path:
        """Find where what a row trains or changes is, or will be, until it is measured."""
        return self.out / "models" / self.find_path(row).stem

    def tune(self, row: str) -> Path:
        """Fine-tune the start model as a row wants it, unless that is done."""
        training, folder = TRAININGS[row], self.find_model(row)
        if folder.exists():
            return folder
        settings, compute = self.make_settings(training), self.compute
        map_dir = self._pick_map(training)
        if map_dir and training.control == "bf16":
            return self._tune_in_bfloat16(map_dir, folder, settings)
        if training.control == "raw":
            template = self.out / "raw.jinja"
            template.write_text(RAW_TEMPLATE, encoding="utf-8")
            compute = replace(compute, chat_template=str(template))
        rows = self.data.mixed() if training.is_mixed else self.data.task
        source = self.out / f"{'mixed' if training.is_mixed else 'task'}.json"
        write_rows(source, rows)
        folder.parent.mkdir(parents=True, exist_ok=True)
        preserve_model(Job(self.start.path, compute), map_dir, str(source), folder, settings)
        return folder

    def _tune_in_bfloat16(self, map_dir: Path, folder: Path, settings: PreserveSettings) -> Path:
        """Fine-tune weights that are in bfloat16 themselves, as no job does."""
        job = Job(self.start.path, self.compute)
        work_dir = folder.with_name(f".{folder.name}.work")  # a second call resumes from there
        model = load_model(job.base, torch.bfloat16, job.device)
        fine_tune(
            *(model, job.tokenizer.pad_token_id),
            job.chat.encode_rows(self.data.task, settings.max_answer_tokens),
            *(read_artifact(map_dir), settings, work_dir, torch.bfloat16),
        )
        write_model(job, model, folder)
        shutil.rmtree(work_dir)
        return folder

    def _pick_map(self, training: Training) -> Path | None:
        """Find what a row freezes; a training without an anchor must freeze something."""
        is_free = training.anchor and training.frozen == NOTHING
        return None if is_free else self.find_map(training.frozen)

    def find_map(self, name: str) -> Path:
        """Find the map or patch to freeze, and select it in the start model unless that is done."""
        if name == SAFETY and self.start.patch:
            return self.start.patch
        settings = self.plan.select(name)
        digest = short_digest({**self.start.digests, "settings": to_json(settings)})
        folder = self.out / "maps" / f"{name}-{digest}"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            score(Job(self.start.path, self.compute), folder, settings)
        return folder

    def change(self, row: str) -> Path:
        """Change the model that was trained with nothing kept, unless that is done."""
        tuned, folder = self.tune(NOTHING), self.find_model(row)
        if folder.exists():
            return folder
        kind, _, size = row.partition("-")
        if kind == "repair":
            self._repair(tuned, min(int(size), self.plan.steps), folder)
        elif kind == "protect":
            protect(tuned, self.start.path, self.find_map(SAFETY), folder)
        else:
            add_safety(tuned, self.start, float(size), folder)
        return folder

    def _repair(self, tuned: Path, steps: int, folder: Path) -> None:
        """Make a model safe again, and merge the patch that does."""
        run = folder.with_name(f"{folder.name}-run")  # a second call resumes there
        settings = RunSettings(
            str(tuned),
            self.plan.select(SAFETY),
            TrainSettings(steps=steps, seed=self.plan.seed),
            EvaluateSettings(limit=1),  # measured below, with all others
            compute=self.compute,
        )
        repair(settings, run, patch=self.start.patch)
        merge(tuned, [run / "patch"], folder)
        shutil.rmtree(run)

    # --- measuring ---

    def measure(self, base: Path, lora: Path | None) -> dict[str, Any]:
        """Measure which requests a model refuses, and its loss on each of the task's answers."""
        job = Job(base, self.compute)
        model = load_patched(job.base, [lora], job.dtype, job.device) if lora else job.model
        batch, found = 256 if self._is_fast else 25, {}
        for kind, rows in (("harmful", self.data.harmful), ("benign", self.data.benign)):
            answers = job.ask(kind, rows, self.plan.new_tokens, batch, model)
            pairs = [(row.instruction, job.read(a)) for row, a in zip(rows, answers, strict=True)]
            found[kind] = RefusalJudge().judge(pairs)
        examples = job.chat.encode_rows(self.data.tests, TASK_TOKENS)
        pad, size = job.tokenizer.pad_token_id, 32 if self._is_fast else 4
        verdicts = [verdict for given in found.values() for verdict in given]
        return {
            "refused": {
                kind: "".join(str(int(verdict is Verdict.REFUSED)) for verdict in given)
                for kind, given in found.items()
            },
            "invalid": verdicts.count(Verdict.INVALID),
            "losses": measure_losses(model, examples, pad, size),
            "tokens": [len(example.answer_ids) for example in examples],
        }


@torch.inference_mode()
def measure_losses(
    model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int, size: int
) -> list[float]:
    """Sum the loss over the tokens of each answer, in nats."""
    losses, layout = [0.0] * len(examples), find_layout(model)
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].prompt_ids))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = collate([examples[row] for row in rows], pad_token_id, layout).to(model.device)
        logits = answer_logits(model, batch).transpose(1, 2).float()
        parts = F.cross_entropy(logits, batch.answer_ids, ignore_index=IGNORED, reduction="none")
        for row, loss in zip(rows, parts.sum(1).tolist(), strict=True):
            losses[row] = loss
    return losses


def add_safety(tuned: Path, start: Start, weight: float, out: Path) -> None:
    """Add a part of what made the start model safe to a tuned one (RESTA, arXiv 2402.11746)."""
    # Of a patch, that is its values, as they were merged; of another start model, all weights.
    safe, base = CheckpointReader(start.path), CheckpointReader(start.base)
    reader = CheckpointReader(tuned)
    with draft_copy(reader, out) as draft:
        for key in reader.keys():
            change = safe.read(key).astype(np.float32) - base.read(key).astype(np.float32)
            if change.any():
                tensor = reader.read(key)
                total = tensor.astype(np.float32) + np.float32(weight) * change
                draft.write(key, total.astype(tensor.dtype))


def count_moved(start: Path, tuned: Path, map_dir: Path) -> dict[str, int]:
    """Count the entries whose bits changed: frozen ones, and all of the frozen ones' tensors."""
    artifact = read_artifact(map_dir)
    before, after = CheckpointReader(start), CheckpointReader(tuned)
    moved, frozen_moved, frozen = 0, 0, 0
    for name, indices in artifact.indices.items():
        (block,) = artifact.metadata.tensors[name].blocks  # as in dense models
        key = before.find_key(block.key) or block.key
        differs = (_bits(before.read(key)) != _bits(after.read(key))).reshape(-1)
        moved += int(differs.sum())
        frozen_moved += int(differs[indices].sum())
        frozen += len(indices)
    return {"frozen": frozen, "moved": moved, "frozen_moved": frozen_moved}


def _bits(array: Array) -> Array:
    return array.view(f"u{array.itemsize}")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, as jobs read them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [{"instruction": row.instruction, "output": row.output} for row in rows])


def digest_files(folder: Path) -> str:
    """Digest a checkpoint's weights."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def short_digest(content: Any) -> str:
    """Name settings in a few characters."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
