"""minillm: train a small language model on your text, then generate and score text with it.

    import minillm
    run = minillm.train(data="my.txt", preset="nano", steps=500)   # the folder of the run
    lm = minillm.load(run)                                # .model, .tokenizer and .config are in it
    print(lm.generate("def ", max_tokens=40))             # the continuation; of a list, a list
    for text in lm.stream("def ", temperature=0.5): print(text, end="")
    print(lm.score("some text").bits_per_byte)            # also .nats, .tokens and .logprobs

The names below come from these packages, each of which imports only the ones above it:

    errors         the errors that a user can cause, each with an exit code
    kernels        every operation in Triton, as PyTorch runs it fastest, and as a page of maths
    ops            the table of operations that a model calls
    runtime        the machine, files, signals, the terminal and command lines
    config         every setting with its default and its range, and the presets
    optim          optimizers, learning-rate schedules and loss scaling
    data           documents, tokenizers, prepared text and batches
    model          the decoder, with recurrent depth if wanted, and its KV cache
    distributed    processes, and how a model is sharded over them
    checkpoint     run folders and checkpoints
    inference      from weights to text, and from text to its probability
    planning       the memory and the time of a training, before it runs
    flags          the command lines of all programs
    training       from a batch to a finished run
    convert        checkpoints in the formats of other projects
    profiling      measurements of the kernels and of the model
    commands       the programs behind `python -m minillm`
"""

from importlib import import_module

TYPE_CHECKING = False  # type checkers take it for True; the one of typing takes 10 ms to import
if TYPE_CHECKING:  # for editors; at run time __getattr__ imports a name when it is first used
    from pathlib import Path

    from minillm.config.model import ModelConfig as ModelConfig
    from minillm.config.presets import PRESETS as PRESETS
    from minillm.config.sampling import SamplingParams as SamplingParams
    from minillm.config.train import TrainConfig as TrainConfig
    from minillm.distributed.zero import ZeroOptimizer as ZeroOptimizer
    from minillm.inference.language_model import load as load
    from minillm.model.gpt import GPT as GPT

__version__ = "0.1.0"

HOMES = {
    "GPT": "minillm.model.gpt",
    "ModelConfig": "minillm.config.model",
    "PRESETS": "minillm.config.presets",
    "SamplingParams": "minillm.config.sampling",
    "TrainConfig": "minillm.config.train",
    "ZeroOptimizer": "minillm.distributed.zero",
    "load": "minillm.inference.language_model",
}
__all__ = [
    "GPT",
    "ModelConfig",
    "PRESETS",
    "SamplingParams",
    "TrainConfig",
    "ZeroOptimizer",
    "load",
    "train",
]


def train(**settings: object) -> "Path":
    """Train a model and return the folder of its run, for load().

    settings: every flag of train.py is a keyword, with underscores: data="my.txt",
        preset="nano", steps=500, time_limit=600, lr=1e-3, resume=True.
        `python train.py --help all` describes them.

    Raises UsageError if a name is unknown or a value cannot be, and the other errors of
    minillm.errors as train.py does. If a signal such as SIGINT or SIGTERM ends the run, the run is
    saved and minillm.training.watchdog.Stopped is raised. Started by torchrun, it trains together
    with the other ranks.
    """
    arguments = import_module("minillm.flags.keywords").train_arguments(settings)
    return import_module("minillm.scripts.train").train_from(arguments)


def __getattr__(name: str) -> object:
    """Import a public name from its file when it is first used (PEP 562)."""
    if name not in HOMES:
        raise AttributeError(f"module 'minillm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES} - {"HOMES", "TYPE_CHECKING", "import_module"})
