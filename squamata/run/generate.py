"""Generating text: prefill the prompt, then one token at a time through the state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from operator import index
from typing import TYPE_CHECKING, Any

import torch

from squamata.errors import SquamataError, nearest
from squamata.models.lm import LanguageModel
from squamata.run.device import DeviceModel, on_device
from squamata.run.sampling import Sampler, SamplingOptions
from squamata.run.stops import StopFilter

if TYPE_CHECKING:
    from squamata.models.lm import Cache


@dataclass(frozen=True)
class Piece:
    """One new token and the text it makes certain (perhaps none). ``stopped_by`` is set on the last piece only:
    ``length``, ``eos`` or ``stop``; the text before a stop string is complete, the stop string itself left out.
    """

    id: int
    text: str
    stopped_by: str | None = None


@dataclass(frozen=True)
class Generation:
    """``text`` continues ``prompt``; ``ids`` are the new tokens, with the one that ended it. Times in milliseconds:
    ``ttft_ms`` from call to first token, ``tpot_ms`` the mean of every further token (None if there was none).
    """

    text: str
    prompt: str
    ids: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    ttft_ms: float
    tpot_ms: float | None
    stopped_by: str

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return asdict(self)


def generate(
    model: LanguageModel | DeviceModel,
    prompt: str | Sequence[int],
    on_piece: Callable[[Piece], None] | None = None,
    device: str = "cpu",
    **options: Any,
) -> Generation:
    """Continue a prompt (text, or token ids used as they are). ``options``: the fields of ``SamplingOptions``.

    ``on_piece`` is called with every piece as it comes. ``device``: *cpu* or *cuda*.
    """
    chosen = sampling_options(**options)
    if isinstance(model, LanguageModel):
        model = on_device(model, device)
    started = time.perf_counter()
    ids = prompt_ids(model, prompt)
    pieces, times = [], []
    for piece in generate_stream(model, ids, chosen):
        pieces.append(piece)
        times.append(time.perf_counter())
        if on_piece is not None:
            on_piece(piece)
    given = prompt if isinstance(prompt, str) else "" if model.tokenizer is None else model.tokenizer.decode(ids)
    return Generation(
        text="".join(piece.text for piece in pieces),
        prompt=given,
        ids=tuple(piece.id for piece in pieces),
        prompt_tokens=len(ids),
        new_tokens=len(pieces),
        ttft_ms=1e3 * (times[0] - started),
        tpot_ms=1e3 * (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        stopped_by=str(pieces[-1].stopped_by),
    )


def generate_stream(
    model: LanguageModel | DeviceModel, prompt: str | Sequence[int], options: SamplingOptions | None = None
) -> Iterator[Piece]:
    """The pieces of a continuation, as they come. SquamataError for a prompt that the model cannot read."""
    chosen = options or SamplingOptions()
    ids = prompt_ids(model, prompt)
    return continue_stream(model, ids, model.new_cache(batch=1), Sampler(chosen))


def continue_stream(
    model: LanguageModel | DeviceModel, ids: Sequence[int], cache: Cache, sampler: Sampler
) -> Iterator[Piece]:
    """Feed ids (at least one) to the state in ``cache`` and generate on from there.

    Whenever a piece has come, the cache has taken in every id before it, but not its own.
    """
    options, tokenizer = sampler.options, model.tokenizer
    if options.stop and tokenizer is None:
        raise SquamataError("the model has no tokenizer, so it cannot find stop strings: leave them out")
    eos = None if tokenizer is None else tokenizer.eos_id
    decoder = None if tokenizer is None else tokenizer.stream()
    stops = StopFilter(options.stop)
    sampler.see(ids)
    noise = sampler.noise if _rounds_at_random(model) else nullcontext
    with torch.no_grad(), noise():
        logits = model.forward(torch.tensor([list(ids)]), cache, last_only=True)[0, -1]  # (V,)
    for count in range(1, options.max_new_tokens + 1):
        token = sampler.pick(logits)
        ended = token == eos
        text = stops.push("" if decoder is None or ended else decoder.push(token))
        if ended or stops.stopped or count == options.max_new_tokens:
            text += "" if stops.stopped else _rest(decoder, stops)
            yield Piece(token, text, "stop" if stops.stopped else "eos" if ended else "length")
            return
        yield Piece(token, text)
        with torch.no_grad(), noise():
            logits = model.step(sampler.ids, cache)[0]


def _rounds_at_random(model: LanguageModel | DeviceModel) -> bool:
    """True if a site rounds by torch's own generator, which everybody uses."""
    sites = model.sites() if isinstance(model, LanguageModel) else ()
    return any(site.quantized and site.spec is not None and site.spec.rounding == "stochastic" for site in sites)


def _rest(decoder: Any, stops: StopFilter) -> str:
    """What decoder and stop filter still hold when generation ends."""
    return stops.push("" if decoder is None else decoder.finish()) + stops.finish()


def prompt_ids(model: LanguageModel | DeviceModel, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt; text gets the begin token. SquamataError if there are none or the model has no such id."""
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise SquamataError("the model has no tokenizer: give token ids, or add tokenizer.json to its folder")
        ids = model.tokenizer.encode(prompt)
    else:
        ids = _whole_numbers(prompt)
    if not ids:
        raise SquamataError("the prompt is empty: give some text, or at least one token id")
    outside = next((token for token in ids if not 0 <= token < model.config.vocab_size), None)
    if outside is not None:
        raise SquamataError(f"token id {outside} is outside the model's vocabulary of {model.config.vocab_size}")
    return ids


def _whole_numbers(prompt: Sequence[int]) -> list[int]:
    try:
        return [index(token) for token in prompt]
    except TypeError:
        raise SquamataError("a prompt is a text, or one row of token ids, which are whole numbers") from None


def sampling_options(**options: Any) -> SamplingOptions:
    """``SamplingOptions`` of keyword arguments; SquamataError with the nearest name for one that does not exist."""
    known = SamplingOptions.__dataclass_fields__
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise SquamataError(f"no sampling option '{unknown}'{nearest(unknown, known)}")
    return SamplingOptions(**options)
