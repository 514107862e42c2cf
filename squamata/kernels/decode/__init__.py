"""One token through a whole model, batch 1: the coarsest op.

``DecodePlan.step`` takes the embedding row float32 (D,) and gives the logits float32 (V,): every layer, the final
norm and the head. It computes what the composition of the fine ops computes (each ``ref.py`` is the definition):
integers that land on a site agree, float sums may be added in another order. The convolution's and the scan's
states are updated in place, in the arrays that were bound to the plan.

From outside in:

- ``cpu.py``: ``DecodePlan`` and what it is made of, numpy arrays and numbers; it fills the tables of
- ``records.py``: one record a layer, of addresses and numbers, which is all that compiled code is given;
- ``token.py``: ``decode_token`` walks the records. A layer is three phases with a barrier after each, every thread at
  its own rows: **1** norm, in_proj, convolution (writes z, x, u, B, C, dt); **2** the scan (writes y); **3** gated
  norm, rotation, out_proj (writes h). The phases are C functions whose addresses are in the record: compiled once,
  whatever the layers are;
- ``convolution.py`` and ``state.py``: what phases 1 and 2 do to the memory of a sequence; ``rows.py``: sixteen rows of
  the state together, as LLVM IR, like the rows of ``kernels/lanes.py``. Products are those of ``kernels/gemv.py``.

What a plan can hold: Mamba-1 and Mamba-2 layers in any order; static symmetric sites, and ``in``, ``out`` and
``head.in`` also with a scale per token; weights in float32, bfloat16, int8 per row, int4 per row or in groups of a
multiple of 32. ``run/decode_plan.py`` makes a plan from a model and raises for one outside of this; the caller then
composes the fine ops.
"""
