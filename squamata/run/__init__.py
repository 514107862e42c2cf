"""Running a model: sampling, generation, chat."""

from squamata.run.chat import Chat
from squamata.run.generate import Generation, Piece, generate, generate_stream
from squamata.run.sampling import Sampler, SamplingOptions

__all__ = ["Chat", "Generation", "Piece", "Sampler", "SamplingOptions", "generate", "generate_stream"]
