"""What may be asked of generation: each refusal one line.

Options go by the names of sample.py's flags; in Python they have underscores for dashes.
"""

from collections.abc import Sequence

from minillm.errors import UsageError
from minillm.model.gpt import GPT

DEEPEST = 4096  # iterations


def check_sampling(
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
) -> None:
    """Raise UsageError on a sampling option outside its range."""
    rules = (
        ("max_tokens", max_tokens, max_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 or more, and finite"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
        ("min_p", min_p, 0 <= min_p <= 1, "between 0 and 1"),
        (
            "repetition_penalty",
            repetition_penalty,
            0.01 <= repetition_penalty <= 100,
            "between 0.01 and 100",
        ),
    )
    for name, value, is_fine, expected in rules:
        if not is_fine:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {value}: expected {expected}")


def check_recurrence(
    model: GPT, recurrence: int | None, recurrent_cache: str
) -> tuple[int | None, int | None]:
    """How often the core runs, and of how many iterations keys and values are kept.

    Raises UsageError on a recurrence that the model or anything cannot have.
    """
    config = model.config
    if config.recurrent is None:
        if recurrence is not None or recurrent_cache != "full":
            flag = "--recurrent-cache" if recurrence is None else "--recurrence"
            raise UsageError(f"{flag}: this model has no core to run again; leave it out")
        return None, None
    r = config.mean_recurrence if recurrence is None else recurrence
    if not 1 <= r <= DEEPEST:
        raise UsageError(f"--recurrence {r}: expected 1 to {DEEPEST}")
    if recurrent_cache not in ("full", "slot"):
        raise UsageError(f"--recurrent-cache {recurrent_cache!r}: expected full or slot")
    return r, r if recurrent_cache == "full" else None


def check_prompts(
    model: GPT, prompts: Sequence[Sequence[int]], samples: Sequence[int] | None = None
) -> None:
    """Raise UsageError on a prompt that cannot be continued, or a model that is being trained."""
    V, bos = model.config.vocab_size, model.config.bos_id
    if not prompts:
        raise UsageError("no prompt to continue")
    if samples is not None and len(samples) != len(prompts):
        raise UsageError(f"{len(samples)} samples for {len(prompts)} prompts; give one for each")
    if model.training and model.config.dropout:
        raise UsageError(
            "the model is in training mode and has dropout, which would change its text; call "
            "model.eval() first"
        )
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UsageError(f"prompt {i} has no token; a model continues at least one")
        bad = [t for t in prompt if not 0 <= t < V]
        if bad:
            raise UsageError(f"prompt {i} holds token {bad[0]}; the model knows 0 to {V - 1}")
        if model.config.document_mask and bos in prompt[1:]:
            raise UsageError(f"prompt {i} holds a second document; this model sees one at a time")
