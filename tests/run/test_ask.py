"""The response as a person watches it grow."""

import pytest

from r1s_jax.protocol.observation import render_documents
from r1s_jax.run.ask import LABEL_WIDTH, Telling
from r1s_jax.types import Document

FOUND = render_documents(
    [
        Document(id="1", title="Lyon", text="A city."),
        Document(id="2", title="Ain", text="A river."),
    ],
    (),
)
RESPONSE = (
    " It is Lyon.\n Where? <|begin_of_query|> Lyon <|end_of_query|>"
    + FOUND
    + " France. </think><answer> Paris </answer>"
)


def tell(responses):
    shown = []
    telling = Telling(lambda text, section: shown.append((text, section)))
    for response in responses[:-1]:
        telling.hear(response)
    telling.hear(responses[-1], final=True)
    sections = []
    for text, section in shown[:-1]:
        if section == "label":
            sections.append([text.strip(), ""])
        else:
            assert section == sections[-1][0]
            sections[-1][1] += text.replace("\n" + " " * LABEL_WIDTH, "\n")
    assert shown[-1] == ("\n", "")
    return [tuple(s) for s in sections]


EXPECTED = [
    ("thought", "It is Lyon.\n Where?"),
    ("query", "Lyon"),
    ("documents", "(1)Title: Lyon Text: A city.\n(2)Title: Ain Text: A river."),
    ("thought", "France."),
    ("answer", "Paris"),
]


@pytest.mark.parametrize("step", [1, 2, 5, 17, 10_000])
def test_every_piece_is_shown_once_however_it_arrives(step):
    ends = [*range(0, len(RESPONSE), step), len(RESPONSE)]
    assert tell([RESPONSE[:end] for end in ends]) == EXPECTED


def test_documents_of_the_policys_own_are_called_invented():
    text = " <|begin_of_documents|>\n(1)x<|end_of_documents|> so"
    assert tell([text]) == [("invented", "(1)x"), ("thought", "so")]


def test_what_is_not_certain_waits():
    shown = []
    telling = Telling(lambda text, section: shown.append(text))
    telling.hear("a <|begin_of")
    assert "".join(shown).split() == ["thought", "a"]
    telling.hear("a <|begin_of it \ufffd")
    telling.hear("a <|begin_of it é\x1b[2J")
    assert "".join(shown).split() == ["thought", "a", "<|begin_of", "it", "é", "[2J"]
