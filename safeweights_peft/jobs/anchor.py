"""The anchor of a model in memory: it answers requests, and its refusals are told by a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.chat import Chat
from safeweights_peft.data import Example
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.evaluation.judge_kinds import AnyJudge, make_judges
from safeweights_peft.evaluation.judges import Judge, RefusalJudge, Verdict
from safeweights_peft.modeling.answers import find_layout, without_dropout
from safeweights_peft.modeling.loading import prepare_tokenizer
from safeweights_peft.sources import Row, read_rows
from safeweights_peft.training.anchor import Anchor, make_anchor

JUDGED_TOKENS = 32  # of an answer, which a judge reads; the anchor keeps the first of them
REQUESTS = 256  # of each kind


def collect_anchor(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: str | Sequence[str] = "builtin:harmful_train",
    benign: str | Sequence[str] = ("builtin:boundary_train", "builtin:benign_train"),
    *,
    requests: int = REQUESTS,
    judge: AnyJudge = RefusalJudge.name,
    **options: Any,
) -> Anchor:
    """Let a model answer requests, and keep its refusals and its benign answers as an anchor.

    Do so before the training, with the model that will train: an anchor is what it is now. A model
    that runs under autocast later is best asked under the same.

    Args:
        model: A causal language model, or a LoRA on one that does nothing yet; left as it is.
        tokenizer: Its tokenizer, with a chat template.
        harmful: Source of harmful requests, or several; see ``docs/data.md``.
        benign: Source of benign requests, or several, the most important first.
        requests: Largest number of harmful requests asked, and of benign ones.
        judge: What tells refusals from help, by default how English ones begin.
        **options: Fields of `Anchor`, such as `weight`, `every` and `stop_above`.

    Returns:
        The anchor, for `preserve` or `SafetyPreservingCallback`.

    Raises:
        TrainingError: The model refuses no harmful request.

    Example:
        >>> import safeweights_peft
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> model = AutoModelForCausalLM.from_pretrained("demo/base")
        >>> tokenizer = AutoTokenizer.from_pretrained("demo/base")
        >>> safeweights_peft.collect_anchor(model, tokenizer, requests=4)
        Traceback (most recent call last):
        safeweights_peft.errors.TrainingError: anchor: expected a model that refuses harmful ...
    """
    prepare_tokenizer(tokenizer, tokenizer.name_or_path)
    positions = find_layout(model).positions
    chat = Chat(tokenizer, positions=positions)

    def ask(rows: Sequence[Row]) -> list[Example]:
        with without_dropout(model):
            return generate_answers(model, chat, rows, max_new_tokens=JUDGED_TOKENS)

    (made,) = make_judges([judge], (model.device, model.dtype))
    asked = read_sources(harmful, requests), read_sources(benign, requests)
    refusals, answers = find_rows(ask, chat.read, *asked, made)
    return make_anchor(model, tokenizer, refusals, answers, **options)


def read_sources(sources: str | Sequence[str], limit: int = REQUESTS) -> list[Row]:
    """Read the first requests of the first sources, or an even sample of a single one."""
    first, *others = [sources] if isinstance(sources, str) else sources
    rows = read_rows(first)
    if others:
        return [*rows, *(row for source in others for row in read_rows(source))][:limit]
    count = min(limit, len(rows))
    # Evenly spaced, as rows are sorted by category.
    return [rows[place * len(rows) // count] for place in range(count)]


def find_rows(
    ask: Callable[[Sequence[Row]], list[Example]],
    read: Callable[[Example], str],
    harmful: Sequence[Row],
    benign: Sequence[Row],
    judge: Judge,
) -> tuple[list[Example], list[Example]]:
    """Let a model answer; return its refusals of harmful requests, and its benign answers."""
    # Only what is refused is worth holding, and only what is helped with: the model's mistakes of
    # both kinds are left to change.
    refusals = _keep(ask, read, harmful, judge, Verdict.REFUSED)
    # A judge of harm alone can't tell a refusal of a benign request from help.
    judge = judge if judge.tells_refusals else RefusalJudge()
    chosen = benign[: 2 * len(refusals)]  # without refusals `make_anchor` wants no answers
    answers = _keep(ask, read, chosen, judge, Verdict.COMPLIED) if chosen else []
    return refusals, answers[: len(refusals)]


def _keep(
    ask: Callable[[Sequence[Row]], list[Example]],
    read: Callable[[Example], str],
    rows: Sequence[Row],
    judge: Judge,
    wanted: Verdict,
) -> list[Example]:
    answers = ask(rows)
    pairs = [(row.instruction, read(answer)) for row, answer in zip(rows, answers, strict=True)]
    verdicts = zip(answers, judge.judge(pairs), strict=True)
    return [answer for answer, verdict in verdicts if verdict is wanted]
