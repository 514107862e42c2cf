"""One token through a whole model, batch 1: the coarsest op.

``DecodePlan.step`` takes the embedding row float32 (D,) and gives the logits float32 (V,): every layer, the final
norm and the head. It computes what the composition of the fine ops computes (each ``ref.py`` is the definition):
integers that land on a site agree, float sums may be added in another order. The convolution's and the scan's
states are updated in place, in the arrays they were planned with.

What a plan can hold: Mamba-1 and Mamba-2 layers in any order; static symmetric sites, and ``in``, ``out`` and
``head.in`` also with a scale per token; weights in float32, bfloat16, int8 per row, int4 per row or in groups of a
multiple of 32. ``run/decode_plan.py`` makes a plan from a model and raises for one outside of this; the caller then
composes the fine ops.
"""
