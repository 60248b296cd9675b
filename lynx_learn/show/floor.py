"""What a calibration says of its noise floor and of the group that was decoded for real, in sentences."""

from typing import Any

# Share of the smallest budget above which the noise floor is worth a word, and share of a budget by which its group may
# lose something else for real. Measured on the reference MoE at budgets .003 to .03: in float32 less than .002 and .001, in
# bfloat16 .11 and .03, which is rounding; a decode that is another computation is 30 budgets away.
NOTED, DIFFERENT = 0.25, 0.1


def floor_lines(how: dict[str, Any]) -> list[str]:
    """Sentences of one metric's calibration; none where an earlier version did not measure it."""
    floor = how.get("floor")
    return [] if floor is None else [*_floor(floor, min(map(float, how["cells"]))), *_real(how["real"])]


def _floor(floor: dict[str, Any], smallest: float) -> list[str]:
    measured = floor["precision"] is not None
    precision = f"{floor['precision']:.2g} in {floor['other']}" if measured else f"not measured in {floor['other']}"
    lines = [
        f"Noise floor, the untouched model against itself: {floor['cached']:.2g} between one pass and a decode with a cache "
        f"(batch of {floor['batch_size']}, {floor['steps']} steps), {precision}; smallest budget {smallest:g}."
    ]
    highest = max(floor["cached"], floor["precision"] or 0.0)
    if highest > smallest:
        lines.append(
            f"The smallest budget, {smallest:g}, is below the noise floor: a loss of that size cannot be told from rounding."
        )
    elif highest > NOTED * smallest:
        lines.append(f"The noise floor is more than a quarter of the smallest budget, {smallest:g}.")
    return lines


def _real(real: dict[str, Any] | None) -> list[str]:
    if real is None:
        return []
    lines = [
        f"One group decoded for real at budget {real['budget']} loses {real['real']:.4f}, by simulated decode "
        f"{real['simulated']:.4f}."
    ]
    if abs(real["real"] - real["simulated"]) > DIFFERENT * float(real["budget"]):
        lines.append(
            "These differ by more than a tenth of the budget: what was measured by simulated decode is not what is lost in "
            "a real one."
        )
    return lines
