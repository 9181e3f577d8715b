"""The wrong numbers of docs/audit.md: theirs as reported, ours right, the page as the program prints it."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401 - where there is none, conftest skips this module

ROOT = Path(__file__).parent.parent

TIMES_TOO_LARGE = {
    "radixark/miles_diffusion#70": 5.5 / 2,
    "google/flax#262": (2 / 3) / (66 / 130),
    "huggingface/trl#1514": 2.5 / (10 / 7),
    # (sum of sizes / ranks) / that rounded down, as the report has it
    "Lightning-AI/pytorch-lightning#21859": (5 / 2) / 2,
    "huggingface/trl#2468": 0.9 / 0.6,
    "allenai/open-instruct#614": 1 / 2,
    "radixark/miles#1968": 6 / 12,
    "verl-project/verl#7361": 50 / 30,
    "huggingface/lerobot#4156": 0.29980,
    "radixark/miles_diffusion#35": 1 / math.sqrt(4),  # "x2 on the dp4 recipe"
    "ByteDance-Seed/VeOmni#184": math.sqrt(2),
    "allenai/open-instruct#1808": 4,  # "counted N times"
    "pytorch/pytorch#25162": 22 / 21,
    "NVIDIA-NeMo/Automodel#3247": 2,  # "double-counts"
    "axolotl-ai-cloud/axolotl#3291": 2,  # "basically double the true value"
    "axolotl-ai-cloud/axolotl#3940": 600 / 4600,
    "huggingface/transformers#41156": 21,
    "allenai/open-instruct#1032": 5,
}


def example() -> Any:
    path = ROOT / "examples/audit/wrong_numbers.py"
    spec = importlib.util.spec_from_file_location("wrong_numbers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


AUDIT = example()


@pytest.mark.parametrize("case", AUDIT.CASES, ids=lambda case: case.report)
def test_their_number_is_off_as_reported_and_ours_is_the_truth(case: Any) -> None:
    found = case.figures()
    assert found.ours == pytest.approx(found.truth, rel=1e-12)
    assert found.theirs / found.truth == pytest.approx(TIMES_TOO_LARGE[case.report], rel=1e-4)
    assert found.theirs != pytest.approx(found.truth, rel=0.01)


def test_the_page_shows_each_case_as_the_program_prints_it() -> None:
    page = (ROOT / "docs/audit.md").read_text().splitlines()
    assert [line for line in page if line.startswith("|")] == AUDIT.markdown(links=True)
    assert {case.report for case in AUDIT.CASES} == TIMES_TOO_LARGE.keys()
