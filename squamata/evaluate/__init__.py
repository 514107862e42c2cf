"""Judging a model: perplexity, fidelity to another model, LAMBADA, multiple-choice tasks."""

from squamata.evaluate.lambada import LambadaResult, evaluate_lambada
from squamata.evaluate.perplexity import Evaluation, PairedDifference, evaluate, paired_difference
from squamata.evaluate.tasks import TASKS, TaskResult, evaluate_task, evaluate_with_lm_eval

__all__ = [
    "TASKS",
    "Evaluation",
    "LambadaResult",
    "PairedDifference",
    "TaskResult",
    "evaluate",
    "evaluate_lambada",
    "evaluate_task",
    "evaluate_with_lm_eval",
    "paired_difference",
]
