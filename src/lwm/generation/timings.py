"""What an answer took, in tokens and seconds, for people to read."""

from dataclasses import dataclass


@dataclass
class Timings:
    """What the last answer took, for people to read.

    Args:
        prompt: tokens of the prompt; `reused` of them were still in the cache.
        prefill_seconds: until the first token, compilation included.
        answer: tokens generated; `answer_seconds` for all of them but the first.
    """

    prompt: int = 0
    reused: int = 0
    prefill_seconds: float = 0.0
    answer: int = 0
    answer_seconds: float = 0.0

    def __str__(self) -> str:
        computed = self.prompt - self.reused
        parts = [f"prompt {self.prompt:,} tokens"]
        if self.reused:
            parts.append(f"{self.reused:,} of them reused")
        if self.prefill_seconds > 0:
            parts.append(f"read at {computed / self.prefill_seconds:,.0f} tokens/s")
        parts.append(f"answer {self.answer:,} tokens")
        if self.answer > 1 and self.answer_seconds > 0:
            parts.append(f"written at {(self.answer - 1) / self.answer_seconds:,.1f} tokens/s")
        return ", ".join(parts)
