"""A trained model and its tokenizer as one object: minillm.load."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, overload

from minillm.checkpoint.find import load_run, while_there
from minillm.config.fields import whole_or_auto
from minillm.config.model import ModelConfig
from minillm.config.sampling import SamplingParams
from minillm.data.tokenizer import Tokenizer
from minillm.errors import UsageError, parameter
from minillm.inference.complete import complete, stream_text
from minillm.inference.score import Score, score
from minillm.model.gpt import GPT
from minillm.model.size import n_parameters
from minillm.runtime.device import pick_device, pick_dtype, set_threads

Text = TypeVar("Text", str, list[str])
DTYPES = ("auto", "fp32", "bf16", "fp16")
ONE_THREAD_BELOW = 20_000_000  # parameters: smaller matrices are not worth sharing out


@dataclass(frozen=True)
class LanguageModel:
    """A model that continues and scores texts.

    model: the decoder, on its device
    tokenizer: from text to token ids and back
    config: the shape of the model
    step: the training step that the weights are from
    """

    model: GPT = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    config: ModelConfig
    step: int

    def generate(self, prompt: Text, **sampling: Any) -> Text:
        """Return the continuation of a prompt, or of each prompt of a list, as one batch.

        prompt: a text or a list of texts; the continuation does not repeat it
        sampling: the fields of minillm.SamplingParams, such as max_tokens, temperature and seed

        Raises UsageError if a parameter is unknown, out of range or does not suit the model, or if
        the tokenizer cannot encode a prompt; UnavailableError if the KV cache does not fit into
        memory; DivergedError if the logits are not finite.
        """
        prompts = _texts("prompt", prompt)
        params = SamplingParams.of(sampling)
        if not prompts:
            return []
        found = complete(self.model, self.tokenizer, prompts, params, say=_warn)
        texts = [completion.text for completion in found]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, **sampling: Any) -> Iterator[str]:
        """Yield the continuation of a prompt in pieces of text, as they are generated.

        prompt: a text
        sampling: the fields of minillm.SamplingParams

        Raises UsageError and UnavailableError at once, as generate() does, and DivergedError when
        the iteration reaches logits that are not finite.
        """
        if not isinstance(prompt, str):
            raise UsageError(f"{parameter('prompt')}: expected a text, got {_kind(prompt)}")
        params = SamplingParams.of(sampling)
        pieces = stream_text(self.model, self.tokenizer, [prompt], params, say=_warn)
        return (piece.text for piece in pieces if piece.text)

    @overload
    def score(self, text: str, *, recurrence: int | None = None) -> Score:
        """Return the score of a text.

        text: a text of any length
        recurrence: iterations of the core
        """

    @overload
    def score(self, text: list[str], *, recurrence: int | None = None) -> list[Score]:
        """Return the score of each text.

        text: texts of any length
        recurrence: iterations of the core
        """

    def score(self, text: str | list[str], *, recurrence: int | None = None) -> Score | list[Score]:
        """Return nats, bits per byte and the log-probability of each token of a text, or of each.

        text: a text or a list of texts, of any length
        recurrence: iterations of the core; default: the model's mean

        Raises UsageError if a text is empty, if the tokenizer cannot encode it, if the model has no
        core to run again, or if it is in training mode and has dropout; DivergedError if the logits
        are not finite.
        """
        texts = _texts("text", text)
        found = score(self.model, self.tokenizer, texts, recurrence)
        return found[0] if isinstance(text, str) else found


def load(
    path: str | PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    checkpoint: str | int = "last",
    kernels: str = "auto",
    threads: str | int = "auto",
) -> LanguageModel:
    """Return the model of a run folder, ready to generate.

    path: the run folder
    device: cpu, cuda, cuda:N or mps; auto: a GPU if there is one
    dtype: fp32, bf16 or fp16, of the weights and the computation; auto: bf16 on a GPU, fp16 on one
        older than Ampere, fp32 on a CPU and on mps. On a CPU, generating one token at a time is
        bound by memory, and bf16 is slower.
    checkpoint: "last", "best" or a step
    kernels: triton or eager; auto: triton on a GPU, else eager
    threads: number of processor threads, which torch uses in the whole process from then on; auto:
        one for a model below 20 million parameters, else one or all, whichever is faster now

    Raises UsageError if there is no such run or checkpoint, CorruptError if a file is damaged,
    UnavailableError if there is no such device.
    """
    if dtype not in DTYPES:
        raise UsageError(f"{parameter('dtype')} {dtype!r} is not one of {', '.join(DTYPES)}")
    if not isinstance(path, str | PathLike):
        raise UsageError(f"{parameter('path')}: expected a path, got {_kind(path)}")
    number = whole_or_auto("threads", str(threads), 4096)
    path, where = Path(path).expanduser(), pick_device(device)
    name = "fp32" if dtype == "auto" and where.type == "cpu" else dtype
    options = {"device": where, "dtype": pick_dtype(name, where, 0), "kernels": kernels}
    step, loaded = while_there(
        path,
        str(checkpoint),
        lambda found: (found.step, load_run(path, checkpoint=found, **options)),
    )
    lm = LanguageModel(*loaded, step)
    small = n_parameters(lm.config) < ONE_THREAD_BELOW
    set_threads(number or (1 if small else "auto"))
    return lm


def _texts(name: str, value: Any) -> list[str]:
    """Return a text, or the texts of a list, as a list; raise UsageError on anything else."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        what = "expected a text or a list of texts"
        raise UsageError(f"{parameter(name)}: {what}, got {_kind(value)}")
    texts = list(value)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UsageError(f"{parameter(name)}[{number}]: expected a text, got {_kind(text)}")
    return texts


def _kind(value: Any) -> str:
    return type(value).__name__


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
