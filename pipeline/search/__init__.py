"""The search methods. A new one is a file with a METHOD, and a line here."""

from pipeline.search import asng, darts, darts_prime, evolution, importance, random
from pipeline.search.base import SearchMethod

METHODS: dict[str, SearchMethod] = {
    "importance": importance.METHOD,
    "asng": asng.METHOD,
    "random": random.METHOD,
    "evolution": evolution.METHOD,
    "darts": darts.METHOD,
    "darts-prime": darts_prime.METHOD,
}
