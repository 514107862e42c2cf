"""Hadamard matrices of the orders that the models' widths need: m * 2^k with m in 1, 12, 20, 28 (40 = 20 * 2).

A Hadamard matrix of an order is not unique, and a weight that was rotated by one needs the same one at run time:
``Family`` says whose matrices are meant. ``own``: Paley I wherever there is one. ``fast-hadamard-transform``: those of
that library, whose kernels made the published Quamba checkpoints: order 12 by Paley II, and 40 = 2 * 20 instead of 20.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

Family = Literal["own", "fast-hadamard-transform"]
FAMILIES: tuple[Family, ...] = get_args(Family)

PALEY_I = {12: 11, 20: 19}  # order q + 1, prime q = 3 mod 4
PALEY_II = {28: 13}  # order 2 (q + 1), prime q = 1 mod 4


def decompose(size: int, family: Family = "own") -> tuple[int, int] | None:
    """(m, 2^k) with size = m * 2^k and a known Hadamard matrix of order m, the smallest m; None if there is none."""
    power = size & -size
    odd = size // power
    if odd == 1:
        return 1, size
    if family == "fast-hadamard-transform":
        order = {3: 12, 5: 40}.get(odd, 0)
        return (order, size // order) if order and size % order == 0 else None
    order = 4 * odd
    return (order, power // 4) if order in PALEY_I | PALEY_II and power >= 4 else None


@cache
@torch.inference_mode(False)  # what is kept must serve whoever wants gradients, too
def base_matrix(order: int, family: Family = "own") -> Tensor:
    """H_m, float32 entries +-1, H H^T = m I. Paley 1933, constructions I and II."""
    if order == 1:
        return torch.ones(1, 1)
    if family == "fast-hadamard-transform":
        return _paley_2(5) if order == 12 else _doubled_paley_1(19)
    if order in PALEY_I:
        skew = _bordered(PALEY_I[order], sign=-1)
        return torch.eye(order) + skew
    return _paley_2(PALEY_II[order])


def _paley_2(q: int) -> Tensor:
    """Construction II, order 2 (q + 1)."""
    symmetric = _bordered(q, sign=1)
    plus, cross = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(symmetric, plus) + torch.kron(torch.eye(len(symmetric)), cross)


def _doubled_paley_1(q: int) -> Tensor:
    """H_2 (x) construction I with the signs of its border changed, order 2 (q + 1): Sloane's had.40.tpal for q = 19."""
    skew = _bordered(q, sign=-1)
    skew[0], skew[:, 0] = -skew[0].clone(), -skew[:, 0].clone()
    return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.eye(q + 1) + skew)


def _bordered(q: int, sign: int) -> Tensor:
    """The conference matrix of order q + 1: Jacobsthal's matrix of quadratic residues with a border of ones."""
    residues = {value * value % q for value in range(1, q)}
    legendre = torch.tensor([0.0] + [1.0 if value in residues else -1.0 for value in range(1, q)])
    differences = (torch.arange(q)[:, None] - torch.arange(q)[None, :]) % q
    matrix = torch.zeros(q + 1, q + 1)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1.0, float(sign), legendre[differences]
    return matrix


def hadamard_matrix(size: int, family: Family = "own") -> Tensor:
    """The whole matrix H_m (x) H_{2^k}, entries +-1, for tests and folding into weights."""
    parts = decompose(size, family)
    if parts is None:
        raise ValueError(f"no Hadamard matrix of order {size} is known here")
    matrix = base_matrix(parts[0], family)
    for _ in range(parts[1].bit_length() - 1):
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix
