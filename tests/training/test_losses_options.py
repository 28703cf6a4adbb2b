"""What InfoNCE refuses, by name."""

import math

import pytest
import torch
from loss_models import Table, column, random_texts

from mlpool.training.losses import InfoNCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"temperature": -1.0}, "got -1.0"),
        ({"mini_batch_tokens": 0}, "mini_batch_tokens must be an integer of at least 1, got 0"),
        ({"mini_batch_tokens": None}, "cached=auto needs mini_batch_tokens"),
        ({"cached": "always"}, r"cached must be one of \('auto', True, False\), got 'always'"),
        ({"false_negatives": "all"}, r"must be one of \('none', 'duplicates', 'margin'\), got 'all'"),
        ({"margin": 0.1}, "need false_negatives='margin', got 'none'"),
        ({"factor": 0.9, "false_negatives": "duplicates"}, "need false_negatives='margin', got 'duplicates'"),
        ({"factor": 0.0, "false_negatives": "margin"}, "factor must be above 0"),
        ({"in_batch_negatives": False, "symmetric": True}, "in_batch_negatives=False"),
        ({"in_batch_negatives": False, "gather_across_devices": True}, "in_batch_negatives=False"),
        ({"matryoshka_dims": []}, "at least one"),
        ({"matryoshka_dims": [4, 4]}, "different sizes"),
        ({"matryoshka_dims": [4, 0]}, r"matryoshka_dims\[1\] must be an integer of at least 1, got 0"),
        ({"matryoshka_dims": [4, 2], "matryoshka_weights": [1.0]}, "must be 2 numbers"),
        ({"matryoshka_dims": [4, 2], "matryoshka_weights": [1.0, -1.0]}, "none below 0"),
        ({"matryoshka_weights": [1.0]}, "needs matryoshka_dims"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        InfoNCE(Table(), **options)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda c: c[:1], {}, r"an anchor and a positive column, got 1 column\(s\)"),
        (lambda c: c[:2], {"in_batch_negatives": False}, "needs hard negatives, but there are two columns only"),
        (lambda c: [c[0], column([[3]])], {}, r"the same number of texts, got \[1, 6\]"),
        (lambda c: [{"input_ids": c[0]["input_ids"]}, c[1]], {}, "column 0 has no attention_mask"),
        (lambda c: [{**c[0], "pixels": torch.ones(7)}, {**c[1], "pixels": torch.ones(7)}], {}, "'pixels' is"),
        (lambda c: c, {"matryoshka_dims": [7]}, "matryoshka_dims has 7, but the embeddings have 6 numbers"),
        (
            lambda c: [{"inputs_embeds": torch.ones(6, 12, 2), "attention_mask": torch.ones(6, 12)}] * 2,
            {"false_negatives": "duplicates"}, "compares input_ids, but the features are",
        ),
    ],
)  # fmt: skip
def test_bad_batches(change, options, message):
    columns = change([column(t) for t in random_texts()])
    with pytest.raises(ValueError, match=message):
        InfoNCE(Table(), **options)(columns, None)
