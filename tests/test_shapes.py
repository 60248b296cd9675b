"""Models of known shapes with random weights."""

import pytest
import torch
from tiny import small_shape, words

from lynx_learn.decode.shapes import shaped_model


def test_a_shape_shrinks_its_vocabulary_with_its_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    small_shape(monkeypatch)
    model = shaped_model("small", 2, torch.device("cpu"), torch.bfloat16)
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (2000, 2)  # type: ignore[union-attr]
    again = shaped_model("small", 2, torch.device("cpu"), torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    with torch.no_grad():
        assert model(input_ids=words(2, 5)).logits.isfinite().all()
