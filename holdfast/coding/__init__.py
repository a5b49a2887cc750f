"""Bytes in, bytes out: Reed-Solomon over GF(2^8), stripes, CRC32C, header codec. Knows nothing of torch or Ray."""

from holdfast.coding.buffers import staggered
from holdfast.coding.crc import crc32c, crc32c_blocks, crc32c_combine, crc32c_cuts, crc32c_xor, crc32c_zeros
from holdfast.coding.erasure import ErasureCode
from holdfast.coding.groups import Group, form_groups
from holdfast.coding.header import HeaderCodec
from holdfast.coding.layout import Repair, RepairPlan, RotatingLayout, TrafficPlan, Transfer
from holdfast.coding.scrub import DamagedChunk, ScrubReport
from holdfast.coding.survival import Explanation, Scheme, explain

__all__ = [
    "DamagedChunk",
    "ErasureCode",
    "Explanation",
    "Group",
    "HeaderCodec",
    "Repair",
    "RepairPlan",
    "RotatingLayout",
    "Scheme",
    "ScrubReport",
    "TrafficPlan",
    "Transfer",
    "crc32c",
    "crc32c_blocks",
    "crc32c_combine",
    "crc32c_cuts",
    "crc32c_xor",
    "crc32c_zeros",
    "explain",
    "form_groups",
    "staggered",
]
