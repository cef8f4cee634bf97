"""Named models."""

from muonlab.models.options import ModelOptions

MODELS: dict[str, ModelOptions] = {
    "micro": ModelOptions(seq_len=256, d_model=128, n_layers=4, n_heads=4, d_ff=512),
}

SUMMARIES: dict[str, str] = {
    "micro": "4 layers of 128: minutes on two cores",
}
