"""What an embedder needs of sentence-transformers, asked before anything of it is imported."""

from importlib.metadata import version

FLOOR = (6, 2)


def require_sentence_transformers() -> None:
    """ImportError for a version whose `encode` would pass our batches by: before 6.2 it has no `_inference`."""
    found, floor = version("sentence-transformers"), ".".join(map(str, FLOOR))
    if tuple(int(part) for part in found.split(".")[:2]) < FLOOR:
        raise ImportError(
            f"sentence-transformers {found} is too old for mlpool's embedders: before {floor} `encode` cannot be given "
            "our batches, and would run all texts padded in one forward; pip install "
            f"'sentence-transformers>={floor}' (without a network: its wheel, with --no-deps)"
        )


require_sentence_transformers()
