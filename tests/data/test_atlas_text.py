import pytest

from r1s_jax.data import atlas_text


def test_every_wording_of_a_passage_carries_its_facts():
    for variant in range(atlas_text.VARIANTS):
        city = atlas_text.city_passage(
            "Hamar", "Norway", "Europe/Oslo", 29520, variant, id="city:1"
        )
        assert city.id == "city:1" and city.title == "Hamar"
        assert all(f in city.text for f in ("Hamar", "Norway", "Europe/Oslo", "29520"))
        geo, codes = atlas_text.country_passages(
            "Norway", "Oslo", "Europe", 324220, "NOK", "47", ".no", variant, id="country:NO"
        )
        assert (geo.id, codes.id) == ("country:NO:geo", "country:NO:codes")
        assert all(f in geo.text for f in ("Norway", "Oslo", "Europe", "324220"))
        assert all(f in codes.text for f in ("Norway", "NOK", "47", ".no"))
        assert not any(f in city.text + geo.text for f in ("NOK", "47", ".no "))


def test_the_variants_differ():
    for kind in atlas_text.KINDS:
        assert len({atlas_text.question_text(kind, "Hamar", v) for v in range(6)}) == 3
    texts = {atlas_text.city_passage("A", "B", "C", 1, v).text for v in range(6)}
    assert len(texts) == 3


@pytest.mark.parametrize("name", ["Hamar", "the country of Oz", "City (of ?) a+b", "Is in"])
def test_the_asked_city_is_found_in_every_wording(name):
    for kind in atlas_text.KINDS:
        for variant in range(atlas_text.VARIANTS):
            assert atlas_text.asked_city(atlas_text.question_text(kind, name, variant)) == name


def test_another_question_asks_about_no_city():
    assert atlas_text.asked_city("Who wrote Middlemarch?") is None


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'mayor'"):
        atlas_text.question_text("mayor", "Hamar", 0)
