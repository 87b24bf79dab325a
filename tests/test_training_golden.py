"""The losses of every arm on a tiny model, as they were: a change of what is learned does not pass unnoticed.

python tests/test_training_golden.py        # writes tests/golden/losses.json anew; say in the commit why
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from toy_models import job

from longreach.infra.launch import run_local
from longreach.training.recipe import ArmMatrix

GOLDEN = Path(__file__).parent / "golden/losses.json"
SEQ_LEN = 16
MATRIX = ArmMatrix(
    tune=("all", "lora", "lora+embed", "lora+norm", "lora+embed+norm"),
    attention=("causal", "shifted_sparse", "grouped"),
    group_ratio=(2, 4),
)
ARMS = MATRIX.arms(SEQ_LEN)
ELSEWHERE = 1e-4
"""Of losses of about 4: six steps of float32 sums in another order, on a processor with other vectors."""


def losses(folder: Path, arm: str) -> list[float]:
    todo = job(folder, name=arm, arm=ARMS[arm].model_dump())
    run_local("longreach.training.loop:train", todo)
    return [json.loads(line)["loss"] for line in (Path(todo["out"]) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_learns_what_it_learned_before(tmp_path, arm):
    assert losses(tmp_path, arm) == pytest.approx(json.loads(GOLDEN.read_text())[arm], abs=ELSEWHERE)


def test_no_two_arms_learn_the_same():
    assert len({tuple(values) for values in json.loads(GOLDEN.read_text()).values()}) == len(ARMS) == 25


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = {arm: losses(Path(scratch), arm) for arm in ARMS}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(f'  "{arm}": {values}' for arm, values in found.items()) + "\n}\n")
    sys.exit(0)
