"""Named models: the laboratory's own and those of published experiments, with the parameter counts that tests hold exact."""

from dataclasses import replace

from muonlab.models.options import ModelOptions

_EXPERTS = ModelOptions(
    vocab_size=49_152,
    seq_len=512,
    d_model=384,
    n_layers=6,
    n_heads=8,
    d_ff=1536,
    activation="silu",
    fused_qkv=True,
    embedding_scale=True,
    dropout=0.1,
    n_experts=8,
    top_k=2,
    load_balancing=0.01,
    router_noise=0.1,
    init_std=0.02,
    depth_init=False,
)

MODELS: dict[str, ModelOptions] = {
    # vocab_size 0: the tokenizer's
    "micro": ModelOptions(
        seq_len=256,
        d_model=128,
        n_layers=4,
        n_heads=4,
        d_ff=512,
        activation="relu2",
        qk_norm=True,
        tied_head=False,
    ),
    # 6,685,312 parameters: Muon ablation over learning rate, momentum and Newton-Schulz steps
    "dense-128": ModelOptions(
        vocab_size=49_152,
        seq_len=256,
        d_model=128,
        n_layers=2,
        n_heads=4,
        d_ff=512,
        activation="silu",
        fused_qkv=True,
        embedding_scale=True,
        dropout=0.1,
        init_std=0.02,
        depth_init=False,
    ),
    # 79,059,840 parameters, 36,592,512 of them active: "exp9", Muon against Adam
    "moe-79m": _EXPERTS,
    # 107,371,392 parameters, 88,492,032 of them in matrices other than the embedding: optimizers against losses
    "moe-107m": replace(_EXPERTS, activation="swiglu"),
    # 385,283,072 parameters: the Qwen2-style toy model of Moonlight, used for block-wise Muon
    "qwen-385m": ModelOptions(
        vocab_size=151_936,
        seq_len=512,
        d_model=1024,
        n_layers=12,
        n_heads=16,
        d_ff=4864,
        activation="swiglu",
        qkv_bias=True,
        rope_base=1_000_000.0,
        init_std=0.02,
        depth_init=False,
    ),
    # 162,220,800 parameters, 123,587,328 without the embedding. The sizes of modded-nanogpt's simple trainer: an untied head
    # (embedding and head have learning rates of their own), heads of 128, squared ReLU and QK-norm; without its biases,
    # logit soft-cap and half-rotated heads.
    "gpt-124m": ModelOptions(
        vocab_size=50_304,
        seq_len=1024,
        d_model=768,
        n_layers=12,
        n_heads=6,
        d_ff=3072,
        activation="relu2",
        qk_norm=True,
        tied_head=False,
    ),
}

SUMMARIES: dict[str, str] = {
    "micro": "4 layers of 128, any vocabulary: minutes on two cores",
    "dense-128": "2 layers of 128, 6.7M parameters: the Muon ablation",
    "moe-79m": "6 layers of 384, 8 experts, 79M parameters (37M active): Muon against Adam",
    "moe-107m": "6 layers of 384, 8 gated experts, 107M parameters (44M active): optimizers against losses",
    "qwen-385m": "12 layers of 1024, 385M parameters, Qwen2 style: block-wise Muon",
    "gpt-124m": "12 layers of 768, untied, 124M parameters without the embedding: the speedrun's simple trainer",
}
