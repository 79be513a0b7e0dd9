"""Pushing a student: what is sent, what is refused, and that what arrived is compared with what was sent."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.paths import list_files
from redif_sdk.card.render import write_card
from redif_sdk.errors import HubError, IntegrityError, InvalidRequest, ParityError
from redif_sdk.hub import push

from .standin import Corrupt, CutUpload, HubStandIn, LoseAnswer, Refuse

REPO = "alice/tiny"


def altered(student: Path, target: Path) -> Path:
    """The student with one file more, as another export would leave it."""
    shutil.copytree(student, target)
    (target / "unet" / "more.json").write_text("{}")
    write_manifest(target, StudentFolder(target).manifest)
    return target


def test_a_push_makes_one_commit_of_the_whole_student(hub: HubStandIn, tiny_student: Path) -> None:
    pushed = push(tiny_student, REPO, private=True, commit_message="First", tags=["grey"], git_tag="v1")
    repository = hub.repos["model", REPO]
    assert repository.private
    assert repository.tags["v1"] == pushed.commit == hub.head(REPO)
    commit = repository.commits[hub.head(REPO)]
    assert commit.title == "First"
    assert len(repository.commits) == 2  # the Hub's own first one, and ours
    there = hub.files(REPO)
    here = {path: (tiny_student / path).read_bytes() for path in list_files(tiny_student)}
    assert {path: data for path, data in there.items() if path not in ("README.md", ".gitattributes")} == {
        path: data for path, data in here.items() if path != "README.md"
    }
    assert 'FastPipeline.from_pretrained("alice/tiny")' in there["README.md"].decode()
    assert "- grey\n" in there["README.md"].decode()
    assert {row["path"] for row in pushed.rows} == set(there) - {".gitattributes"}
    assert {row["action"] for row in pushed.rows} == {"add"}
    assert pushed.url == f"{hub.url}/{REPO}/commit/{pushed.commit}"


def test_a_pipeline_pushes_what_it_was_loaded_from(hub: HubStandIn, tiny_student: Path) -> None:
    pushed = FastPipeline.from_pretrained(tiny_student).push_to_hub(REPO)
    assert hub.files(REPO)["redif.json"] == (tiny_student / "redif.json").read_bytes()
    again = FastPipeline.from_pretrained(REPO)  # from the Hub, and only the files that it needs
    assert again.origin is not None
    assert again.origin.commit == pushed.commit
    copy = again.push_to_hub("alice/copy")
    assert hub.files("alice/copy")["redif.json"] == (tiny_student / "redif.json").read_bytes()
    assert copy.commit == hub.head("alice/copy")


def test_a_second_push_sends_what_changed_and_deletes_what_is_gone(
    hub: HubStandIn, tiny_student: Path, tmp_path: Path
) -> None:
    first = altered(tiny_student, tmp_path / "first")
    push(first, REPO)
    hub.put(REPO, {"notes.txt": b"of somebody else"})
    before = hub.passed
    pushed = push(tiny_student, REPO)
    actions = {row["path"]: row["action"] for row in pushed.rows}
    assert {path for path, action in actions.items() if action == "delete"} == {"unet/more.json", "notes.txt"}
    assert {path for path, action in actions.items() if action == "replace"} == {"redif.json", "README.md"}
    assert hub.passed - before < 200_000  # no weights
    assert "unet/more.json" not in hub.files(REPO)
    again = push(tiny_student, REPO)
    assert {row["action"] for row in again.rows} == {"keep"}
    assert again.commit == pushed.commit == hub.head(REPO)


def test_a_dry_run_changes_nothing(hub: HubStandIn, tiny_student: Path) -> None:
    planned = push(tiny_student, REPO, dry_run=True)
    assert planned.commit is None
    assert {row["path"]: row["bytes"] for row in planned.rows if row["path"].endswith(".onnx")} == {
        path: (tiny_student / path).stat().st_size for path in list_files(tiny_student) if path.endswith(".onnx")
    }
    assert not hub.repos
    assert not hub.asked("POST|PUT|DELETE")


def test_branches_and_pull_requests(hub: HubStandIn, tiny_student: Path, tmp_path: Path) -> None:
    pushed = push(tiny_student, REPO, revision="fast")
    assert hub.head(REPO, "fast") == pushed.commit != hub.head(REPO)
    assert list(hub.files(REPO)) == [".gitattributes"]
    proposed = push(tiny_student, REPO, create_pr=True)
    assert proposed.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert "redif.json" in hub.files(REPO, "refs/pr/1")
    assert list(hub.files(REPO)) == [".gitattributes"]
    further = push(altered(tiny_student, tmp_path / "more"), REPO, revision="refs/pr/1")
    assert "unet/more.json" in hub.files(REPO, "refs/pr/1")
    assert further.commit == hub.head(REPO, "refs/pr/1")
    for contradiction in ({"revision": "fast"}, {"git_tag": "v1"}):
        with pytest.raises(InvalidRequest, match="create_pr"):
            push(tiny_student, REPO, create_pr=True, **contradiction)  # type: ignore[arg-type]


def test_a_student_that_did_not_pass_its_gate_is_not_pushed(
    hub: HubStandIn, bare_student: Path, tiny_student: Path, tmp_path: Path
) -> None:
    with pytest.raises(ParityError, match="no compiled graphs; run redif export"):
        push(bare_student, REPO)
    failed = Path(shutil.copytree(tiny_student, tmp_path / "failed"))
    manifest = StudentFolder(failed).manifest
    rows = [row | {"passed": False} for row in manifest.verification]
    write_manifest(failed, manifest.model_copy(update={"verification": rows}))
    with pytest.raises(ParityError, match="in fp32 have not passed the parity gate"):
        push(failed, REPO)
    assert not hub.requests
    push(failed, REPO, allow_unverified=True)
    push(bare_student, "alice/bare", allow_unverified=True)
    assert "redif.json" in hub.files("alice/bare")


def test_a_student_that_is_not_whole_is_not_pushed(hub: HubStandIn, tiny_student: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_student, tmp_path / "broken"))
    (broken / "engine.txt").write_text("not listed")
    with pytest.raises(IntegrityError, match=r"engine\.txt .* not in the list"):
        push(broken, REPO)
    (broken / "engine.txt").unlink()
    with (broken / "onnx" / "denoiser.fp32.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError, match=r"denoiser\.fp32\.onnx .* altered"):
        push(broken, REPO)
    assert not hub.requests


def test_a_repository_of_something_else_is_left_alone(hub: HubStandIn, tiny_student: Path) -> None:
    hub.put(REPO, {"model.safetensors": b"x", "config.json": b"{}"})
    before = hub.head(REPO)
    with pytest.raises(
        HubError, match=r"holds something else than a student \(config\.json, model\.safetensors\)"
    ) as e:
        push(tiny_student, REPO)
    assert e.value.kind == "conflict"
    assert hub.head(REPO) == before


def test_the_users_text_stays_in_the_card(hub: HubStandIn, tiny_student: Path, tmp_path: Path) -> None:
    local = Path(shutil.copytree(tiny_student, tmp_path / "local"))
    write_card(local)
    push(local, REPO, tags=["grey"])
    there = hub.files(REPO)["README.md"].decode()
    end = there.index("<!-- user:end end")
    edited = there[:end] + "\nWritten on the Hub.\n\n" + there[end:]
    edited = edited.replace("- grey\n", "- grey\n- of-the-hub\n").replace(
        "---\n", "---\nextra_gated_prompt: Be kind.\n", 1
    )
    hub.put(REPO, {"README.md": edited.encode()})
    push(altered(local, tmp_path / "next"), REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert "Written on the Hub." in card
    assert "- grey\n" in card
    assert "- of-the-hub\n" in card
    assert "extra_gated_prompt: Be kind.\n" in card
    assert "unet/more.json" in hub.files(REPO)


def test_a_card_that_was_written_by_hand_stays(hub: HubStandIn, tiny_student: Path) -> None:
    push(tiny_student, REPO)
    for text in (b"---\nlicense: mit\n---\n# By hand\n", b"---\nlicense: mit\n---\n# By hand, changed\n"):
        hub.put(REPO, {"README.md": text})
        push(tiny_student, REPO)
        assert hub.files(REPO)["README.md"] == text
    hub.put(REPO, {"README.md": b"# Without metadata\n"})
    push(tiny_student, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert "library_name: redif-sdk" in card


def test_a_repository_that_is_public_already_is_not_taken_for_a_private_one(
    hub: HubStandIn, tiny_student: Path
) -> None:
    push(tiny_student, REPO)
    with pytest.raises(InvalidRequest, match="is there already, and public"):
        push(tiny_student, REPO, private=True)


def test_a_tag_that_stands_for_another_commit_is_not_moved(hub: HubStandIn, tiny_student: Path, tmp_path: Path) -> None:
    push(tiny_student, REPO, git_tag="v1")
    push(tiny_student, REPO, git_tag="v1")
    with pytest.raises(HubError, match="has a tag v1 for another commit"):
        push(altered(tiny_student, tmp_path / "next"), REPO, git_tag="v1")


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (Refuse(401, "Invalid credentials in Authorization header"), "token", "does not accept the token"),
        (Refuse(403, "you may not"), "forbidden", "the token may not do that"),
        (Refuse(409, "busy"), "conflict", "somebody else changed it"),
        (Refuse(412, "moved"), "conflict", "somebody else changed it"),
        (Refuse(429, "slow", headers={"Retry-After": "17"}), "rate-limit", "try again in 17 seconds"),
        (Refuse(500, "oops"), "server", "failed with status 500"),
        (Refuse(503, "oops"), "server", "failed with status 503"),
        (LoseAnswer(), "network", "the connection failed"),
    ],
)
def test_refusals_of_the_commit(hub: HubStandIn, tiny_student: Path, fault: Refuse, kind: str, said: str) -> None:
    if not isinstance(fault, LoseAnswer):
        hub.faults.add(fault, method="POST", path="/commit/", times=None)
    else:
        hub.faults.add(fault, method="POST", path="/commit/")
    with pytest.raises(HubError, match=said) as caught:
        push(tiny_student, REPO)
    assert caught.value.kind == kind
    assert caught.value.retry_after == (17 if kind == "rate-limit" else None)
    assert "\n" not in str(caught.value)
    hub.faults.clear()
    push(tiny_student, REPO)
    assert hub.files(REPO)["redif.json"] == (tiny_student / "redif.json").read_bytes()


def test_who_may_not_write(hub: HubStandIn, tiny_student: Path) -> None:
    with pytest.raises(HubError, match="may not do that") as caught:
        push(tiny_student, "bob/tiny")
    assert caught.value.kind == "forbidden"
    with pytest.raises(HubError, match=r"does not accept the token|no such repository") as caught:
        push(tiny_student, REPO, token="hf_nobody")
    assert caught.value.kind in ("token", "not-found")


def test_weights_that_arrived_are_not_sent_again(hub: HubStandIn, tiny_student: Path) -> None:
    size = sum(path.stat().st_size for path in tiny_student.rglob("*") if path.is_file())
    hub.faults.add(Refuse(500), method="POST", path="/commit/", times=None)
    with pytest.raises(HubError):
        push(tiny_student, REPO)
    hub.faults.clear()
    sent = sum(request.received for request in hub.requests)
    assert sent > size
    push(tiny_student, REPO)
    assert sum(request.received for request in hub.requests) - sent < size / 10
    assert hub.files(REPO)["redif.json"] == (tiny_student / "redif.json").read_bytes()


def test_an_upload_that_is_cut_is_sent_again_by_the_client(hub: HubStandIn, tiny_student: Path) -> None:
    hub.faults.add(CutUpload(1000), method="PUT")
    pushed = push(tiny_student, REPO)
    assert hub.head(REPO) == pushed.commit


def test_a_commit_that_is_not_what_was_sent_is_noticed(
    hub: HubStandIn, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that loses a bit: the listing afterwards has another hash."""
    push(tiny_student, REPO)
    files = hub.files(REPO)
    spoilt = files["unet/config.json"].replace(b"14", b"15", 1)
    from huggingface_hub import HfApi

    real = HfApi.create_commit

    def commit(self: HfApi, *arguments: object, **options: object) -> object:
        result = real(self, *arguments, **options)  # type: ignore[arg-type]
        oid = hub.put(REPO, {"unet/config.json": spoilt})
        result.oid = oid
        return result

    monkeypatch.setattr(HfApi, "create_commit", commit)
    hub.put(REPO, {"golden/old.txt": b"so that there is something to do"})
    with pytest.raises(HubError, match=r"unet/config\.json of alice/tiny at \w+ is not what was sent") as caught:
        push(tiny_student, REPO)
    assert caught.value.kind == "altered"


def test_the_manifest_and_the_hashes_of_git_agree(hub: HubStandIn, tiny_student: Path) -> None:
    """What the comparison after a push rests on: small files have the SHA-1 of git, large ones their own SHA-256."""
    push(tiny_student, REPO)
    document = json.loads(hub.files(REPO)["redif.json"])
    listed = {entry["path"]: entry["sha256"] for entry in document["files"]}
    blobs = hub.repos["model", REPO].commits[hub.head(REPO)].files
    assert {path: blob.sha256 for path, blob in blobs.items() if path in listed} == listed
    config = blobs["unet/config.json"]
    assert not config.lfs
    assert config.oid == hashlib.sha1(b"blob %d\0" % len(config.data) + config.data).hexdigest()


def test_push_is_refused_offline(hub: HubStandIn, tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(tiny_student, REPO)


def test_corrupted_uploads_are_refused_by_the_hub_and_sent_again(hub: HubStandIn, tiny_student: Path) -> None:
    hub.faults.add(Corrupt(10), method="PUT")
    pushed = push(tiny_student, REPO)
    assert hub.head(REPO) == pushed.commit
