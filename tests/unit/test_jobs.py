"""Submission against a stand-in for Ray's job server: attempts, attaching, tokens, packages, what comes back."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_server import TOKEN, FakeJobs, fake_job_server
from shard_sets import write_set

from cluster import job_files, job_package
from cluster.job_api import JobServer, Server, find_token, is_loopback
from cluster.job_plan import Submission, checked_run_name, estimate, planned
from cluster.jobs import attempts, exit_code, follow, listed, submit
from medtl_dist.cli.main import run
from medtl_dist.config import Config, load_config, validate
from medtl_dist.data.folds import Settings
from medtl_dist.errors import DataError, Interrupted, UserError
from medtl_dist.run import Folder
from medtl_dist.storage import StorageOptions


@pytest.fixture
def fake() -> Iterator[FakeJobs]:
    with fake_job_server() as state:
        yield state


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "medtl_dist-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("tune_spaces", "medtl_dist", "cluster"):
            archive.writestr(f"{name}/__init__.py", "")
    return path


def _config(*overrides: str) -> Config:
    return load_config(preset="smoke", overrides=["data.shards=sets/x", *overrides])


def _plan(name: str = "run-1", *overrides: str, **options: Any) -> Submission:
    return planned("train", _config(*overrides), name=name, store="/mnt/store", **options)


def _server(fake: FakeJobs) -> JobServer:
    return JobServer(Server(fake.address, TOKEN))


def _no_wheel() -> bytes:
    raise AssertionError("nothing is built for a job that is not started")


# --- the plan


@pytest.mark.parametrize(
    "name", ["", "A", "1a", "a_b", "a.2", "a-", "../x", "a b", "a;rm", "$(id)", "a\n", "ä", "a" * 48]
)
def test_a_name_that_a_folder_a_url_or_a_shell_would_read_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        checked_run_name(name)


@settings(max_examples=25, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40).filter(
        lambda text: "://" not in text and ".." not in text and not text.startswith("~")
    ),
    st.from_regex(r"/[ -~]{1,30}", fullmatch=True).filter(lambda text: "://" not in text and "/.." not in text),
)
def test_values_with_characters_of_a_shell_reach_the_command_as_they_are(shards: str, store: str) -> None:
    tree = _config().model_dump(mode="json")
    tree["data"]["shards"] = shards
    submission = planned("train", validate(tree), name="run-1", store=store, space_text="x")
    assert shlex.split(submission.entrypoint) == submission.command
    config = load_config_text(submission.files["config.yaml"])
    assert config == submission.config
    assert config.data.shards is not None
    assert config.data.shards.endswith(shards.rstrip("/").split("/")[-1].removeprefix("./"))


def load_config_text(text: str) -> Config:
    import yaml

    return validate(yaml.safe_load(text))


def test_an_entrypoint_run_by_a_shell_executes_nothing_of_the_values(tmp_path: Path) -> None:
    programs, folder = tmp_path / "bin", tmp_path / "cwd"
    programs.mkdir()
    folder.mkdir()
    (programs / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (programs / "python").chmod(0o700)
    store = f"{folder}/$(touch a)`touch b`;touch c;'\"&|><* x"
    submission = planned("train", _config(), name="r", store=store)
    environment = {"PATH": f"{programs}:/usr/bin:/bin"}
    done = subprocess.run(  # noqa: S602 (as Ray runs it)
        submission.entrypoint,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == submission.command[1:]
    assert f"{store}/runs/r" in submission.command
    assert list(folder.iterdir()) == []


def test_relative_paths_lie_in_the_store_and_the_cluster_is_the_jobs_own() -> None:
    submission = _plan(
        "run-1", "cluster.num_workers=0", "cluster.address=ray://elsewhere:10001", "model.weights=w/a.pth"
    )
    assert submission.config.data.shards == "/mnt/store/sets/x"
    assert submission.config.model.weights == "/mnt/store/w/a.pth"
    assert submission.config.cluster.address == "auto"
    assert submission.config.cluster.num_workers == 1
    assert submission.run_folder == "/mnt/store/runs/run-1"
    assert "--resume" in submission.command
    assert (
        planned("train", _config("data.shards=s3://b/x"), name="r", store="s3://b/p").config.data.shards == "s3://b/x"
    )


@pytest.mark.parametrize(
    "store", ["runs", "http://host/x", "s3://user:key@bucket/x", "s3://b/x?X-Amz-Signature=1", "pipe:rm"]
)
def test_a_store_that_nodes_can_not_share_or_that_holds_a_secret_is_refused(store: str) -> None:
    with pytest.raises(UserError) as caught:
        planned("train", _config(), name="r", store=store)
    assert "Signature" not in caught.value.message
    assert "key@" not in caught.value.message


@pytest.mark.parametrize("shards", ["~/x", "../x", "s3://id:secretkey@bucket/x"])
def test_a_set_that_the_cluster_can_not_see_is_refused(shards: str) -> None:
    with pytest.raises(UserError) as caught:
        planned("train", _config(f"data.shards={shards}"), name="r", store="/mnt/s")
    assert "secretkey" not in caught.value.message


def test_the_estimate_is_images_over_speed() -> None:
    config = _config("train.epochs=10")
    found = estimate(config, lambda _: {"train": 3_000_000, "val": 600_000}, images_per_s=1000.0, trials=3)
    assert found["gpu_hours_at_most"] == pytest.approx(3 * 10 * (3_000_000 + 200_000) / 1000 / 3600, abs=1e-4)
    assert (found["epochs"], found["trials_at_most"], found["images"]["val"]) == (10, 3, 600_000)
    unknown = estimate(config, lambda _: None)
    assert unknown == {
        "images_per_s_per_gpu": 1200.0, "trials_at_most": 1, "epochs": 10, "gpu_hours_at_most": None,
    }  # fmt: skip
    with pytest.raises(UserError, match="images-per-s"):
        estimate(config, lambda _: None, images_per_s=0.0)


_STAGES = "transfer.stages=[{name: a, data: {shards: sets/a}, train: {epochs: 3}}, {name: b, train: {epochs: 10}}]"


def test_the_estimate_of_a_chain_or_comparison_is_of_all_its_trainings() -> None:
    images = {"sets/a": {"train": 3_000_000}, "sets/x": {"train": 600_000, "val": 300_000}}

    def hours(*overrides: str) -> dict[str, Any]:
        config = _config(_STAGES, *overrides)
        return estimate(config, lambda one: images.get(one.data.shards or ""), images_per_s=1000.0)

    a, b = 3 * 3_000_000 / 1000 / 3600, 10 * 700_000 / 1000 / 3600
    chain = hours()
    assert chain["gpu_hours_at_most"] == pytest.approx(a + b, abs=1e-3)
    assert [(row["name"], row["times"], row["epochs"]) for row in chain["trainings"]] == [("a", 1, 3), ("b", 1, 10)]
    assert [row["gpu_hours_at_most"] for row in chain["trainings"]] == pytest.approx([a, b], abs=1e-3)
    compared = hours("transfer.compare=true", "transfer.seeds=[1, 2, 3]")
    assert compared["gpu_hours_at_most"] == pytest.approx(3 * (a + 2 * b), abs=1e-3)
    assert [row["name"] for row in compared["trainings"]] == ["a", "b", "b alone"]
    del images["sets/a"]
    unknown = hours()
    assert unknown["gpu_hours_at_most"] is None
    assert unknown["trainings"][1]["gpu_hours_at_most"] == pytest.approx(b, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "store", "overrides", "message"),
    [
        ("tune", "/mnt/store", [_STAGES], "submit tune with transfer.stages: that is a chain of trainings, and a sweep"),
        ("crossval", "/mnt/store", [_STAGES], "submit crossval with transfer.stages: that is a chain of trainings, and a cross"),
        ("train", "/mnt/store", ["transfer.stages=[{name: a}, {name: b, data: {shards: null}}]"], "stage b: data.shards is not"),
        (
            "train", "s3://bucket/p", ["transfer.stages=[{name: a}, {name: b, data: {endpoint_url: 'http://k:s@e'}}]"],
            "stage b: data.endpoint_url = http://…@e, and the run folder is reached with None",
        ),
    ],
)  # fmt: skip
def test_a_chain_that_can_not_run_there_is_refused_here(
    kind: str, store: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        planned(kind, _config(*overrides), name="r", store=store)
    assert message in caught.value.message


def test_stages_may_each_name_a_set_and_the_whole_none() -> None:
    own = [{"name": name, "data": {"shards": f"sets/{name}"}} for name in ("a", "b")]
    submission = planned("train", validate({"transfer": {"stages": own}}), name="r", store="/mnt/s")
    stages = submission.config.transfer.stages
    assert [stage["data"]["shards"] for stage in stages] == ["/mnt/s/sets/a", "/mnt/s/sets/b"]


# --- the server and its token


def test_http_to_another_machine_without_a_token_is_refused() -> None:
    for host in ("ray.example.org:8265", "10.0.0.5", "127.0.0.1.example.org", "[2001:db8::1]:80"):
        with pytest.raises(UserError, match="without a token"):
            Server(f"http://{host}")
        assert Server(f"http://{host}", TOKEN).in_the_clear
        assert not Server(f"https://{host}").in_the_clear
    for host in ("127.0.0.1:8265", "localhost", "[::1]:1", "127.8.8.8"):
        assert not Server(f"http://{host}").in_the_clear
    assert not is_loopback("localhost.example.org")


@pytest.mark.parametrize(
    "address",
    [
        "ray://h:1",
        "h:8265",
        "http://",
        "http://u:p@h",
        "http://h/?token=s3cret",
        "https://h/path",
        "http://h:0",
        "http://h:x",
        "http://a b",
    ],
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused_without_showing_it(address: str) -> None:
    with pytest.raises(UserError) as caught:
        Server(address, TOKEN)
    assert "s3cret" not in caught.value.message
    assert "u:p" not in caught.value.message


def test_the_token_is_found_as_ray_finds_it_and_shown_by_nothing(tmp_path: Path, token_file: Path) -> None:
    assert find_token(token_file, {"RAY_AUTH_TOKEN": "another-token"}) == TOKEN
    assert find_token(None, {"RAY_AUTH_TOKEN": TOKEN}) == TOKEN
    assert find_token(None, {"RAY_AUTH_TOKEN_PATH": str(token_file)}) == TOKEN
    assert find_token(None, {"HOME": str(tmp_path)}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    (tmp_path / ".ray" / "auth_token").chmod(0o600)
    assert find_token(None, {"HOME": str(tmp_path)}) == TOKEN
    assert TOKEN not in repr(Server("https://h", TOKEN))


def test_a_token_file_of_everybody_or_with_a_second_line_is_refused(token_file: Path) -> None:
    token_file.write_text(f"{TOKEN}\nX-Other: header")
    with pytest.raises(UserError, match="holds no token") as caught:
        find_token(token_file, {})
    assert TOKEN not in caught.value.message
    token_file.write_text(TOKEN)
    token_file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        find_token(token_file, {})
    with pytest.raises(UserError, match="can't be read"):
        find_token(token_file.parent / "none", {})


@pytest.mark.parametrize(("token", "said"), [(None, "asks for a token"), ("wrong-token-1", "refuses this token")])
def test_no_or_a_wrong_token_is_one_message(fake: FakeJobs, token: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        JobServer(Server(fake.address, token)).jobs()
    assert "wrong-token-1" not in caught.value.message


def test_a_redirect_is_not_followed_so_the_token_stays_here(fake: FakeJobs) -> None:
    with fake_job_server() as elsewhere:
        fake.redirect_to = elsewhere.address + "/api/jobs/"
        with pytest.raises(UserError, match="HTTP 302"):
            _server(fake).jobs()
        assert elsewhere.requests == []


def test_an_untrusted_certificate_and_no_server_are_told_apart(tmp_path: Path) -> None:
    import ssl

    from urllib3.exceptions import MaxRetryError, SSLError

    from cluster.job_api import _unreachable

    untrusted = MaxRetryError(None, "/", SSLError(ssl.SSLCertVerificationError("self-signed")))  # type: ignore[arg-type]
    assert isinstance(_unreachable("https://h", untrusted), UserError)
    with pytest.raises(Interrupted, match="can't be reached"):
        JobServer(Server("http://127.0.0.1:9")).jobs()
    with pytest.raises(UserError, match="no such file"):
        Server("https://h", None, tmp_path / "none.pem")


# --- attempts


def test_a_name_is_submitted_once_attached_to_and_resumed_under_a_number(fake: FakeJobs) -> None:
    server = _server(fake)
    assert submit(server, _plan(), None).news == "submitted"
    again = submit(server, _plan(), _no_wheel)
    assert (again.submission_id, again.news) == ("run-1", "attached")
    fake.end("run-1", "FAILED", 75)
    resumed = submit(server, _plan(), None)
    assert (resumed.submission_id, resumed.news) == ("run-1.2", "resumed")
    fake.end("run-1.2", "STOPPED", None)
    assert submit(server, _plan(), None).submission_id == "run-1.3"
    fake.end("run-1.3", "SUCCEEDED", 0)
    assert submit(server, _plan(), _no_wheel).news == "finished"
    with_test = submit(server, _plan(test=True), None)  # asks for more than the finished job did
    assert (with_test.submission_id, with_test.news) == ("run-1.4", "resumed")
    assert [row["attempt"] for row in listed(server)] == ["run-1.4"]


def test_another_config_under_the_same_name_is_refused_and_another_cluster_size_is_not(fake: FakeJobs) -> None:
    server = _server(fake)
    submit(server, _plan(), None)
    with pytest.raises(UserError, match="another config"):
        submit(server, _plan("run-1", "optim.lr=0.5"), None)
    fake.end("run-1", "FAILED", 5)
    assert submit(server, _plan("run-1", "cluster.num_workers=4"), None).news == "resumed"


def test_names_that_begin_alike_are_not_confused() -> None:
    def job(submission_id: str, name: str) -> dict[str, Any]:
        return {"submission_id": submission_id, "metadata": {"medtl_name": name}, "status": "RUNNING"}

    jobs = [
        job("a.10", "a"),
        job("a", "a"),
        job("a-2", "a-2"),
        job("a.2", "a"),
        job("a.2x", "a"),
        job("a.3", "other"),
        job("a.1", "a"),
    ]
    assert [number for number, _ in attempts(jobs, "a")] == [1, 2, 10]
    assert attempts([{"type": "DRIVER", "submission_id": None, "metadata": None}], "a") == []


def test_of_two_submitters_at_once_one_starts_the_job(fake: FakeJobs) -> None:
    barrier, found = threading.Barrier(4), []

    def go() -> None:
        server = _server(fake)
        barrier.wait()
        found.append(submit(server, _plan(), None).news)

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["attached"] * 3 + ["submitted"]
    assert list(fake.jobs) == ["run-1"]


def test_a_job_of_this_id_that_is_not_ours_is_left_alone(fake: FakeJobs) -> None:
    fake.jobs["run-1"] = {"submission_id": "run-1", "metadata": {}, "status": "RUNNING"}
    with pytest.raises(UserError, match="medtl did not submit"):
        submit(_server(fake), _plan(), None)


def test_a_cluster_of_another_ray_is_refused_only_for_shipped_code(fake: FakeJobs, wheel: Path) -> None:
    fake.ray_version = "2.9.0"
    with pytest.raises(UserError, match=r"Ray 2\.9\.0"):
        submit(_server(fake), _plan(), wheel.read_bytes)
    assert submit(_server(fake), _plan(), None).news == "submitted"


def test_what_is_sent_holds_code_config_and_nothing_secret(
    fake: FakeJobs, wheel: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-aws-secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    fake.endings = [("SUCCEEDED", 0)]
    arguments = [
        "submit",
        "train",
        "--preset",
        "smoke",
        "--set",
        "data.shards=sets/x",
        "--name",
        "run-1",
        "--store",
        "/mnt/s",
    ]
    arguments += ["--address", fake.address, "--wheel", str(wheel), "--out", str(tmp_path / "out")]
    assert run(arguments) == 0
    sent = b"".join(path.encode() + body for _, path, body in fake.requests)
    assert b"canary" not in sent
    job = fake.jobs["run-1"]
    assert "canary" not in json.dumps(job)
    (code,) = job["runtime_env"]["py_modules"]
    files = {name: zipfile.ZipFile(io.BytesIO(data)) for name, data in fake.packages.items()}
    assert files[job["runtime_env"]["working_dir"].removeprefix("gcs://")].namelist() == ["config.yaml"]
    assert "cluster/__init__.py" in files[code.removeprefix("gcs://")].namelist()
    assert set(job["runtime_env"]) == {"working_dir", "py_modules", "env_vars"}
    uploads = sum(method == "PUT" for method, _, _ in fake.requests)
    fake.jobs.clear()
    fake.endings = [("SUCCEEDED", 0)]
    assert run(arguments) == 0
    assert sum(method == "PUT" for method, _, _ in fake.requests) == uploads  # the same bytes are not sent twice


# --- what comes back


def _finished(folder: Path) -> Folder:
    place = Folder.local(folder)
    place.write("results.json", json.dumps({"auc": 0.9}).encode())
    place.write("report.html", "<p>Ü</p>".encode() * 5000)
    place.write("model.safetensors", b"weights")
    return place


def test_results_and_report_come_back_through_the_log(fake: FakeJobs, tmp_path: Path) -> None:
    block = job_files.framed(_finished(tmp_path / "run"))
    assert block is not None
    server = _server(fake)
    submit(server, _plan(), None)
    fake.logs["run-1"] = f"epoch 1\nepoch 2\n{block}\n"
    fake.endings = [("SUCCEEDED", 0)]
    said: list[str] = []
    job, log = follow(server, "run-1", said.append)
    assert [line for line in said if line] == ["epoch 1", "epoch 2"]
    assert exit_code(job) == 0
    files = job_files.unframed(log)
    assert files is not None
    saved = job_files.save(files, tmp_path / "out")
    assert sorted(path.name for path in saved) == ["report.html", "results.json"]
    for path in saved:
        assert path.read_bytes() == (tmp_path / "run" / path.name).read_bytes()


def test_a_damaged_or_foreign_block_is_refused(tmp_path: Path) -> None:
    block = job_files.framed(_finished(tmp_path / "run"))
    assert block is not None
    assert job_files.unframed("no block") is None
    head, body, tail = block.split("\n", 2)
    flipped = body[:50] + ("A" if body[50] != "A" else "B") + body[51:]
    digest = head.split("sha256=")[1][:64]
    with pytest.raises(DataError, match="damaged"):
        job_files.unframed(block.replace(digest, digest[::-1]))
    for broken in ("\n".join((head, flipped, tail)), "\n".join((head, body[:-8], tail))):
        with pytest.raises(DataError, match="damaged"):
            job_files.unframed(broken)


def test_a_block_can_name_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_files, "NAMES", ("../evil.html",))
    (tmp_path / "evil.html").write_text("x")
    (tmp_path / "run").mkdir()
    block = job_files.framed(Folder.local(tmp_path / "run"))
    monkeypatch.undo()
    assert block is not None
    with pytest.raises(DataError):
        job_files.unframed(block)


def test_a_report_too_large_for_a_log_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_files, "PACKED_BYTES", 100)
    assert job_files.framed(_finished(tmp_path / "run")) is None
    assert job_files.framed(Folder.local(tmp_path / "none")) is None


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", 3, 3), ("FAILED", 4, 4), ("FAILED", 5, 5), ("FAILED", 75, 75),
     ("FAILED", 1, 1), ("FAILED", None, 75), ("FAILED", -9, 75), ("FAILED", 137, 75), ("STOPPED", None, 75), ("STOPPED", 0, 75)],
)  # fmt: skip
def test_the_command_ends_with_the_jobs_code(
    fake: FakeJobs, token_file: Path, tmp_path: Path, status: str, code: int | None, expected: int
) -> None:
    fake.endings = [(status, code)]
    arguments = [
        "submit",
        "train",
        "--preset",
        "smoke",
        "--set",
        "data.shards=sets/x",
        "--name",
        "run-1",
        "--store",
        "/mnt/s",
    ]
    where = ["--address", fake.address, "--token-file", str(token_file)]
    assert run([*arguments, *where, "--code", "image", "--out", str(tmp_path)]) == expected
    assert run(["logs", "run-1", "-f", *where]) == expected


def test_status_list_stop_and_logs_by_name(
    fake: FakeJobs, token_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--address", fake.address, "--token-file", str(token_file)]
    submit(_server(fake), _plan(), None)
    fake.logs["run-1"] = "epoch 1\nepoch 2\n-----BEGIN MEDTL FILES sha256=00"
    assert run(["status", "run-1", *where, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["last_lines"]) == ("running", ["epoch 1", "epoch 2"])
    assert run(["logs", "run-1", *where]) == 0
    assert capsys.readouterr().out == "epoch 1\nepoch 2\n"
    assert run(["stop", "run-1", *where]) == 0
    assert run(["stop", "run-1", *where]) == 0
    assert capsys.readouterr().out.splitlines() == ["run-1: asked to stop.", "run-1 had already ended (stopped)."]
    assert run(["list", *where]) == 0
    assert capsys.readouterr().out == "run-1: train stopped, exit code 75, 1 s, /mnt/store/runs/run-1\n"
    assert run(["status", "run-2", *where]) == 2
    assert run(["status", "../x", *where]) == 2


def test_a_dry_run_prints_the_plan_with_the_stores_set_counted_and_asks_no_cluster(
    fake: FakeJobs, token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "sets" / "x", {"train": [11, 9], "val": [5]})
    arguments = [
        "submit",
        "train",
        "--preset",
        "smoke",
        "--set",
        "data.shards=sets/x",
        "--name",
        "run-1",
        "--store",
        str(tmp_path),
    ]
    assert (
        run(
            [
                *arguments,
                "--address",
                fake.address,
                "--token-file",
                str(token_file),
                "--dry-run",
                "--max-gpu-hours",
                "2",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    facts = json.loads(printed)
    assert facts["run_folder"] == f"{tmp_path}/runs/run-1"
    assert shlex.split(facts["entrypoint"])[-2:] == ["--max-gpu-hours", "2"]
    assert facts["estimate"]["images"] == {"train": 20, "val": 5}
    assert TOKEN not in printed
    assert fake.requests == []


def test_a_dry_run_of_a_chain_counts_every_stages_set(
    fake: FakeJobs, token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "sets" / "x", {"train": [11, 9], "val": [5]})
    write_set(tmp_path / "sets" / "a", {"train": [30], "val": [6]})
    given = ["submit", "train", "--preset", "smoke", "--set", "data.shards=sets/x", "--set", _STAGES, "--name", "run-1"]
    given += ["--store", str(tmp_path), "--address", fake.address, "--token-file", str(token_file)]
    assert run([*given, "--dry-run", "--max-gpu-hours", "2", "--images-per-s", "0.01"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert shlex.split(facts["entrypoint"])[-2:] == ["--max-gpu-hours", "2"]
    assert [row["images"] for row in facts["estimate"]["trainings"]] == [
        {"train": 30, "val": 6},
        {"train": 20, "val": 5},
    ]
    assert facts["estimate"]["gpu_hours_at_most"] == pytest.approx((3 * 32 + 10 * (20 + 5 / 3)) / 36, abs=1e-3)
    assert fake.requests == []


def test_a_dry_run_of_a_cross_validation_counts_every_folds_training(
    fake: FakeJobs, token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "sets" / "x", {"train": [11, 9], "val": [6]})
    given = [
        "submit",
        "crossval",
        "--preset",
        "smoke",
        "--set",
        "data.shards=sets/x",
        "--set",
        "train.epochs=3",
        "--dry-run",
    ]
    given += ["--name", "cv", "--store", str(tmp_path), "--address", fake.address, "--token-file", str(token_file)]
    assert run([*given, "--folds", "4", "--repeats", "2", "--epochs-from", "inner", "--images-per-s", "0.01"]) == 0
    facts = json.loads(capsys.readouterr().out)
    words = ["--folds", "4", "--repeats", "2", "--epochs-from", "inner", "--parallel"]
    assert shlex.split(facts["entrypoint"])[-7:] == words
    assert facts["estimate"]["images"] == {"train": 20, "val": 7}  # of 26 outside test
    assert facts["estimate"]["gpu_hours_at_most"] == pytest.approx(8 * 3 * (20 + 7 / 3) / 36, abs=1e-3)
    for wrong, message in (
        (["--folds", "1"], "--folds 1: 2 to 100 folds expected"),
        (["--repeats", "0"], "--repeats 0: 1 to 100 expected"),
        (["--set", "train.early_stop_epochs=2"], "train.early_stop_epochs = 2: with fixed epochs"),
    ):
        assert run([*given, *wrong]) == 2
        assert f"error: {message}" in capsys.readouterr().err
    assert fake.requests == []
    different = (Settings(5), Settings(4), Settings(5, 2))
    plans = [planned("crossval", _config(), name="cv", store="/mnt/s", folds=one) for one in different]
    assert len({plan.digest for plan in plans}) == 3
    assert planned("crossval", _config(), name="cv", store="/mnt/s").digest == plans[0].digest


def test_a_head_that_was_replaced_is_an_interruption(fake: FakeJobs) -> None:
    with pytest.raises(Interrupted, match="Submit it again"):
        follow(_server(fake), "run-1", lambda _line: None)


# --- the wheel


def test_the_wheel_of_the_sources_is_the_same_bytes_each_time_and_holds_the_entrypoint() -> None:
    first = job_package.reproducible(job_package.build_wheel())
    names = zipfile.ZipFile(io.BytesIO(first)).namelist()
    assert {"medtl_dist/cli/job_entry.py", "cluster/jobs.py", "tune_spaces/__init__.py"} <= set(names)
    assert any(name.endswith(".dist-info/METADATA") for name in names)
    assert job_package.reproducible(first) == first
    assert job_package.package_name(first).startswith("_ray_pkg_")


def test_a_file_that_is_no_wheel_of_ours_is_refused(tmp_path: Path, wheel: Path) -> None:
    assert job_package.checked_wheel(wheel)
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("medtl_dist/__init__.py", "")
    (tmp_path / "text.whl").write_text("x")
    for path in (other, tmp_path / "text.whl", tmp_path / "none.whl"):
        with pytest.raises(UserError, match="--wheel"):
            job_package.checked_wheel(path)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("../evil.py", "")
    with pytest.raises(UserError, match="--wheel"):
        job_package.checked_wheel(wheel)


def test_the_entrypoint_hands_over_only_after_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medtl_dist.cli import job_entry

    _finished(tmp_path / "run")
    monkeypatch.setattr(job_entry, "run", lambda words: {"--version": 0, "--bad": 5}[words[0]])
    assert job_entry.main([str(tmp_path / "run"), "--version"]) == 0
    assert job_files.unframed(capsys.readouterr().out) is not None
    assert job_entry.main([str(tmp_path / "run"), "--bad"]) == 5
    assert job_files.unframed(capsys.readouterr().out) is None


@pytest.mark.parametrize("answers", [True, False])
def test_the_entrypoint_reaches_the_store_as_the_run_did(
    answers: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medtl_dist import store_folder
    from medtl_dist.cli import job_entry

    place = _finished(tmp_path / "run")
    asked: list[str | None] = []

    def folder_at(url: str, options: StorageOptions | None = None) -> Folder:
        asked.append(options.endpoint_url if options is not None else None)
        if not answers:
            raise Interrupted(f"{url}: no answer")
        return place

    monkeypatch.setattr(store_folder, "folder_at", folder_at)
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> int:
        os.chdir("/")  # as Ray does
        return 0

    monkeypatch.setattr(job_entry, "run", run)
    endpoint = ["data.endpoint_url=http://10.0.0.9:8333"]
    config = load_config(preset="smoke", overrides=[*endpoint, "data.shards=s3://bucket/set"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    words = ["train", "--config", "config.yaml", "--run-dir", "s3://bucket/runs/a", "--resume"]
    assert job_entry.main(["s3://bucket/runs/a", *words]) == 0  # the run itself has succeeded, whatever comes after it
    said = capsys.readouterr().out
    assert asked == ["http://10.0.0.9:8333"]
    assert (job_files.unframed(said) is not None) == answers
    assert answers or said.startswith(
        "note: results and report are in s3://bucket/runs/a, and can't be read for the log: "
    )


def test_submitting_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from medtl_dist.cli.main import run; import cluster.jobs, cluster.job_plan, cluster.job_package\n"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
