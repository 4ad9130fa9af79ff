"""Logits that predict answers, and the layout in which a model computes them right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from safeweights_peft.data import Batch, Batching, Example, Layout, collate
from safeweights_peft.errors import ModelError, SafeWeightsError

# Two rows of one start, of which the first is padded in any batch. A few tokens tell: what a model
# gets wrong it gets wrong at the first column of padding. Only windows longer than these rows stay
# unseen, so `_can_share` asks for those.
PROBE_START, PROBE_RESTS, PROBE_ANSWERS = 3, (1, 4), (3, 2)
# The gap that is still rounding: this many times the noise of the model itself, but at most the
# root of the dtype's precision: 3e-4, 0.03 or 0.09. Where padding is not ignored, tiny models of
# 200 architectures show at least 0.03, or a cache that tells.
NOISE_FACTOR, LEAST_NOISE = 4.0, 1e-6

_layouts: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Compute the float32 logits that predict a batch's answers; ``(B, A, vocabulary)``."""
    if batch.is_alone:
        return _stack_rows(model, batch)
    return _forward(model, batch, _share_past(model, batch))


def prompt_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Compute each layer's float32 output at the last token of prompts; ``(layers, B, hidden)``.

    The batch has no answers.
    """
    if batch.is_alone:
        return torch.cat([_compute_states(model, row) for row in batch.split()], 1)
    return _compute_states(model, batch, _share_past(model, batch))


def _share_past(model: nn.Module, batch: Batch) -> Any:
    """Compute the columns that all rows share, for each row; None where nothing is shared."""
    # A system prompt is the same in all rows: it is computed once, not once per row, where the
    # model keeps plain keys and values of its past. Gradients flow through them all the same.
    if not batch.shared or len(batch.input_ids) == 1:
        return None
    past = _compute_past(model, batch)
    past.batch_repeat_interleave(len(batch.input_ids))
    return past


def _stack_rows(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Run each row without padding, and lay the logits side by side."""
    width = batch.answer_ids.shape[1]
    rows = []
    for row in batch.split():
        missing = width - row.answer_ids.shape[1]
        rows.append(F.pad(_forward(model, row)[0], (0, 0, 0, missing)))
    return torch.stack(rows)


def _forward(model: nn.Module, batch: Batch, past: DynamicCache | None = None) -> torch.Tensor:
    count = batch.answer_ids.shape[1]
    columns = last_columns(count + 1)[:-1]
    logits = _run(model, batch, past, logits_to_keep=columns).logits
    # Some models don't know `logits_to_keep`, and compute the logits of all columns.
    return (logits if logits.shape[1] == count else logits[:, columns]).float()


def _compute_states(
    model: nn.Module, batch: Batch, past: DynamicCache | None = None
) -> torch.Tensor:
    output = _run(model, batch, past, logits_to_keep=last_columns(1), output_hidden_states=True)
    _, *states = getattr(output, "hidden_states", None) or [None]  # the first is the embedding
    if not states or any(state.ndim != 3 for state in states):
        raise ModelError(
            f"{type(find_plain(model)).__name__}: expected a model that returns the states of its "
            "layers, found one that doesn't; use another model"
        )
    return torch.stack([state[:, -1].float() for state in states])


def _run(model: nn.Module, batch: Batch, past: DynamicCache | None, **options: Any) -> Any:
    start = batch.shared if past else 0
    # RoBERTa and its kin don't count positions from 0: a row alone gets those of the model.
    positions = None if batch.is_alone else batch.position_ids[:, start:]
    with refuse_failures(model):
        return model(
            input_ids=batch.input_ids[:, start:],
            attention_mask=batch.attention_mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=past is not None,
            **options,
        )


@contextmanager
def refuse_failures(model: nn.Module) -> Iterator[None]:
    """Refuse in one line a model whose own code fails."""
    try:
        yield
    except (SafeWeightsError, torch.OutOfMemoryError):
        raise
    # An architecture may want rows of certain lengths, or a cache of its own making.
    except Exception as error:
        raise ModelError(
            f"{type(find_plain(model)).__name__}: expected a model that runs rows of any length, "
            f"found {type(error).__name__}: {' '.join(str(error).split())}; use another model"
        ) from error


def last_columns(count: int) -> torch.Tensor:
    """Name the last columns of a batch in the form for which a model computes logits fastest."""
    # For a number, transformers takes a view of the hidden states, and of a view torch copies the
    # whole output matrix once per row: half of a short step's time.
    return torch.arange(-count, 0)


def _compute_past(model: nn.Module, batch: Batch) -> Any:
    """Compute the shared columns once; None for a model that returns no past."""
    columns = slice(0, batch.shared)
    output = model(
        input_ids=batch.input_ids[:1, columns],
        position_ids=batch.position_ids[:1, columns],
        use_cache=True,
        logits_to_keep=last_columns(1),
    )
    return getattr(output, "past_key_values", None)


def find_layout(model: nn.Module) -> Layout:
    """Find how a model takes several rows at once; a check that runs it, once per model."""
    base = find_plain(model)
    if base not in _layouts:
        with torch.inference_mode(False), torch.no_grad(), without_dropout(base):
            _layouts[base] = _Check(base).find_layout()
    return _layouts[base]


def pads_behind(model: nn.Module) -> bool:
    """Find whether rows padded behind their ends are run as each is alone, as training may."""
    # What comes later changes nothing in a causal model, whatever state it keeps and however it
    # counts positions: this holds where no layout for answers does, and leaves less padding.
    base = find_plain(model)
    with torch.inference_mode(False), torch.no_grad(), without_dropout(base):
        return _Check(base).pads_behind()


def measure_noise(model: nn.Module) -> float:
    """Measure the gap of logits that is still rounding, in units of their spread."""
    base = find_plain(model)
    with torch.inference_mode(False), torch.no_grad(), without_dropout(base):
        return _Check(base).limit


def find_plain(model: nn.Module) -> nn.Module:
    """Find the model in PEFT's wrapper, which lengthens every name."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Run a model as in evaluation for a while, whatever modes its modules are in."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


class _Check:
    """A comparison of a model's batches with each row alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.examples = make_probe(model.config.get_text_config().vocab_size)
        row = self.examples[0]
        # The embedding of padding may be 0, of which the gradient of a norm need not be finite.
        padding = getattr(model.get_input_embeddings(), "padding_idx", None)
        self.pad_token_id = row.prompt_ids[0] if padding is None else padding
        self.alone = self._run([row], Batching.ALONE)
        # The same row twice, and longer: without padding, so this changes nothing but how a
        # causal model's sums are rounded.
        longer = Example(row.prompt_ids, row.answer_ids * 2)
        gaps = measure_gaps(self._run([longer, longer], Batching.LEFT), self.alone)
        epsilon = torch.finfo(model.dtype).eps
        self.bound = epsilon**0.5
        # Then the model reads ahead, or counts positions in its own way, and noise says nothing.
        self.is_like_no_batch = bool(gaps.median() > self.bound)
        noise = max(float(gaps.max()), epsilon, LEAST_NOISE)
        self.limit = min(NOISE_FACTOR * noise, self.bound)

    def find_layout(self) -> Layout:
        positions = find_positions(self.model)
        for batching in (Batching.SHARED, Batching.LEFT):
            if not self.is_like_no_batch and self._holds(self._is_right, batching):
                return Layout(batching, positions)
        generates = self._holds(self._generates_alike, Batching.ALONE)
        return Layout(Batching.ALONE, positions, generates)

    def pads_behind(self) -> bool:
        return self._holds(self._is_right, None)

    def _holds(self, check: Callable[[Any], bool], argument: Any) -> bool:
        try:
            with refuse_failures(self.model):
                return check(argument)
        # A model that has run the row alone, and fails now, has a cache or masks for no batch. Too
        # little memory is not that: rows would be run alone for good, and nobody told.
        except ModelError:
            return False

    def _run(self, rows: list[Example], batching: Batching | None) -> torch.Tensor:
        """Compute the logits of the first row's answer; None pads behind the rows."""
        batch = self._collate(rows, batching)
        if batching is not None:
            return answer_logits(self.model, batch)[0, : PROBE_ANSWERS[0]]
        first = len(rows[0].prompt_ids) - 1
        return _forward(self.model, batch)[0, first : first + PROBE_ANSWERS[0]]

    def _collate(self, rows: list[Example], batching: Batching | None) -> Batch:
        if batching is not None:
            return collate(rows, self.pad_token_id, Layout(batching)).to(self.model.device)
        # Where all prompts are one token, rows begin together; and the model counts positions.
        rows = [Example(row.prompt_ids[:1], row.prompt_ids[1:] + row.answer_ids) for row in rows]
        return replace(self._collate(rows, Batching.LEFT), is_alone=True)

    def _is_right(self, batching: Batching | None) -> bool:
        is_shared = batching is Batching.SHARED
        if is_shared and not _can_share(self.model, self.examples):
            return False
        # The median: where rounding sends a token to another expert, one position may be far off.
        gap = measure_gaps(self._run(self.examples, batching), self.alone).median()
        return (
            bool(gap <= self.limit)
            and (batching is None or self._generates_alike(batching))
            and self._has_right_gradients(batching)
        )

    def _generates_alike(self, batching: Batching) -> bool:
        """Find whether `generate` predicts the tokens after the first as a row alone does."""
        # A state that was made beside padding can't always be read on; and positions may be those
        # of columns where a model's `forward` doesn't name them, as MOSS's.
        examples = self.examples[:1] if batching is Batching.ALONE else self.examples
        prompts = [Example(example.prompt_ids, ()) for example in examples]
        batch = self._collate(prompts, batching)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=3,
            pad_token_id=self.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        output = self.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=config,
        )
        answer = tuple(output.sequences[0, batch.input_ids.shape[1] :].tolist())
        expected = self._run([Example(prompts[0].prompt_ids, answer)], Batching.ALONE)
        found = torch.stack([logits[0].float() for logits in output.logits])
        # The least, for the same reason as the median above.
        return bool(measure_gaps(found, expected)[1:].min() <= self.limit)

    def _has_right_gradients(self, batching: Batching | None) -> bool:
        """Find whether a row's gradient is the one that it has alone, and finite in all columns."""
        try:
            with refuse_failures(self.model):
                (expected,) = self._compute_gradients(self.examples[:1], Batching.ALONE)
        except ModelError:  # no gradient at all, as of some quantized weights
            return True
        found = self._compute_gradients(self.examples, batching)
        if not expected.isfinite().all():
            return True
        # Padding may overflow where nothing reads it, and its gradient, 0 times infinity, spoils
        # that of all weights.
        if not all(gradient.isfinite().all() for gradient in found):
            return False
        is_own = self._collate(self.examples, batching).attention_mask[0].bool()
        own = torch.cat([gradient[0] for gradient in found])[is_own]
        gap = (own - expected[0]).norm() / expected.norm().clamp_min(torch.finfo().tiny)
        return bool(gap <= NOISE_FACTOR * self.bound)

    def _compute_gradients(
        self, rows: list[Example], batching: Batching | None
    ) -> list[torch.Tensor]:
        """Compute the first row's gradients of the embedded tokens, of each call of the model."""
        embedded: list[torch.Tensor] = []

        def keep(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            output = output if output.requires_grad else output.requires_grad_()
            embedded.append(output)
            return output

        handle = self.model.get_input_embeddings().register_forward_hook(keep)
        try:
            with torch.enable_grad():
                loss = self._run(rows, batching).square().mean()
                return [gradient.float() for gradient in torch.autograd.grad(loss, embedded)]
        finally:
            handle.remove()


def make_probe(vocabulary: int) -> list[Example]:
    """Make rows of tokens from the middle of a vocabulary, away from those that mean images."""
    length = PROBE_START + sum(PROBE_RESTS) + sum(PROBE_ANSWERS)
    tokens = iter((torch.arange(length) * 37 % (vocabulary // 2) + vocabulary // 4).tolist())
    start = tuple(islice(tokens, PROBE_START))
    return [
        Example(start + tuple(islice(tokens, rest)), tuple(islice(tokens, answer)))
        for rest, answer in zip(PROBE_RESTS, PROBE_ANSWERS, strict=True)
    ]


def measure_gaps(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Measure the distance of logits at each position, in units of their spread there."""
    spread = expected.std(-1).clamp_min(torch.finfo(expected.dtype).tiny)
    return (found - expected).square().mean(-1).sqrt() / spread


def _can_share(model: PreTrainedModel, examples: list[Example]) -> bool:
    """Find whether a model's past is plain keys and values, of all tokens before."""
    config = model.config.get_text_config()
    # A cache whose config has no layer types doesn't know a window that is an architecture's own.
    has_window = any(
        name.endswith(("window", "window_size")) and type(value) is int and value > 0
        for name, value in vars(config).items()
    )
    if has_window and not getattr(config, "layer_types", None):
        return False
    past = _compute_past(model, collate(examples, 0, Layout(Batching.SHARED)).to(model.device))
    # A recurrent state isn't repeated for each row by what follows, and padding stands in a
    # window; nor is what a subclass keeps beside its layers repeated.
    return type(past) is DynamicCache and {type(x) for x in past.layers} == {DynamicLayer}


def find_positions(model: PreTrainedModel) -> int | None:
    """Find how many positions a model has a table of; None where it computes any."""
    count = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not count:
        return None
    tokens = set(model.get_input_embeddings().modules())
    tables = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module not in tokens
    ]
    # RoBERTa and its kin count from the row after that of padding.
    for table in tables:
        if len(table.weight) == count and table.padding_idx is not None:
            return count - table.padding_idx - 1
    # GPT-J and its kin keep sines in a buffer. OPT and its kin have two rows more than positions.
    lengths = [len(table.weight) for table in tables]
    lengths += [len(buffer) for buffer in model.buffers() if buffer.ndim == 2]
    return count if any(count <= length <= count + 2 for length in lengths) else None
