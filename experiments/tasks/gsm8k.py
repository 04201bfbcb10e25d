"""gsm8k: GSM8K, word problems with a chain of thought and the result after `####`.

Cobbe et al., arXiv 2110.14168.
"""

from experiments.tasks import files
from experiments.tasks.base import Sizes, Task


def load(sizes: Sizes) -> Task:
    """Loads the data set from the Hugging Face hub; its test items are held out."""
    task = files.load("openai/gsm8k:main", sizes, "question", "answer")
    return task._replace(name="gsm8k")
