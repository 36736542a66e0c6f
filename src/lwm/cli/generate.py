"""`lwm generate text`: continue a prompt."""

from lwm.cli.flags import Load, LoadFlags, ModelName, Sampling, SamplingFlags, print_stream
from lwm.core.errors import InputError
from lwm.core.progress import say


def generate_text(
    model: ModelName,
    /,
    prompt: str,
    load: Load = LoadFlags(),
    sampling: Sampling = SamplingFlags(max_tokens=256),
) -> None:
    """Continue a prompt, without any chat form.

    Args:
        prompt: Text to continue.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty; write some text to continue after --prompt")
    loaded = load.load(model)
    print_stream(loaded.generate(prompt, stream=True, **sampling.settings()))
    say(f"({loaded.figures})")
