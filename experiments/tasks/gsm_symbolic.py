"""GSM-Symbolic: GSM8K's word problems with other names and numbers; generated.

Mirzadeh et al., arXiv 2410.05229.
"""

from experiments.tasks.base import Sizes, Task, generate, same_result


def load(sizes: Sizes) -> Task:
    """Items whose answer is a chain of thought, and the result after `####`."""
    items = generate("gsm_symbolic", lambda item: item["metadata"]["answer_cot"], sizes)
    return Task("gsm_symbolic", *items, same_result)
