"""gsm_symbolic: GSM-Symbolic, GSM8K's word problems generated with other names and numbers.

Mirzadeh et al., arXiv 2410.05229.
"""

from experiments.tasks.base import Sizes, Task, generate, same_result


def load(sizes: Sizes) -> Task:
    """Generates items whose answer is a chain of thought and the result after `####`."""
    items = generate("gsm_symbolic", lambda item: item["metadata"]["answer_cot"], sizes)
    return Task("gsm_symbolic", *items, same_result)
