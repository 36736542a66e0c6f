"""Build the prompts with which a model writes questions and answers about a book."""

from collections.abc import Container, Sequence

from lwm.data.text.templates import Message

SYSTEM = "You write questions about passages of a book and answer them from the passage."
QUESTION = "Write a question that this sentence answers: {sentence}"
ANSWER = "Answer the question in one sentence. The answer stands here: {sentence}"

# Passages with their sentences, questions and answers. A weak model writes nothing usable from
# instructions only, but does from these; one passage has the style of old books.
WORKED_EXAMPLES: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "The bakery in Elm Street opened in the spring. Old Marta baked the bread before sunrise, "
        "and her nephew Tom carried it to the inn. In June the oven broke, and for nine days "
        "there was no bread. A smith from Harrow mended it.",
        (
            (
                "Old Marta baked the bread before sunrise, and her nephew Tom carried it to the "
                "inn.",
                "Who carried Marta's bread to the inn?",
                "Her nephew Tom carried the bread to the inn.",
            ),
            (
                "In June the oven broke, and for nine days there was no bread.",
                "Why was there no bread for nine days in June?",
                "There was no bread because the oven broke.",
            ),
        ),
    ),
    (
        "When the river rose, the ferryman Anselm moved his goats to the chapel hill. And he said "
        "to Lena, Fear not, for the water shall go down. On the fourth day a boat came from "
        "Ostra, and the soldiers gave them flour and salt.",
        (
            (
                "When the river rose, the ferryman Anselm moved his goats to the chapel hill.",
                "Where did the ferryman Anselm take his goats when the river rose?",
                "Anselm took his goats to the chapel hill.",
            ),
            (
                "And he said to Lena, Fear not, for the water shall go down.",
                "What did Anselm say to Lena about the water?",
                "Anselm told Lena that the water would go down.",
            ),
        ),
    ),
)

# Texts that a generation must not copy.
_PROMPT_TEXTS = tuple(
    text.lower()
    for text in (
        SYSTEM,
        *(text.partition("{")[0].strip() for text in (QUESTION, ANSWER)),
        *(text for _, examples in WORKED_EXAMPLES for one in examples for text in one[1:]),
    )
)


def message(role: str, content: str) -> dict[str, str]:
    """Return a message in OpenAI's format."""
    return {"role": role, "content": content}


def question_messages(chunk: str, sentence: str) -> list[dict[str, str]]:
    """Build the conversation in which a model writes a question about a sentence of a chunk.

    The chunk comes before the parts that differ between tries, so that it is prefilled once.
    """
    messages = [message("system", SYSTEM)]
    for passage, examples in WORKED_EXAMPLES:
        for number, (example_sentence, question, answer) in enumerate(examples):
            request = QUESTION.format(sentence=example_sentence)
            messages += [
                message("user", request if number else f"{passage}\n\n{request}"),
                message("assistant", question),
                message("user", ANSWER.format(sentence=example_sentence)),
                message("assistant", answer),
            ]
    request = QUESTION.format(sentence=sentence)
    return [*messages, message("user", f"{chunk.strip()}\n\n{request}")]


def answer_messages(asking: Sequence[Message], question: str, sentence: str) -> list[Message]:
    """Continue the conversation with the request for an answer."""
    request = ANSWER.format(sentence=sentence)
    return [*asking, message("assistant", question), message("user", request)]


def copied_fault(text: str, asked: Container[str] = ()) -> str | None:
    """Return a fault if a generation copies the prompt or one of the `asked` questions."""
    if any(prompt in text.lower() for prompt in _PROMPT_TEXTS):
        return "prompt copied"
    return "question asked before" if text.lower() in asked else None
