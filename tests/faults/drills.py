"""Run the tests that inject the faults of docs/reliability.md.

    make drill                                           # all faults
    python tests/faults/drills.py -m "not slow"          # 4 minutes on two busy cores
    python tests/faults/drills.py --faults 8 21          # some faults

Most of these tests are in the test file of the code that they break; this folder has the others.
docs/reliability.md says what is expected and what was measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ARTIFACT, LEASE, MIRROR = (f"test_infra_{name}.py" for name in ("artifact", "lease", "mirror"))
CHECKPOINT = "test_training_checkpoint.py"
LOOP, SKIPS, DOCUMENTS, PACKED = (f"test_training_{name}.py" for name in ("loop", "skips", "documents", "corpus"))
CONVERT, RUNNER, QUICKSTART = "test_training_convert.py", "test_pipelines_runner.py", "test_quickstart.py"
S3, DISK, NAMES = "faults/test_faults_s3.py", "faults/test_faults_disk.py", "faults/test_faults_names.py"
THREE_KILLS = f"{QUICKSTART}::test_kill_9_of_a_rank_a_stage_task_and_the_driver_costs_at_most_one_checkpoint_interval"

DRILLS: dict[int, tuple[str, ...]] = {
    1: (
        THREE_KILLS,
        "test_infra_launch.py::test_a_killed_rank_is_restarted_and_a_group_that_a_killed_task_left_behind_is_in_nobodys_way",
    ),
    2: (THREE_KILLS, f"{LEASE}::test_a_dead_holder_is_replaced_and_a_merely_slow_one_learns_that_it_lost"),
    3: (
        THREE_KILLS,
        f"{RUNNER}::test_a_stage_task_killed_with_sigkill_is_retried_and_sees_its_earlier_checkpoint",
        f"{ARTIFACT}::test_the_first_publisher_wins_and_the_orphan_is_refused_and_removed",
        f"{LOOP}::test_an_attempt_superseded_while_it_trains_ends_its_step_and_leaves_no_result",
    ),
    4: (
        "test_cluster.py::test_a_lost_node_costs_the_steps_since_the_newest_pushed_checkpoint",
        "faults/test_faults_nodes.py::test_one_rank_of_each_disk_acts_for_it",
        "faults/test_faults_upload.py::test_training_goes_on_while_a_checkpoint_is_uploaded_and_it_counts_once_all_nodes_have_done_so",
        "faults/test_faults_upload.py::test_all_ranks_learn_of_a_failed_upload_and_the_next_one_removes_what_it_left",
    ),
    5: (
        f"{QUICKSTART}::test_sigterm_ctrl_c_and_a_closed_terminal_leave_a_checkpoint_a_free_lease_and_no_step_to_repeat",
    ),
    6: (
        f"{CHECKPOINT}::test_a_damaged_checkpoint_is_passed_over_and_said",
        f"{CHECKPOINT}::test_the_newest_of_all_attempts_wins_and_a_missing_file_disqualifies",
        f"{CHECKPOINT}::test_a_checkpoint_that_was_never_finished_is_not_seen_and_goes",
    ),
    7: (
        f"{ARTIFACT}::test_damaged_files_are_noticed_and_named",
        f"{ARTIFACT}::test_a_remote_download_that_was_damaged_is_brought_again",
        f"{QUICKSTART}::test_a_flipped_byte_in_a_shard_is_noticed_and_only_packing_runs_again",
        f"{CONVERT}::test_a_missing_shard_is_named",
    ),
    8: (
        f"{DISK}::test_a_full_disk_leaves_what_was_published_and_nothing_half_written",
        f"{DISK}::test_a_full_disks_error_names_the_file_that_did_not_fit",
        f"{DISK}::test_a_disk_that_fills_while_training_keeps_the_last_good_checkpoint",
        f"{DISK}::test_a_disk_that_fills_while_training_is_called_full_by_name",
    ),
    9: (
        f"{MIRROR}::test_an_outage_at_the_start_in_the_middle_and_at_the_end_costs_no_time_and_no_point",
        f"{MIRROR}::test_lost_answers_double_neither_runs_nor_points",
        f"{MIRROR}::test_a_mirror_killed_in_the_middle_goes_on_without_gaps_or_doubles",
    ),
    10: (
        f"{DOCUMENTS}::test_malformed_lines_are_skipped_and_named_with_file_line_and_reason",
        f"{DOCUMENTS}::test_a_text_file_with_invalid_utf8_is_skipped_and_its_line_named",
        f"{PACKED}::test_more_malformed_entries_than_the_limit_fail_naming_the_first",
    ),
    11: (
        f"{PACKED}::test_one_large_document_is_streamed_and_loses_no_token",
        "faults/test_faults_document.py::test_a_document_of_100_mb_is_packed_in_a_fraction_of_its_size",
    ),
    12: (
        f"{RUNNER}::test_a_second_run_of_a_recipe_is_refused_while_one_lives",
        f"{LEASE}::test_of_two_runs_started_together_one_waits_for_the_other",
        f"{ARTIFACT}::test_of_many_publishers_at_once_exactly_one_wins",
    ),
    13: (
        "faults/test_faults_clock.py::test_a_clock_that_jumps_neither_takes_a_live_runs_lease_nor_keeps_a_dead_ones",
        "faults/test_faults_clock.py::test_attempts_are_numbered_whatever_the_clock_says",
    ),
    14: (
        f"{SKIPS}::test_a_skipped_step_leaves_weights_and_optimizer_as_they_were",
        f"{SKIPS}::test_after_too_many_in_a_row_training_goes_back_once_and_leaves_the_bad_steps_out",
        f"{SKIPS}::test_when_going_back_does_not_help_training_stops_and_names_the_rows",
        f"{SKIPS}::test_weights_that_blow_up_stop_training_and_no_checkpoint_of_them_is_kept",
    ),
    15: (
        "test_pipelines_foresee.py::test_a_training_that_cannot_fit_is_refused_before_anything_starts",
        f"{LOOP}::test_out_of_memory_says_what_would_fit",
        "test_infra_launch.py::test_a_users_error_on_one_rank_ends_the_run_at_once_as_itself",
    ),
    16: (
        "test_pipelines_recipe.py::test_a_mistyped_field_is_shown_with_its_line_and_the_nearest_field",
        "test_pipelines_cli.py::test_a_bad_recipe_is_exit_2_with_all_its_mistakes",
    ),
    17: (
        f"{CHECKPOINT}::test_another_number_of_ranks_goes_on_with_the_same_rows",
        f"{CHECKPOINT}::test_another_zero_stage_or_dtype_is_refused_with_both_values",
    ),
    18: (
        f"{CONVERT}::test_a_hub_that_is_away_fails_in_seconds_and_names_the_local_ways",
        f"{DOCUMENTS}::test_a_hub_dataset_whose_commit_cannot_be_resolved_says_what_to_set",
        "faults/test_faults_hub.py::test_a_hub_that_refuses_or_never_answers_is_named_within_its_time",
    ),
    19: (
        f"{DISK}::test_a_root_that_may_not_be_written_is_named_and_what_is_there_can_be_read",
        "test_infra_doctor.py::test_unwritable_home_and_root_are_found",
        f"{ARTIFACT}::test_a_manifest_cannot_name_files_outside_its_folder",
        f"{NAMES}::test_a_recipes_names_are_folders_of_their_own",
        f"{NAMES}::test_a_documents_name_is_never_a_path",
        f"{NAMES}::test_what_a_link_in_an_artifact_leads_to_cannot_change_unnoticed",
        f"{NAMES}::test_removing_an_attempt_follows_no_link",
        f"{NAMES}::test_a_key_of_the_store_cannot_lead_out_of_the_folder_that_is_pulled",
    ),
    20: (
        f"{CONVERT}::test_pickled_weights_are_refused",
        f"{CHECKPOINT}::test_a_checkpoint_of_another_recipe_is_not_resumed_from",
        "faults/test_faults_pickles.py::test_a_pickle_in_a_checkpoint_is_not_run_unless_its_manifest_vouches_for_it",
        "faults/test_faults_pickles.py::test_a_pickle_in_a_model_folder_is_never_opened",
        "faults/test_faults_pickles.py::test_a_pickle_named_like_a_tokenizer_is_not_copied",
    ),
    21: (
        f"{S3}::test_an_answer_of_500_now_and_then_costs_nothing",
        f"{S3}::test_a_publication_whose_answer_was_lost_is_a_publication",
        f"{S3}::test_a_store_that_only_answers_500_is_named_and_the_attempt_is_published_later",
        f"{S3}::test_a_slow_store_takes_no_lease_from_a_live_holder",
        f"{S3}::test_a_lease_outlives_a_store_that_is_away_for_a_while",
        "test_infra_lease.py::test_a_store_that_is_away_at_the_release_changes_no_outcome_and_the_next_run_takes_over",
    ),
    22: (
        "faults/test_faults_versions.py::test_a_node_of_another_ray_does_not_join",
        "faults/test_faults_versions.py::test_a_stage_on_a_node_of_another_longreach_is_refused_with_both_versions",
    ),
    23: (
        "faults/test_faults_power.py::test_a_power_cut_at_any_moment_of_publication_leaves_the_artifact_or_the_checkpoint",
        "faults/test_faults_power.py::test_a_power_cut_at_any_moment_of_a_checkpoint_leaves_the_newest_finished_one",
    ),
    24: ("test_infra_launch.py::test_a_rank_that_hangs_is_taken_for_dead_and_all_start_again",),
    25: (
        "test_hostile_input.py::test_a_model_that_lies_is_refused_by_name_or_taken_without_what_lies",
        "test_hostile_input.py::test_a_text_that_lies_is_refused_by_name_or_said_to_be_malformed",
    ),
    26: (
        "test_infra_cluster.py::test_a_stage_that_fills_the_memory_is_ended_and_not_tried_for_ever",
        "test_infra_launch.py::test_ray_keeps_the_foreseen_memory_for_ranks_and_has_less_than_the_machine",
        "test_infra_cluster.py::test_memory_is_asked_for_that_some_node_has",
    ),
}
"""Number of a fault in docs/reliability.md -> pytest node ids below tests/."""


def main() -> int:
    import pytest

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, nargs="+", choices=DRILLS, default=list(DRILLS), metavar="NUMBER")
    options, rest = parser.parse_known_args()
    tests = Path(__file__).parents[1]
    chosen = dict.fromkeys(test for number in options.faults for test in DRILLS[number])
    return pytest.main(["-m", "", *(str(tests / test) for test in chosen), *rest])


if __name__ == "__main__":
    sys.exit(main())
