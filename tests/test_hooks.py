"""What the hooks on a model survive: threads, copies, calls past the model, other policies."""

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EOS, PAD, decode, random_selector, tiny_model, words
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.errors import ModelError
from lynx_learn.moe.calls import DRAFTS, NO_CACHE
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.hooks import intercept, owner_of
from lynx_learn.rules.keep_sets import XShare

SOME, EVERYTHING, PROMPT, LENGTH = 2.0, 1e9, 6, 11


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(
        len(getattr(module, kind)) for module in model.modules() for kind in (*kinds, "_forward_hooks_always_called")
    )


def in_threads(work: list[Callable[[], Any]]) -> tuple[list[Any], list[Exception]]:
    found: list[Any] = [None] * len(work)
    errors: list[Exception] = []

    def run(place: int) -> None:
        try:
            found[place] = work[place]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, errors


def test_calls_in_threads_decide_each_for_their_own_batch() -> None:
    model = tiny_model("qwen3_moe")
    policy = random_selector(model).at_threshold(SOME)
    texts = [words(1 + place % 3, LENGTH + place, seed=place) for place in range(6)]
    with skip_experts(model, policy) as alone:
        wanted = [decode(model, text, PROMPT)[1] for text in texts]
    with skip_experts(model, policy) as together:
        found, errors = in_threads([lambda text=text: decode(model, text, PROMPT)[1] for text in texts])
    assert not errors
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert together.stats == alone.stats


def test_what_hooks_give_a_captured_graph_outlives_them() -> None:
    """A CUDA graph reads it where it lies; later hooks must not have to make it anew, nor anybody get its memory."""
    model = tiny_model("qwen3_moe")
    layers, seen = find_moe_layers(model), list[Tensor]()
    for _ in range(2):
        with intercept(model, layers, lambda layer, routing: seen.append(routing.active)):
            model(words(3, 1))
    assert all(active.all() for active in seen)
    assert len({active.untyped_storage().data_ptr() for active in seen}) == 1


def test_who_has_ended_is_known_in_each_thread() -> None:
    model = tiny_model("mixtral")
    policy = random_selector(model).at_threshold(SOME)
    texts = [words(rows, PROMPT, seed=rows) for rows in (2, 3, 4, 2)]
    ask = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": PAD, "eos_token_id": list(range(EOS, 40))}

    def generate(text: Tensor) -> Tensor:
        return model.generate(text, attention_mask=torch.ones_like(text), **ask)  # type: ignore[operator]

    with skip_experts(model, policy) as alone:
        wanted = [generate(text) for text in texts]
    with skip_experts(model, policy) as together:
        found, errors = in_threads([lambda text=text: generate(text) for text in texts])
    assert not errors
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert together.stats == alone.stats
    assert torch.equal(together.tally.counts[0], alone.tally.counts[0])


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_of_an_attached_model_is_untouched(how: str) -> None:
    model = tiny_model("qwen3_moe")
    own = [model.register_forward_hook(keep), model.model.register_forward_pre_hook(keep, with_kwargs=True)]
    text = words(3, LENGTH)
    wanted = decode(model, text, PROMPT)[1]
    before = hooks(model)
    with skip_experts(model, random_selector(model).at_threshold(EVERYTHING)) as skipping:
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert hooks(other) == before == 3, "the user's own hooks come along"
        assert torch.equal(decode(other, text, PROMPT)[1], wanted)
        assert skipping.stats.steps == 0
        assert not any(name in vars(other) for name in ("generate", "_get_stopping_criteria", "__reduce_ex__"))
        assert all(layer.experts.config is other.config for layer in find_moe_layers(other))
        with skip_experts(other, random_selector(other).at_threshold(EVERYTHING)) as second:
            decode(other, text, PROMPT)
        assert second.stats.steps == LENGTH - PROMPT
        decode(model, text, PROMPT)
        assert skipping.stats.steps == LENGTH - PROMPT
    assert hooks(model) == before
    for handle in own:
        handle.remove()


def keep(*_: Any) -> None:
    """A hook of the user's own."""


def test_saving_an_attached_model_says_nothing_of_it(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "before")
    with skip_experts(model, random_selector(model).at_threshold(SOME)):
        model.save_pretrained(tmp_path / "during")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "during").iterdir())
    assert all((tmp_path / "before" / name).read_bytes() == (tmp_path / "during" / name).read_bytes() for name in files)
    AutoModelForCausalLM.from_pretrained(tmp_path / "during")


def test_calls_by_position_and_of_the_inner_model_are_decode_steps() -> None:
    model = tiny_model("qwen3_moe")
    text = words(4, LENGTH)
    policy = random_selector(model).at_threshold(SOME)
    with skip_experts(model, policy), torch.no_grad():
        wanted = decode(model, text, PROMPT)[1][:, 0]
    for call in (
        lambda cache, one: model(one, None, None, cache).logits,
        lambda cache, one: model.lm_head(model.model(one, past_key_values=cache).last_hidden_state),
        lambda cache, one: model.forward(one, past_key_values=cache).logits,
    ):
        with skip_experts(model, policy) as skipping, torch.no_grad():
            cache = model(text[:, :PROMPT]).past_key_values
            found = call(cache, text[:, PROMPT : PROMPT + 1])[:, 0]
        assert skipping.stats.steps == 1
        torch.testing.assert_close(found, wanted)


def test_the_inner_model_cannot_be_attached_beside_the_model() -> None:
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)
    assert owner_of(model, layers) is model.model
    rule = XShare(4)
    with skip_experts(model, rule):
        before = hooks(model)
        with pytest.raises(ModelError, match="already skips experts"):
            skip_experts(model.model, XShare(4)).attach()
        assert hooks(model) == before
    with skip_experts(model.model, XShare(4)) as inner:
        decode(model, words(3, LENGTH), PROMPT)
        with pytest.raises(ModelError, match="already skips experts"):
            skip_experts(model, rule).attach()
    assert inner.stats.steps == LENGTH - PROMPT
    assert hooks(model) == 0


def compiled(model: PreTrainedModel) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, Wrapper])
def test_the_model_in_a_wrapper_is_found(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_model("qwen3_moe")
    policy = random_selector(model).at_threshold(SOME)
    text = words(3, LENGTH)
    with skip_experts(model, policy):
        wanted = decode(model, text, PROMPT)[1]
    wrapped = wrap(model)
    untouched = decode(wrapped, text, PROMPT)[1]
    with skip_experts(wrapped, policy) as skipping:
        torch.testing.assert_close(decode(wrapped, text, PROMPT)[1], wanted, rtol=1e-4, atol=1e-4)
    assert skipping.stats.steps == LENGTH - PROMPT
    torch.testing.assert_close(decode(wrapped, text, PROMPT)[1], untouched, rtol=1e-4, atol=1e-4)


def test_what_is_no_model_or_runs_copies_is_refused_by_name() -> None:
    model = tiny_model("mixtral")
    policy = random_selector(model).at_threshold(SOME)
    with pytest.raises(ModelError, match="a dict is no model"):
        skip_experts({"model": model}, policy)  # type: ignore[arg-type]
    several = nn.DataParallel(model)
    several.device_ids = [0, 1]
    with pytest.raises(ModelError, match="DataParallel runs copies"):
        skip_experts(several, policy)


def test_a_model_compiled_before_attaching_with_experts_that_do_not_compile_is_refused() -> None:
    torch._dynamo.reset()
    model, text = tiny_model("qwen3_moe"), words(3, LENGTH)
    model.set_experts_implementation("eager")
    policy = random_selector(model).at_threshold(SOME)
    model.compile(backend="eager")
    with skip_experts(model, policy), pytest.raises(ModelError, match="set_experts_implementation"):
        decode(model, text, PROMPT)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt_lookup_num_tokens": 2}, DRAFTS),
        ({"assistant_model": "itself"}, DRAFTS),
        ({"use_cache": False}, NO_CACHE),
    ],
)
def test_ways_to_generate_that_are_not_acted_on_say_so_and_write_untouched_text(
    options: dict[str, Any], reason: str
) -> None:
    model, text = tiny_model("qwen3_moe"), words(1, LENGTH)
    if "assistant_model" in options:
        options = {"assistant_model": tiny_model("qwen3_moe")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    untouched = model.generate(text, **options)  # type: ignore[operator]
    with skip_experts(model, random_selector(model).at_threshold(EVERYTHING)) as skipping:
        with pytest.warns(UserWarning, match="decoding without skipping"):
            found = model.generate(text, **options)  # type: ignore[operator]
        assert torch.equal(found, untouched)
        assert set(skipping.stats.passed_by) == {reason}
        assert skipping.stats.passed_by[reason] >= 2
        assert skipping.stats.steps == 0
        model.generate(text, max_new_tokens=4, min_new_tokens=4, do_sample=False)  # type: ignore[operator]
        assert skipping.stats.steps == 3


def test_a_model_that_is_running_in_another_thread_can_be_attached_to() -> None:
    """A server's first request for skipping, while others are under way: these go on as they began."""
    model = tiny_model("qwen3_moe")
    layers = find_moe_layers(model)
    prompt = words(2, LENGTH)
    with torch.no_grad():
        plain = model(input_ids=prompt).logits
    inside, attached, found = threading.Event(), threading.Event(), []

    def wait(module: nn.Module, args: object, output: object) -> None:
        if threading.current_thread() is other and not inside.is_set():
            inside.set()
            attached.wait(60)

    def run() -> None:
        with torch.no_grad():
            found.append(model(input_ids=prompt).logits)

    handle = layers[0].router.register_forward_hook(wait)  # between a router and its experts
    other = threading.Thread(target=run)
    other.start()
    assert inside.wait(60)
    with skip_experts(model, random_selector(model).at_threshold(EVERYTHING)) as skipping:
        attached.set()
        other.join()
        assert torch.equal(found[0], plain)
        assert skipping.stats.steps == 0
        decode(model, prompt, PROMPT)
        assert skipping.stats.steps > 0
    handle.remove()
