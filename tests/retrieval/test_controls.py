import pytest

from r1s_jax.retrieval.controls import WrongPassages
from r1s_jax.retrieval.interface import device_part
from r1s_jax.types import Document, RetrievalFailure
from tests.fakes import DictionaryRetriever, FailingRetriever


def _document(id, title=None):
    return Document(id=id, title=title or id.replace(":", " "), text="")


CITIES = [_document(f"city:{i}", f"Name{i:02d}") for i in range(40)]
GEO = [_document(f"country:{c}:geo", f"Land {c}") for c in "ABCDEF"]
CODES = [_document(f"country:{c}:codes", f"Codes of Land {c}") for c in "ABCDEF"]
CORPUS = CITIES + GEO + CODES
FOUND = (CITIES[0], CITIES[1], GEO[2], CODES[2])


def test_passages_are_wrong_but_of_the_same_kinds():
    queries = [f"query {i} Name05 Land A" for i in range(200)]
    wrong = WrongPassages(DictionaryRetriever(mapping={}, default=FOUND), CORPUS, seed=1)
    answers = wrong.search(queries, 4)
    for found in answers:
        assert isinstance(found, tuple) and len({d.id for d in found}) == 4
        assert [d.id.split(":")[0] for d in found] == ["city", "city", "country", "country"]
        assert [d.id.split(":")[-1] for d in found[2:]] == ["geo", "codes"]
        assert not set(found) & set(FOUND)
        assert all(d.title not in ("Name05", "Land A") for d in found)
        assert all(d in CORPUS for d in found)
    assert len({a[0].id for a in answers}) > 20


def test_the_same_query_gets_the_same_wrong_answer_whatever_its_companions():
    inner = DictionaryRetriever(mapping={}, default=FOUND)
    wrong = WrongPassages(inner, CORPUS, seed=1)
    assert (
        wrong.search(["a", "b"], 3)[1] == WrongPassages(inner, CORPUS[::-1], 1).search(["b"], 3)[0]
    )
    assert wrong.search(["a"], 3) != WrongPassages(inner, CORPUS, seed=2).search(["a"], 3)


def test_failures_and_empty_answers_stay_what_they_are():
    inner = FailingRetriever(inner=DictionaryRetriever(mapping={"x": FOUND}), pattern="bad")
    failure, nothing, found = WrongPassages(inner, CORPUS).search(["bad", "?", "x"], 1)
    assert isinstance(failure, RetrievalFailure) and failure.reason
    assert nothing == () and len(found) == 1


def test_a_kind_without_another_passage_is_refused():
    inner = DictionaryRetriever(mapping={}, default=FOUND[:1])
    with pytest.raises(ValueError, match="'city:0'"):
        WrongPassages(inner, CITIES[:1]).search(["q"], 1)


def test_without_a_device_part_there_are_no_vectors():
    """The two parts themselves are tested with the pool, which is what they are for."""
    wrong = WrongPassages(DictionaryRetriever(mapping={}), CORPUS)
    assert not wrong.embeds_on_device and device_part(wrong) is None
    with pytest.raises(ValueError, match="DictionaryRetriever does not embed on a device"):
        wrong.embed_queries(["q"])


def test_plain_ids_are_all_of_one_kind():
    plain = [Document(id=str(i), title=f"T{i}", text="") for i in range(3)]
    inner = DictionaryRetriever(mapping={}, default=(plain[0],))
    assert WrongPassages(inner, plain).search(["q"], 1)[0][0] in plain[1:]
