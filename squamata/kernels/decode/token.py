"""The compiled token: phases of a layer, each run by every thread on its own rows, three fork-joins a layer.

Small things (norm, rotation, x_proj) every thread computes for itself: cheaper than another fork-join. Rows are dealt
out in tiles of sixteen. All functions here take records (``records.py``) and addresses.
"""

# mypy: ignore-errors
from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray, cfunc, njit, prange, types

from squamata.kernels.decode.convolution import convolve
from squamata.kernels.decode.records import DYNAMIC, LAYER, MODEL, PRIVATE, SHARED, SITE, STATIC
from squamata.kernels.decode.state import round_value, update_rows
from squamata.kernels.gemv import scale_rows, sum_groups
from squamata.kernels.grid import SMALLEST_SCALE
from squamata.kernels.hadamard.butterflies import rotate
from squamata.kernels.halves import split_groups
from squamata.kernels.lanes import land_all, land_each, largest_magnitude, sum_of_squares
from squamata.kernels.memory import call_address, pointer, record_address, slice_float32, view_float32, view_int8
from squamata.kernels.packing import Kind
from squamata.kernels.simd import clamp, divide, exp, silu, softplus, sqrt

_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)
_LOST = np.float32(np.nan)
_LEAST_SCALE = np.float32(SMALLEST_SCALE)
_FIRST_OF_INTEGERS = int(Kind.INT8_INT8)  # from this kind on integers are multiplied
_INT4_INT8, _INT4_INT16 = int(Kind.INT4_INT8), int(Kind.INT4_INT16)
_PREFETCHED_LINES = 8192  # half a megabyte: what a core's second-level cache takes beside everything else


def land_static(site_record, values, codes, start, stop):
    """Put values[start:stop] on the grid of a static site, in place; the integers also to ``codes`` (0: nowhere)."""
    site = carray(pointer(site_record), (1,), SITE)[0]
    blocks = (stop - start) // 16
    kept = codes + start if codes != 0 else np.int64(0)
    inverse, scale = site.inverse + 4 * start, site.scale + 4 * start
    land_each(values + 4 * start, kept, blocks, inverse, scale, site.low, site.high, site.rounding)
    v, q = view_float32(values, stop), view_int8(codes, stop)
    for i in range(start + blocks * 16, stop):
        code = round_value(v[i] * view_float32(site.inverse, stop)[i], site.low, site.high, site.rounding)
        if codes != 0:
            q[i] = np.int8(np.int32(code))
        v[i] = code * view_float32(site.scale, stop)[i]


@njit(cache=True)
def land(site, values, codes, start, stop):
    """``land_static`` if the site has a static scale."""
    if site.mode == STATIC:
        call_address(site.land, (record_address(site), values, codes, start, stop))


@njit(cache=True)
def land_row(site, values, codes, count):
    """``land`` of a whole row, also with the row's own scale; returns the scale of the integers."""
    if site.mode != DYNAMIC:
        land(site, values, codes, 0, count)
        return site.value
    v = view_float32(values, count)
    most = largest_magnitude(values, count // 16)
    for i in range(count - count % 16, count):
        most = max(most, abs(v[i]))
    scale = max(divide(most, site.span), _LEAST_SCALE)
    inverse = divide(_ONE, scale)
    land_all(values, codes, count // 16, inverse, scale, site.low, site.high, site.rounding)
    q = view_int8(codes, count)
    for i in range(count - count % 16, count):
        code = round_value(v[i] * inverse, site.low, site.high, site.rounding)
        q[i] = np.int8(np.int32(code))
        v[i] = code * scale
    return scale


@njit(cache=True)
def prepare(layer, values, codes, sums):
    """What int4 weights need of the activations: sums of their groups, and float ones as integers, in ``codes``."""
    if layer.kind == _INT4_INT8:
        sum_groups(codes, layer.group_lines * 8, layer.lines // layer.group_lines, sums)
    elif layer.kind == _INT4_INT16:
        split_groups(values, layer.group_lines * 8, layer.lines // layer.group_lines, codes, sums)


@njit(cache=True)
def multiply(layer, values, codes, x_scale, sums, out, first, last):
    """Rows of tiles first..last of a linear layer, with scales and bias."""
    integer = layer.kind >= _FIRST_OF_INTEGERS
    x = codes if integer else values
    call_address(layer.product, (out, x, layer.tiles, layer.extra, sums, layer.lines, layer.group_lines, first, last))
    own = x_scale if integer and layer.kind != _INT4_INT16 else _ONE
    scale_rows(out, layer.scale, layer.bias, own, first * 16, last * 16)


@njit(cache=True)
def rms_factor(row, count, epsilon):
    """1 / sqrt(mean of squares + epsilon)."""
    total = sum_of_squares(row, count // 16)
    v = view_float32(row, count)
    for i in range(count - count % 16, count):
        total += v[i] * v[i]
    return divide(_ONE, sqrt(divide(total, np.float32(count)) + epsilon))


@njit(cache=True)
def normalize(source, target, weight, start, stop, factor):
    """target = source * factor, times weight unless that address is 0."""
    x, y = slice_float32(source, start, stop), slice_float32(target, start, stop)
    if weight == 0:
        for i in range(x.size):
            y[i] = x[i] * factor
    else:
        w = slice_float32(weight, start, stop)
        for i in range(x.size):
            y[i] = (x[i] * factor) * w[i]


@njit(cache=True)
def finite(row, count):
    """True if float32 (count,) at an address holds neither NaN nor infinity."""
    v = view_float32(row, count)
    nothing = _ZERO
    for i in range(count):
        nothing += v[i] * _ZERO
    return nothing == _ZERO


@njit(cache=True)
def enter(norm, epsilon, site, h, residual, row, codes, count):
    """residual += h; row = its RMS norm, landed. Returns the scale of the integers."""
    r = view_float32(residual, count)
    x = view_float32(h, count)
    for i in range(count):
        r[i] = r[i] + x[i]
    normalize(residual, row, norm, 0, count, rms_factor(residual, count, epsilon))
    return land_row(site, row, codes, count)


@njit(cache=True)
def project(linear, site, private, x_scale, out, thread, threads):
    """This thread's rows of one segment of in_proj, landed. Returns its first row and the one after its last."""
    first, last = linear.tile_count * thread // threads, linear.tile_count * (thread + 1) // threads
    start, stop = first * 16, min(last * 16, linear.rows)
    if last > first:
        multiply(linear, private.row, private.codes, x_scale, private.sums, out, first, last)
        land(site, out, 0, start, stop)
    return start, stop


def project_and_convolve(layer_record, shared_record, private_record, thread, threads):
    """Phase 1: norm, in_proj, convolution; z leaves as SiLU(z)."""
    layer = carray(pointer(layer_record), (1,), LAYER)[0]
    shared = carray(pointer(shared_record), (1,), SHARED)[0]
    private = carray(pointer(private_record), (1,), PRIVATE)[0]
    x_scale = enter(
        layer.norm, layer.epsilon, layer.input, shared.h, private.residual, private.row, private.codes, layer.width
    )
    prepare(layer.in_x, private.row, private.codes, private.sums)
    start, stop = project(layer.in_z, layer.z, private, x_scale, shared.z, thread, threads)
    z = slice_float32(shared.z, start, stop)
    for i in range(z.size):
        z[i] = silu(z[i])
    start, stop = project(layer.in_x, layer.x, private, x_scale, shared.x, thread, threads)
    if start < stop:
        convolve(layer.conv, shared.x, shared.u, 0, start, stop)
        land(layer.u, shared.u, shared.u_codes, start, stop)
    if layer.selective:
        return
    project(layer.in_dt, layer.dt, private, x_scale, shared.dt, thread, threads)
    start, stop = project(layer.in_B, layer.B, private, x_scale, shared.B, thread, threads)
    if start < stop:
        convolve(layer.conv, shared.B, shared.B_conv, layer.inner, start, stop)
        land(layer.B_conv, shared.B_conv, 0, start, stop)
    start, stop = project(layer.in_C, layer.C, private, x_scale, shared.C, thread, threads)
    if start < stop:
        convolve(layer.conv, shared.C, shared.C_conv, layer.inner + layer.groups * layer.states, start, stop)
        land(layer.C_conv, shared.C_conv, 0, start, stop)


@njit(cache=True)
def low_rank_input(layer, shared, private, linear, site, out, codes, count):
    """One of dt_low, B, C: all rows of its part of x_proj, FalconMamba's norm if there is one, landed."""
    own = private.inner_codes if linear.kind == _INT4_INT16 else shared.u_codes
    multiply(linear, shared.u, own, layer.u.value, private.sums, out, 0, linear.tile_count)
    if layer.bcdt_epsilon >= _ZERO:
        normalize(out, out, 0, 0, count, rms_factor(out, count, layer.bcdt_epsilon))
    land(site, out, codes, 0, count)


@njit(cache=True)
def ahead(linear, thread, threads, rows):
    """Where this thread's tiles of the next projection begin, and how many lines of them to prefetch a row.

    The scan leaves the memory idle; the weights that follow it do not depend on it.
    """
    first, last = linear.tile_count * thread // threads, linear.tile_count * (thread + 1) // threads
    lines = min((last - first) * linear.lines, _PREFETCHED_LINES)
    return linear.tiles + first * linear.lines * 64, lines // max(rows, 1)


def scan_selective(layer_record, shared_record, private_record, thread, threads):
    """Phase 2, Mamba-1: x_proj, dt_proj, state update, skip and gate."""
    layer = carray(pointer(layer_record), (1,), LAYER)[0]
    shared = carray(pointer(shared_record), (1,), SHARED)[0]
    private = carray(pointer(private_record), (1,), PRIVATE)[0]
    own = private.inner_codes if layer.x_proj_dt.kind == _INT4_INT16 else shared.u_codes
    prepare(layer.x_proj_dt, shared.u, own, private.sums)
    low_rank_input(
        layer, shared, private, layer.x_proj_dt, layer.dt_low, private.low, private.low_codes, layer.low_rank
    )
    low_rank_input(layer, shared, private, layer.x_proj_B, layer.B, private.B, 0, layer.states)
    low_rank_input(layer, shared, private, layer.x_proj_C, layer.C, private.C, 0, layer.states)
    tiles = layer.dt_proj.tile_count
    first, last = tiles * thread // threads, tiles * (thread + 1) // threads
    start, stop = first * 16, min(last * 16, layer.inner)
    if last == first:
        return
    prepare(layer.dt_proj, private.low, private.low_codes, private.sums)
    multiply(layer.dt_proj, private.low, private.low_codes, layer.dt_low.value, private.sums, shared.dt, first, last)
    land(layer.dt, shared.dt, 0, start, stop)
    enter_scan(layer.dt_bias, shared.dt, shared.u, shared.y, start, stop)
    weights, lines = ahead(layer.out_proj, thread, threads, stop - start)
    a, rates = layer.A + start * layer.states * 4, shared.dt + 4 * start
    update_rows(
        layer.state, start, stop, layer.states, private.state, a, private.B, private.C, rates, 4, shared.y,
        weights, lines, True,
    )  # fmt: skip
    leave_scan(layer.skip, shared.u, shared.z, shared.y, start, stop)
    land(layer.y, shared.y, 0, start, stop)


@njit(cache=True)
def enter_scan(bias, dt, u, drive, start, stop):
    """dt = softplus(dt + bias) and drive = dt u, of channels start..stop."""
    b, step = slice_float32(bias, start, stop), slice_float32(dt, start, stop)
    x, out = slice_float32(u, start, stop), slice_float32(drive, start, stop)
    for e in range(step.size):
        step[e] = softplus(step[e] + b[e])
    for e in range(step.size):
        out[e] = step[e] * x[e]


@njit(cache=True)
def leave_scan(skip, u, gate, y, start, stop):
    """y = (y + skip u) gate, of channels start..stop."""
    through, x = slice_float32(skip, start, stop), slice_float32(u, start, stop)
    z, out = slice_float32(gate, start, stop), slice_float32(y, start, stop)
    for e in range(out.size):
        out[e] = (out[e] + through[e] * x[e]) * z[e]


def scan_heads(layer_record, shared_record, private_record, thread, threads):
    """Phase 2, Mamba-2: state update and skip of this thread's share of (head, channel) rows."""
    layer = carray(pointer(layer_record), (1,), LAYER)[0]
    shared = carray(pointer(shared_record), (1,), SHARED)[0]
    private = carray(pointer(private_record), (1,), PRIVATE)[0]
    rows, head_dim, states = layer.inner, layer.head_dim, layer.states
    start, stop = rows * thread // threads, rows * (thread + 1) // threads
    dt = view_float32(shared.dt, layer.heads)
    bias, A, skip = view_float32(layer.dt_bias, layer.heads), view_float32(layer.A, layer.heads), layer.skip
    per_group = layer.heads // layer.groups
    weights, lines = ahead(layer.out_proj, thread, threads, stop - start)
    B, C = shared.B_conv, shared.C_conv
    for head in range(start // head_dim, (stop + head_dim - 1) // head_dim):
        step = clamp(softplus(dt[head] + bias[head]), layer.dt_low_limit, layer.dt_high_limit)
        decay = exp(step * A[head])
        through = view_float32(skip, layer.heads)[head]
        group = head // per_group * states * 4
        first, last = max(start, head * head_dim), min(stop, (head + 1) * head_dim)
        u, y = slice_float32(shared.u, first, last), slice_float32(shared.y, first, last)
        for row in range(y.size):
            y[row] = step * u[row]
        view_float32(private.low, 1)[0] = decay
        update_rows(
            layer.state, first, last, states, private.state, 0, B + group, C + group, private.low, 0, shared.y,
            weights + (first - start) * lines * 64, lines, False,
        )  # fmt: skip
        for row in range(y.size):
            y[row] = y[row] + through * u[row]


def gate_rotate_project(layer_record, shared_record, private_record, thread, threads):
    """Phase 3: gated norm (Mamba-2), rotation, out_proj."""
    layer = carray(pointer(layer_record), (1,), LAYER)[0]
    shared = carray(pointer(shared_record), (1,), SHARED)[0]
    private = carray(pointer(private_record), (1,), PRIVATE)[0]
    inner = layer.inner
    row = private.inner
    x, y, z = view_float32(row, inner), view_float32(shared.y, inner), view_float32(shared.z, inner)
    if layer.selective:
        for i in range(inner):
            x[i] = y[i]
    else:
        for i in range(inner):
            x[i] = y[i] * z[i]
        size = inner // layer.groups
        for group in range(layer.groups):
            start = group * size
            factor = rms_factor(row + 4 * start, size, layer.gate_epsilon)
            normalize(row, row, layer.gate_norm, start, start + size, factor)
        land(layer.y, row, 0, 0, inner)
    if layer.rotation.size:
        turn = layer.rotation
        row = rotate(row, private.mixed, turn.size, turn.matrix, turn.order, turn.power, turn.factor)
    x_scale = land_row(layer.out, row, private.inner_codes, inner)
    prepare(layer.out_proj, row, private.inner_codes, private.sums)
    tiles = layer.out_proj.tile_count
    first, last = tiles * thread // threads, tiles * (thread + 1) // threads
    multiply(layer.out_proj, row, private.inner_codes, x_scale, private.sums, shared.h, first, last)


def project_head(model_record, shared_record, private_record, thread, threads):
    """Final norm and this thread's rows of the head."""
    model = carray(pointer(model_record), (1,), MODEL)[0]
    shared = carray(pointer(shared_record), (1,), SHARED)[0]
    private = carray(pointer(private_record), (1,), PRIVATE)[0]
    x_scale = enter(
        model.final_norm, model.epsilon, model.head_input, shared.h, private.residual, private.row, private.codes,
        model.width,
    )  # fmt: skip
    if not finite(private.residual, model.width):
        x_scale = _LOST  # codes would hide it: the logits become NaN, as those of a head in float
    prepare(model.head, private.row, private.codes, private.sums)
    first, last = model.head.tile_count * thread // threads, model.head.tile_count * (thread + 1) // threads
    multiply(model.head, private.row, private.codes, x_scale, private.sums, shared.logits, first, last)


@cache
def function_address(function):
    """Address of the C function of ``land_static`` or of a phase (five int64), compiled on first use."""
    compiled = cfunc(types.void(*[types.int64] * 5), cache=True)(function)
    _COMPILED.append(compiled)
    return compiled.address


_COMPILED = []  # keeps the machine code alive


@njit(cache=True)
def _run(function, record, shared, private, thread, threads):
    call_address(function, (record, shared, private, np.int64(thread), np.int64(threads)))


@njit(cache=True)
def clear_residuals(privates, threads, width):
    """Outside of the parallel function, whose passes would drop writes to arrays that nothing there reads."""
    for t in range(threads):
        residual = view_float32(privates[t].residual, width)
        for i in range(width):
            residual[i] = _ZERO


@njit(parallel={"fusion": False}, cache=True)  # fusion would lose the barriers: numba sees no arrays here
def decode_token(model, layers, shared, privates, threads):
    """One token through all layers and the head; ``shared.h`` holds the embedding row.

    Arguments: one MODEL record, LAYER records, one SHARED record, a PRIVATE record a thread.
    """
    common = record_address(shared[0])
    clear_residuals(privates, threads, model[0].width)
    for index in range(layers.size):
        layer = record_address(layers[index])
        enter_layer, scan, leave_layer = layers[index].enter, layers[index].scan, layers[index].leave
        for t in prange(threads):
            _run(enter_layer, layer, common, record_address(privates[t]), t, threads)
        for t in prange(threads):
            _run(scan, layer, common, record_address(privates[t]), t, threads)
        for t in prange(threads):
            _run(leave_layer, layer, common, record_address(privates[t]), t, threads)
    last, head = model[0].project_head, record_address(model[0])
    for t in prange(threads):
        _run(last, head, common, record_address(privates[t]), t, threads)
