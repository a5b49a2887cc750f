"""Saved activations in few bits."""

from holdfast.kernels.activations.budget import FittedPolicy, fit_policy
from holdfast.kernels.activations.compiled import compile_hooks
from holdfast.kernels.activations.compressor import Compressor, compress_activations, wrap_activations
from holdfast.kernels.activations.gradients import GradientError, gradient_error
from holdfast.kernels.activations.policy import KEEP, OFFLOAD, ActPolicy, Rule, mixed_policy
from holdfast.kernels.activations.stats import Report, Row

__all__ = [
    "KEEP",
    "OFFLOAD",
    "ActPolicy",
    "Compressor",
    "FittedPolicy",
    "GradientError",
    "Report",
    "Row",
    "Rule",
    "compile_hooks",
    "compress_activations",
    "fit_policy",
    "gradient_error",
    "mixed_policy",
    "wrap_activations",
]
