"""Define how the learning rate changes during a run.

To add a schedule, add its name to `Schedule` and a case to `learning_rate`. The command line then
offers it as a value of `--optimizer.schedule`.

Source of the two schedules: LargeWorldModel paper (arXiv 2402.08268, tables of appendix F).
"""

from typing import Literal

import optax

Schedule = Literal["cosine", "constant"]
"""Names of the schedules, for what follows the warm-up."""


def learning_rate(
    schedule: Schedule, *, highest: float, final: float, warmup_steps: int, steps: int
) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates made.

    Args:
        highest: rate at the end of the warm-up.
        final: rate at the end of the run, for schedules that decay.
        warmup_steps: updates over which the rate rises to `highest`.
        steps: updates of the whole run.
    """
    match schedule:
        case "cosine":
            decay_steps = max(1, steps - warmup_steps)
            after = optax.cosine_decay_schedule(highest, decay_steps, alpha=final / highest)
        case "constant":
            after = optax.constant_schedule(highest)
    if not warmup_steps:
        return after
    # The warm-up does not begin at 0, because an update at rate 0 would waste a batch.
    warmup = optax.linear_schedule(highest / warmup_steps, highest, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, after], [warmup_steps])
