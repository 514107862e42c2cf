"""What a recipe costs on a described chip: SRAM for scales, energy, latency, DRAM traffic, roofline. Without torch."""

from squamata.hardware.chip import Assumed, Estimate, estimate, working_group
from squamata.hardware.technology import Device, Technology

__all__ = ["Assumed", "Device", "Estimate", "Technology", "estimate", "working_group"]
