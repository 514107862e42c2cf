"""Running on a GPU: a plan of fused kernels, captured in CUDA graphs and replayed, a prompt or a token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.decode.triton import Kernel
from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.prefill.triton import FEW_SEQUENCES, SequencePlan, Workspace
from squamata.kernels.qtensor import QTensor
from squamata.models.block import ScanCache
from squamata.models.lm import Cache, LanguageModel
from squamata.run.gpu_plan import Planner

LENGTHS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)  # that a prefill graph is captured for
MOST_TOKENS = 2**15  # of all sequences in one prefill graph


class CapturedDecoder:
    """A model on a GPU for ``batch`` sequences: prefill, and a decode step without host synchronisation or allocation.

    ``weights``: *bfloat16* or *float32* for the weights that the recipe leaves in float. ``state_dtype``: of a state
    that the recipe leaves in float. ``keep_rows``: hold a second copy of the large weights, laid out for prefill, which
    saves a tenth of its time (by default if it fits in a quarter of the free memory). ``pdl``: programmatic dependent
    launch (Hopper and later). Raises SquamataError for a recipe that the fused kernels do not take. Where Triton
    interprets, the plan runs uncaptured. A batch of one to 16 decodes through matrix-vector products, a larger one
    through the tensor cores.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch: int = 1,
        device: torch.device | str = "cuda",
        weights: str = "bfloat16",
        state_dtype: torch.dtype = torch.float32,
        pdl: bool | None = None,
        keep_rows: bool | None = None,
    ) -> None:
        self.device = torch.device(device)
        if pdl is None:
            pdl = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0)
        self.batch = batch
        self.exact = weights != "bfloat16"
        self.plan = Planner(batch, self.device, not self.exact, state_dtype, pdl).model(model)
        self.keep_rows = self._room_for_copies() if keep_rows is None else keep_rows
        self._copies: dict[int, Tensor] = {}
        self._many = self.sequence_plan(1) if batch > FEW_SEQUENCES else None
        if self._many is not None:
            self._many.work.ids = self.plan.buffers.ids
        self._prefills: dict[int, tuple[SequencePlan, Callable[[], None]]] = {}
        self._replay = captured(self.launch, self.device)
        self.reset()

    @property
    def logits(self) -> Tensor:
        """float32 (B, V) of the last step; the next one overwrites it."""
        return self.plan.logits

    @property
    def ids(self) -> Tensor:
        """int64 (B,): what the next step takes in; a step leaves the likeliest next token here."""
        return self.plan.buffers.ids

    @property
    def longest(self) -> int:
        """Tokens a sequence that one prefill graph takes; longer prompts go in pieces."""
        return max((size for size in LENGTHS if size * self.batch <= MOST_TOKENS), default=LENGTHS[0])

    def kernels(self) -> Iterator[Kernel]:
        """Every launch of a step, in order, with the name of what it does."""
        return (self._many or self.plan).kernels()

    def launch(self) -> None:
        """The kernels of a step, uncaptured."""
        (self._many or self.plan).step()

    def step(self, ids: Tensor | None = None) -> Tensor:
        """One token for every sequence: ``ids`` (B,), or what the last step chose -> logits (B, V)."""
        if ids is not None:
            self.ids.copy_(ids)
        self.replay()
        return self.logits

    def replay(self) -> None:
        """Launch a step; returns before it has run."""
        self._replay()

    def prefill(self, ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Take in int64 ids (B, L) -> logits (B, V) of every sequence's last token; ``ids`` holds the likeliest next.

        ``lengths``: tokens of every sequence, 1 to L, where they differ; what is beyond them is ignored. Goes on from
        what the states hold. Returns before it has run.
        """
        longest = ids.shape[1]
        wanted = torch.full((self.batch,), longest) if lengths is None else torch.tensor(list(lengths))
        if ids.shape[0] != self.batch or len(wanted) != self.batch or not 1 <= int(wanted.min()) <= longest:
            raise SquamataError(f"a prefill of {self.batch} sequences takes as many rows of ids and lengths of 1 to L")
        most = self.longest
        pieces = range(0, longest, most)
        kept: tuple[Tensor, Tensor] | None = None
        for start in pieces:
            inside = (wanted - start).clamp(0, most)
            self._take(ids[:, start : start + most], inside)
            if len(pieces) == 1:
                break
            live = (inside > 0).to(self.device)
            now = (self.logits.clone(), self.ids.clone())
            kept = (
                now
                if kept is None
                else (torch.where(live[:, None], now[0], kept[0]), torch.where(live, now[1], kept[1]))
            )
        if kept is not None:
            self.logits.copy_(kept[0])
            self.ids.copy_(kept[1])
        return self.logits

    def _take(self, ids: Tensor, lengths: Tensor) -> None:
        """One piece of all sequences, padded to a length that has a graph."""
        plan, replay = self.captured_prefill(ids.shape[1])
        plan.work.ids.view(self.batch, -1)[:, : ids.shape[1]].copy_(ids, non_blocking=True)
        plan.work.lengths.copy_(lengths, non_blocking=True)
        replay()

    def captured_prefill(self, length: int) -> tuple[SequencePlan, Callable[[], None]]:
        """The plan for sequences of up to ``length`` tokens and its replay, captured at the first call."""
        size = next((size for size in LENGTHS if size >= length), length)
        if size not in self._prefills:
            plan = self.sequence_plan(size)
            plan.work.lengths.zero_()  # no tokens: the run that compiles leaves the states as they are
            self._prefills[size] = plan, captured(plan.step, self.device)
        return self._prefills[size]

    def sequence_plan(self, length: int) -> SequencePlan:
        """A plan for ``length`` places a sequence, with memory of its own."""
        buffers = self.plan.buffers
        work = Workspace(self.batch, length, buffers.width, self.device, self.exact, self.keep_rows, self._copies)
        return SequencePlan(self.plan, work)

    def _room_for_copies(self) -> bool:
        """True if the integer weights take at most a quarter of the memory that is free."""
        if self.device.type != "cuda":
            return False
        return self.plan.weight_bytes < 0.25 * torch.cuda.mem_get_info(self.device)[0]

    def reset(self) -> None:
        """Forget everything: zeroed states."""
        self.plan.buffers.position.zero_()
        for layer in self.plan.layers:
            layer.state.ring.zero_()
            layer.state.state.zero_()

    def load_cache(self, cache: Cache) -> None:
        """Go on from a model's cache (after its prefill, say), of the same batch."""
        for layer, given in zip(self.plan.layers, cache, strict=True):
            assert isinstance(given, ScanCache)
            ring, state = layer.state.ring, layer.state.state
            history = given.conv.data if isinstance(given.conv, QTensor) else given.conv
            slots = ring.shape[0]
            ring.zero_()
            ring[1:].copy_(history.permute(2, 0, 1))  # position % slots is 0: the newest input is in the last slot
            state.copy_((given.state.data if isinstance(given.state, QTensor) else given.state).reshape(state.shape))
            if layer.scan.grid is not None and layer.scan.grid.span > 0 and isinstance(given.state, QTensor):
                layer.scan.grid.scale.copy_(given.state.scale.reshape(-1))
        self.plan.buffers.position.fill_(slots)


def captured(
    step: Callable[[], None], device: torch.device, generator: torch.Generator | None = None
) -> Callable[[], None]:
    """A replay of ``step``'s launches, which run once beforehand to be compiled; ``step`` itself in the interpreter.

    ``generator``: what the step draws from, which goes on from one replay to the next.
    """
    if INTERPRETED:
        return step
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return graph.replay
