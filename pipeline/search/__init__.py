"""The search methods. A new one is a file with a METHOD, and a line here."""

from pipeline.search import asng, darts, darts_prime, e2rnas, evolution, importance, nsga2, random
from pipeline.search.base import SearchMethod

METHODS: dict[str, SearchMethod] = {
    "importance": importance.METHOD,
    "asng": asng.METHOD,
    "random": random.METHOD,
    "evolution": evolution.METHOD,
    "nsga2": nsga2.METHOD,
    "darts": darts.METHOD,
    "darts-prime": darts_prime.METHOD,
    "e2rnas": e2rnas.METHOD,
}
