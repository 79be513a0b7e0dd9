"""C2PA: files are signed with a user's own certificate, and `redif whence` says whether they are what was signed."""

from __future__ import annotations

import datetime
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.cli.main import app
from redif_sdk.errors import InvalidRequest
from redif_sdk.marks.signature import ContentSigner, signature_of
from redif_sdk.marks.xmp import mark_of, options_of

pytest.importorskip("c2pa")

NOW = datetime.datetime.now(datetime.UTC)
KINDS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


def named(name: str) -> x509.Name:
    parts = {NameOID.COUNTRY_NAME: "DE", NameOID.ORGANIZATION_NAME: "Example", NameOID.COMMON_NAME: name}
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in parts.items()])


def certificate(name: str, key: Any, issuer: str, issuers: Any, *, days: int = 30) -> bytes:
    """A certificate as C2PA's profile has it, of an issuer where `name` is `issuer`."""
    root = name == issuer
    uses = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
    uses |= {"key_cert_sign": root, "crl_sign": root, "encipher_only": False, "decipher_only": False}
    made = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=60))
        .not_valid_after(NOW + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuers.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.KeyUsage(digital_signature=True, **uses), critical=True)
    )
    if not root:
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return made.sign(issuers, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def private(key: Any, password: bytes | None = None) -> bytes:
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock))


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a root, a signing certificate and its key, and files that are no use."""
    folder = tmp_path_factory.mktemp("pems")
    root, key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    (folder / "root.pem").write_bytes(certificate("Root", root, "Root", root))
    (folder / "other.pem").write_bytes(certificate("Other", other, "Other", other))
    (folder / "cert.pem").write_bytes(certificate("Tester", key, "Root", root))
    (folder / "old.pem").write_bytes(certificate("Tester", key, "Root", root, days=-2))
    (folder / "key.pem").write_bytes(private(key))
    (folder / "wrong.pem").write_bytes(private(other))
    (folder / "locked.pem").write_bytes(private(key, b"secret"))
    (folder / "text.pem").write_text("no certificate\n")
    curves = {"P-384": ec.generate_private_key(ec.SECP384R1()), "Ed25519": ed25519.Ed25519PrivateKey.generate()}
    for name, kind in (curves | {"RSA": rsa.generate_private_key(65537, 2048)}).items():
        (folder / f"{name}.pem").write_bytes(certificate("Tester", kind, "Root", root))
        (folder / f"{name}.key").write_bytes(private(kind))
    return folder


@pytest.fixture(scope="module")
def signer(pems: Path) -> ContentSigner:
    return ContentSigner.load(pems / "cert.pem", pems / "key.pem")


@pytest.mark.parametrize("kind", KINDS)
def test_a_signed_file_says_who_and_that_it_was_generated(kind: str, signer: ContentSigner, pems: Path) -> None:
    plain = io.BytesIO()
    mark = {"student": "tiny", "seed": 7}
    Image.effect_noise((28, 28), 60).save(plain, kind, **options_of([mark], kind))
    data = signer.sign(plain.getvalue(), kind)
    image = Image.open(io.BytesIO(data))
    assert mark_of(image) == [mark]
    assert image.tobytes() == Image.open(plain).tobytes()
    found = signature_of(data, kind)
    assert found is not None
    assert (found.unchanged, found.trusted, found.generated) == (True, None, True)
    assert found.signer == "Tester, Example"
    assert len(data) < len(plain.getvalue()) + 40_000  # no thumbnail
    trusted = [signature_of(data, kind, pems / file) for file in ("root.pem", "other.pem")]
    assert [(one.unchanged, one.trusted) for one in trusted if one] == [(True, True), (True, False)]
    assert signature_of(plain.getvalue(), kind) is None
    pixels = bytearray(data)
    pixels[-30] ^= 1
    written = data.replace(b"tiny", b"tinx")  # the mark is signed too
    assert written != data
    for altered in (bytes(pixels), written):
        found = signature_of(altered, kind)
        assert found is not None
        assert not found.unchanged
        assert found.problems[0] in ("assertion.dataHash.mismatch", "claimSignature.mismatch")


@pytest.mark.parametrize("kind", ["P-384", "Ed25519", "RSA"])
def test_other_kinds_of_keys(kind: str, pems: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    data = ContentSigner.load(pems / f"{kind}.pem", pems / f"{kind}.key").sign(buffer.getvalue(), "PNG")
    found = signature_of(data, "PNG", pems / "root.pem")
    assert found is not None
    assert found.trusted


def test_from_python(signer: ContentSigner, full_student: Path, tmp_path: Path) -> None:
    image = FastPipeline.from_pretrained(full_student, runtime="onnxruntime")(class_labels=1, seed=7).images[0]
    signer.save(image, tmp_path / "one.png")
    data = (tmp_path / "one.png").read_bytes()
    assert mark_of(Image.open(io.BytesIO(data)))[0]["seed"] == 7
    found = signature_of(data, "PNG")
    assert found is not None
    assert found.unchanged
    for name in ("one.bmp", "one"):
        with pytest.raises(InvalidRequest, match="cannot be signed; use one of PNG"):
            signer.save(image, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_generate_and_whence(full_student: Path, pems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner()
    pair = ["--c2pa-cert", str(pems / "cert.pem"), "--c2pa-key", str(pems / "key.pem")]
    made = ["generate", str(full_student), "--class-label", "2", "--seed", "9", "--runtime", "onnxruntime", *pair, "-q"]
    assert run.invoke(app, [*made, "-o", str(tmp_path / "one.png")]).exit_code == 0
    assert run.invoke(app, [*made, "-n", "2", "-o", f"{tmp_path / 'each'}/"]).exit_code == 0
    assert signature_of((tmp_path / "each/1.png").read_bytes(), "PNG") is not None
    asked = ["whence", str(tmp_path / "one.png"), "--c2pa-trust", str(pems / "root.pem")]
    told = run.invoke(app, [*asked, "--student", str(full_student), "--runtime", "onnxruntime"])
    assert told.exit_code == 0, (told.output, told.exception)
    assert "signed by Tester, Example (trusted), unchanged since" in told.output
    assert "it is that image, bit for bit" in told.output
    assert run.invoke(app, [*made, "-o", str(tmp_path / "one.jpg")]).exit_code == 0
    data = (tmp_path / "one.jpg").read_bytes()
    (tmp_path / "one.jpg").write_bytes(data.replace(b"tiny", b"tinx"))
    told = run.invoke(app, ["whence", str(tmp_path / "one.jpg"), "--json", str(tmp_path / "out.json")])
    assert told.exit_code == 1
    assert "CHANGED since (assertion.dataHash.mismatch)" in told.output
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (row["c2pa"]["unchanged"], row["student"]) == (False, "tinx")
    assert run.invoke(app, [*made, "--no-marks", "-o", str(tmp_path / "bare.jpg")]).exit_code == 0
    told = run.invoke(app, ["whence", str(tmp_path / "bare.jpg")])
    assert told.exit_code == 0
    assert "no certificate is trusted here" in told.output
    monkeypatch.setitem(sys.modules, "c2pa", None)
    monkeypatch.setattr("redif_sdk.cli.whence.find_spec", lambda name: None)
    told = run.invoke(app, ["whence", str(tmp_path / "one.png")])
    assert told.exit_code == 0
    assert 'not verified: pip install "redif-sdk[c2pa]"' in " ".join(told.output.split())


@pytest.mark.parametrize(
    ("cert", "key", "output", "said"),
    [
        ("cert.pem", None, "out.png", "--c2pa-cert needs --c2pa-key too"),
        (None, "key.pem", "out.png", "--c2pa-key needs --c2pa-cert too"),
        ("none.pem", "key.pem", "out.png", "none.pem does not exist"),
        ("text.pem", "key.pem", "out.png", "text.pem is not the certificate in PEM"),
        ("key.pem", "cert.pem", "out.png", "key.pem is not the certificate in PEM"),
        ("cert.pem", "wrong.pem", "out.png", "cannot sign"),
        ("cert.pem", "locked.pem", "out.png", "is protected by a password"),
        ("old.pem", "key.pem", "out.png", "cannot sign"),
        ("cert.pem", "key.pem", "out.bmp", "cannot be signed; use a name that ends in .png"),
    ],
)
def test_what_cannot_sign_is_said_before_anything_is_generated(
    cert: str | None, key: str | None, output: str, said: str, pems: Path, tmp_path: Path
) -> None:
    pair = [("--c2pa-cert", cert), ("--c2pa-key", key)]
    options = [part for name, file in pair if file for part in (name, str(pems / file))]
    done = CliRunner().invoke(app, ["generate", "no-such-student", *options, "-o", str(tmp_path / output)])
    assert isinstance(done.exception, InvalidRequest), done.output
    assert said in str(done.exception)
    assert "\n" not in str(done.exception)


def test_without_the_extra_it_says_so(pems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(InvalidRequest, match=r'c2pa is not installed; pip install "redif-sdk\[c2pa\]"'):
        ContentSigner.load(pems / "cert.pem", pems / "key.pem")
