"""Signed provenance (C2PA): a user's own certificate says who made an image, and that the file was not changed since.

A mark (`xmp.py`) is text that anybody may write or remove. A C2PA manifest is signed, and covers every byte of the
file, the mark among them. Needs the extra ``c2pa``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from redif_sdk.errors import InvalidRequest, first_line
from redif_sdk.marks.xmp import SOURCE_TYPE
from redif_sdk.textfile import read_text_file

__all__ = ["MEDIA_TYPES", "ContentSigner", "Signature", "has_manifest", "signature_of"]

#: The kinds of file that are signed, by PIL's names.
MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}

LARGEST_PEM = 1 << 20  # bytes
_ALGORITHMS = ("es256", "es384", "es512", "ps256", "ed25519")  # one for each kind of key that C2PA allows
_SETTINGS: dict[str, Any] = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},  # a file that is read sends nobody anywhere
}
_MARKERS = {"PNG": b"caBX", "JPEG": b"jumb", "WEBP": b"C2PA"}  # of the part of a file that holds a manifest


class ContentSigner:
    """Signs image files with a certificate and its private key. Safe to use from several threads."""

    def __init__(self, certificate: str, key: str, *, where: str = "the certificate and the key") -> None:
        """Try them on a small image.

        Args:
            certificate: PEM: the signing certificate, and after it those of its issuers without the root.
            key: PEM, PKCS#8 without a password: of an EC key (P-256, P-384, P-521), Ed25519 or RSA.
            where: Names the two in errors.

        Raises:
            InvalidRequest: They cannot sign: one is not what it should be, they do not belong together, the
                certificate is expired or not for signing; or the extra is not installed.
        """
        _library()
        self._pair = (certificate.encode(), key.encode())
        buffer = io.BytesIO()
        Image.new("L", (8, 8)).save(buffer, "PNG")
        reasons: dict[str, str] = {}
        for self._algorithm in _ALGORITHMS:
            try:
                signed = self._signed(buffer.getvalue(), "PNG")
            except InvalidRequest as error:
                reasons[self._algorithm] = str(error)
                continue
            if (problems := _read(signed, "PNG", None).problems) == ():
                return
            reasons[self._algorithm] = ", ".join(problems)
        said = [text for text in reasons.values() if "private key" not in text] or list(reasons.values())
        raise InvalidRequest(
            f"{where} cannot sign ({said[0]}); give a certificate for C2PA (PEM, with its issuers after it) and its "
            f"private key (PEM, PKCS#8, without a password)"
        )

    @classmethod
    def load(cls, certificate: str | Path, key: str | Path) -> ContentSigner:
        """The signer of two PEM files. Raises InvalidRequest as the constructor, and for files that cannot be read."""
        _library()
        texts = [
            _pem(Path(file), what, kind)
            for file, what, kind in (
                (certificate, "the certificate", "CERTIFICATE"),
                (key, "the private key", "PRIVATE KEY"),
            )
        ]
        return cls(*texts, where=f"{certificate} and {key}")

    def sign(self, data: bytes, kind: str) -> bytes:
        """An image file with a signed manifest, and otherwise the same.

        Args:
            data: A PNG, JPEG or WebP file, with whatever metadata it has.
            kind: "PNG", "JPEG" or "WEBP".

        Raises:
            InvalidRequest: Another kind of file, or the library refuses it.
        """
        if kind not in MEDIA_TYPES:
            raise InvalidRequest(f"{kind} files cannot be signed; use one of {', '.join(MEDIA_TYPES)}")
        return self._signed(data, kind)

    def save(self, image: Image.Image, file: str | Path, **params: Any) -> None:
        """Save ``image`` as PIL does, signed. A file that was there is replaced whole, or stays."""
        from redif_sdk.artifact.atomic import atomic_write

        kind = Image.registered_extensions().get(Path(file).suffix.lower(), "")
        buffer = io.BytesIO()
        if kind in MEDIA_TYPES:
            image.save(buffer, kind, **params)
        atomic_write(Path(file), self.sign(buffer.getvalue(), kind or Path(file).suffix or "such"))

    def _signed(self, data: bytes, kind: str) -> bytes:
        c2pa = _library()
        certificate, key = self._pair
        out = io.BytesIO()
        with _plain_errors("the image cannot be signed"), c2pa.Context(c2pa.Settings.from_dict(_SETTINGS)) as context:
            info = c2pa.C2paSignerInfo(self._algorithm, certificate, key, None)
            with c2pa.Signer.from_info(info) as signer, c2pa.Builder(_manifest(), context=context) as builder:
                builder.sign(signer, MEDIA_TYPES[kind], io.BytesIO(data), out)
        return out.getvalue()


@dataclass(frozen=True)
class Signature:
    """The signed manifest of a file.

    Attributes:
        unchanged: whether the file is byte for byte what was signed, by an intact and valid signature.
        trusted: whether the signer's certificate leads to one of the trusted ones; None: none were given.
        signer: who signed, as the certificate says; who trusts no certificate knows nothing by it.
        generated: whether the manifest says that a model generated the image.
        problems: the codes of C2PA for what does not hold.
    """

    unchanged: bool
    trusted: bool | None
    signer: str
    generated: bool
    problems: tuple[str, ...]


def signature_of(data: bytes, kind: str, trusted: str | Path | None = None) -> Signature | None:
    """The manifest of a file; None if it has none.

    Args:
        data: The file.
        kind: "PNG", "JPEG" or "WEBP"; others have none.
        trusted: A PEM file of certificates whose signatures are trusted.

    Raises:
        InvalidRequest: The manifest or `trusted` cannot be read, or the extra is not installed.
    """
    if kind not in MEDIA_TYPES:
        return None
    anchors = None if trusted is None else _pem(Path(trusted), "the trusted certificates", "CERTIFICATE")
    c2pa = _library()
    try:
        return _read(data, kind, anchors)
    except c2pa.C2paError.ManifestNotFound:
        return None


def has_manifest(data: bytes, kind: str) -> bool:
    """Whether a file seems to have a manifest, for those who do not have the library."""
    return kind in _MARKERS and _MARKERS[kind] in data and b"c2pa" in data


def _read(data: bytes, kind: str, anchors: str | None) -> Signature:
    c2pa = _library()
    settings = _SETTINGS if anchors is None else _SETTINGS | {"trust": {"trust_anchors": anchors}}
    settings = settings | {"verify": {**_SETTINGS["verify"], "verify_trust": anchors is not None}}
    with (
        _plain_errors("the C2PA manifest cannot be read"),
        c2pa.Context(c2pa.Settings.from_dict(settings)) as context,
        c2pa.Reader(MEDIA_TYPES[kind], io.BytesIO(data), context=context) as reader,
    ):
        found = json.loads(reader.json())
    active = found.get("manifests", {}).get(found.get("active_manifest"), {})
    results = found.get("validation_results", {}).get("activeManifest", {})
    codes = tuple(dict.fromkeys(one["code"] for one in results.get("failure", [])))
    problems = tuple(code for code in codes if code != "signingCredential.untrusted")
    info = active.get("signature_info", {})
    return Signature(
        unchanged=not problems and found.get("validation_state") in ("Valid", "Trusted"),
        trusted=None if anchors is None else found.get("validation_state") == "Trusted",
        signer=", ".join(filter(None, (info.get("common_name"), info.get("issuer")))) or "nobody named",
        generated=SOURCE_TYPE in json.dumps(active.get("assertions", [])),
        problems=problems,
    )


def _manifest() -> dict[str, Any]:
    """What is signed: who wrote the file, and that a trained model made its content."""
    release = version("redif-sdk")
    created = {
        "action": "c2pa.created",
        "digitalSourceType": SOURCE_TYPE,
        "softwareAgent": {"name": "redif-sdk", "version": release},
    }
    return {
        "claim_generator_info": [{"name": "redif-sdk", "version": release}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }


def _pem(file: Path, what: str, kind: str) -> str:
    text = read_text_file(file, what, limit=LARGEST_PEM)
    if "ENCRYPTED PRIVATE KEY" in text:
        raise InvalidRequest(f"{file} is protected by a password; decrypt it first: openssl pkey -in {file.name}")
    if f"{kind}-----" not in text:
        raise InvalidRequest(f"{file} is not {what} in PEM (-----BEGIN {kind}-----); convert it with openssl")
    return text


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Turn the library's errors into InvalidRequest, but for a manifest that is not there."""
    c2pa = _library()
    try:
        yield
    except c2pa.C2paError.ManifestNotFound:
        raise
    except c2pa.C2paError as error:
        raise InvalidRequest(f"{what}: {first_line(error)}") from error


def _library() -> Any:
    try:
        import c2pa
    except ImportError as error:
        raise InvalidRequest('c2pa is not installed; pip install "redif-sdk[c2pa]"') from error
    return c2pa
