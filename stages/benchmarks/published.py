"""Published scores beside which the page puts ours: pass@1 in percent."""

from phimini.stages.report.page import PAPER, STAGE_NAMES

BESIDE = ("aime24", "aime25", "math500", "gpqa_diamond", "gsm8k")
"""benchmarks of the table"""
_OF_PAPER = ("aime24", "math500", "gpqa_diamond")


def _paper(*values: float) -> dict[str, str]:
    return {name: f"{value:.1f}" for name, value in zip(_OF_PAPER, values, strict=True)}


def _again(*values: float) -> dict[str, str]:
    return {name: f"{value:.2f}" for name, value in zip(BESIDE[:4], values, strict=True)}


TABLES: dict[str, dict[str, dict[str, str]]] = {
    "The paper, arXiv 2504.21233": {
        "o1-mini": _paper(63.6, 90.0, 60.0),
        "DeepSeek-R1-Distill-Qwen-7B": _paper(53.3, 91.4, 49.5),
        "DeepSeek-R1-Distill-Llama-8B": _paper(43.3, 86.9, 47.3),
        "Bespoke-Stratos-7B": _paper(20.0, 82.0, 37.8),
        "OpenThinker-7B": _paper(31.3, 83.0, 42.4),
        "Llama-3.2-3B-Instruct": _paper(6.7, 44.4, 25.3),
        "Phi-4-Mini": _paper(10.0, 71.8, 36.9),
        "Phi-4-Mini-Reasoning": _paper(57.5, 94.6, 52.0),
    },
    "Microsoft's stricter re-measurement, arXiv 2507.06607: 64 samples for AIME, 8 for the others": {
        "DeepSeek-R1-Distill-Qwen-1.5B": _again(29.58, 20.78, 84.50, 37.69),
        "DeepSeek-R1-Distill-Qwen-7B": _again(53.70, 35.94, 93.03, 47.85),
        "DeepSeek-R1-Distill-Llama-8B": _again(43.96, 27.34, 87.48, 45.83),
        "Bespoke-Stratos-7B": _again(21.51, 18.28, 80.73, 38.51),
        "OpenThinker-7B": _again(29.69, 24.32, 87.25, 41.60),
        "Phi-4-Mini-Reasoning": _again(48.13, 31.77, 91.20, 44.51),
        "Phi-4-Mini-Flash-Reasoning (no RL)": _again(52.29, 33.59, 92.45, 45.08),
    },
    "The paper's stages": {STAGE_NAMES[stage]: _paper(*values) for stage, values in PAPER.items()},
}
"""rows of published tables: scores by model and benchmark"""
