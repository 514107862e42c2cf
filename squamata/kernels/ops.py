"""Every op by its name: coarse ones, which the models speak, then the fine ones they are composed of."""

from squamata.kernels.causal_conv1d import causal_conv1d
from squamata.kernels.conv_selective_scan import conv_selective_scan
from squamata.kernels.conv_ssd_scan import conv_ssd_scan
from squamata.kernels.embedding import embedding
from squamata.kernels.gated_rms_norm import gated_rms_norm
from squamata.kernels.hadamard import hadamard
from squamata.kernels.linear import linear
from squamata.kernels.norm_linear import norm_linear
from squamata.kernels.norm_rotate_linear import norm_rotate_linear
from squamata.kernels.rms_norm import rms_norm
from squamata.kernels.selective_scan import selective_scan
from squamata.kernels.ssd_scan import ssd_scan

__all__ = [
    "causal_conv1d",
    "conv_selective_scan",
    "conv_ssd_scan",
    "embedding",
    "gated_rms_norm",
    "hadamard",
    "linear",
    "norm_linear",
    "norm_rotate_linear",
    "rms_norm",
    "selective_scan",
    "ssd_scan",
]
