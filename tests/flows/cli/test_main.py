"""The command line, in processes of its own and without a terminal."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, LogFilter

from layerwise.flows.cli.flow_commands import comparison_of
from layerwise.flows.cli.main import FLOWS, main
from layerwise.flows.cli.parser import command_parser, parse_command
from layerwise.flows.options import add_options, compare_command, read_options, search_command
from layerwise.flows.runtime import FanOutRuntime, SearchRuntime
from layerwise.flows.settings import Search
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore

SEVERAL_COMMANDS = """
import json, sys
from layerwise.flows.cli.main import main

for command in json.loads(sys.argv[1]):
    sys.argv, code = ["layerwise", *command], 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    for stream in (sys.stdout, sys.stderr):
        print(f"<exit code {code or 0}>", file=stream, flush=True)
"""
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def __post_init__(self) -> None:
        assert "\x1b" not in self.out + self.err, "without a terminal everything is plain text"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Environment of a user who has never used Prefect and has no bucket."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "AWS_"))}
    home = str(tmp_path_factory.mktemp("home"))
    no_aws = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": f"{home}/none"}
    return own | no_aws | {"PREFECT_HOME": home, "COLUMNS": "100"}


def obey_ctrl_c() -> None:
    """React to Ctrl-C as at a terminal; shells make background processes and their children ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def start(environment, pytestconfig):
    def start_process(*arguments, **more) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=pytestconfig.rootpath,
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # its own process group, as at a terminal
            preexec_fn=obey_ctrl_c,
        )

    return start_process


@pytest.fixture(scope="module")
def several(start, prefect_backend):
    """Run commands one after the other in one process, to import torch only once, with the server of the tests."""

    def run(*commands: list[str]) -> list[Done]:
        process = start("-c", SEVERAL_COMMANDS, json.dumps(commands), PREFECT_API_URL=prefect_backend)
        out, err = process.communicate(timeout=300)
        outs, errs = (re.split(r"<exit code (\d+)>\n", text) for text in (out, err))
        assert len(outs) == 2 * len(commands) + 1, err
        return [Done(int(c), o, e) for o, c, e in zip(outs[::2], outs[1::2], errs[::2], strict=False)]

    return run


@pytest.fixture(scope="module")
def options(workshop):
    """Spell the settings of a small search as options."""

    def spell(**changes) -> list[str]:
        spelt = workshop.parameters(betas="0.1,0.25") | changes
        return [f"--{name.replace('_', '-')}={value}" for name, value in spelt.items()]

    return spell


@pytest.fixture(scope="module", autouse=True)
def first_search(start, options, tmp_path_factory):
    """Run a search on a fresh machine with the embedded server, while other tests run."""
    store = str(tmp_path_factory.mktemp("first") / "store")
    process = start("-m", "layerwise", "search", *options(), "--store", store)
    done: list[Done] = []

    def wait() -> tuple[str, Done]:
        if not done:
            out, err = process.communicate(timeout=300)
            done.append(Done(process.returncode, out, err))
        return store, done[0]

    yield wait
    if process.poll() is None:  # a test has failed; SIGINT also ends the server
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def search_that_made(finished) -> str:
    """Return the key of the search's own artifact."""
    result, runtime = finished
    made = {artifact.key for artifact in result.stages.values()}
    (search,) = (
        artifact.key
        for artifact in ArtifactStore(runtime.store).artifacts()
        if artifact.recipe["name"] == "search" and set(artifact.recipe["inputs"].values()) == made
    )
    return search


@pytest.fixture(scope="module")
def said(several, options, finished, workshop, tmp_path_factory) -> dict[str, Done]:
    """Exit code and output of each of these commands, by name."""
    result, runtime = finished
    key = result.stages["capture"].key
    empty = str(tmp_path_factory.mktemp("empty"))
    failing = str(tmp_path_factory.mktemp("failing"))
    commands = {
        "ls": ["ls", runtime.store],
        "ls of nothing": ["ls", empty],
        # In the other store, a test may have added a later search.
        "show": ["show", str(Path(runtime.store).with_name("untouched"))],
        "show the search": ["show", runtime.store, search_that_made(finished)],
        "show a beginning": ["show", runtime.store, key[:16]],
        "show an unknown key": ["show", runtime.store, "capture/ffff"],
        "show an ambiguous key": ["show", runtime.store, "sample_tokens/"],
        "show nothing": ["show", empty],
        "report": ["report", runtime.store, search_that_made(finished)],
        "report a capture": ["report", runtime.store, key],
        "plan before": ["plan", *options(), "--store", empty],
        "plan without measuring": ["plan", *options(), "--store", empty, "--no-measure"],
        "plan after": ["plan", *options(), "--store", runtime.store],
        "plan with all windows": ["plan", *options(selection_windows="", seqlen=4), "--store", empty],
        "wrong number": ["plan", *options(sparsity=2), "--store", empty],
        "two wrong options": ["plan", *options(pruner="random", betas="0.1,x"), "--store", empty],
        "unknown option": ["plan", *options(), "--sparsty=0.5", "--store", empty],
        "contradiction": ["plan", *options(beta_step=0.1), "--store", empty],
        "illegal beta": ["plan", *options(betas="0.6"), "--store", empty],
        "no model": ["plan", *options(model="nowhere"), "--store", empty],
        "no text": ["plan", *options(selection="nowhere.txt"), "--store", empty],
        "recurrent": ["plan", *options(model=workshop.folder / "recurrent"), "--store", empty],
        "a secret": ["plan", *options(calibration="s3://key:SECRET@bucket/text.txt"), "--store", empty],
        "misspelt command": ["serch", "--store", empty],
        "misspelt option of a store": ["gc", "--aply", runtime.store],
        "an argument too many": ["ls", runtime.store, "more"],
        "a dash": ["plan", *options(), "--offsets", "-0.1,0.1", "--store", empty],
        "nothing excluded": ["plan", *options(exclude="no_such_linear"), "--store", empty],
        "everything excluded": ["search", *options(exclude="proj"), "--store", failing],
        "a billion betas": ["plan", *options(betas="", beta_count=10**9), "--store", empty],
        "traceback": ["--debug", "plan", *options(model="nowhere"), "--store", empty],
        "traceback after": ["plan", *options(model="nowhere"), "--store", empty, "--debug"],
        "nothing": [],
        "version": ["--version"],
        "unknown storage": ["ls", "nosuch://bucket"],
        "no S3 credentials": ["ls", "s3://bucket/prefix"],
        "no package": ["ls", "gs://bucket/prefix"],
        "help": ["--help"],
        **{f"help {command}": [command, "--help"] for command in ("search", "plan", "ls", "show")},
        "search again": ["search", *options(), "--store", runtime.store],
        "search that fails": ["search", *options(seqlen=400), "--store", failing],
        "infinite": ["plan", *options(), "--store", empty, "--hidden-states-gib=inf"],
    }
    return dict(zip(commands, several(*commands.values()), strict=True))


def without_spaces(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("command", ["search", "plan"])
@pytest.mark.parametrize("settings", [Search, SearchRuntime])
def test_help_has_every_setting_with_its_description_and_default(said, command, settings):
    assert said[f"help {command}"].code == 0
    shown = without_spaces(said[f"help {command}"].out)
    for name, field in settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert without_spaces(field.description) in shown
        if not field.is_required() and field.default not in (None, ()):
            default = getattr(field.default, "method", field.default)
            default = str(default).lower() if isinstance(default, bool) else default
            assert without_spaces(f"{field.description} Default: {default}.") in shown


def test_help_names_the_commands_and_shows_an_example(said):
    for command in ("search", "plan", "ls", "show"):
        assert re.search(rf"^ +{command} ", said["help"].out, re.MULTILINE)
        assert said[f"help {command}"].out.startswith(f"usage: layerwise {command}")
    assert "layerwise search --model meta-llama/Llama-2-7b-hf" in said["help"].out


def test_ls_has_one_line_for_each_artifact_that_show_understands(said, finished):
    result, _ = finished
    header, *lines = said["ls"].out.splitlines()
    assert header.split() == ["artifact", "made", "seconds", "size", "what"]
    for artifact in result.stages.values():
        assert len([line for line in lines if artifact.key.startswith(line.split()[0])]) == 1
    assert said["ls of nothing"].out == "The store has no artifacts.\n"


def test_show_of_a_search_has_its_table_its_verdict_and_the_place_of_the_model(said, finished):
    result, _ = finished
    shown = said["show the search"].out
    assert result.selection.verdict in shown
    assert f"Pruned model: {result.pruned}" in shown
    assert (
        f"dense {result.test.dense:.2f}, uniform {result.test.uniform:.2f}, best {result.test.best:.2f}"
        in shown
    )
    rows = [line.split() for line in shown.splitlines() if line.split()[-1:] in (["ATP"], ["uniform"])]
    assert [row[0] for row in rows] == ["0", "0.1", "0.25"]
    assert said["show"].code == 0
    assert "Pruned model: " in said["show"].out
    assert re.search(r"test: .*: \d+ windows of 16 tokens from .*SHA-256 \w{12}", said["show"].out)


def test_report_prints_the_path_of_the_page(said, finished):
    assert (said["report"].code, said["report"].out) == (0, f"{finished[0].report}\n")


def test_show_of_an_artifact_has_its_recipe_and_its_files(said, finished):
    artifact = finished[0].stages["capture"]
    shown = said["show a beginning"].out
    assert shown.splitlines()[0] == artifact.key
    assert json.loads(shown[shown.index("{") : shown.rindex("}") + 1])["recipe"] == artifact.recipe
    for file in artifact.files.values():
        assert file.path in shown


def test_plan_shows_the_work_before_and_after_a_search(said):
    before, after = said["plan before"], said["plan after"]
    assert before.code == after.code == 0
    assert "in the store" not in before.out
    assert after.out.count("in the store") == 9
    assert "betas: 0, 0.1, 0.25 (0 is uniform)" in before.out
    assert "memory: about " in before.out
    assert "time: about " in before.out
    assert "time: about " not in after.out


def test_plan_shows_no_times_if_it_shall_not_measure(said):
    assert said["plan without measuring"].code == 0
    assert "time" not in said["plan without measuring"].out.splitlines()[0].split()
    assert "time: about " not in said["plan without measuring"].out


def test_an_empty_option_means_all_windows_not_the_default(said):
    """The selection text has a quarter of 2000 words, in windows of four tokens; auto would give 64 windows."""
    (line,) = [
        line for line in said["plan with all windows"].out.splitlines() if "sample_tokens: sel" in line
    ]
    assert "cut 125 windows of 4 tokens" in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong number", "--sparsity: Input should be less than 1, got '2'"),
        ("two wrong options", "--pruner: .*'wanda', 'magnitude'.*; --betas: .*valid number.*, got '0.1,x'"),
        ("contradiction", "the betas are given by betas and step; give exactly one"),
        ("illegal beta", r"beta 0.6 is outside the legal range \[0, 0.50000\]"),
        ("no model", "'nowhere' is neither a file or folder on this machine nor a hub id"),
        ("no text", "there is no corpus at nowhere.txt"),
        ("recurrent", "rwkv passes more than hidden states"),
        ("show an unknown key", "0 artifacts of .* have a key that begins with 'capture/ffff'"),
        ("show an ambiguous key", r"\d+ artifacts of .* have a key that begins with 'sample_tokens/'"),
        ("show nothing", "holds no finished search"),
        ("report a capture", "capture/.* is not the result of a search"),
        ("a secret", "--calibration: the URL holds credentials \\(not shown\\).* give the bare URL$"),
        ("unknown storage", "nosuch:// URLs are not supported"),
        ("no S3 credentials", "bucket/prefix at .* was refused .*Unable to locate credentials.*AWS_PROFILE"),
        ("no package", "gs:// URLs need a package that is not installed"),
        ("nothing excluded", "exclude is 'no_such_linear', which matches none of the model's 21 linears"),
        ("everything excluded", "exclude is 'proj', which matches every one of .* 0.self_attn.q_proj, "),
        ("a billion betas", "settings: the settings give 1000000001 plans, .* at most 255"),
        ("infinite", "--hidden-states-gib: Input should be a finite number"),
    ],
)
def test_an_error_is_one_line_that_names_what_is_wrong(said, name, message):
    done = said[name]
    assert done.code == 1
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert re.match(f"layerwise: .*{message}", line)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown option", "layerwise plan: unknown option --sparsty; did you mean --sparsity?"),
        ("misspelt command", "layerwise: unknown command 'serch'; did you mean search?"),
        ("misspelt option of a store", "layerwise gc: unknown option --aply; did you mean --apply?"),
        ("an argument too many", "layerwise: unexpected argument 'more'"),
        ("a dash", "layerwise plan: argument --offsets: expected one argument. .* --offsets=-0.1"),
    ],
)
def test_a_misspelt_command_or_option_gives_one_line_with_the_closest_one(said, name, message):
    done = said[name]
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert re.match(message.replace("?", r"\?"), line)
    assert re.search("See `layerwise.* --help`.$", line)


def test_without_arguments_the_help_is_shown(said):
    assert said["nothing"] == said["help"]


def test_the_version_is_that_of_the_installed_package(said):
    assert said["version"] == Done(0, f"layerwise {version('layerwise-pruning')}\n", "")


@pytest.mark.parametrize("name", ["traceback", "traceback after"])
def test_debug_shows_the_traceback_before_the_line(said, name):
    done = said[name]
    assert done.code == 1
    assert done.err.startswith("Traceback (most recent call last):\n")
    assert re.match("layerwise: 'nowhere' is neither", done.err.splitlines()[-1])


def test_a_wrong_option_is_refused_before_a_server_starts(start, options, tmp_path):
    process = start(
        "-m",
        "layerwise",
        "search",
        *options(sparsity=2),
        "--store",
        "s",
        PREFECT_HOME=str(tmp_path),
    )
    _, err = process.communicate(timeout=300)
    assert err == "layerwise: --sparsity: Input should be less than 1, got '2'\n"
    assert not (tmp_path / "prefect.db").exists()


@pytest.mark.parametrize("command", ["--help", "ls"])
def test_a_closed_pipe_is_no_error(start, command, tmp_path):
    process = start("-m", "layerwise", command, *([str(tmp_path)] if command == "ls" else []))
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    assert err == ""


@pytest.mark.parametrize(
    "encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"TERM": "dumb"}]
)
def test_a_name_that_the_terminal_cannot_encode_is_escaped(start, tmp_path, encoding):
    store = ArtifactStore(str(tmp_path))
    stage = Stage("named", 1, "größe \udcff \x1b[2J \u202e [/x] :smile:", {})
    artifact = store.get_or_build(stage, lambda draft: draft.write("file", b""))
    process = start("-m", "layerwise", "show", str(tmp_path), artifact.key, **encoding)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert r"\udcff \u001b[2J \u202e [/x] :smile:" in out


def test_a_failing_search_ends_with_one_line(said):
    """Prefect logs the error twice with tracebacks, in its own log and not on the terminal."""
    done = said["search that fails"]
    assert (done.code, done.out) == (1, "")
    warning, line = done.err.splitlines()
    expected = "Z WARNING a window has 400 tokens, but this llama model was made for 64 positions"
    assert warning[len("2026-11-30T12:00:00") :].startswith(expected)
    assert re.match(r"layerwise: .*1000 tokens, but 6 x 400 = 2400 are needed", line)


def test_a_second_search_reuses_every_artifact(said, finished):
    result, done = finished[0], said["search again"]
    assert (done.code, done.err) == (0, "")
    assert "Everything was in the store already: no layer was computed, no weight was read." in done.out
    assert result.selection.verdict in done.out
    assert re.search(r"start-up \d+ s \(reaching your Prefect server took \d+ s of it\)", done.out)


def test_prefect_keeps_the_log_of_a_failing_search(said, workshop):
    assert said["search that fails"].code == 1
    with get_client(sync_client=True) as client:
        ours = FlowRunFilter(name={"any_": ["model at 0.5"]}, state={"type": {"any_": ["FAILED"]}})
        (failed,) = [
            run
            for run in client.read_flow_runs(flow_run_filter=ours)
            if run.parameters["settings"]["seqlen"] == 400 and "failing" in run.parameters["runtime"]["store"]
        ]
        messages = [log.message for log in client.read_logs(LogFilter(flow_run_id={"any_": [failed.id]}))]
    assert any("2400 are needed" in message for message in messages)


def test_ctrl_c_ends_a_search_with_its_processes_and_prints_how_to_resume(start, options, tmp_path):
    """A terminal sends the signal to the whole group. If the server ended too, Prefect would retry for 17 minutes."""
    where = ["--store", str(tmp_path / "store"), "--fan-out", "processes:1"]
    process = start("-m", "layerwise", "search", *options(), *where, PREFECT_CLIENT_MAX_RETRIES="9")
    while "capture: pending" not in (line := process.stderr.readline()):
        assert line, "the search has ended before"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "interrupted; " in err
    assert "Resume with:\n  layerwise search --model" in err


def test_a_first_search_with_the_embedded_server_shows_progress_and_the_result(first_search, finished):
    store, done = first_search()
    assert done.code == 0, done.err
    last = "evaluate: dense, uniform and best on the test windows; the export is written in the same pass"
    for stage in ("capture: dense model", "branch: 3 betas", last):
        line = rf"^{TIME} {stage}.*: layer 3 of 3, 0 s left, \d+\.\d GiB \(peak \d+\.\d GiB\)$"
        assert re.search(line, done.err, re.MULTILINE)
    assert [line for line in done.err.splitlines() if not re.match(rf"{TIME} .*GiB\)$", line)] == []
    assert finished[0].selection.verdict in done.out
    assert "Built 12 of 12 artifacts (checkpoint, calibration," in done.out
    assert re.search(
        r"\d+ s in all: the run \d+ s, start-up \d+ s \(Prefect's embedded server took \d+ s", done.out
    )
    exported = re.search(r"^Pruned model: (.*)$", done.out, re.MULTILINE)[1]
    assert os.path.exists(f"{exported}/config.json")
    assert exported.startswith(store)
    page = re.search(r"^Report: (.*)$", done.out, re.MULTILINE)[1]
    assert os.path.exists(page)


def test_options_and_settings_cannot_differ():
    """Every field has an option, and values are strings until they are validated."""
    parser = ArgumentParser()
    add_options(parser, Search)
    given = vars(parser.parse_args(["--model=demo", "--sparsity=0.5", "--test-windows="]))
    assert set(given) == set(Search.model_fields)
    assert given["sparsity"] == "0.5"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"betas": [0.004, 1e-05], "selection_windows": None, "export": False, "model": "a folder/it's"},
        {"pruner": {"method": "sparsegpt", "block_size": 64}, "exclude": "down_proj$"},
        {"allocator": {"method": "owl", "threshold": 3.0}, "granularity": "linear"},
        {"allocator": {"method": "given", "layers": [0.4, 0.6]}},
        {"offsets": [-0.1, 0.1], "strategy": "two-parameter"},
        {"strategy": "projections", "trials": 30},
        {"pruner": "magnitude", "allocator": "erf"},
    ],
)
def test_the_command_of_a_search_gives_the_same_settings(changes):
    settings = Search.model_validate({"model": "demo", "sparsity": 0.5, **changes})
    parser = ArgumentParser()
    add_options(parser, Search)
    add_options(parser, SearchRuntime)
    program, command, *options = shlex.split(search_command(settings))
    assert (program, command) == ("layerwise", "search")
    parsed = parser.parse_args(options)
    assert read_options(parsed, Search) == settings
    assert parsed.store == "STORE"


@pytest.mark.parametrize(
    "given_options",
    [
        [
            "--sparsity=0.5",
            "--sparsities=0.5,0.7",
            "--pruners=wanda,sparsegpt",
            "--seeds=0,1",
            "--betas=0.004",
        ],
        ["--sparsity=0.5", "--recoveries=none,refit", "--recover-windows=4"],
        [
            "--sparsity=0.6",
            "--allocator=owl",
            '--allocators=["atp", "owl", "atp+offset", {"strategy": "projections"}]',
        ],
        ["--sparsity=0.6", '--pruners=[{"method": "sparsegpt", "block_size": 64}]', "--tasks=arc_easy,piqa"],
        ["--preset=atp-paper", "--table=2"],
        ["--preset=atp-paper", "--strategy=auto", "--calibration-windows=auto"],
    ],
)
def test_the_command_of_a_comparison_gives_the_same_settings(given_options):
    given = comparison_of(parse_command(["compare", "--model=demo", "--store=a", *given_options]))
    where = FanOutRuntime(store="a store", boundary_layers=2)
    program, *again = shlex.split(compare_command(given.search, given, where))
    repeated = parse_command(again)
    assert (program, comparison_of(repeated)) == ("layerwise", given)
    assert read_options(repeated, FanOutRuntime) == where


def test_a_wrong_recovery_in_a_list_is_named_by_its_own_option():
    options = ["--sparsity=0.5", "--recoveries=refti", "--recover-windows=8"]
    with pytest.raises(ValueError, match="^--recoveries: .*'refti'"):
        comparison_of(parse_command(["compare", "--model=demo", "--store=a", *options]))


@pytest.mark.parametrize("command", ["ls", "status", "show", "report", "bench", "gc", "verify"])
def test_a_missing_store_is_refused_and_not_created(command, tmp_path, monkeypatch, capsys):
    missing = tmp_path / "missing"
    monkeypatch.setattr(sys, "argv", ["layerwise", command, str(missing)])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == 1
    line = f"layerwise: {missing} is not a store: nothing is there. Check the path or URL.\n"
    assert capsys.readouterr().err == line
    assert not missing.exists()


@pytest.mark.parametrize("command", ["compress", "distill", "zero-shot"])
def test_a_missing_store_is_refused_before_a_server_starts(command, tmp_path):
    store = [str(tmp_path / "missing")] if command == "distill" else ["--store", str(tmp_path / "missing")]
    arguments = command_parser([command]).parse_args([command, *store])
    with pytest.raises(FileNotFoundError, match="missing is not a store: nothing is there"):
        FLOWS[command](arguments, 0.0)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("end", ["before the run", "after it"])
def test_the_signal_ends_a_command_that_does_not_run_its_flow_yet_and_not_one_that_has(
    tmp_path, monkeypatch, capsys, end
):
    def signalled(arguments, began):
        if end == "before the run":
            os.kill(os.getpid(), signal.SIGUSR1)
            raise AssertionError("the command continued")

    monkeypatch.setitem(FLOWS, "work", signalled)
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(sys, "argv", ["layerwise", "work", str(tmp_path), "--on-signal", "USR1"])
    try:
        if end == "after it":
            main()
            os.kill(os.getpid(), signal.SIGUSR1)
            return
        with pytest.raises(SystemExit) as leaving:
            main()
        assert leaving.value.code == 143
        assert "stopped by SIGUSR1; finished stages and resume points are kept" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGUSR1, before)
