"""Fire times against plain oracles and systemd's own, and the rendered files in the hands of systemd and of cron."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import yaml

from longreach.infra import kubernetes
from longreach.infra import schedule as schedule_module
from longreach.infra.kubernetes import Place
from longreach.infra.resources import Resources
from longreach.infra.schedule import TARGETS, Job, Schedule, crontab, on_calendar, render, systemd
from longreach.pipelines import cli, cluster_cli

BERLIN = ZoneInfo("Europe/Berlin")
LOST = datetime(2026, 3, 28, 12, tzinfo=UTC)  # half a day before Berlin's clock jumps from 2:00 to 3:00
DOUBLED = datetime(2026, 10, 24, 12, tzinfo=UTC)  # half a day before 2:00 to 3:00 comes twice


def job(folder=Path("/srv/longreach"), **changes):
    made = {
        "name": "quickstart", "recipe": str(folder / "mine.yaml"), "overrides": ("finetune.steps=4",),
        "program": folder / "longreach", "folder": folder, "text": "name: quickstart\n", "resources": Resources(),
        "store_root": "s3://bucket/prefix",
    }  # fmt: skip
    return Job(**made | changes)


def walls(times):
    return [f"{moment:%d %H:%M %z}" for moment in times]


# ---- when it fires


@pytest.mark.parametrize(
    ("target", "lost", "doubled"),
    [
        ("crontab", ["29 03:00 +0200", "30 02:30 +0200"], ["25 02:30 +0200", "26 02:30 +0100"]),
        ("systemd", ["30 02:30 +0200", "31 02:30 +0200"], ["25 02:30 +0200", "26 02:30 +0100"]),
        ("cronjob", ["30 02:30 +0200", "31 02:30 +0200"], ["25 02:30 +0200", "25 02:30 +0100"]),
        ("ray-cronjob", ["30 02:30 +0200", "31 02:30 +0200"], ["25 02:30 +0200", "25 02:30 +0100"]),
    ],
)
def test_each_target_has_its_own_way_with_the_lost_and_the_doubled_hour(target, lost, doubled):
    schedule = Schedule.parse("30 2 * * *", "Europe/Berlin")
    assert walls(schedule.next(2, target, LOST)) == lost
    assert walls(schedule.next(2, target, DOUBLED)) == doubled


def oracle(minutes, hours, zone, after, days, target):
    """By looking at every minute."""
    found, seen = [], set()
    for count in range(days * 24 * 60):
        moment = after + timedelta(minutes=count + 1)
        wall = moment.astimezone(zone).replace(tzinfo=None)
        before = (moment - timedelta(minutes=1)).astimezone(zone).replace(tzinfo=None)
        due = wall.minute in minutes and wall.hour in hours
        if target == "crontab":  # what lies in a jump comes right after it
            skipped = [before + timedelta(minutes=m) for m in range(1, int((wall - before).total_seconds()) // 60)]
            due |= any(one.minute in minutes and one.hour in hours for one in skipped)
        if due and not (target != "cronjob" and wall in seen):
            found.append(moment)
        seen.add(wall)
    return found


CHANGES = {  # half a day before each change of the clock
    "Europe/Berlin": (LOST, DOUBLED),
    "America/New_York": (datetime(2026, 3, 7, 18, tzinfo=UTC), datetime(2026, 10, 31, 18, tzinfo=UTC)),
    "Australia/Lord_Howe": (
        datetime(2026, 10, 3, 3, tzinfo=UTC),
        datetime(2026, 4, 4, 3, tzinfo=UTC),
    ),  # by half an hour
    "UTC": (LOST,),
}


HALF_AN_HOUR = ("Australia/Lord_Howe", "cronjob")
"""Go's cron goes forward by whole hours, and past an hour that begins at half past: no oracle for it."""


@pytest.mark.parametrize(
    ("zone", "target"), sorted({*itertools.product(CHANGES, ["crontab", "systemd", "cronjob"])} - {HALF_AN_HOUR})
)
def test_fire_times_are_those_of_an_oracle_around_every_change_of_the_clock(zone, target):
    for start, minutes, hours in itertools.product(CHANGES[zone], [(0,), (15, 45), (59,)], [(0,), (1,), (2,), (1, 3)]):
        cron = f"{','.join(map(str, minutes))} {','.join(map(str, hours))} * * *"
        expected = oracle(minutes, hours, ZoneInfo(zone), start, 1, target)
        coming = Schedule.parse(cron, zone).fire_times(start, target)
        got = list(itertools.takewhile(lambda moment, end=start + timedelta(days=1): moment <= end, coming))
        assert [moment.astimezone(UTC) for moment in got] == expected, cron


@pytest.mark.parametrize("target", ["crontab", "systemd"])
def test_nothing_of_the_first_of_two_hours_comes_up_again_in_the_second(target):
    in_the_second = datetime(2026, 10, 25, 1, 15, tzinfo=UTC)
    assert walls(Schedule.parse("30 2 * * *", "Europe/Berlin").next(1, target, in_the_second)) == ["26 02:30 +0100"]


def test_fire_times_rise_and_carry_the_offset_of_their_day():
    for target in TARGETS:
        times = Schedule.parse("*/20 * * * *", "Europe/Berlin").next(200, target, DOUBLED)
        assert all(earlier.timestamp() < later.timestamp() for earlier, later in itertools.pairwise(times))
        assert {moment.utcoffset() for moment in times} == {timedelta(hours=1), timedelta(hours=2)}


def test_how_late_it_is_counts_from_the_last_fire_time():
    schedule = Schedule.parse("0 3 * * 1", "Europe/Berlin")
    monday = datetime(2026, 11, 30, 3, tzinfo=BERLIN)
    assert schedule.late_by(monday.astimezone(UTC) + timedelta(minutes=90)) == timedelta(minutes=90)
    assert schedule.late_by(monday.astimezone(UTC) - timedelta(minutes=1)) == timedelta(days=7) - timedelta(minutes=1)
    after_the_lost_hour = datetime(2026, 3, 29, 10, tzinfo=UTC)
    assert Schedule.parse("0 1 * * *", "Europe/Berlin").late_by(after_the_lost_hour) == timedelta(hours=10)


# ---- what is understood


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("0 3 * * 1", "0 3 * * 1"),
        ("0 3 * * 7", "0 3 * * 0"),
        ("0 3 * * sat,SUN", "0 3 * * 0,6"),
        ("0 3 * jan-mar mon-fri", "0 3 * 1,2,3 1,2,3,4,5"),
        ("5/15 */2 * * *", "5-59/15 */2 * * *"),
        ("0 3 * * 1/2", "0 3 * * 0,1,3,5"),
        ("0 3 * * */2,7", "0 3 * * 0,2,4,6"),
        ("0 3 * */6,DEC */3,SAT", "0 3 * 1,7,12 0,3,6"),
        ("*,5 3 1 * *,7", "* 3 1 * *"),
    ],
)
def test_a_line_is_written_so_that_every_cron_reads_it_alike(written, read):
    assert Schedule.parse(written, "UTC").cron == read


@pytest.mark.parametrize(
    ("cron", "tz", "delay", "says"),
    [
        ("0 3 * *", "UTC", None, "has 4 fields, but needs 5"),
        ("@weekly", "UTC", None, "has 1 fields"),
        ("0 24 * * *", "UTC", None, "hour '24': use 0 to 23"),
        ("60 3 * * *", "UTC", None, "minute '60': use 0 to 59"),
        ("0 3 L * *", "UTC", None, "day of the month 'L': not every target supports"),
        ("0 3 * * 1#2", "UTC", None, "day of the week '1#2': not every target supports"),
        ("0 3 15W * *", "UTC", None, "'15W': not every target supports"),
        ("0 3 * * fri-sun", "UTC", None, "day of the week 'FRI-SUN': use 0 to 7"),
        ("0 3 31 2 *", "UTC", None, "no such day exists"),
        ("0 3 */2 * 1", "UTC", None, "write '*/2' as a list"),
        ("0 3 1 * */2", "UTC", None, "write '*/2' as a list"),
        ("0 3 */5 * */3", "UTC", None, "write '*/5' as a list"),
        ("0 3 1 * */2,7", "UTC", None, "write '*/2,7' as a list"),
        ("0 3 1 * 7,*", "UTC", None, "write '7,*' as a list"),
        ("TZ=UTC 0 3 * * 1", "UTC", None, "set the time zone with its own option"),
        ("0 3 * * 1", "Europe/Berln", None, "did you mean Europe/Berlin?"),
        ("0 3 * * 1", "localtime", None, "tz 'localtime': no such time zone"),
        ("0 3 * * 1", "", None, "tz '': no such time zone"),
        ("0 3 * * 1", "UTC", "2", "max_start_delay '2': write days"),
        ("0 3 * * 1", "UTC", "0h", "max_start_delay '0h': write days"),
        ("0 3 * * 1", "UTC", "9999999999h", "max_start_delay '9999999999h': write days"),
        ("0 * * * *", "UTC", "1h", "max_start_delay '1h': fire times are 1:00:00 apart"),
    ],
)
def test_a_mistake_is_named_with_its_value_and_its_remedy(cron, tz, delay, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Schedule.parse(cron, tz, delay)


def test_a_delay_is_read_in_days_hours_and_minutes():
    assert Schedule.parse("0 3 * * 1", "UTC", "1d2h30m").max_start_delay == timedelta(days=1, hours=2, minutes=30)


# ---- systemd

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


def analyze(*arguments):
    environment = {**os.environ, "TZ": "UTC", "LC_ALL": "C"}
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, env=environment, check=False)


@needs_systemd
@pytest.mark.parametrize(
    "cron", ["30 2 * * *", "*/30 * * * *", "0 3 * * 1,3", "15 1-3 * * *", "0 4 1,15 * 5", "0 0 29 2 *"]
)
@pytest.mark.parametrize("start", [LOST, DOUBLED])
def test_systemd_fires_when_we_say_that_it_does(cron, start):
    schedule, expected = Schedule.parse(cron, "Europe/Berlin"), set()
    for calendar in on_calendar(schedule):
        base = f"--base-time={start:%Y-%m-%d %H:%M:%S} UTC"
        done = analyze("calendar", "--iterations=12", base, calendar)
        assert done.returncode == 0, done.stderr
        expected |= set(re.findall(r"(?:elapse|#\d+): \w+ ([\d-]+ [\d:]+) UTC", done.stdout))
    got = [f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}" for moment in schedule.next(12, "systemd", start)]
    assert got == sorted(expected)[:12]


@needs_systemd
def test_systemd_accepts_the_units_with_the_strangest_paths(tmp_path):
    folder = tmp_path / "a 50% $HOME"
    folder.mkdir()
    (folder / "longreach").write_text("#!/bin/sh\n")
    (folder / "longreach").chmod(0o755)
    schedule = Schedule.parse("0 3 1 * 1", "Europe/Berlin", "2h")
    strange = ('base.source=a "quoted" $5 100% \\ path',)
    for name, text in systemd(schedule, job(folder, name="sink+160m", overrides=strange)).items():
        (tmp_path / name).write_text(text)
    done = analyze("verify", *(str(path) for path in sorted(tmp_path.glob("longreach-sink-160m.*"))))
    assert len(list(tmp_path.glob("longreach-sink-160m.*"))) == 2
    assert f"WorkingDirectory={tmp_path}/a 50%% $HOME\n" in (tmp_path / "longreach-sink-160m.service").read_text()
    ours = [line for line in done.stderr.splitlines() if "longreach" in line]
    assert not ours
    assert done.returncode == 0, done.stderr


def test_what_a_unit_cannot_hold_is_refused():
    schedule = Schedule.parse("0 3 * * 1", "UTC")
    with pytest.raises(ValueError, match="which a unit file cannot hold"):
        systemd(schedule, job(overrides=("name=a\nb",)))
    with pytest.raises(ValueError, match="which a unit file cannot hold"):
        systemd(schedule, job(program=Path("/opt/it's/longreach")))


def test_a_service_has_time_for_checkpoints_and_knows_clean_ends():
    (service,) = (
        text for name, text in systemd(Schedule.parse("0 3 * * 1", "UTC"), job()).items() if "service" in name
    )
    assert int(re.search(r"TimeoutStopSec=(\d+)", service)[1]) >= 30
    assert "KillMode=mixed" in service
    assert "SuccessExitStatus=143 75 3" in service


# ---- cron


def zone_file(name):
    for folder in ("/usr/share/zoneinfo", "/usr/lib/zoneinfo"):
        if (path := Path(folder, name)).exists():
            return path
    pytest.skip("this machine has no zone files")


def test_a_zone_that_is_not_the_machines_is_refused_and_one_of_another_name_is_not():
    schedule = Schedule.parse("0 3 * * 1", "Europe/Berlin")
    with pytest.raises(ValueError, match="tz 'Europe/Berlin': cron uses this machine's time zone, which is Asia/"):
        crontab(schedule, job(), zone_file("Asia/Kathmandu"))
    with pytest.raises(ValueError, match="which is UTC, and Debian's cron ignores CRON_TZ: use --to systemd"):
        crontab(schedule, job(), Path("/nonexistent"))
    with pytest.raises(ValueError, match="time zone, which is Africa/Lagos"):  # Berlin's clock in winter alone
        crontab(schedule, job(), zone_file("Africa/Lagos"))
    assert "0 3 * * 1 cd " in crontab(schedule, job(), zone_file("Europe/Berlin"))
    assert "0 3 * * 1 cd " in crontab(
        schedule, job(), zone_file("Europe/Vienna")
    )  # has gone by Berlin's clock since 1980


def test_what_a_crontab_cannot_hold_is_refused():
    schedule, zone = Schedule.parse("0 3 * * 1", "UTC"), Path("/nonexistent")
    with pytest.raises(ValueError, match="which a crontab cannot hold"):
        crontab(schedule, job(overrides=("name=a\nb",)), zone)
    with pytest.raises(ValueError, match=r"the command has \d{4} bytes, but cron accepts at most 998"):
        crontab(schedule, job(overrides=("name=" + "\N{CYRILLIC SMALL LETTER A}" * 500,)), zone)


def test_a_crontab_does_not_ask_how_late_it_is_since_cron_never_starts_late():
    assert "--max-start-delay" not in crontab(Schedule.parse("0 3 * * 1", "UTC", "2h"), job(), Path("/nonexistent"))


CRON = """\
set -e
mount -t tmpfs tmpfs /var/spool/cron && mkdir -m 1730 /var/spool/cron/crontabs && chgrp crontab /var/spool/cron/crontabs
mount -t tmpfs tmpfs /etc/cron.d
mount -t tmpfs tmpfs /run
mount --bind "$2" /etc/crontab
mount --bind "$3" /etc/localtime
crontab "$1"
exec cron -f
"""


def alone(*command):
    """In mounts and processes of its own, all of which end with it: nothing of the machine's cron is touched."""
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", *command]


@pytest.mark.slow
def test_debians_cron_fires_the_line_by_the_machines_clock_and_ignores_cron_tz(tmp_path):
    if not shutil.which("cron") or not Path("/etc/debian_version").exists():
        pytest.skip("Debian's cron is not installed")
    if (
        not shutil.which("unshare")
        or subprocess.run(alone("mount", "-t", "tmpfs", "x", "/run"), check=False).returncode
    ):
        pytest.skip("this user may not mount: no place to run a cron of its own")
    zone, folder = "Asia/Kathmandu", tmp_path / "50% of 'it'"  # 5:45 ahead of Greenwich, and 3:15 behind Tokyo
    folder.mkdir()
    (folder / "longreach").write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@" >"$0.fired"\n')
    (folder / "longreach").chmod(0o755)
    soon = [datetime.now(UTC) + timedelta(minutes=count) for count in (1, 2)]

    def fields(name):
        local = [moment.astimezone(ZoneInfo(name)) for moment in soon]
        return f"{','.join(f'{m.minute}' for m in local)} {','.join(sorted({f'{m.hour}' for m in local}))} * * *"

    line = crontab(Schedule.parse(fields(zone), zone), job(folder), zone_file(zone))
    control = (
        f"CRON_TZ=Asia/Tokyo\n{fields(zone)} touch {tmp_path}/ignored\n{fields('Asia/Tokyo')} touch {tmp_path}/obeyed\n"
    )
    (tmp_path / "crontab").write_text(line + control)
    (tmp_path / "none").touch()
    arguments = [str(path) for path in (tmp_path / "crontab", tmp_path / "none", zone_file(zone))]
    daemon = subprocess.Popen(alone("sh", "-c", CRON, "sh", *arguments), stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 75
        while time.monotonic() < until and daemon.poll() is None and not (tmp_path / "ignored").exists():
            time.sleep(0.5)
        time.sleep(1)
    finally:
        daemon.kill()
        _, errors = daemon.communicate()
    assert (folder / "longreach.fired").exists(), errors
    said = (folder / "longreach.fired").read_text().splitlines()
    assert said == [str(folder), "run", f"{folder}/mine.yaml", "--set", "finetune.steps=4", "--no-wait", "--quiet"]
    assert (folder / "quickstart.log").exists()
    assert (tmp_path / "ignored").exists()
    assert not (tmp_path / "obeyed").exists()


# ---- Kubernetes


def entrypoint(files):
    """The command of the RayJob that the files lead to."""
    (text,) = files.values()
    made = {one["kind"]: one for one in yaml.safe_load_all(text) if one["metadata"]["name"] != "quickstart-recipe"}
    if "RayCronJob" in made:
        return made["RayCronJob"]["spec"]["jobTemplate"]["entrypoint"]
    return yaml.safe_load(made["ConfigMap"]["data"]["rayjob.yaml"])["spec"]["entrypoint"]


def test_a_ray_cron_job_looks_at_the_clock_itself_and_a_cron_job_lets_kubernetes():
    schedule = Schedule.parse("0 3 * * 1", "Europe/Berlin", "2h")
    sets = "--set finetune.steps=4 --set store.workdir=/var/longreach"
    run = f"longreach run /etc/longreach/recipe.yaml {sets} --address auto"
    assert entrypoint(render(schedule, job(), "cronjob", Place(), enable=False)) == f"{run} --no-wait --quiet"
    guarded = entrypoint(render(schedule, job(), "ray-cronjob", Place(), enable=False))
    assert guarded.startswith("longreach schedule /etc/longreach/recipe.yaml ")
    assert guarded.endswith("--address auto --cron '0 3 * * 1' --tz Europe/Berlin --max-start-delay 120m --run")
    plain = Schedule.parse("0 3 * * 1", "Europe/Berlin")
    assert entrypoint(render(plain, job(), "ray-cronjob", Place(), enable=False)) == f"{run} --no-wait --quiet"


@pytest.mark.parametrize("target", ["ray-cronjob", "cronjob"])
def test_a_cluster_needs_a_store_that_outlives_its_pods(target):
    schedule = Schedule.parse("0 3 * * 1", "UTC")
    with pytest.raises(ValueError, match=r"store\.root '\.longreach' would be a folder inside one pod"):
        render(schedule, job(store_root=".longreach"), target, Place(), enable=False)
    (text,) = render(schedule, job(), target, Place(), enable=True).values()
    assert "suspend: false" in text
    assert "text: |" not in text
    assert "recipe.yaml: |\n    name: quickstart\n" in text


def test_what_the_operator_would_refuse_is_not_rendered():
    with pytest.raises(ValueError, match="has 40 characters, but a RayCronJob takes at most 36"):
        render(Schedule.parse("0 3 * * 1", "UTC"), job(name="q" * 40), "ray-cronjob", Place(), enable=False)
    with pytest.raises(ValueError, match="--to 'airflow': choose one of ray-cronjob, cronjob, systemd, crontab"):
        render(Schedule.parse("0 3 * * 1", "UTC"), job(), "airflow", Place(), enable=False)


def test_names_of_recipes_become_names_of_kubernetes():
    assert kubernetes.dns_name("sink+160m.v2_a") == "sink-160m-v2-a"


# ---- the command


def longreach(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code or 0


def test_the_command_prints_five_fire_times_and_the_files(capsys):
    assert longreach("schedule", "quickstart", "--cron", "0 3 * * 1", "--tz", "Europe/Berlin") == 0
    out, err = capsys.readouterr()
    assert len(re.findall(r"^fires Mon \d{4}-\d\d-\d\d 03:00 \+0[12]00$", err, re.MULTILINE)) == 5
    assert "OnCalendar=Mon *-*-* 03:00:00 Europe/Berlin" in out
    assert f'ExecStart="{Path(sys.executable).with_name("longreach")}" "run" "/' in out


def test_keys_come_from_a_file_that_only_its_owner_reads(tmp_path, capsys):
    keys, out = tmp_path / "my keys.env", tmp_path / "out.txt"
    keys.write_text("LONGREACH_NOTIFY_URL=https://example.org/secret\n")
    options = ("--cron", "0 3 * * 1", "--env-file", str(keys))
    keys.chmod(0o640)
    assert longreach("schedule", "quickstart", *options) == 2
    assert f"chmod 600 {keys}" in capsys.readouterr().err
    keys.chmod(0o600)
    assert longreach("schedule", "quickstart", *options, "--to", "crontab") == 0
    line = capsys.readouterr().out.splitlines()[-1].split(maxsplit=5)[5]
    assert "secret" not in line
    shell = re.sub(r"exec .*", f"exec sh -c 'echo \"$LONGREACH_NOTIFY_URL\"' > {shlex.quote(str(out))}", line)
    subprocess.run(["/bin/sh", "-c", shell], check=True)
    assert out.read_text() == "https://example.org/secret\n"
    assert longreach("schedule", "quickstart", *options, "--to", "systemd") == 0
    assert f"\nEnvironmentFile={keys}\n" in capsys.readouterr().out
    assert longreach("schedule", "quickstart", *options, "--to", "cronjob", "--set", "store.root=s3://b/p") == 2
    assert "Secret longreach-store" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", ["https://h/x?a=1&b=2", "pa$word", "two words", "it's", "~/keys", "a\\b", "`id`", "x\r"]
)
def test_a_value_that_crons_shell_would_not_take_as_it_stands_is_refused_and_taken_in_quotes(tmp_path, value):
    keys, schedule = tmp_path / "keys.env", Schedule.parse("0 3 * * 1", "UTC")
    keys.touch(0o600)
    keys.write_bytes(f"# of cron\n\nKEY={value}\n".encode())
    with pytest.raises(ValueError, match=r"keys\.env, line 3: .* of KEY .*: put the value in single quotes") as refused:
        render(schedule, job(env_file=keys), "crontab", Place(), enable=False)
    assert value not in str(refused.value)
    render(schedule, job(env_file=keys), "systemd", Place(), enable=False)
    quoted = f'"{value}"' if "'" in value else f"'{value}'"
    keys.write_bytes(f"KEY={quoted} \nPLAIN=wJalr/XUtn+FEMI=,:@%\nCHANNEL=https://h/#chan\nTILDE=a~b".encode())
    schedule_module._check_env_file(keys, "crontab")
    command = f'. {shlex.quote(str(keys))} && printf %s "$KEY $PLAIN"'
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=True)
    assert done.stdout.decode() == f"{value} wJalr/XUtn+FEMI=,:@%"


def test_the_command_writes_the_files_into_a_folder(tmp_path, capsys):
    store = "store.root=s3://bucket/prefix"
    options = ("--to", "cronjob", "--out", str(tmp_path / "made"), "--set", store, "--gpu-node", "pool=h100")
    assert longreach("schedule", "quickstart", "--cron", "0 3 * * 1", *options) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "made" / "quickstart.yaml")]
    kinds = [one["kind"] for one in yaml.safe_load_all((tmp_path / "made" / "quickstart.yaml").read_text())]
    assert kinds == ["ConfigMap", "ConfigMap", "ServiceAccount", "Role", "RoleBinding", "CronJob"]


@pytest.mark.parametrize("target", ["ray-cronjob", "cronjob"])
def test_texts_of_this_machine_are_refused_for_pods_that_have_none(target, capsys):
    options = ("--cron", "0 3 * * 1", "--to", target, "--set", "store.root=s3://bucket/prefix")
    assert longreach("schedule", "retrain", *options) == 2
    assert "corpus.sources.0.files 'documents/**/*.txt' is on this machine" in (err := capsys.readouterr().err)
    assert "give --claim" in err
    sources = ("--set", "corpus.sources=[{files: 's3://bucket/texts/*'}]")
    assert longreach("schedule", "retrain", *options, *sources) == 2  # else every fired run would end so
    assert "every node would use its own model registry in its own folder: set tracking.uri" in capsys.readouterr().err
    assert longreach("schedule", "retrain", *options, *sources, "--set", "tracking.uri=http://mlflow:5000") == 0


def test_a_mistake_exits_2_with_one_line(capsys):
    assert longreach("schedule", "quickstart", "--cron", "0 25 * * 1") == 2
    assert "hour '25': use 0 to 23" in capsys.readouterr().err


@pytest.mark.parametrize(("minutes", "runs"), [(30, True), (200, False)])
def test_run_looks_at_the_clock_and_never_waits_for_another_run(monkeypatch, capsys, minutes, runs):
    ran = []
    monkeypatch.setattr(cluster_cli, "run_recipe", lambda loaded, **options: ran.append((loaded.recipe.name, options)))
    fired = datetime.now(UTC) - timedelta(minutes=minutes)
    cron = f"{fired.minute} {fired.hour} * * *"
    guard = ("--cron", cron, "--max-start-delay", "2h", "--run", "--address", "auto")
    assert longreach("schedule", "quickstart", *guard) == 0
    assert ran == ([("quickstart", {"address": "auto", "wait": False, "quiet": True})] if runs else [])
    assert ("skipped:" in capsys.readouterr().err) is not runs
