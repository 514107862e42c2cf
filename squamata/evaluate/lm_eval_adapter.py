"""Our models under EleutherAI's lm-evaluation-harness, and our local tasks as tasks of it (extra ``eval``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from squamata.errors import SquamataError, nearest
from squamata.evaluate.scoring import Request, request, score
from squamata.evaluate.uncertainty import RESAMPLES
from squamata.evaluate.windows import tokenizer_of, windows_of

if TYPE_CHECKING:
    from squamata.models.lm import LanguageModel

TASK_FILES = Path(__file__).parent / "tasks"

Generate = Callable[..., Any]  # as squamata.generate: (model, prompt, **options) -> an object with ``text``

_NEW_TOKENS = 256  # lm-eval's own default


class SquamataLM(LM):
    """lm-eval's interface over a language model.

    Every text begins with the tokenizer's begin token. ``generate`` is ``squamata.generate``, handed in because
    judging does not know running. ``window``: tokens a rolling log-likelihood sees at once.
    """

    def __init__(self, model: LanguageModel, generate: Generate, window: int = 2048) -> None:
        super().__init__()
        self.model = model
        self.window = window
        self._generate = generate

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding gives it) of every request."""
        tokenizer = tokenizer_of(self.model)
        scores = score(self.model, [request(tokenizer, *item.args) for item in requests])
        return [(-item.nats, item.greedy) for item in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p(text) of every request, in windows without overlap."""
        return [-self._nats(*item.args) for item in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of every context, up to one of its ``until`` strings."""
        return [self._continuation(*item.args) for item in requests]

    def _nats(self, text: str) -> float:
        windows = windows_of(0, tokenizer_of(self.model).encode(text), self.window)  # none for a text of no tokens
        return sum(item.nats for item in score(self.model, [Request(each.ids, each.predicted) for each in windows]))

    def _continuation(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or ()
        sampled = {name: options[name] for name in ("top_k", "top_p") if name in options}
        generation = self._generate(
            self.model,
            context,
            max_new_tokens=options.get("max_gen_toks", _NEW_TOKENS),
            temperature=options.get("temperature", 0.0) if options.get("do_sample", True) else 0.0,
            stop=(until,) if isinstance(until, str) else tuple(until),
            **sampled,
        )
        return str(generation.text)


def local_tasks() -> list[str]:
    """Names of the tasks that read local JSONL files."""
    return sorted(path.stem for path in TASK_FILES.glob("*.yaml"))


def task_config(name: str, folder: str | Path) -> dict[str, Any]:
    """lm-eval's description of a local task, with its data file taken from ``folder``."""
    config: dict[str, Any] = yaml.safe_load((TASK_FILES / f"{name}.yaml").read_text(encoding="utf-8"))
    files = {split: Path(folder) / file for split, file in config["dataset_kwargs"]["data_files"].items()}
    for file in files.values():
        if not file.is_file():
            raise SquamataError(f"no such file: {file}; task '{name}' reads it from the data folder")
    config["dataset_kwargs"]["data_files"] = {split: str(file.resolve()) for split, file in files.items()}
    return config


def run_tasks(
    model: LanguageModel,
    tasks: Sequence[str],
    folder: str | Path,
    generate: Generate,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """``evaluate_with_lm_eval``, with lm-eval at hand."""
    foreign = [name for name in tasks if name not in local_tasks()]
    manager = TaskManager(include_defaults=bool(foreign))
    unknown = [name for name in foreign if name not in manager.all_tasks]
    if unknown:
        raise SquamataError(f"no task '{unknown[0]}'{nearest(unknown[0], local_tasks())}")
    configs = [task_config(name, folder) if name in local_tasks() else name for name in tasks]
    found = simple_evaluate(
        SquamataLM(model, generate),
        tasks=configs,
        task_manager=manager,
        limit=limit,
        bootstrap_iters=RESAMPLES,
        log_samples=False,
    )
    return {name.removeprefix("squamata_"): _figures(metrics) for name, metrics in found["results"].items()}


def _figures(metrics: dict[str, Any]) -> dict[str, float]:
    """lm-eval writes ``acc,none`` for metric ``acc`` under filter ``none``."""
    named = {name.removesuffix(",none"): value for name, value in metrics.items()}
    return {name: float(value) for name, value in named.items() if isinstance(value, int | float)}
