"""Schedules: validate a cron line, compute its next fire times, and write the files for a scheduler.

Schedulers differ when clocks change. For a fixed time in the hour that a zone skips, Debian's cron
fires right after that hour, while systemd and Kubernetes skip it. In the hour that occurs twice,
Kubernetes fires twice, the others once. `next` does what the target does. Firing twice is harmless:
a run that finds another one alive exits with 75 (infra/lease.py), and one that finds everything
published ends in seconds. max_start_delay prevents late starts by a scheduler that catches up
(systemd after a reboot, KubeRay after an outage).

    print(*Schedule.parse("30 2 * * *", "Europe/Berlin").next(5, "systemd"), sep="\n")
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from longreach.infra import kubernetes
from longreach.infra.resources import Resources

TARGETS = ("ray-cronjob", "cronjob", "systemd", "crontab")
FIELDS = {"minute": (0, 59), "hour": (0, 23), "day of the month": (1, 31), "month": (1, 12), "day of the week": (0, 7)}
LONGEST_CRONTAB_LINE = 998
"""The longest command that Debian's cron accepts, in bytes."""
AS_IT_STANDS = re.compile(r"""'[^']*'|"[^"$`\\]*"|([^\s'"$`&|;<>()\\~:]|:(?!~)|(?!^)~)*""")
"""A value in an --env-file that a shell and systemd read alike."""


@dataclass(frozen=True)
class Schedule:
    """A cron line of five fields and its time zone."""

    cron: str
    tz: str
    max_start_delay: timedelta | None = None

    @classmethod
    def parse(cls, cron: str, tz: str, max_start_delay: str | None = None) -> Schedule:
        """Return the schedule. Raises ValueError if a field is invalid or targets would interpret the
        line differently; the message says what to write."""
        _check_zone(tz)
        schedule = cls(_normal(cron), tz, _duration(max_start_delay) if max_start_delay else None)
        ticks = [tick.astimezone(UTC) for tick in schedule.next(50, "systemd")]
        gap = min((after - before for before, after in pairwise(ticks)), default=timedelta.max)
        if schedule.max_start_delay and schedule.max_start_delay >= gap:
            raise ValueError(
                f"max_start_delay {max_start_delay!r}: fire times are {gap} apart, so a run would never be that late: "
                "make it shorter, or leave it out"
            )
        return schedule

    def fire_times(self, after: datetime, target: str) -> Iterator[datetime]:
        """Yield the fire times of `target` after `after` (which must have a zone), in the schedule's
        zone.

        Where a zone skips midnight itself (Cairo, Beirut, Santiago), Go's cron skips or moves that
        day; this method does not.
        """
        zone = ZoneInfo(self.tz)
        start = after.astimezone(zone)
        times: Iterator[datetime]
        if target == "systemd":  # wall-clock time: skips a time that does not exist, takes the first of two
            walls = (wall.replace(tzinfo=zone) for wall in CronSim(self.cron, start.replace(tzinfo=None)))
            times = filter(_exists, walls)
        elif target == "crontab":  # without seconds, cronsim behaves like Debian's cron
            times = CronSim(self.cron, start)
        else:  # with seconds, it counts instants, as Go's cron does
            times = CronSim(f"0 {self.cron}", start)
        for time in times:
            # Started in the second of two equal hours, cronsim yields times of the first one, too.
            if (instant := time.astimezone(UTC)) > after:
                yield instant.astimezone(zone)

    def next(self, count: int, target: str, after: datetime | None = None) -> list[datetime]:
        """Return the next `count` fire times."""
        return list(islice(self.fire_times(after or datetime.now(UTC), target), count))

    def late_by(self, now: datetime) -> timedelta:
        """Return how long ago the last fire time was. In an hour that occurs twice, the nearer of the
        two counts."""
        return now - next(CronSim(f"0 {self.cron}", now.astimezone(ZoneInfo(self.tz)), reverse=True))

    def command(self, recipe: str, overrides: tuple[str, ...], program: str, address: str | None = None) -> list[str]:
        """Return the command that a target starts. It never waits for another run, and with
        max_start_delay it checks first that it is not too late."""
        sets = [part for text in overrides for part in ("--set", text)]
        where = ["--address", address] if address else []
        if self.max_start_delay is None:
            return [program, "run", recipe, *sets, *where, "--no-wait", "--quiet"]
        delay = f"{int(self.max_start_delay.total_seconds()) // 60}m"
        guard = ["--cron", self.cron, "--tz", self.tz, "--max-start-delay", delay, "--run"]
        return [program, "schedule", recipe, *sets, *where, *guard]


@dataclass(frozen=True)
class Job:
    """What a schedule starts: the fields for this machine and those for a cluster."""

    name: str
    recipe: str
    """The name of a built-in recipe, or an absolute path."""
    overrides: tuple[str, ...]
    program: Path
    """The absolute path of the longreach command on this machine."""
    folder: Path
    """The working directory on this machine."""
    text: str
    """The content of the recipe file, for a cluster."""
    resources: Resources
    store_root: str
    env_file: Path | None = None
    """A file on this machine with NAME=value lines, such as credentials, that a unit or crontab reads."""


def render(schedule: Schedule, job: Job, target: str, place: kubernetes.Place, *, enable: bool) -> dict[str, str]:
    """Return the target's files by name. Raises ValueError if the target cannot run this job; the
    message says what to change."""
    if job.env_file:
        _check_env_file(job.env_file, target)
    if target == "systemd":
        return systemd(schedule, job)
    if target == "crontab":
        return {f"{job.name}.crontab": crontab(schedule, job)}
    if target not in TARGETS:
        raise ValueError(f"--to {target!r}: choose one of {', '.join(TARGETS)}")
    if "://" not in job.store_root:
        raise ValueError(
            f"store.root {job.store_root!r} would be a folder inside one pod, and its artifacts and lease would be "
            "lost with that pod: --set store.root=s3://bucket/prefix"
        )
    name = kubernetes.dns_name(job.name)
    overrides = (*job.overrides, f"store.workdir={kubernetes.WORKDIR}")
    replays = target == "ray-cronjob"  # a CronJob drops late starts by itself
    guarded = schedule if replays else Schedule(schedule.cron, schedule.tz)
    entrypoint = guarded.command(kubernetes.RECIPE_FILE, overrides, "longreach", "auto")
    ray_job = kubernetes.ray_job(name, entrypoint, job.resources, place)
    timer = (name, schedule.cron, schedule.tz, ray_job, place)
    if replays:
        timers = [kubernetes.ray_cron_job(*timer, suspend=not enable)]
    else:
        timers = kubernetes.cron_job(*timer, suspend=not enable, max_start_delay=schedule.max_start_delay)
    manifests = [kubernetes.recipe_map(name, job.text, place), *timers]
    problems = []
    for manifest in [*manifests, ray_job]:
        problems += kubernetes.check(manifest)
    if problems:
        raise ValueError("\n".join(problems))
    return {f"{name}.yaml": kubernetes.dump(manifests)}


def _check_env_file(file: Path, target: str) -> None:
    """Raise ValueError for a file that the target cannot read, or that other users can read."""
    if target not in ("systemd", "crontab"):
        raise ValueError(
            "--env-file is a file on this machine: pods get their credentials from the Secret longreach-store"
        )
    if not file.is_file():
        raise ValueError(f"--env-file {file}: no such file; create it with NAME=value lines")
    if mode := file.stat().st_mode & 0o077:
        raise ValueError(
            f"--env-file {file} is accessible to other users (group and other mode {mode:03o}): chmod 600 {file}"
        )
    if re.search("[\"'\\\\\n]", str(file)):
        raise ValueError(f"--env-file {str(file)!r} contains a character that a unit file cannot hold: rename it")
    if target == "crontab":  # its shell reads the file
        for number, line in enumerate(file.read_bytes().decode(errors="surrogateescape").split("\n"), start=1):
            if not (line := line.strip(" \t")) or line.startswith("#"):
                continue
            setting = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", line, re.ASCII)
            if setting is None:
                raise ValueError(
                    f"--env-file {file}, line {number}: write NAME=value, without export and spaces around ="
                )
            if not AS_IT_STANDS.fullmatch(setting[2]):
                raise ValueError(
                    f"--env-file {file}, line {number}: cron's shell would change the value of {setting[1]} or execute "
                    f"part of it: put the value in single quotes, as in {setting[1]}='value' (systemd reads this alike)"
                )


SERVICE = """\
# {unit}.service
[Unit]
Description=longreach: {name}

[Service]
Type=exec
WorkingDirectory={folder}
{environment}ExecStart={command}
# SIGTERM goes to the run only, which lets its ranks write their checkpoints. The timeout kills what is left.
KillMode=mixed
TimeoutStopSec=120
# Not failures: 143 (stopped on request), 75 (another run of this recipe is live), 3 (the gate kept the champion).
SuccessExitStatus=143 75 3
NoNewPrivileges=true
"""
TIMER = """\
# {unit}.timer
[Unit]
Description=longreach: {name}, {cron} in {tz}

[Timer]
{calendars}
# If fire times were missed while the machine was off, run once after it starts.
Persistent=true

[Install]
WantedBy=timers.target
"""


def systemd(schedule: Schedule, job: Job) -> dict[str, str]:
    """Return a service and its timer, for `systemctl --user` or, with a User= line added, for the
    system manager."""
    unit = "longreach-" + job.name.replace("+", "-")  # a unit's name must not contain `+`
    arguments = schedule.command(job.recipe, job.overrides, str(job.program))
    if unfit := re.search("[\"'\\\\]", str(job.program)) or re.search("\n", "".join([*arguments, str(job.folder)])):
        raise ValueError(f"{unfit.string!r} contains {unfit[0]!r}, which a unit file cannot hold: rename it")
    calendars = "\n".join(f"OnCalendar={text}" for text in on_calendar(schedule))
    command = " ".join([f'"{job.program}"'.replace("%", "%%"), *map(_unit_quoted, arguments[1:])])
    folder = str(job.folder).replace("%", "%%")
    environment = ""
    if job.env_file:
        environment = f"EnvironmentFile={job.env_file}\n".replace("%", "%%")
    service = SERVICE.format(unit=unit, name=job.name, folder=folder, command=command, environment=environment)
    timer = TIMER.format(unit=unit, name=job.name, cron=schedule.cron, tz=schedule.tz, calendars=calendars)
    return {f"{unit}.service": service, f"{unit}.timer": timer}


def on_calendar(schedule: Schedule) -> list[str]:
    """Return the schedule as systemd calendar expressions. There are two if the cron line means "this
    day of the month or that day of the week"."""
    sim = CronSim(schedule.cron, datetime(2000, 1, 1))
    names = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"]
    every = [set(range(low, high + 1)) for low, high in FIELDS.values()]

    def listed(chosen: set[int], full: set[int]) -> str:
        if chosen >= full:
            return "*"
        return ",".join(f"{value:02}" for value in sorted(chosen))

    week, weekdays = "", _weekdays(sim)
    if len(weekdays) < 7:
        week = ",".join(names[day] for day in sorted(weekdays)) + " "
    time = f"{listed(sim.hours, every[1])}:{listed(sim.minutes, every[0])}:00 {schedule.tz}"
    months, days = listed(sim.months, every[3]), listed(sim.days, every[2])
    if sim.day_and:
        return [f"{week}*-{months}-{days} {time}"]
    return [f"*-{months}-{days} {time}", f"{week}*-{months}-* {time}"]


def crontab(schedule: Schedule, job: Job, localtime: Path = Path("/etc/localtime")) -> str:
    """Return the text for `crontab`. Cron never starts late, so max_start_delay is not needed.

    Raises ValueError if the zone is not this machine's: Debian's cron ignores CRON_TZ, and hours
    converted to the machine's zone would be wrong for half of the year.
    """
    if not _is_zone_of_machine(schedule.tz, localtime):
        zone = "UTC"
        if localtime.exists():
            zone = str(localtime.resolve()).partition("zoneinfo/")[2] or str(localtime)
        raise ValueError(
            f"tz {schedule.tz!r}: cron uses this machine's time zone, which is {zone}, and Debian's cron ignores "
            "CRON_TZ: use --to systemd, which supports time zones, or set --tz to the machine's zone"
        )
    arguments = Schedule(schedule.cron, schedule.tz).command(job.recipe, job.overrides, str(job.program))
    environment = ""
    if job.env_file:
        environment = f"set -a && . {shlex.quote(str(job.env_file))} && set +a && "  # -a: export the variables
    command = f"cd {shlex.quote(str(job.folder))} && {environment}exec {shlex.join(arguments)} >>{job.name}.log 2>&1"
    for unfit in "\\\n":
        if unfit in command:
            raise ValueError(f"{command!r} contains {unfit!r}, which a crontab cannot hold: rename the file or value")
    command = command.replace("%", "\\%")  # cron reads % as a line break
    if (size := len(command.encode())) > LONGEST_CRONTAB_LINE:
        raise ValueError(
            f"the command has {size} bytes, but cron accepts at most {LONGEST_CRONTAB_LINE}: write the "
            "overrides into the recipe"
        )
    return f"# longreach: {job.name}, in {schedule.tz}, the zone of this machine\n{schedule.cron} {command}\n"


def _is_zone_of_machine(tz: str, localtime: Path) -> bool:
    """Return whether a zone has the machine's UTC offset on each day of the next two years. Names
    cannot be compared, since a zone has several."""
    if not localtime.exists():
        return tz in ("UTC", "Etc/UTC")
    with localtime.open("rb") as file:
        machine = ZoneInfo.from_file(file)
    days = (datetime.now(UTC) + timedelta(days=day) for day in range(730))
    return all(machine.utcoffset(day) == ZoneInfo(tz).utcoffset(day) for day in days)


def _normal(cron: str) -> str:
    """Return the cron line rewritten so that Debian's cron, Go's cron and cronsim read it alike."""
    if "TZ=" in cron.upper():
        raise ValueError(f"cron {cron!r}: set the time zone with its own option, such as --tz Europe/Berlin")
    fields = cron.upper().split()
    if len(fields) != len(FIELDS):
        raise ValueError(
            f"cron {cron!r} has {len(fields)} fields, but needs 5: {', '.join(FIELDS)} (write @weekly as 0 0 * * 0)"
        )
    day, week = fields[2], fields[4]
    for index, (text, (name, (low, high))) in enumerate(zip(fields, FIELDS.items(), strict=True)):
        if re.search("[LW#?]", re.sub("[A-Z]{3}", "", text)):
            raise ValueError(f"cron {cron!r}, {name} {text!r}: not every target supports L, W, # and ?: use numbers")
        alone = ["*"] * len(FIELDS)
        alone[index] = text
        try:
            sim = CronSim(" ".join(alone), datetime(2000, 1, 1, tzinfo=UTC))
        except CronSimError as error:
            raise ValueError(f"cron {cron!r}, {name} {text!r}: use {low} to {high}, *, lists, ranges, /step") from error
        chosen = {"month": sim.months, "day of the week": _weekdays(sim)}
        text = re.sub(r"^\*(/0*1)?,.*", "*", text)
        if name in chosen and ("," in text or text[0] != "*"):  # Go's cron takes no 7, Debian's takes no lists of names
            text = ",".join(map(str, sorted(chosen[name])))
        fields[index] = re.sub(r"(^|,)(\d+)/", rf"\1\2-{high}/", text)  # Debian's cron needs a range before a step
    # Both days have to match if a field begins with * (Debian), or has an item * or */1 (Go); otherwise either.
    both_in_go = any(re.fullmatch(r"\*(/0*1)?", item) for item in f"{day},{week}".split(","))
    if both_in_go != (day[0] == "*" or week[0] == "*"):
        starred = day if "*" in day else week
        raise ValueError(
            f"cron {cron!r}: {day!r} and {week!r} both restrict the day. One of cron and Kubernetes fires if both "
            f"match, the other if either does: write {starred!r} as a list without *, or set one of the two to *"
        )
    try:
        CronSim(" ".join(fields), datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise ValueError(f"cron {cron!r}: no such day exists ({error}): change the day or the month") from error
    return " ".join(fields)


def _weekdays(sim: CronSim) -> set[int]:
    """Return the days of the week in a cron line as numbers. Sunday, which may be written 7, is 0."""
    return {day % 7 for day in sim.weekdays if isinstance(day, int)}


def _check_zone(tz: str) -> None:
    zones = available_timezones() - {"localtime", "posixrules", "Factory"}  # files of a machine that are no zones
    if tz in zones:
        return
    hint = "write one such as Europe/Berlin"
    if close := difflib.get_close_matches(tz, zones, n=1):
        hint = f"did you mean {close[0]}?"
    raise ValueError(f"tz {tz!r}: no such time zone; {hint}")


def _duration(text: str) -> timedelta:
    duration = timedelta()
    if match := re.fullmatch(r"(?:(\d{1,5})d)?(?:(\d{1,5})h)?(?:(\d{1,5})m)?", text.strip()):
        days, hours, minutes = map(int, match.groups(default="0"))
        duration = timedelta(days=days, hours=hours, minutes=minutes)
    if not duration:
        raise ValueError(
            f"max_start_delay {text!r}: write days, hours and minutes with at most five digits each, as in 2h or 1h30m"
        )
    return duration


def _exists(time: datetime) -> bool:
    """Return whether a local time exists: False in the hour that a zone's clock skips."""
    return time.astimezone(UTC).astimezone(time.tzinfo).replace(tzinfo=None) == time.replace(tzinfo=None)


def _unit_quoted(text: str) -> str:
    """Return an argument quoted for ExecStart=. (In the first word, the program, only %% is an escape.)"""
    for special, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        text = text.replace(special, escaped)
    return f'"{text}"'
