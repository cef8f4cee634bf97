"""Pure measurements on tensors and shapes: parameters, arithmetic, memory."""

from muonlab.diagnostics.flops import ParameterCounts, TokenFlops, count_parameters, hidden_matrices, token_flops
from muonlab.diagnostics.memory import TrainingMemory, training_memory

__all__ = [
    "ParameterCounts",
    "TokenFlops",
    "TrainingMemory",
    "count_parameters",
    "hidden_matrices",
    "token_flops",
    "training_memory",
]
