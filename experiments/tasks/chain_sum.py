"""chain_sum: generated sums and differences of two numbers, both of one digit or both of two."""

from experiments.tasks.base import Sizes, Task, generate, same_number


def load(sizes: Sizes) -> Task:
    """Generates items whose answer is a number alone."""
    terms = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    items = generate("chain_sum", lambda item: item["answer"], sizes, **terms)
    return Task("chain_sum", *items, same_number)
