"""The tokenizers that tests of tokenizers have."""

from tests.tokenizer.conftest import files, oracles, small_file

__all__ = ["files", "oracles", "small_file"]
