"""Refuse prompts and sampling parameters that a model cannot be used with."""

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.config.sampling import ExitRule, SamplingParams
from minillm.errors import UsageError, parameter
from minillm.model.gpt import GPT


@dataclass(frozen=True)
class CoreOptions:
    """Options of the core of a recurrent model while tokens are generated.

    recurrence: iterations; None for a model without a core
    kept_iterations: iterations whose keys and values the cache keeps; None for the last one only
    exit_rule: rule by which a token may leave the core early; None for no early exit
    warm_start: whether each token starts from the last state of the token before it
    """

    recurrence: int | None
    kept_iterations: int | None
    exit_rule: ExitRule | None = None
    warm_start: bool = False


def core_options(model: GPT, params: SamplingParams, use_cache: bool = True) -> CoreOptions:
    """Return the options of the model's core that result from these parameters.

    model: the decoder
    params: sampling parameters
    use_cache: whether there is a KV cache

    Raises UsageError if the model has no core and a parameter needs one, or if a parameter needs a
    cache and there is none.
    """
    needs_core = {
        "recurrence": params.recurrence,
        "recurrent_cache": params.recurrent_cache != "full",
        "exit_by": params.exit_by,
        "warm_start": params.warm_start,
        "draft_recurrence": params.draft_recurrence,
    }
    given = [name for name, value in needs_core.items() if value]
    if model.config.recurrent is None:
        if given:
            raise UsageError(
                f"{', '.join(map(parameter, given))}: this model has no core to run again; leave "
                "it out"
            )
        return CoreOptions(None, None)
    if not use_cache and (needing := [name for name in given if name != "recurrence"]):
        raise UsageError(f"{', '.join(map(parameter, needing))}: needs use_cache=True")
    r = model.config.mean_recurrence if params.recurrence is None else params.recurrence
    if params.draft_recurrence is not None and params.draft_recurrence >= r:
        raise UsageError(
            f"{parameter('draft_recurrence')} {params.draft_recurrence}: expected less than "
            f"{parameter('recurrence')} {r}, or leave it out"
        )
    kept = r if params.recurrent_cache == "full" else None
    return CoreOptions(r, kept, params.exit_rule, params.warm_start)


def check_prompts(
    model: GPT, prompts: Sequence[Sequence[int]], samples: Sequence[int] | None = None
) -> None:
    """Raise UsageError if a prompt cannot be continued, or if the model is being trained.

    model: the decoder
    prompts: token ids of each row
    samples: the sample number of each row, if they are given
    """
    V, bos = model.config.vocab_size, model.config.bos_id
    if not prompts:
        raise UsageError("no prompt to continue")
    if samples is not None and len(samples) != len(prompts):
        raise UsageError(f"{len(samples)} samples for {len(prompts)} prompts; give one for each")
    require_eval_mode(model)
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UsageError(f"prompt {i} has no token; a model continues at least one")
        bad = [t for t in prompt if not 0 <= t < V]
        if bad:
            raise UsageError(f"prompt {i} holds token {bad[0]}; the model knows 0 to {V - 1}")
        if model.config.document_mask and bos in prompt[1:]:
            raise UsageError(f"prompt {i} holds a second document; this model sees one at a time")


def require_eval_mode(model: GPT) -> None:
    """Raise UsageError if dropout would change what the model computes.

    model: the decoder
    """
    if model.training and model.config.dropout:
        raise UsageError(
            "the model is in training mode and has dropout, which would change its text and its "
            "scores; call model.eval() first"
        )
