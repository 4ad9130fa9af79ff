"""The frame of all jobs: a base and its model, progress, records, and work to resume from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.chat import REQUEST_TOKENS, Chat, read_template
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.data import Example
from safeweights_peft.delta import WEIGHT_DTYPES
from safeweights_peft.errors import DataError, EvaluationError, ModelError, SafeWeightsError
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.evaluation.judges import Verdict, judge_opening
from safeweights_peft.fetching import CODE_FILES, MODEL_FILES, BaseModel, find_base
from safeweights_peft.files import (
    PathLike,
    check_apart,
    check_target,
    lock,
    write_json,
)
from safeweights_peft.jobs.work import (
    FILES,
    IDENTITY,
    clear_work,
    find_work,
    holds_work,
    refuse_work,
)
from safeweights_peft.merging.gather import gather_entries
from safeweights_peft.modeling.answers import find_positions
from safeweights_peft.modeling.layout import describe, eligible_parameters
from safeweights_peft.modeling.loading import (
    build_empty,
    find_memory,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    prepare_tokenizer,
)
from safeweights_peft.modeling.tensors import to_torch
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.records import TensorRecord
from safeweights_peft.progress import Advance, Joined, Progress, Quiet
from safeweights_peft.schema import Settings, to_json
from safeweights_peft.settings import ComputeSettings
from safeweights_peft.sources import Row
from safeweights_peft.tables import size_text

PACKAGES = ("safeweights-peft", "transformers", "torch")
ENOUGH_THOUGHTS = 25  # answers that tell of all others, if each is cut in its thought
LOOKED_AT = 64  # entries of each parameter of a base in memory


class Job:
    """A base, where to compute, and what is shown; jobs on one base share it, and its model."""

    # Every part is found when it is first asked for, so that a job can check what costs nothing
    # before a base is downloaded, and all else before it is loaded.

    def __init__(
        self,
        base: str | os.PathLike[str] | BaseModel | PreTrainedModel,
        compute: ComputeSettings | None = None,
        progress: Progress | None = None,
        adapters: Sequence[Path] = (),  # made for the base, and so recording its commit
        tokenizer: PreTrainedTokenizerBase | None = None,  # of a base in memory
    ) -> None:
        if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise ModelError(
                f"WORLD_SIZE: expected a job in one process, found {processes}, which would all do "
                "the same and write to one place; start it without torchrun, or unset WORLD_SIZE"
            )
        self._source: Any = base
        self._adapters = adapters
        self._lent: PreTrainedModel | None = None  # a base in memory, to be given back as it was
        if isinstance(base, PreTrainedModel):
            self._lend(base, tokenizer)
        self.compute = compute or ComputeSettings()
        self.progress: Progress = progress or Quiet()
        read_template(self.compute.chat_template)  # a missing file is refused at once

    def _lend(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Take a base that is loaded already."""
        if tokenizer is None:
            raise ModelError(
                "tokenizer: expected the tokenizer of a model in memory, found none; give it"
            )
        if not model.name_or_path:
            raise ModelError(
                "base: expected a model that was loaded from a directory or the Hub, where its "
                "patches will find it, found one without a name; save_pretrained and load it"
            )
        self._source, self._lent = model.name_or_path, model
        self.__dict__.update(model=model, device=model.device, dtype=model.dtype)
        self.__dict__["tokenizer"] = prepare_tokenizer(tokenizer, model.name_or_path)

    @cached_property
    def base(self) -> BaseModel:
        """The base on this disk, downloaded if need be."""
        if isinstance(self._source, BaseModel):
            return self._source
        trusts = self.compute.trust_remote_code
        files = (*MODEL_FILES, *CODE_FILES) if trusts else MODEL_FILES
        base = find_base(self._source, self._adapters, self.compute.revision, files)
        return replace(base, trust_remote_code=trusts)

    @cached_property
    def reader(self) -> CheckpointReader:
        """The base's files."""
        return CheckpointReader(self.base.path)

    @cached_property
    def device(self) -> torch.device:
        """Where to compute."""
        return pick_device(self.compute.device)

    @cached_property
    def dtype(self) -> torch.dtype | str:
        """What to compute in; "auto" is the checkpoint's own."""
        return pick_dtype(self.compute.dtype, self.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, able to pad."""
        return load_tokenizer(self.base)

    @cached_property
    def chat(self) -> Chat:
        """What renders and reads for the base."""
        compute = self.compute
        return Chat(
            self.tokenizer,
            compute.system_prompt,
            read_template(compute.chat_template),
            compute.answer_prefix,
            find_positions(self.empty),
        )

    @cached_property
    def empty(self) -> PreTrainedModel:
        """The base without its weights, which takes neither memory nor time."""
        return build_empty(self.base, self.reader.keys())

    @cached_property
    def layout(self) -> dict[str, TensorRecord]:
        """Where the parameters that may be selected from are in the base's files."""
        return describe(self.empty, eligible_parameters(self.empty), self.base.path)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base, loaded once; whoever changes its weights restores them, or takes the model."""
        size = size_text(sum(self.reader.info(key).size_bytes for key in self.reader.keys()))
        dtype = str(self.dtype).removeprefix("torch.").replace("auto", "its own dtype")
        self.progress.note(f"Loading {self.base.name} ({size}) in {dtype} on {self.device}")
        return load_model(self.base, self.dtype, self.device)

    def check(
        self,
        requests: Iterable[Row] = (),
        answered: Iterable[Row] = (),
        *,
        answer_tokens: int = 0,
        out: Path | None = None,
        inputs: Mapping[str, PathLike] = MappingProxyType({}),
        overwrite: bool = False,
        error: type[SafeWeightsError] = ModelError,
    ) -> None:
        """Refuse now what would fail later: the target, the base's files, a request's template."""
        # From what takes no time to what takes a second. Before it, a job reads its requests and
        # adapters; after it, it may compute.
        if out is not None:
            check_target(out, overwrite, error)
            check_apart(out, {"the base": self.base.path, **inputs}, error)
        self.reader.unlisted()  # reads all headers
        if self._lent is not None:
            self._check_lent(self._lent)
        self._check_memory()
        is_new, noted = "chat" not in self.__dict__, len(self.chat.cut)
        if is_new and (opening := self.chat.describe()):
            self.progress.note(f"Answers begin after {opening}; --answer-prefix sets another text")
        for request in requests:
            self.chat.encode_prompt(request, answer_tokens)
        self.chat.encode_rows(list(answered), 1)
        if len(self.chat.cut) > noted:
            self.progress.note(
                f"requests longer than {REQUEST_TOKENS} tokens, or than the model's positions, "
                f"lose their middle: {len(self.chat.cut)}"
            )

    def _check_lent(self, model: PreTrainedModel) -> None:
        """Refuse a model whose weights are not those of the files that results will name."""
        with torch.no_grad():
            for name, parameter in eligible_parameters(model).items():
                count = min(LOOKED_AT, parameter.numel())
                indices = torch.linspace(0, parameter.numel() - 1, count).long()
                record = self.layout[name]
                stored = gather_entries(self.reader, name, record, indices.numpy())
                held = parameter.flatten()[indices.to(parameter.device)]
                expected = to_torch(stored).to(held)
                if not torch.equal(held, expected):
                    raise ModelError(
                        f"{name}: expected the weights of {self.base.name}, from where the model "
                        "was loaded, found others; save it by save_pretrained, and load it again"
                    )

    def _check_memory(self) -> None:
        """Refuse a base whose weights alone don't fit: without swap, the system would kill us."""
        infos = [self.reader.info(key) for key in self.reader.keys()]
        if isinstance(self.dtype, torch.dtype):
            needed = sum(math.prod(info.shape) for info in infos) * self.dtype.itemsize
        else:
            needed = sum(info.size_bytes for info in infos)
        limit = find_memory(self.device)
        if limit is not None and needed > limit:
            raise ModelError(
                f"{self.base.name}: expected weights of at most {size_text(limit)}, the memory of "
                f"{self.device}, found {size_text(needed)}; give --dtype bfloat16 if it isn't "
                "given, or a larger machine"
            )

    def check_exact(self, records: Iterable[TensorRecord]) -> None:
        """Refuse a dtype that rounds weights to be trained, whose bits a patch starts from."""
        if not isinstance(self.dtype, torch.dtype):
            return
        dtype = WEIGHT_DTYPES[str(self.dtype).removeprefix("torch.")]
        for block in (block for record in records for block in record.blocks):
            key = self.reader.find_key(block.key) or block.key
            stored = WEIGHT_DTYPES[self.reader.info(key).dtype]
            if dtype in (stored, np.float32):
                continue
            # The values decide: weights in float32 may have been tuned in bfloat16.
            for window in self.reader.read_windows(key):
                values = window.view(stored)
                if not np.array_equal(values.astype(dtype).astype(stored), values, equal_nan=True):
                    raise ModelError(
                        f"--dtype {dtype}: expected one that holds the weights of "
                        f"{self.base.name} exactly, as training needs, found {stored} in {key}; "
                        "leave --dtype out, or give --dtype float32"
                    )

    def take_model(self) -> PreTrainedModel:
        """Hand the model over to be changed for good; the next job loads another."""
        model = self.model
        if self._lent is None:
            del self.model
        return model

    def drop_model(self) -> None:
        """Give the memory of the model back, if it is loaded; who asks for it loads it again."""
        if self._lent is None:
            self.__dict__.pop("model", None)

    def give_back(self, model: PeftModel) -> None:
        """Take the layers of an adapter out of a base that was in memory before."""
        if self._lent is not None:
            model.unload()

    def beside(self, model: Path) -> Job:
        """Make a job of the same kind on a model in a directory, which has no revisions."""
        return Job(model, replace(self.compute, revision=None), self.progress)

    def ask(
        self,
        who: str,
        requests: Sequence[Row | str],
        max_new_tokens: int,
        batch_size: int = 25,
        model: PreTrainedModel | None = None,
        show_refusals: bool = False,
        seed: int | None = None,
    ) -> list[Example]:
        """Let the base, or another model of its tokenizer, answer requests: greedily, or drawn."""
        model = self.model if model is None else model  # loaded before the task is shown
        with self.progress.task(f"Ask {who} requests", len(requests)) as advance:
            asked = refused = 0
            in_thought: list[bool] = []

            def show(answers: Sequence[Example]) -> None:
                nonlocal asked, refused
                in_thought.extend(map(self.chat.is_in_thought, answers))
                # Said now, not after hours: what is measured must be an answer.
                if show_refusals and len(in_thought) >= ENOUGH_THOUGHTS:
                    refuse_thoughts(in_thought)
                texts = [self.read(answer) for answer in answers]
                asked += len(texts)
                refused += sum(judge_opening("", text) is Verdict.REFUSED for text in texts)
                rates = {"refused %": 100 * refused / asked} if show_refusals else {}
                advance(len(texts), **rates)

            return generate_answers(
                model,
                self.chat,
                requests,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_batch=show,
                seed=seed,
            )

    def read(self, answer: Example) -> str:
        """Decode an answer."""
        return self.chat.read(answer)

    @contextmanager
    def steps(self, description: str, total: int, each: int = 0) -> Iterator[Advance]:
        """Show a task; what it yields takes the step reached, as a resumed job skips some.

        With the number of steps that a call does, it is said from where a job resumes.
        """
        done = 0
        with self.progress.task(description, total) as advance:

            def reach(step: int, /, **figures: float) -> None:
                nonlocal done
                if not done and step > each > 0:
                    self.progress.note(f"{description}: resumed at step {step}")
                advance(step - done, **figures)
                done = step

            yield reach

    @contextmanager
    def joined(self, description: str, total: int) -> Iterator[Advance]:
        """Show all tasks within as one; what it yields takes the units that must be reached."""
        progress, reached = self.progress, 0
        with progress.task(description, total) as advance:

            def count(done: int, /, **figures: float) -> None:
                nonlocal reached
                done = min(done, total - reached)
                reached += done
                advance(done, **figures)

            self.progress = Joined(count)
            try:
                yield lambda units, /, **figures: count(max(units - reached, 0), **figures)
            finally:
                self.progress = progress

    def record(
        self,
        kind: str,
        artifact: Artifact | None = None,
        settings: Settings | None = None,
        /,  # so that content may go by these names too
        **content: Any,
    ) -> dict[str, Any]:
        """Say what a result is made with: base, adapter, settings and versions."""
        if settings is not None:
            content["settings"] = to_json(settings) | to_json(self.compute)
        return {
            "kind": kind,
            "base": {"name": self.base.name, "revision": self.base.revision},
            # A directory can be filled anew; a content id names what was in it, digests of the
            # base's entries included.
            "content_id": artifact.metadata.content_id if artifact else None,
            **content,
            **_find_versions(),
        }

    @contextmanager
    def work(
        self, out: Path, identity: Mapping[str, Any], overwrite: bool = False
    ) -> Iterator[Path]:
        """Name a directory beside a result for work to resume from; clear it once all is done."""
        # The name is made of all that the result depends on. Work of other settings is refused,
        # not dropped: it may have taken hours.
        content = {**identity, FILES: identify(self.base), **_find_versions()}
        if template := read_template(self.compute.chat_template):  # whose file may change
            content["chat_template_digest"] = _digest(template)
        digest = _digest(json.dumps(content, sort_keys=True)).removeprefix("sha256:")
        with lock(out, DataError):
            work_dir = out.with_name(f".{out.name}.{digest[:12]}.work")
            for other in find_work(out):
                if other.name != work_dir.name and not overwrite:
                    refuse_work(out, other, content)
            work_dir.mkdir(parents=True, exist_ok=True)
            try:
                write_json(work_dir / IDENTITY, content)
                yield work_dir
            except BaseException:
                if not holds_work(work_dir):
                    shutil.rmtree(work_dir, ignore_errors=True)
                raise
            clear_work(out)


def refuse_thoughts(in_thought: Sequence[bool]) -> None:
    """Refuse answers that are thoughts alone, all cut before they ended."""
    if all(in_thought):
        raise EvaluationError(
            "answers: expected some that end their thought, found all cut in it; raise "
            "--max-new-tokens, or close the thought by --answer-prefix"
        )


def identify(model: BaseModel) -> str | list[list[Any]]:
    """Name what a model's files hold by its commit, or by their sizes and times of change."""
    if model.revision:
        return model.revision
    # Digests would tell more, and read gigabytes.
    stats = [(path.name, path.stat()) for path in sorted(model.path.iterdir()) if path.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _find_versions() -> dict[str, str]:
    return {f"{name.replace('-', '_')}_version": version(name) for name in PACKAGES}
