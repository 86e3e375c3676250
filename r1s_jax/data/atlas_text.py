"""The words of the bundled world: templates for its passages and its questions.

Plain functions of plain facts, so that pre-training can render the very same templates with
made-up facts. Texts are short because every token costs CPU time. `variant` picks one of
`VARIANTS` wordings (taken modulo), which keeps reading from becoming a fixed offset.
"""

from __future__ import annotations

import re

from r1s_jax.types import Document

VARIANTS = 3
ONE_HOP = ("country", "timezone", "population")
TWO_HOP = ("capital", "calling_code", "currency", "domain")
KINDS = ONE_HOP + TWO_HOP

_CITY = (
    "{name} is a city in {country}. Its time zone is {timezone} and its population is "
    "{population}.",
    "With a population of {population}, {name} lies in {country}. The time zone is {timezone}.",
    "The city keeps {timezone} time. {name} belongs to {country} and has {population} people.",
)

_GEO = (
    "{name} is a country in {continent}. Its capital is {capital}. Its area is {area} km2.",
    "The capital of {name} is {capital}. The country is part of {continent}, area {area} km2.",
    "A country of {area} km2 in {continent}. {capital} is the capital of {name}.",
)

_CODES = (
    "Currency code of {name}: {currency}. Calling code: {phone}. Top-level domain: {tld}.",
    "{name} has the top-level domain {tld}, the calling code {phone} and the currency code "
    "{currency}.",
    "The calling code is {phone}, the currency code is {currency} and the top-level domain of "
    "{name} is {tld}.",
)

_CURRENCY = (
    "{code} stands for a currency named {name}.",
    "The money called {name} is written {code} for short.",
    "In price lists {code} means {name}.",
)

_TIMEZONE = (
    "{zone} is a time zone. It counts {cities} larger cities.",
    "Clocks in {cities} larger cities follow {zone}.",
    "The zone {zone} sets the time of {cities} larger cities.",
)

_QUESTIONS: dict[str, tuple[str, ...]] = {
    "country": (
        "In which country is {city}?",
        "Which country does {city} belong to?",
        "Name the country of {city}.",
    ),
    "timezone": (
        "In which time zone is {city}?",
        "Which time zone do the clocks of {city} follow?",
        "What is the time zone of {city}?",
    ),
    "population": (
        "What is the population of {city}?",
        "How many people live in {city}?",
        "How large is the population of {city}?",
    ),
    "capital": (
        "What is the capital of the country where {city} lies?",
        "Name the capital of the country of {city}.",
        "Which city is the capital of the country that {city} is in?",
    ),
    "calling_code": (
        "What is the calling code of the country where {city} lies?",
        "Which calling code reaches the country of {city}?",
        "Name the calling code of the country of {city}.",
    ),
    "currency": (
        "What is the currency code of the country where {city} lies?",
        "Which currency code is used in the country of {city}?",
        "Name the currency code of the country of {city}.",
    ),
    "domain": (
        "What is the top-level domain of the country where {city} lies?",
        "Which top-level domain has the country of {city}?",
        "Name the top-level domain of the country of {city}.",
    ),
}

_ASKED = tuple(
    re.compile(re.escape(template).replace(re.escape("{city}"), "(?P<city>.+)"))
    for templates in _QUESTIONS.values()
    for template in templates
)


def city_passage(
    name: str, country: str, timezone: str, population: int, variant: int, *, id: str = "city:0"
) -> Document:
    """The passage of a city; it names its country but none of the country's own facts."""
    text = _CITY[variant % VARIANTS].format(
        name=name, country=country, timezone=timezone, population=population
    )
    return Document(id=id, title=name, text=text)


def country_passages(
    name: str,
    capital: str,
    continent: str,
    area: int,
    currency: str,
    phone: str,
    tld: str,
    variant: int,
    *,
    id: str = "country:0",
) -> tuple[Document, Document]:
    """The two passages of a country: `<id>:geo` (capital, continent, area), `<id>:codes`."""
    geo = _GEO[variant % VARIANTS].format(
        name=name, capital=capital, continent=continent, area=area
    )
    codes = _CODES[variant % VARIANTS].format(name=name, currency=currency, phone=phone, tld=tld)
    return (
        Document(id=f"{id}:geo", title=name, text=geo),
        Document(id=f"{id}:codes", title=f"Codes of {name}", text=codes),
    )


def currency_passage(code: str, name: str, variant: int) -> Document:
    """A distractor about a currency; it names no country."""
    text = _CURRENCY[variant % VARIANTS].format(code=code, name=name)
    return Document(id=f"currency:{code}", title=f"{name} ({code})", text=text)


def timezone_passage(zone: str, cities: int, variant: int) -> Document:
    """A distractor about a time zone; it names no city and no country of it."""
    text = _TIMEZONE[variant % VARIANTS].format(zone=zone, cities=cities)
    return Document(id=f"timezone:{zone}", title=f"Time zone {zone}", text=text)


def question_text(kind: str, city: str, variant: int) -> str:
    """One of the wordings of a question of this kind (see `KINDS`) about a city."""
    if kind not in _QUESTIONS:
        raise ValueError(f"kind is {kind!r}, must be one of {KINDS}")
    return _QUESTIONS[kind][variant % VARIANTS].format(city=city)


def asked_city(text: str) -> str | None:
    """The city a question of `question_text` asks about; None for any other question.

    Where several templates fit, the shortest name is the right one: the others swallow
    words of the longer template.
    """
    found = [m["city"] for pattern in _ASKED if (m := pattern.fullmatch(text))]
    return min(found, key=len, default=None)
