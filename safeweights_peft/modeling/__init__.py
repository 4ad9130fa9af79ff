"""Models: load them, say where their parameters live, compute answers' logits."""

from safeweights_peft.modeling.answers import AnswerBatch, answer_logits, last_columns
from safeweights_peft.modeling.layout import (
    ROUTER_NAMES,
    describe,
    eligible_parameters,
    total_parameters,
)
from safeweights_peft.modeling.loading import (
    build_empty,
    load_classifier,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
)

__all__ = [
    "ROUTER_NAMES",
    "AnswerBatch",
    "answer_logits",
    "build_empty",
    "describe",
    "eligible_parameters",
    "last_columns",
    "load_classifier",
    "load_model",
    "load_tokenizer",
    "pick_device",
    "pick_dtype",
    "total_parameters",
]
