"""The names of transformers that the experiments use, for pyright.

Its own `__init__.py` imports several hundred models, which take pyright 20 seconds to read.
"""

from typing import Any, Self

AutoConfig: Any
AutoModelForCausalLM: Any
AutoTokenizer: Any

class PreTrainedTokenizerFast:
    chat_template: str | None
    def __init__(self, **options: Any) -> None: ...
    def __call__(self, text: Any, **options: Any) -> Any: ...
    def __len__(self) -> int: ...
    def __getattr__(self, name: str) -> Any: ...
    @classmethod
    def from_pretrained(cls, name: Any, **options: Any) -> Self: ...
