"""Experts and other weights in float8, as DeepSeek-V3 and Qwen3-FP8 ship them and transformers loads them."""
