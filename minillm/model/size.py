"""Count the parameters and FLOPs of a model from its configuration alone.

Each part counts itself, next to its implementation; here the counts are added up.
"""

from minillm.config.model import ModelConfig
from minillm.model.block import block_flops, block_matrices, block_vectors
from minillm.model.injection import injection_flops, injection_matrices, injection_parameters
from minillm.model.linear import Matrix
from minillm.model.norms import norm_parameters
from minillm.model.positions import POSITIONS


def matrices(config: ModelConfig) -> dict[str, Matrix]:
    """Return the weight matrices of the blocks and the injection, by parameter name."""
    block = block_matrices(config)
    found = {
        f"blocks.{i}.{name}": matrix
        for i in range(config.n_layer)
        for name, matrix in block.items()
    }
    return found | {f"injection.{name}": m for name, m in injection_matrices(config).items()}


def n_block_matrix_parameters(config: ModelConfig) -> int:
    """Return the number of parameters in the weight matrices of one block."""
    return sum(m.elements for m in block_matrices(config).values())


def n_block_parameters(config: ModelConfig) -> int:
    """Return the number of all parameters of one block, norms and biases included."""
    return n_block_matrix_parameters(config) + block_vectors(config)


def n_inner_matrix_parameters(config: ModelConfig) -> int:
    """Return the number of parameters in the weight matrices of the blocks and the injection."""
    injected = sum(m.elements for m in injection_matrices(config).values())
    return config.n_layer * n_block_matrix_parameters(config) + injected


def n_embedding_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of the embedding, which is also that of the head."""
    return (config.vocab_size or 0) * config.d_model


def n_matrix_parameters(config: ModelConfig) -> int:
    """Return the number of parameters that multiply activations: all matrices, and the head."""
    return n_inner_matrix_parameters(config) + n_embedding_parameters(config)


def n_parameters(config: ModelConfig) -> int:
    """Return the number of all stored parameters; tied ones count once."""
    embeddings = n_embedding_parameters(config) * (1 if config.tie_embeddings else 2)
    positions = POSITIONS[config.position].parameters(config)
    blocks = config.n_layer * n_block_parameters(config)
    injection = sum(injection_parameters(config))
    return embeddings + positions + blocks + injection + norm_parameters(config)


def flops_per_token(
    config: ModelConfig, recurrence: float | None = None, grad: float | None = None
) -> float:
    """Return FLOPs per token of a training step, forward and backward.

    These are 6 N + 12 L H D T for what gradients go through, and a third of that for iterations
    without gradients.

    config: shape of the model
    recurrence: iterations of the core; default: the mean
    grad: iterations that have gradients; default: as many as backprop_depth allows
    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    prelude, core, coda = config.depths
    block = block_flops(config)
    once = (prelude + coda) * block + 6 * n_embedding_parameters(config)
    if config.recurrent is None:
        return once
    r = config.mean_recurrence if recurrence is None else recurrence
    k = min(r, config.backprop_depth) if grad is None else grad
    text, state = injection_flops(config)
    return once + text + (k + (r - k) / 3) * (core * block + state)
