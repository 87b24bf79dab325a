"""Ranks through Ray Train: placed, threaded, restarted after a kill, and honest about errors."""

import itertools
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import ControllerError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from longreach.infra import launch
from longreach.infra.cluster import RESERVED_SHARE
from longreach.infra.launch import AbandonedGroups, check_room, run_ranks
from longreach.infra.machine import GIB, usable_memory
from longreach.infra.polling import polling
from longreach.infra.resources import Resources


class Controller:
    """Makes groups as a controller of Ray Train does."""

    def reserve(self):
        group = ray.util.placement_group([{"CPU": 0.4}])
        ray.get(group.ready(), timeout=120)
        return group


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_a_group_that_a_killed_task_left_behind_is_in_nobodys_way(cluster, tmp_path):
    left = cluster.util.placement_group([{"CPU": 1}] * 2)
    cluster.get(left.ready(), timeout=120)
    assert cluster.available_resources().get("CPU", 0) == 0
    job = {"kill_marker": str(tmp_path / "killed")}
    resources = Resources(workers=2, matmul_precision="medium")
    interrupt = signal.getsignal(signal.SIGINT)
    got = run_ranks("toy_ranks:count_ranks", job, resources=resources, name="count", storage=tmp_path)
    assert (tmp_path / "killed").exists()
    assert signal.getsignal(signal.SIGINT) is interrupt, "Ctrl-C would reach a controller that is gone"
    assert (got["rank"], got["world"], got["sum"], got["threads"], got["precision"]) == (0, 2, 3, 1, "medium")


@pytest.mark.slow
def test_ray_keeps_the_foreseen_memory_for_ranks_and_has_less_than_the_machine(cluster, tmp_path):
    room = cluster.cluster_resources()["memory"]
    assert room == pytest.approx(RESERVED_SHARE * usable_memory(), rel=0.01)
    found = run_ranks(
        "toy_ranks:reserved", {}, resources=Resources(workers=2), name="reserved", storage=tmp_path, memory_gib=3
    )
    assert [bundle["memory"] for bundle in found["bundles"]] == [1.5 * GIB, 1.5 * GIB]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpointing", "precision", "given_back"),
    [(True, "highest", True), (True, "medium", False), (False, "highest", False)],
)
def test_ranks_with_activation_checkpointing_give_freed_memory_back(
    cluster, tmp_path, checkpointing, precision, given_back
):
    resources = Resources(activation_checkpointing=checkpointing, matmul_precision=precision)
    found = run_ranks("toy_ranks:left_after_freeing", {}, resources=resources, name="free", storage=tmp_path)
    assert found["huge"] == ("1" if given_back else None)
    assert (found["left"] < 20) == given_back, found


@pytest.mark.slow
def test_ranks_that_wait_for_room_say_so_once_and_go_on_when_there_is_some(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "WAIT_S", 1)
    holder = cluster.remote(num_cpus=1)(threading.Event).remote()  # an empty placement group would be removed
    cluster.get(holder.is_set.remote(), timeout=120)
    said, waits_s = [], []

    def note(text: str) -> None:
        said.append(text)
        time.sleep(2)
        cluster.kill(holder)

    began = time.monotonic()

    found = run_ranks(
        "toy_ranks:reserved",
        {},
        resources=Resources(workers=2),
        name="waits",
        storage=tmp_path,
        memory_gib=3,
        note=note,
        waited=waits_s.append,
    )
    assert len(found["bundles"]) == 2
    (waited_s,) = waits_s
    assert 3 <= waited_s <= time.monotonic() - began
    assert said == ["its ranks wait for other stages to free 2 CPUs and 3.0 GiB"]


@pytest.mark.slow
def test_ranks_do_not_say_that_they_wait_while_others_do(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "WAIT_S", 0)
    others = cluster.util.placement_group([{"CPU": 100}])
    said, waits_s = [], []
    run_ranks(
        "toy_ranks:reserved",
        {},
        resources=Resources(workers=1),
        name="placed",
        storage=tmp_path,
        note=said.append,
        waited=waits_s.append,
    )
    assert not others.wait(0), "there are no 100 CPUs"
    cluster.util.remove_placement_group(others)
    assert (said, waits_s) == ([], [0.0])


def test_ranks_that_wait_name_all_that_they_ask_for_and_nothing_else():
    assert launch._room(Resources(workers=2), 3 * GIB) == "2 CPUs and 6.0 GiB"
    assert launch._room(Resources(workers=1), 0) == "1 CPU"
    assert launch._room(Resources(workers=4, gpus_per_worker=1, cpus_per_worker=2), 0) == "8 CPUs and 4 GPUs"


@pytest.mark.slow
@pytest.mark.drill
def test_a_rank_that_hangs_is_taken_for_dead_and_all_start_again(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "15")
    hung = tmp_path / "hung"
    job = {"kill_marker": str(hung), "signal": signal.SIGSTOP}
    began = time.monotonic()
    got = run_ranks("toy_ranks:count_ranks", job, resources=Resources(workers=2), name="hang", storage=tmp_path)
    print(f"a stopped rank's run ended after {time.monotonic() - began:.0f} s")
    assert got["sum"] == 3
    assert not Path("/proc", hung.read_text()).exists(), "it would hold its memory, and its GPU"


@pytest.mark.slow
def test_a_users_error_on_one_rank_ends_the_run_at_once_as_itself(cluster, tmp_path):
    (tmp_path / "lives").mkdir()
    started = time.monotonic()
    with pytest.raises(ValueError, match="seq_len 30 is not a multiple of 4"):
        run_ranks(
            "toy_ranks:complain_on_one_rank",
            {"lives": str(tmp_path / "lives")},
            resources=Resources(workers=2, max_failures=3),
            name="complain",
            storage=tmp_path,
        )
    assert len(list((tmp_path / "lives").iterdir())) == 2  # no restart
    assert time.monotonic() - started < 120


def test_a_rank_that_dies_while_it_is_started_is_started_again_and_its_cpus_are_freed(cluster, tmp_path, monkeypatch):
    """Ray Train's own way of ending such a run, with the placement group that it leaves behind."""
    lives = []

    class Rank:
        def ready(self):
            return True

    class Trainer:
        def __init__(self, function, *, train_loop_config, **options):
            self.results = Path(train_loop_config["results"].folder)

        def fit(self):
            lives.append(self)
            if len(lives) == 1:
                group = cluster.util.placement_group([{"CPU": 1}] * 2)
                cluster.get(group.ready())
                assert cluster.available_resources().get("CPU", 0) == 0
                place = PlacementGroupSchedulingStrategy(group)
                rank = cluster.remote(num_cpus=1)(Rank).options(scheduling_strategy=place).remote()
                cluster.get(rank.ready.remote())
                threading.Timer(2.5, cluster.kill, [rank]).start()  # dies only after the run was given up
                raise ControllerError(ActorDiedError())
            (self.results / "result.json").write_text("{}")

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    assert run_ranks("toy_ranks:count_ranks", {}, resources=Resources(workers=2), name="again", storage=tmp_path) == {}
    assert len(lives) == 2
    until = time.monotonic() + 20
    while cluster.available_resources().get("CPU", 0) < 2:
        assert time.monotonic() < until, "the first group still holds its CPUs"
        time.sleep(0.1)


def test_a_group_whose_controller_lives_keeps_its_room_however_late_its_ranks_come(cluster, monkeypatch):
    """On a busy machine ranks came more than three seconds after their group, which was then taken from them."""
    known = launch._placement_groups

    def without_deaths(job):
        """What Ray has on record where a group was asked for just before its creator died."""
        groups = known(job)
        for group in groups:
            group.creator_actor_dead = False
        return groups

    monkeypatch.setattr(launch, "_placement_groups", without_deaths)
    controller = cluster.remote(num_cpus=0)(Controller)
    dies, lives, again = controller.remote(), controller.remote(), controller.remote()
    orphan, waits, given_up, newer = cluster.get(
        [dies.reserve.remote(), lives.reserve.remote(), again.reserve.remote(), again.reserve.remote()]
    )

    def states() -> list[str]:
        return [cluster.util.placement_group_table(group)["state"] for group in (orphan, waits, given_up, newer)]

    groups = AbandonedGroups()
    for _ in range(2 * groups.LOOKS):
        assert groups.look()
    assert states() == ["CREATED", "CREATED", "REMOVED", "CREATED"]
    cluster.kill(dies)
    until = time.monotonic() + 20
    while states()[0] != "REMOVED":
        assert time.monotonic() < until, "the dead controller's group still holds its CPU"
        groups.look()
        time.sleep(0.1)
    for _ in range(2 * groups.LOOKS):
        groups.look()
    assert states() == ["REMOVED", "CREATED", "REMOVED", "CREATED"]
    for group in (waits, newer):
        cluster.util.remove_placement_group(group)


@pytest.mark.parametrize(
    ("error", "lives"), [(OSError("disk"), 1), (ActorDiedError(), 3)], ids=["never again", "at most twice again"]
)
def test_ray_trains_own_error_is_raised_when_starting_again_cannot_help(cluster, tmp_path, monkeypatch, error, lives):
    lived = []

    class Trainer:
        def __init__(self, *args, **options):
            pass

        def fit(self):
            lived.append(self)
            raise ControllerError(error)

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    resources = Resources(workers=2, max_failures=2)
    with pytest.raises(ControllerError):
        run_ranks("toy_ranks:count_ranks", {}, resources=resources, name="once", storage=tmp_path)
    assert len(lived) == lives


def test_a_failed_answer_of_rays_state_does_not_keep_ranks_from_starting_again(monkeypatch, capsys):
    looks, lives = [], []

    class Trainer:
        def fit(self):
            lives.append(self)
            if len(lives) == 1:
                raise ControllerError(ActorDiedError())

    def look(groups):
        looks.append(groups)
        if len(looks) == 1:
            raise RuntimeError("no answer within 30 s")

    monkeypatch.setattr(AbandonedGroups, "look", look)
    launch._fit(Trainer(), 1, SimpleNamespace(look=lambda: None))
    assert (len(lives), len(looks)) == (2, 2)
    assert "(no answer within 30 s): trying again" in capsys.readouterr().out


def test_a_look_that_fails_is_told_once_and_followed_by_the_next(capsys):
    enough = threading.Event()
    looks = itertools.count(1)

    def look():
        if next(looks) < 4:
            raise RuntimeError("no answer")
        enough.set()

    with polling(look, every_s=0.01, name="a test"):
        assert enough.wait(60)
    assert capsys.readouterr().err.count("RuntimeError: no answer") == 1


def test_ranks_that_can_never_be_placed_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"3 ranks x 2 CPU need 6 CPUs, but the cluster has 4: lower"):
        check_room({"CPU": 4.0}, Resources(workers=3, cpus_per_worker=2))
    with pytest.raises(ValueError, match=r"2 ranks x 1 GPU need 2 GPUs, but the cluster has 0"):
        check_room({"CPU": 4.0}, Resources(workers=2, gpus_per_worker=1))


def test_ranks_that_fit_are_let_through():
    check_room({"CPU": 4.0, "GPU": 1.0}, Resources(workers=2, cpus_per_worker=2))
