"""The text the tiny base policy is pre-trained on: transcripts of a poor but capable searcher.

Its habits are what RL has to change. It searches in a minority of transcripts, often with a query
that cannot find anything, often stops one search too early, and mostly guesses. Its skills are what
RL can build on: it copies names into queries and answers out of passages, which it also practises
on passages that are simply given to it. Facts are partly made up (a city moved into an invented
country), so that only reading, never remembering, predicts them.

Only countries of the atlas' `base` split are named. Passages and questions use the atlas' own
templates, the protocol its own tags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from r1s_jax.data import atlas_text as words
from r1s_jax.data.atlas import World
from r1s_jax.protocol.observation import render_documents
from r1s_jax.protocol.prompts import tiny_prompt
from r1s_jax.protocol.tags import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    BEGIN_QUERY,
    END_QUERY,
    PROTOCOL_TAGS,
    THINK_CLOSE,
)
from r1s_jax.types import Document, Segment, TokenSource

T = TypeVar("T")

_OPENERS = (" {x}?", " The city is {x}.", " About {x}:")
_FOUND = (" The country is {c}.", " So it is {c}.", " {c}.")
_AGAIN = (" Not found.", " Once more.", "")
_GOOD_FIRST = (" {x}", " city {x}", " {x} city", " where is {x}")
_POOR_FIRST = (
    " the city", " which country is it in", " {w} of the country", " {w}", " city", " {stub}"
)  # fmt: skip
_GOOD_SECOND = (" {c} {w}", " {w} of {c}", " {c}")
_POOR_SECOND = (" {w} of the country", " the country", " {w}", " {x}")
_WORDS = {
    "country": "country",
    "timezone": "time zone",
    "population": "population",
    "capital": "capital",
    "calling_code": "calling code",
    "currency": "currency code",
    "domain": "top-level domain",
}
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in ("a", "e", "i", "o", "u", "an", "or", "ia")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Habits:
    """How often the base does what; all are probabilities."""

    search: float = 0.22  # begins with a search instead of an answer
    good_first: float = 0.55  # a first query names the city
    retry: float = 0.35  # searches again after a search that brought nothing
    second_hop: float = 0.35  # knows the country and searches for its fact
    good_second: float = 0.55  # a second query names the country
    read: float = 0.92  # answers with the fact it has found
    broken: float = 0.10  # leaves out a tag
    exercise: float = 0.35  # share of the texts that only ask about given passages
    made_up: float = 0.70  # facts invented for this transcript


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What is true in one transcript."""

    city: str
    country: str
    timezone: str
    population: str
    capital: str
    calling_code: str
    currency: str
    domain: str
    city_passage: Document
    country_passages: tuple[Document, Document]


class TranscriptWriter:
    """Draws transcripts as segments (PROMPT, SAMPLED, OBSERVATION, …); the seed decides all."""

    def __init__(
        self, world: World, *, documents: int, habits: Habits | None = None, seed: int = 0
    ):
        self.habits = habits or Habits()
        self.documents = documents
        self._rng = np.random.default_rng((20250305, seed))
        codes = sorted(code for code, split in world.split.items() if split == "base")
        self._countries = [world.countries[code] for code in codes]
        self._cities = sorted(world.cities_of("base"), key=lambda c: (c.name, c.id))
        self._zones = sorted({c.timezone for c in self._cities})
        self._prompt = tiny_prompt()

    def transcript(self) -> list[Segment]:
        """One episode as the base would live it."""
        kind = str(self._pick(words.ONE_HOP if self._chance(0.5) else words.TWO_HOP))
        facts = self._facts()
        question = words.question_text(kind, facts.city, int(self._rng.integers(words.VARIANTS)))
        segments = [Segment(source=TokenSource.PROMPT, text=self._prompt.render(question))]
        thought = self._pick(_OPENERS).format(x=facts.city)
        known = {"city"}
        want_search = self._chance(self.habits.search)
        while want_search and len(segments) < 9:
            query, documents = self._search(kind, facts, known)
            turn = thought + BEGIN_QUERY + query + END_QUERY
            segments.append(Segment(source=TokenSource.SAMPLED, text=turn))
            block = render_documents(documents, PROTOCOL_TAGS)
            segments.append(Segment(source=TokenSource.OBSERVATION, text=block))
            before = len(known)
            if facts.city_passage in documents:
                known |= {*words.ONE_HOP}
            for passage, facts_in in zip(
                facts.country_passages, (("capital",), words.TWO_HOP[1:]), strict=True
            ):
                if passage in documents:
                    known |= {*facts_in}
            if kind in known:
                thought, want_search = "", False
            elif "country" in known and len(known) > before:
                thought = self._pick(_FOUND).format(c=facts.country)
                want_search = self._chance(self.habits.second_hop)
            else:
                thought = self._pick(_AGAIN)
                want_search = self._chance(self.habits.retry)
        reads = kind in known and self._chance(self.habits.read)
        answer = getattr(facts, kind) if reads else self._guess(kind)
        segments.append(Segment(source=TokenSource.SAMPLED, text=thought + self._close(answer)))
        return segments

    def exercise(self) -> list[Segment]:
        """Passages that were given, not searched for, and questions that they answer.

        All of it is plain text to be learnt, hence one PROMPT segment.
        """
        facts, other = self._facts(), self._facts()
        geo, codes = facts.country_passages
        if self._chance(0.5):
            passages = [
                facts.city_passage,
                self._pick((other.city_passage, self._distractor(facts))),
            ]
            asked = [(kind, facts) for kind in words.ONE_HOP]
            if passages[1] is other.city_passage:
                asked += [(kind, other) for kind in words.ONE_HOP]
        else:
            passages = [facts.city_passage, geo, codes]
            asked = [(kind, facts) for kind in words.KINDS]
        self._rng.shuffle(passages)  # type: ignore[arg-type]
        self._rng.shuffle(asked)  # type: ignore[arg-type]
        text = render_documents(passages, PROTOCOL_TAGS)
        for kind, about in asked[:4]:
            variant = int(self._rng.integers(words.VARIANTS))
            question = words.question_text(kind, about.city, variant)
            answer = f" {THINK_CLOSE}{ANSWER_OPEN} {getattr(about, kind)}{ANSWER_CLOSE}"
            text += self._prompt.render(question) + answer + "\n"
        return [Segment(source=TokenSource.PROMPT, text=text)]

    def draw(self) -> list[Segment]:
        """A transcript, or (`Habits.exercise`) an exercise in reading."""
        return self.exercise() if self._chance(self.habits.exercise) else self.transcript()

    def _search(self, kind: str, facts: Facts, known: set[str]) -> tuple[str, list[Document]]:
        """A query, good or poor, and documents of the sort a search engine returns for it."""
        second = "country" in known
        good = self._chance(self.habits.good_second if second else self.habits.good_first)
        patterns = (_POOR_FIRST, _GOOD_FIRST, _POOR_SECOND, _GOOD_SECOND)[2 * second + good]
        stub = facts.city[:3] if self._chance(0.5) else self._pick(self._cities).name
        query = self._pick(patterns).format(
            x=facts.city, c=facts.country, w=_WORDS[kind], stub=stub
        )
        if good and second:
            passages = list(facts.country_passages)
            wanted = passages.pop(0 if kind == "capital" else 1)
            rest = [passages[0] if self._chance(0.7) else self._distractor(facts)]
        elif good or (second and facts.city in query):
            wanted, rest = facts.city_passage, []
        else:
            wanted, rest = self._distractor(facts), []
        rest += [self._distractor(facts) for _ in range(self.documents - 1 - len(rest))]
        documents = [wanted, *rest]
        if self._chance(0.3):
            self._rng.shuffle(documents)  # type: ignore[arg-type]
        return query, documents

    def _facts(self) -> Facts:
        index = int(self._rng.integers(len(self._cities)))
        city = self._cities[index]
        country = self._pick(self._countries)
        name, population, timezone = city.name, city.population, city.timezone
        capital, phone = country.capital, country.phone
        currency, tld, country_name = country.currency, country.tld, country.name
        if self._chance(self.habits.made_up):
            country_name = self._invented_name()
            capital = self._invented_name()
            phone = str(int(10 ** self._rng.uniform(0.3, 4)))
            currency = "".join(self._letters(3)).upper()
            tld = "." + "".join(self._letters(2))
            timezone = self._pick(self._zones).rsplit("/", 1)[0] + "/"
            timezone += self._invented_name().replace(" ", "_")
            population = int(10 ** self._rng.uniform(3, 7.2))
        variants = [int(v) for v in self._rng.integers(words.VARIANTS, size=2)]
        return Facts(
            city=name,
            country=country_name,
            timezone=timezone,
            population=str(population),
            capital=capital,
            calling_code=phone,
            currency=currency,
            domain=tld,
            city_passage=words.city_passage(name, country_name, timezone, population, variants[0]),
            country_passages=words.country_passages(
                country_name, capital, country.continent, country.area, currency, phone, tld,
                variants[1],
            ),
        )  # fmt: skip

    def _distractor(self, facts: Facts) -> Document:
        """A passage about something else; half of the cities look like the one asked about."""
        draw = self._rng.random()
        variant = int(self._rng.integers(words.VARIANTS))
        if draw < 0.15:
            zone = self._pick(self._zones)
            return words.timezone_passage(zone, int(self._rng.integers(1, 200)), variant)
        if draw < 0.3:
            c = self._pick(self._countries)
            pair = words.country_passages(
                c.name, c.capital, c.continent, c.area, c.currency, c.phone, c.tld, variant
            )
            return self._pick(pair)
        near = draw < 0.65
        index = int(self._rng.integers(len(self._cities)))
        if near:
            at = self._position(facts.city) + int(self._rng.choice([-3, -2, -1, 1, 2, 3]))
            index = at % len(self._cities)
        city = self._cities[index]
        if city.name == facts.city:
            city = self._cities[(index + 7) % len(self._cities)]
        return words.city_passage(
            city.name, city.country_name, city.timezone, city.population, variant
        )

    def _position(self, name: str) -> int:
        """Where a city stands in the alphabet of cities."""
        low, high = 0, len(self._cities)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._cities[middle].name < name else (low, middle)
        return low

    def _guess(self, kind: str) -> str:
        """An answer of the right kind from what the base has read about."""
        if kind in words.ONE_HOP:
            city = self._pick(self._cities)
            return {
                "country": city.country_name,
                "timezone": city.timezone,
                "population": str(city.population),
            }[kind]
        c = self._pick(self._countries)
        facts = {
            "capital": c.capital, "calling_code": c.phone, "currency": c.currency, "domain": c.tld
        }  # fmt: skip
        return facts[kind]

    def _close(self, answer: str) -> str:
        """The end of a response; now and then a tag is missing."""
        if not self._chance(self.habits.broken):
            return f" {THINK_CLOSE}{ANSWER_OPEN} {answer}{ANSWER_CLOSE}"
        return self._pick(
            (
                f" {ANSWER_OPEN} {answer}{ANSWER_CLOSE}",
                f" {THINK_CLOSE} {answer}",
                f" {THINK_CLOSE}{ANSWER_OPEN} {answer}",
                f" {answer}.",
            )
        )

    def _invented_name(self) -> str:
        draw = self._rng.random()
        if draw < 0.5:
            return self._pick(self._cities).name
        parts = [
            "".join(self._pick(_SYLLABLES) for _ in range(int(self._rng.integers(2, 4))))
            for _ in range(1 if draw < 0.9 else 2)
        ]
        return " ".join(p.capitalize() for p in parts)

    def _letters(self, count: int) -> list[str]:
        return [chr(ord("a") + int(i)) for i in self._rng.integers(26, size=count)]

    def _pick(self, options: Sequence[T]) -> T:
        return options[int(self._rng.integers(len(options)))]

    def _chance(self, probability: float) -> bool:
        return bool(self._rng.random() < probability)
