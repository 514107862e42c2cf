"""The plan as the compiled code sees it: tables of addresses and numbers, one record a layer.

An address of 0 stands for what a layer has not: a record full of zeros is a layer without rotation, bias, codes...
"""

from __future__ import annotations

import numpy as np


def _record(**fields: object) -> np.dtype:
    return np.dtype(list(fields.items()), align=True)  # type: ignore[misc]


ADDRESS, COUNT, REAL = np.int64, np.int64, np.float32

FUNCTION = np.int64  # address of a compiled C function

FLOAT, STATIC, DYNAMIC = 0, 1, 2  # SITE.mode, STATE.mode: float32; int8, scales known before; int8, a row's own scale

SITE = _record(  # value: the scale where there is only one
    land=FUNCTION, mode=COUNT, rounding=COUNT, scale=ADDRESS, inverse=ADDRESS,
    low=REAL, high=REAL, value=REAL, span=REAL,
)  # fmt: skip
LINEAR = _record(
    product=FUNCTION, kind=COUNT, tiles=ADDRESS, extra=ADDRESS, scale=ADDRESS, bias=ADDRESS,
    lines=COUNT, group_lines=COUNT, tile_count=COUNT, rows=COUNT,
)  # fmt: skip
ROTATION = _record(size=COUNT, order=COUNT, power=COUNT, matrix=ADDRESS, factor=REAL)
STATE = _record(  # index: of a static row's scales in the table at ``scale``; a dynamic row's scale is at ``scale``
    data=ADDRESS, mode=COUNT, index=ADDRESS, scale=ADDRESS, inverse=ADDRESS, rounding=COUNT,
    low=REAL, high=REAL, span=REAL,
)  # fmt: skip
CONVOLUTION = _record(
    width=COUNT, channels=COUNT, integer=COUNT, state=ADDRESS, taps=ADDRESS, scale=ADDRESS, bias=ADDRESS
)

LAYER = _record(
    enter=FUNCTION, scan=FUNCTION, leave=FUNCTION,  # the three phases
    selective=COUNT,  # 1 Mamba-1, 0 Mamba-2
    width=COUNT, inner=COUNT, states=COUNT, low_rank=COUNT, heads=COUNT, head_dim=COUNT, groups=COUNT,
    norm=ADDRESS, epsilon=REAL, bcdt_epsilon=REAL, gate_epsilon=REAL, dt_low_limit=REAL, dt_high_limit=REAL,
    input=SITE, in_z=LINEAR, in_x=LINEAR, in_B=LINEAR, in_C=LINEAR, in_dt=LINEAR,
    z=SITE, x=SITE, B=SITE, C=SITE, dt=SITE,
    conv=CONVOLUTION, u=SITE, B_conv=SITE, C_conv=SITE,
    x_proj_dt=LINEAR, x_proj_B=LINEAR, x_proj_C=LINEAR, dt_low=SITE, dt_proj=LINEAR,
    dt_bias=ADDRESS, A=ADDRESS, skip=ADDRESS, state=STATE, y=SITE,
    gate_norm=ADDRESS, rotation=ROTATION, out=SITE, out_proj=LINEAR,
)  # fmt: skip

MODEL = _record(project_head=FUNCTION, width=COUNT, final_norm=ADDRESS, epsilon=REAL, head_input=SITE, head=LINEAR)

SHARED = _record(  # buffers that all threads read; each writes its own rows
    h=ADDRESS, z=ADDRESS, x=ADDRESS, u=ADDRESS, u_codes=ADDRESS, B=ADDRESS, C=ADDRESS, B_conv=ADDRESS, C_conv=ADDRESS,
    dt=ADDRESS, y=ADDRESS, logits=ADDRESS,
)  # fmt: skip
PRIVATE = _record(  # buffers of one thread
    residual=ADDRESS, row=ADDRESS, codes=ADDRESS, inner=ADDRESS, mixed=ADDRESS, inner_codes=ADDRESS,
    low=ADDRESS, low_codes=ADDRESS, B=ADDRESS, C=ADDRESS, sums=ADDRESS, state=ADDRESS,
)  # fmt: skip
