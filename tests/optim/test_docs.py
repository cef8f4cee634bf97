"""Every example in docs/optimizer.md runs."""

import re
from pathlib import Path

import pytest

from muonlab.optim.registry import OPTIMIZERS
from muonlab.optim.rules import ELEMENTWISE
from muonlab.optim.views import OPERATIONS

PAGE = Path(__file__).parents[2] / "docs" / "optimizer.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_example_runs_as_printed(number, tmp_path, monkeypatch):
    if "transformers" in EXAMPLES[number]:
        pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    before = [set(registry) for registry in (OPTIMIZERS, ELEMENTWISE, OPERATIONS)]
    try:
        exec(compile(EXAMPLES[number], f"{PAGE.name}[{number}]", "exec"), {"__name__": "example"})
    finally:
        for registry, names in zip((OPTIMIZERS, ELEMENTWISE, OPERATIONS), before):
            for name in set(registry) - names:
                del registry[name]
