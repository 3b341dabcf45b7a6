"""Presets: named settings, each given by the values that differ from the defaults."""

from typing import Any

# The settings that reached a given loss fastest on the default corpus (benchmarks/): rotary
# positions, QK-norm, squared ReLU, Takase's initial weights, Muon, a constant learning rate with a
# long decay at the end.
_RECIPE: dict[str, Any] = {
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "relu2",
    "qk_norm": True,
    "init": "takase",
    "optimizer": "muon",
    "learning_rate": 0.02,
    "min_learning_rate": 0.0004,
    "warmup": 0,
    "schedule": "wsd",
    "decay_fraction": 0.5,
    "weight_decay": 0.0,
}

# nanoGPT's architecture: learned positions, LayerNorm without biases, GELU, one matrix for both
# embeddings. Source: karpathy/nanoGPT 3adf61e, model.py.
_NANOGPT: dict[str, Any] = {
    "position": "learned",
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "mlp": "gelu",
    "bias": False,
    "tie_embeddings": True,
    "init": "gpt2",
    "optimizer": "adamw",
    "schedule": "cosine",
    "weight_decay": 0.1,
    "grad_clip": 1.0,
}

_LARGE: dict[str, Any] = {
    "mlp": "swiglu",
    "qk_norm": True,
    "optimizer": "adamw",
    "beta2": 0.95,
    "weight_decay": 0.1,
    "warmup": 700,
    "seq_len": 1024,
    "compile": True,
}

_PLAIN: dict[str, dict[str, Any]] = {
    # The default on a CPU: useful in about two minutes on two cores.
    "nano": {
        **_RECIPE,
        "learning_rate": 0.05,
        "min_learning_rate": 0.001,
        "n_layer": 4,
        "n_head": 2,
        "d_model": 128,
        "seq_len": 256,
        "batch_size": 16,
        "steps": 1000,
        "time_limit": 130.0,
        "log_every": 50,
    },
    # 10M: the default on a GPU.
    "tiny": {
        **_RECIPE,
        "n_layer": 6,
        "n_head": 6,
        "d_model": 384,
        "seq_len": 512,
        "batch_size": 64,
        "steps": 2000,
        "log_every": 100,
    },
    # 124M, after GPT-2 small.
    "small": {
        **_LARGE,
        "n_layer": 12,
        "n_head": 12,
        "d_model": 768,
        "batch_size": 512,
        "learning_rate": 6e-4,
        "min_learning_rate": 6e-5,
    },
    # 350M, after GPT-2 medium.
    "medium": {
        **_LARGE,
        "n_layer": 24,
        "n_head": 16,
        "d_model": 1024,
        "batch_size": 512,
        "learning_rate": 4e-4,
        "min_learning_rate": 4e-5,
    },
    # 1B.
    "large": {
        **_LARGE,
        "n_layer": 20,
        "n_head": 16,
        "n_kv_head": 4,
        "d_model": 2048,
        "seq_len": 2048,
        "batch_size": 512,
        "learning_rate": 3e-4,
        "min_learning_rate": 3e-5,
    },
    # nanoGPT's README, "I only have a macbook": 0.80M, nats a character 1.88.
    "nanogpt-char-cpu": {
        **_NANOGPT,
        "tokenizer": "char",
        "val_fraction": 0.1,
        "n_layer": 4,
        "n_head": 4,
        "d_model": 128,
        "seq_len": 64,
        "batch_size": 12,
        "steps": 2000,
        "log_every": 100,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-4,
        "warmup": 100,
        "beta2": 0.99,
    },
    # nanoGPT's config/train_shakespeare_char.py: 10.65M, best validation loss 1.4697.
    "nanogpt-char": {
        **_NANOGPT,
        "tokenizer": "char",
        "val_fraction": 0.1,
        "n_layer": 6,
        "n_head": 6,
        "d_model": 384,
        "seq_len": 256,
        "batch_size": 64,
        "dropout": 0.2,
        "steps": 5000,
        "log_every": 250,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-4,
        "warmup": 100,
        "beta2": 0.99,
    },
    # nanoGPT's config/train_gpt2.py: 124M, its vocabulary padded to 50304, half a million tokens
    # a step, 300 billion in all.
    "nanogpt-124m": {
        **_NANOGPT,
        "vocab_size": 50304,
        "n_layer": 12,
        "n_head": 12,
        "d_model": 768,
        "seq_len": 1024,
        "batch_size": 480,
        "steps": 600000,
        "learning_rate": 6e-4,
        "min_learning_rate": 6e-5,
        "warmup": 2000,
        "beta2": 0.95,
        "log_every": 100,
        "eval_every": 1000,
    },
}

# Recurrent twins: the same number of stored parameters, within 1 %. The core's blocks run several
# times. d_ff is smaller than in the plain preset, to pay for the injection's matrices.
_TWINS = {
    "nano": {
        "recurrent": "1,2,1",
        "mean_recurrence": 4,
        "d_ff": 496,
    },
    "tiny": {"recurrent": "1,4,1", "mean_recurrence": 4, "d_ff": 1536},
    "small": {"recurrent": "2,8,2", "mean_recurrence": 4, "d_ff": 2048},
    "medium": {"recurrent": "4,16,4", "mean_recurrence": 4, "d_ff": 2752},
    "large": {"recurrent": "4,12,4", "mean_recurrence": 4, "d_ff": 5504},
}
_LOOPED = {"recurrence_style": "parcae", "init": "takase"}  # the better on text: benchmarks/

PRESETS: dict[str, dict[str, Any]] = {
    **_PLAIN,
    **{f"{name}-recurrent": {**_PLAIN[name], **twin, **_LOOPED}
       for name, twin in _TWINS.items()},
}  # fmt: skip
