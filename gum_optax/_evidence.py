"""Evidence that a leaf is no matrix, from its name and from the shapes of the whole tree.

With L layers, width d and V tokens, a leaf may be a vector ``[d]`` or a stack of vectors
``[L, d]``, a table ``[V, d]``, or a head ``[d, V]``; `dimension_numbers` describes these. A *part*
of a path is a name between two ``/``, and a *word* is a word of a part: ``LayerNorm_1`` has the
words layer and norm.

Tests: tests/library/test_dimension_numbers.py.
"""

import collections
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

_Shape = tuple[int, ...]

# Strong words name a leaf wherever they stand in a part of its path: `embed_tokens`, `ln_attn`.
_EMBEDDINGS = {"embed", "embedding", "embeddings", "embedder", "wte", "emb", "embs"}
_HEADS = {"unembed", "unembedding", "unemb", "lmhead", "vocab", "logit", "logits", "logitdense"}
_STRONG = {*_EMBEDDINGS, *_HEADS, "wpe", "posemb", "ln"}

# Weak words name a leaf only as the last word, the head noun of an English compound: `q_norm` is a
# norm, and `norm_mlp` an MLP.
_VECTORS = {"bias", "biases", "scale", "norm", "norms", "layernorm", "rmsnorm", "batchnorm"}
_POSITIONS = {"pos", "position", "positional", "positions"}
_WEAK = {*_VECTORS, *_POSITIONS, "table", "head"}

# Words for the form of a value, not for its role. They do not count as the last word, which is norm
# in `norm_weight` and positional in `positional_encoding`. The letter d remains of `BatchNorm2d`.
_HOLDERS = {
    *("weight", "weights", "kernel", "w", "param", "params", "gamma", "beta", "g", "d"),
    *("enc", "encoding", "encodings"),
}


def evidence_against_matrices(named: Sequence[tuple[str, Any]]) -> list[str]:
    """Returns for each leaf of one tree the evidence that it is no matrix, or ""."""
    paths = [path for path, _ in named]
    shapes = [tuple(leaf.shape) for _, leaf in named]
    # 1. The number of axes, then the name: each leaf by itself.
    found = [
        "vector" if len(shape) < 2 else _name_evidence(path)
        for path, shape in zip(paths, shapes, strict=True)
    ]
    # 2. Shapes: all leaves of the tree together. Each step judges only leaves without evidence.
    for position in _stacked_vectors(paths, shapes, found):
        found[position] = "stacked vectors"
    for position, vocabulary in _heads(paths, shapes, found):
        found[position] = f"head: vocabulary {vocabulary}"
    return found


def stacks_of_scales(named: Sequence[tuple[str, Any]]) -> list[_Shape]:
    """Returns shapes of stacked norms, ``[L, d]`` or ``[d, L]``: they show scanned layers."""
    scales = {f"name: {word}" for word in (*_VECTORS, "ln")} - {"name: bias", "name: biases"}
    return [
        tuple(leaf.shape)
        for (_, leaf), evidence in zip(named, evidence_against_matrices(named), strict=True)
        if len(leaf.shape) == 2 and evidence in {*scales, "stacked vectors"}
    ]


def is_no_table(path: str) -> bool:
    """Returns whether a path has no name of a table, of tokens, positions or nothing in particular.

    A name of a head counts as no name of a table.
    """
    return is_head(path) or not _name_evidence(path)


def _name_evidence(path: str) -> str:
    *modules, leaf = path.split("/")
    # `b`, `b1` and `b_q` are biases, `lora_b` is not, nor is a layer in a module called `b`.
    bias = "b" if _words(leaf)[:1] == ("b",) else ""
    words = [*map(_naming_word, modules), bias or _naming_word(leaf)]
    return next((f"name: {word}" for word in words if word), "")


def _stacked_vectors(
    paths: Sequence[str], shapes: Sequence[_Shape], found: Sequence[str]
) -> list[int]:
    """Finds vectors ``[L, d]`` that have a weak word anywhere in their names (``norm_attn``)."""
    deep = [shape for shape in shapes if len(shape) > 2]
    # A size L that leads stacks of matrices [L, m, n] is a number of layers, unless it is a width:
    # attention kernels [d, heads, head_dim] lead with d, which ends vectors and 2-D kernels.
    layers = {shape[0] for shape in deep} - {shape[-1] for shape in shapes if 0 < len(shape) < 3}
    # With the layers on the second axis, as in MaxText, vectors [d, L] go with matrices [d, L, n].
    fronts = {shape[:2] for shape in deep}
    return [
        position
        for position, (path, shape) in enumerate(zip(paths, shapes, strict=True))
        if len(shape) == 2 and not found[position] and not _VECTORS.isdisjoint(_all_words(path))
        if shape[0] in layers or shape in fronts
    ]


def _heads(
    paths: Sequence[str], shapes: Sequence[_Shape], found: Sequence[str]
) -> Iterator[tuple[int, int]]:
    """Finds heads by the vocabulary that an embedding shows: yields (position, V).

    The head is the only unnamed leaf with the sizes {V, d}, in either order. Where several leaves
    have these sizes (a byte-level model whose MLP is as wide as the vocabulary), shapes cannot
    decide. Where a head of these sizes is named, there is no search for another one.
    """
    flat = [position for position, shape in enumerate(shapes) if len(set(shape)) == len(shape) == 2]
    # {V, d} -> the embedding's shape.
    tables = {frozenset(shapes[i]): shapes[i] for i in flat if _is_embedding(paths[i])}
    for sizes, table in tables.items():
        alike = [i for i in flat if frozenset(shapes[i]) == sizes]
        unnamed = [i for i in alike if not found[i]]
        if len(unnamed) == 1 and not any(is_head(paths[i]) for i in alike):
            [position] = unnamed
            if _is_last_of_its_role(paths[position], paths):
                # d is the width of most leaves, V of few; in a tie the table is [V, d].
                uses = collections.Counter(size for shape in shapes for size in set(shape))
                yield position, min(table, key=uses.__getitem__)


def _is_embedding(path: str) -> bool:
    """Returns whether a path names a table of tokens: positions and relative biases show no V."""
    words = _all_words(path)
    others = {*_POSITIONS, *_VECTORS, "wpe", "posemb"}
    return not _EMBEDDINGS.isdisjoint(words) and others.isdisjoint(words) and not is_head(path)


def is_head(path: str) -> bool:
    """Returns whether a path names an output head."""
    # `vocab_proj` is a head, `vocab_embed` is not.
    return any(
        _naming_word(part) in {*_HEADS, "head"} and _EMBEDDINGS.isdisjoint(_words(part))
        for part in path.split("/")
    )


def _is_last_of_its_role(path: str, paths: Sequence[str]) -> bool:
    """Tells the output from earlier layers of one name: ``linear_2`` comes after ``linear``."""

    def role(path: str) -> str:
        return re.sub(r"_?\d+", "", path)

    def numbers(path: str) -> list[int]:
        return [int(digits) for digits in re.findall(r"\d+", path)]

    return all(numbers(other) <= numbers(path) for other in paths if role(other) == role(path))


# Words of names; the parts of paths recur from layer to layer and from call to call ---------------


@functools.lru_cache(maxsize=4096)
def _naming_word(part: str) -> str:
    """Returns the word by which a part of a path names a table, a vector or a head, or ""."""
    words = _words(part)
    strong = [word for word in words if word in _STRONG]
    if strong:
        return strong[0]
    nouns = [word for word in words if word not in _HOLDERS]
    # `lm_head` is a head, `multi_head` is a kind of attention.
    if not nouns or (nouns[-1] == "head" and "multi" in nouns):
        return ""
    return nouns[-1] if nouns[-1] in _WEAK else ""


@functools.lru_cache(maxsize=4096)
def _words(part: str) -> tuple[str, ...]:
    """Splits a name into words in lower case: ``LayerNorm_1`` has layer and norm."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", part)
    return tuple(word.lower() for word in re.findall(r"[A-Za-z]+", spaced))


def _all_words(path: str) -> set[str]:
    return {word for part in path.split("/") for word in _words(part)}
