"""Threads and precision of a process, as the resources of a recipe ask for them."""

import torch

from longreach.infra.resources import Resources
from longreach.pipelines.evaluate import _number_setting


def test_a_task_sets_threads_and_precision_whatever_the_task_before_it_had_set():
    before = torch.get_num_threads()
    try:
        Resources(matmul_precision="medium").prepare_torch(2)
        assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == ("medium", 2)
        Resources().prepare_torch(1)
        assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == ("highest", 1)
    finally:
        Resources().prepare_torch(before)


def test_cells_of_a_half_done_grid_are_not_mixed_with_those_of_another_precision():
    highest = _number_setting(Resources())
    assert highest == "float32, GPUs: 0"  # as in grids that were left half done before there was a choice
    assert _number_setting(Resources(matmul_precision="medium")) != highest
