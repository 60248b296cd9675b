"""The check tells the graph of another selector from its own."""

from dataclasses import replace

import pytest
from graph_cases import LAYERS, MLP, changed, runner_of, selector_of

from lynx_learn.errors import LynxError
from lynx_learn.graph.check import check
from lynx_learn.selector.selector import LynxSelector


def test_a_graph_of_another_selector_is_found_out() -> None:
    assert check(selector_of(MLP), runner_of(MLP)).layers == LAYERS
    with pytest.raises(LynxError, match=r"costs.* of layer 2"):
        check(changed(), runner_of(MLP))
    first = LynxSelector(replace(selector_of(MLP).config, keep_top1=False))
    first.load_state_dict(selector_of(MLP).state_dict())
    with pytest.raises(LynxError, match=r"keep bits.* of layer 0"):
        check(first, runner_of(MLP))
