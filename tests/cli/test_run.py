"""The main job, as users run it: a real process, the dummy engine, real files, pipes, signals and terminals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.batch.runs import kept_rows
from tests.cli.commands import figures
from tests.engine_configs import fake_command
from trinfer.data.records import content_key
from trinfer.process.spawn import marked_processes

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples" / "prompts.jsonl"


def trinfer(*arguments: object, stdin: str | bytes = b"", env: dict[str, str] | None = None, timeout: float = 60):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "trinfer", *map(str, arguments)],
        input=stdin if isinstance(stdin, bytes) else stdin.encode(),
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# -- the main job ---------------------------------------------------------------------------------------------------


def test_the_example(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    code, stdout, stderr = trinfer("run", EXAMPLES, "--output", out, "--engine", "dummy", "--param", "max_tokens=7")
    assert (code, stdout) == (0, "")
    given = {row["id"]: row for row in rows(EXAMPLES)}
    answered = rows(out)
    assert {row["id"] for row in answered} == set(given)
    for row in answered:
        generation = row.pop("generation")
        assert row == given[row["id"]]
        assert generation["text"]
        assert generation["usage"]["completion_tokens"] <= 7
    assert f"{len(given)} ok, 0 failed" in stderr
    assert not Path(f"{out}.partial").exists()


def test_the_same_run_gives_the_same_answers(tmp_path: Path):
    outs = []
    for name in ("a", "b"):
        out = tmp_path / name
        assert trinfer("run", EXAMPLES, "-o", out, "-q")[0] == 0
        outs.append({row["id"]: row["generation"]["text"] for row in rows(out)})
    assert outs[0] == outs[1]


def test_pipes(tmp_path: Path):
    code, stdout, stderr = trinfer("run", "-", "-o", "-", "-q", stdin='{"prompt": "a"}\n\n{"text": "b", "id": 7}\n')
    assert (code, stderr) == (0, "")
    assert {json.loads(line)["id"] for line in stdout.splitlines()} == {content_key(b'{"prompt": "a"}').hex(), 7}


def test_rows_that_cannot_be_used_are_error_rows_with_their_place(tmp_path: Path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(
        b"\xef\xbb\xbf" + b'{"prompt": "with a byte order mark", "id": 0, "more": [1]}\n'
        b"not json\n[1]\n{}\n"
        b'{"prompt": 5, "id": "five"}\n{"messages": []}\n{"messages": [{"content": "no role"}]}\n'
        b'{"prompt": "\xff"}\n'
        b'{"id": 1, "messages": [{"role": "user", "content": "fine"}], "error": "old", "generation": "old"}\n'
        b'{"prompt": "no newline at the end"}'
    )
    out = tmp_path / "out.jsonl"
    code, _, stderr = trinfer("run", source, "-o", out)
    assert code == 1
    # Rows without an id of their own get one of their content, wherever they stand.
    places = {
        content_key(line.strip()).hex(): f"in.jsonl:{n}" for n, line in enumerate(source.read_bytes().splitlines(), 1)
    }
    outcome = {places.get(row["id"], row["id"]): row for row in rows(out)}
    assert len(outcome) == 10
    assert outcome[0]["more"] == [1]
    assert {key for key, row in outcome.items() if "generation" in row} == {0, 1, "in.jsonl:10"}
    assert "error" not in outcome[1]
    assert "in.jsonl:2: the line is not JSON" in outcome["in.jsonl:2"]["error"]["message"]
    assert "not UTF-8" in outcome["in.jsonl:8"]["error"]["message"]
    assert outcome["five"]["error"]["type"] == "InvalidRow"
    assert "InvalidRow 7" in stderr


def test_requests_that_fail_are_error_rows(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    source = write(tmp_path / "in", {"id": 1, "prompt": "short"}, {"id": 2, "prompt": "long " * 9000})
    code, _, stderr = trinfer("run", source, "-o", out, "--engine", "dummy")
    assert code == 1
    by_id = {row["id"]: row for row in rows(out)}
    assert by_id[1]["generation"]
    assert by_id[2]["error"]["type"] == "ContextLengthError"
    assert by_id[2]["error"]["status"] == 400
    assert "ContextLengthError 1" in stderr


def test_prompt_options(tmp_path: Path):
    source = write(tmp_path / "in", {"q": "what", "prompt": "not this"}, {"q": [{"role": "user", "content": "x"}]})
    out = tmp_path / "out"
    assert trinfer("run", source, "-o", out, "--prompt-field", "q", "--system-prompt", "be brief", "-q")[0] == 0
    # The dummy counts words: "system: be brief user: what".
    assert sorted(row["generation"]["usage"]["prompt_tokens"] for row in rows(out)) == [5, 5]
    code, _, _ = trinfer("run", source, "-o", out, "--restart", "--no-chat", "-q")
    assert code == 1  # messages need the chat route
    assert sum("generation" in row for row in rows(out)) == 1
    assert next(row for row in rows(out) if "generation" in row)["generation"]["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("redirections", "code", "words"),
    [
        ("IN -o OUT 2>&-", 0, ""),
        ("IN -o OUT <&- >&-", 0, "20 ok"),
        ("IN -o - >&-", 4, "writing standard output failed: Bad file descriptor"),
        ("- -o OUT <&-", 4, "Bad file descriptor"),
    ],
)
def test_standard_files_that_are_closed(tmp_path: Path, redirections, code, words):
    source = write(tmp_path / "in", *({"prompt": f"p{i}"} for i in range(20)))
    text = redirections.replace("IN", str(source)).replace("OUT", str(tmp_path / "out"))
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m trinfer run {text}"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if code == 0:
        assert len(rows(tmp_path / "out")) == 20


def test_an_output_that_is_a_folder_or_the_input(tmp_path: Path):
    source = write(tmp_path / "in", {"prompt": "a"})
    (tmp_path / "link").symlink_to(source)
    for output in (".", "/", "./", tmp_path, source, tmp_path / "link"):
        code, _, stderr = trinfer("run", source, "-o", output, "--overwrite")
        assert code == (2 if str(output) in {".", "/", "./"} else 4), stderr
        assert "unexpected" not in stderr
    assert rows(source) == [{"prompt": "a"}]


def test_an_empty_input_is_no_error(tmp_path: Path):
    code, _, stderr = trinfer("run", write(tmp_path / "in"), "-o", tmp_path / "out")
    assert code == 0
    assert "0 rows" in stderr
    assert (tmp_path / "out").read_bytes() == b""


def test_large_rows(tmp_path: Path):
    source = write(tmp_path / "in", *({"id": i, "prompt": "x", "blob": "y" * 500_000} for i in range(20)))
    out = tmp_path / "out"
    assert trinfer("run", source, "-o", out, "-q")[0] == 0
    assert all(len(row["blob"]) == 500_000 for row in rows(out))


def test_concurrency_is_bounded_and_used(tmp_path: Path):
    source = write(tmp_path / "in", *({"prompt": f"p{i}"} for i in range(40)))
    base = ("run", source, "-q", "--restart", "-o", tmp_path / "out", "--model-kwarg", "latency=0.2")
    five_at_a_time = 40 / 5 * 0.2  # seconds at least
    assert trinfer(*base, "--max-concurrent", "40")[0] == 0
    assert figures(tmp_path / "out.run")["seconds"] < five_at_a_time
    assert trinfer(*base, "--max-concurrent", "5")[0] == 0
    assert figures(tmp_path / "out.run")["seconds"] >= five_at_a_time


# -- engines --------------------------------------------------------------------------------------------------------


def test_a_custom_engine(tmp_path: Path):
    command = json.dumps(fake_command("--ready-after", "0.3"))
    code, _, _ = trinfer(
        *("run", EXAMPLES, "-o", tmp_path / "out", "--engine", "custom", "--model", "fake", "-q"),
        *("--model-kwarg", f"server_command={command}"),
    )
    assert code == 0
    assert all(row["generation"]["text"].startswith("echo: ") for row in rows(tmp_path / "out"))


def test_an_engine_that_dies_stops_the_run_and_keeps_what_was_answered(tmp_path: Path):
    source = write(tmp_path / "in", *({"prompt": f"p{i}"} for i in range(200)))
    command = json.dumps(fake_command("--crash-at", "request:50", "--print", "its last words"))
    code, _, stderr = trinfer(
        *("run", source, "-o", tmp_path / "out", "--engine", "custom", "--model", "fake", "--max-concurrent", "4"),
        *("--model-kwarg", f"server_command={command}", "--no-progress", "--max-restarts", "0"),
    )
    assert code == 3
    assert "the engine ended while serving: exit code 1" in stderr
    assert "its last words" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()
    assert 40 <= len(kept_rows(tmp_path / "out.run")) <= 50
    assert "run the same command again" in stderr


def test_an_engine_that_is_not_installed(tmp_path: Path):
    code, _, stderr = trinfer(
        "run", EXAMPLES, "-o", tmp_path / "out", "--engine", "vllm", "--model", "m", "--executable", "/no/vllm"
    )
    assert code == 3
    assert "'/no/vllm' could not be started" in stderr
    assert "what to do: install the engine" in stderr
    assert list(tmp_path.iterdir()) == []


def test_keys_come_from_the_environment_and_are_never_shown(tmp_path: Path):
    # The dummy engine asks for the key that it is given, so the run works only if both sides have it.
    env = {"TRINFER_API_KEY": "s3cret-key"}
    code, _, stderr = trinfer("run", EXAMPLES, "-o", tmp_path / "out", env=env)
    assert code == 0
    assert "s3cret" not in stderr + (tmp_path / "out").read_text()
    assert trinfer("run", EXAMPLES, "-o", tmp_path / "o2", "--api-key", "s3cret")[0] == 2


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "/no/such/file", "-o", "OUT"], 4, "/no/such/file cannot be read: No such file"),
        (["run", ROOT / ".ci", "-o", "OUT"], 4, "matches no file"),
        (["run", "/no/such/*.jsonl", "-o", "OUT"], 4, "matches no file"),
        (["run", EXAMPLES, "-o", "/no/such/folder/out"], 4, "cannot be written"),
        (["run", EXAMPLES, "-o", "/tmp"], 4, "is a folder"),
        (["run", EXAMPLES, "-o", "/dev/full"], 4, "No space left on device"),
        (["run", EXAMPLES, "-o", "OUT", "--engine", "vlm"], 2, "invalid choice"),
        (["run", EXAMPLES, "-o", "OUT", "--engine", "vllm"], 2, "model_name_or_path"),
        (["run", EXAMPLES, "-o", "OUT", "--engine", "endpoint"], 2, "endpoint_url"),
        (["run", EXAMPLES, "-o", "OUT", "--param", "max_tokens"], 2, "allowed is KEY=VALUE"),
        (["run", EXAMPLES, "-o", "OUT", "--param", "a=1", "--param", "a=2"], 2, "given twice"),
        (["run", EXAMPLES, "-o", "OUT", "--param", "prompt=x"], 2, "is set by trinfer"),
        (["run", EXAMPLES, "-o", "OUT", "--max-concurrent", "0"], 2, "allowed are integers >= 1"),
        (["run", EXAMPLES, "-o", "OUT", "--tp", "0"], 2, "InferenceConfig.tp is 0"),
        (["run", EXAMPLES, "-o", "OUT", "--model-kwarg", "latency=-1"], 2, "a number from 0"),
        (["run", EXAMPLES, "-o", "OUT", "--model-kwarg", "nonsense=1"], 2, "allowed for the dummy engine are"),
        (
            ["run", EXAMPLES, "-o", "OUT", "--system-prompt", "x", "--no-chat"],
            2,
            "--system-prompt needs the chat route",
        ),
        (["run", EXAMPLES, "-o", "OUT", "--request-timeout", "0"], 2, "allowed are seconds > 0"),
        (["run", EXAMPLES, "-o", "OUT", "--ready-timeout", "inf"], 2, "allowed are seconds >= 0"),
        (["run", EXAMPLES], 2, "--output"),
        ([], 2, "COMMAND"),
        (["walk"], 2, "invalid choice"),
    ],
)
def test_mistakes_get_one_clear_message_and_a_code(tmp_path: Path, arguments, code, words):
    got, stdout, stderr = trinfer(*[tmp_path / "out" if argument == "OUT" else argument for argument in arguments])
    assert (got, stdout) == (code, "")
    assert words in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_not_overwritten_unless_told(tmp_path: Path):
    out = write(tmp_path / "out", {"precious": True})
    code, _, stderr = trinfer("run", EXAMPLES, "-o", out)
    assert code == 4
    assert "exists already" in stderr
    assert rows(out) == [{"precious": True}]
    assert trinfer("run", EXAMPLES, "-o", out, "--overwrite", "-q")[0] == 0
    assert len(rows(out)) > 1
    out.rename(tmp_path / "out.partial")
    code, _, stderr = trinfer("run", EXAMPLES, "-o", out, "--no-durable")
    assert code == 4
    assert "unfinished run" in stderr


def test_a_disk_that_fills_up_stops_the_run_and_keeps_what_fits(tmp_path: Path, small_disk: Path):
    source = write(tmp_path / "in", *({"prompt": "x", "blob": f"{i}" + "y" * 2000} for i in range(200)))
    code, _, stderr = trinfer("run", source, "-o", small_disk / "out", "--no-durable")
    assert code == 4
    assert "No space left on device" in stderr
    assert "Traceback" not in stderr
    assert (small_disk / "out.partial").stat().st_size > 30_000


def test_an_engine_that_dies_now_and_then_is_started_again(tmp_path: Path):
    source = write(tmp_path / "in", *({"id": i, "prompt": f"p{i}"} for i in range(200)))
    command = json.dumps(fake_command("--crash-at", "request:80"))
    code, _, stderr = trinfer(
        *("run", source, "-o", tmp_path / "out", "--engine", "custom", "--model", "fake", "--max-concurrent", "4"),
        *("--model-kwarg", f"server_command={command}", "--no-progress"),
    )
    assert code == 0, stderr
    assert "starting again after" in stderr
    assert sorted(row["id"] for row in rows(tmp_path / "out")) == list(range(200))


# -- signals, crashes, terminals ------------------------------------------------------------------------------------


def start(tmp_path: Path, *options: str, latency: float = 0.05, more: str = "") -> subprocess.Popen[bytes]:
    source = write(tmp_path / "in", *({"id": i, "prompt": f"p{i}"} for i in range(500)))
    command = json.dumps(fake_command("--latency", str(latency), "--daemon", "--own-session", *more.split()))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "trinfer", "run", source, "-o", tmp_path / "out", "--engine", "custom"),
            *("--model", "fake", "--model-kwarg", f"server_command={command}", "--max-concurrent", "4"),
            *options,
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )


def wait_for_rows(tmp_path: Path, count: int) -> None:
    give_up = time.monotonic() + 20
    while len(kept_rows(tmp_path / "out.run")) < count:
        assert time.monotonic() < give_up
        time.sleep(0.02)


def engines_of(pid: int) -> list[int]:
    start_time = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return marked_processes({"TRINFER_RUN_ID": f"{pid}-{start_time}"})


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75)]
)
def test_a_signal_stops_the_run_when_what_is_under_way_has_been_answered(tmp_path: Path, number, code):
    process = start(tmp_path)
    wait_for_rows(tmp_path, 5)
    before = len(kept_rows(tmp_path / "out.run"))
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code
    assert b"Traceback" not in stderr
    assert b"stopping" in stderr
    kept = kept_rows(tmp_path / "out.run")
    # The four requests that were under way are not lost.
    assert len({row["id"] for row in kept}) == len(kept) >= before + 4
    assert all("generation" in row for row in kept)
    assert f"{len(kept)} rows" in stderr.decode()


def test_a_run_under_nohup_does_not_hear_the_hangup(tmp_path: Path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which is passed on to children, as nohup does it
    try:
        process = start(tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_rows(tmp_path, 5)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, b"stopping" in stderr) == (0, False)


def test_what_takes_too_long_is_dropped(tmp_path: Path):
    process = start(tmp_path, "--drain-timeout", "0.1")
    wait_for_rows(tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert time.monotonic() - began < 5


def test_a_second_signal_ends_the_run_at_once_and_leaves_no_engine(tmp_path: Path):
    logs = tmp_path / "logs"
    process = start(tmp_path, "--server-log-folder", str(logs), latency=30, more="--print-at-request 4 all-are-here")
    assert process.stderr is not None
    give_up = time.monotonic() + 20
    while not (logs.exists() and any("all-are-here" in log.read_text() for log in logs.iterdir())):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    engines = engines_of(process.pid)
    assert engines
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None  # it waits for what is under way
    process.send_signal(signal.SIGINT)
    process.wait(timeout=2)
    process.stderr.close()
    assert process.returncode == 130
    give_up = time.monotonic() + 4
    while (left := [pid for pid in engines if Path(f"/proc/{pid}").exists()]) and time.monotonic() < give_up:
        time.sleep(0.02)
    assert left == []


def test_an_engine_that_still_loads_is_not_waited_for(tmp_path: Path):
    process = start(tmp_path, more="--ready-after 60")
    while not engines_of(process.pid):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 75, stderr


def test_a_time_limit(tmp_path: Path):
    process = start(tmp_path, "--time-limit", "0:02")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75
    assert b"the time limit is reached" in stderr
    assert len(kept_rows(tmp_path / "out.run")) >= 4


def test_kill_9_leaves_whole_rows_and_no_engine(tmp_path: Path):
    process = start(tmp_path)
    wait_for_rows(tmp_path, 5)
    start_time = Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    marker = {"TRINFER_RUN_ID": f"{process.pid}-{start_time}"}
    assert marked_processes(marker)
    process.kill()
    process.communicate()
    give_up = time.monotonic() + 3
    while marked_processes(marker) and time.monotonic() < give_up:
        time.sleep(0.02)
    assert marked_processes(marker) == []
    assert len(kept_rows(tmp_path / "out.run")) >= 5


def test_a_reader_that_goes_away_is_told_cleanly(tmp_path: Path):
    source = write(tmp_path / "in", *({"prompt": "x", "blob": "y" * 5000} for _ in range(200)))
    process = subprocess.Popen(
        [sys.executable, "-m", "trinfer", "run", source, "-o", "-", "--max-concurrent", "4"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    stderr = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 4
    assert "Broken pipe" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("which", ["-Sn", "-n"])
def test_few_open_files_slow_a_run_down_and_no_more(tmp_path: Path, which: str):
    given = write(tmp_path / "in.jsonl", *({"prompt": f"word {number}"} for number in range(300)))
    out = tmp_path / "out.jsonl"
    command = f'ulimit {which} 80 && exec "$0" -m trinfer run "$1" -o "$2" --no-progress --param max_tokens=3'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, given, out], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(rows(out)) == 300
    # The soft limit is raised; the hard one is not ours.
    assert (b"at most 8 requests at once" in done.stderr) is (which == "-n")


def in_shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command of the shell, for which $0 is Python and $1 the example's prompts."""
    return subprocess.run(
        ["sh", "-c", command, sys.executable, EXAMPLES],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_working_directory_that_is_gone_is_named(tmp_path: Path):
    done = in_shell(
        'mkdir gone && cd gone && rmdir ../gone && exec "$0" -m trinfer run "$1" -o out.jsonl', cwd=tmp_path
    )
    assert done.returncode == 4
    assert "the working directory does not exist any more" in done.stderr
    assert "what to do" in done.stderr
    assert "bug" not in done.stderr


def test_too_few_file_descriptors_for_anything_are_no_bug_of_ours():
    done = in_shell('ulimit -n 9 && exec "$0" -m trinfer run "$1" -o -', cwd=ROOT)
    assert done.returncode == 4
    assert "Too many open files" in done.stderr
    assert "ulimit" in done.stderr
    assert "bug" not in done.stderr


def test_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path: Path):
    source = write(tmp_path / "in", *({"prompt": f"p{i}"} for i in range(60)))
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "trinfer", "run", source, "-o", tmp_path / "out"),
            *("--max-concurrent", "2", "--model-kwarg", "latency=0.02"),
        ],
        cwd=ROOT,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            more = os.read(leader, 65536)
        except OSError:  # how Linux says that the other side has closed
            break
        if not more:
            break
        seen += more
    os.close(leader)
    assert process.wait() == 0
    text = seen.decode(errors="replace")
    for words in ("generating", "rows/s", "tokens/s", "in flight", "━", "60 ok, 0 failed"):
        assert words in text


# -- help and version -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_and_version_are_quick_and_load_nothing_heavy(arguments):
    code = (
        "import sys, time; began = time.perf_counter()\n"
        "from trinfer.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = [m for m in ('trio', 'httpx', 'httptools', 'rich', 'ssl', 'asyncio') if m in sys.modules]\n"
        "print(time.perf_counter() - began, heavy, file=sys.stderr)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert time.monotonic() - began < 0.3
    assert done.stderr.strip().endswith("[]")
    assert done.stdout


def test_exit_codes_are_documented_in_the_help():
    _, stdout, _ = trinfer("run", "--help")
    for code in ("0 ", "1 ", "2 ", "3 ", "4 ", "130"):
        assert f"\n  {code}" in stdout
